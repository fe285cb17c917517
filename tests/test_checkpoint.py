"""training/checkpoint.py: what counts as a checkpoint, rotation, strict loading, no code run."""

import re

import pytest
import torch
from torch import nn

from modeling.layers import load_weights
from training import checkpoint as ckpt
from training.optim import EMA, OptimizerConfig, build_optimizer


def state_of(step, **inputs):
    return {"step": step, "ema_updates": 3, "num_processes": 1, "inputs": inputs}


def write(run_dir, step, keep=9, model=None, **inputs):
    """A checkpoint of a model's weights and moments."""
    model = model or nn.Linear(2, 2)
    partial = ckpt.begin_checkpoint(run_dir, step)
    parts = {ckpt.MODEL_FILE: model.state_dict()}
    parts[ckpt.EMA_FILE] = EMA(model, 0.9).average.state_dict()
    parts[ckpt.OPTIMIZER_FILE] = build_optimizer(model, OptimizerConfig()).state_dict()
    ckpt.write_checkpoint(partial, parts, state_of(step, **inputs), keep)
    return partial.with_suffix("")


def test_a_half_written_folder_is_ignored_and_removed_when_its_step_comes_again(tmp_path):
    folder = write(tmp_path, 1)
    half = ckpt.begin_checkpoint(tmp_path, 2)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "left_over").touch()
    assert ckpt.latest_checkpoint(tmp_path) == (1, folder)
    whole = write(tmp_path, 2)
    assert ckpt.latest_checkpoint(tmp_path) == (2, whole)
    assert not half.exists() and not (whole / "left_over").exists()
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    write(tmp_path, 2, model=model)  # once more: it replaces the first
    load_weights(other, whole / ckpt.MODEL_FILE)
    assert torch.equal(other.weight, model.weight)


def test_the_newest_is_the_highest_step_whatever_its_name_size_or_age(tmp_path):
    large = write(tmp_path, 100_000_000)  # nine digits: sorts before 99999999 by name
    small = write(tmp_path, 99_999_999)
    (small / "padding").write_bytes(b"x" * 100_000)
    (tmp_path / "checkpoints" / "step_900000000").touch()  # a file
    for name in ("step_best", "step_", "epoch_900000000", "step_900000000_backup"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert list(ckpt.checkpoint_folders(tmp_path)) == [99_999_999, 100_000_000]
    assert ckpt.latest_checkpoint(tmp_path) == (100_000_000, large)


def test_loading_is_strict_and_names_file_and_tensors(tmp_path):
    path = write(tmp_path, 1) / ckpt.MODEL_FILE
    for other, reason in (
        (nn.Sequential(nn.Linear(2, 2)), "Missing key.*0.weight.*Unexpected key.*bias"),
        (nn.Linear(3, 2), "size mismatch for weight"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){re.escape(str(path))} .*{reason}"):
            load_weights(other, path)
    for spoiling in (lambda: path.write_bytes(b"half"), path.unlink):
        spoiling()
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_weights(nn.Linear(2, 2), path)


def test_inputs_are_compared_with_those_of_the_checkpoint(tmp_path):
    folder = write(tmp_path, 1, a="1", b=2.5, lost="x")
    ckpt.check_inputs(folder, {"lost": "x", "b": 2.5, "a": "1"})
    differences = "a was 1, is 2; lost was x, is None; new was None, is y"
    with pytest.raises(ValueError, match=f"{tmp_path} .*{differences}"):
        ckpt.check_inputs(folder, {"a": "2", "b": 2.5, "new": "y"})


# Damage, rotation, the background


@pytest.mark.parametrize("text", ["", "[3]", '{"model.safetensors": 3}', "{}", "\x00", "step"])
def test_a_folder_without_a_sound_state_is_no_checkpoint(tmp_path, text):
    path = write(tmp_path, 2) / ckpt.STATE_FILE
    another_step = path.read_text().replace('"step": 2', '"step": 3')
    path.write_text(another_step if text == "step" else text)
    with pytest.raises(ValueError, match="no checkpoint of .* is whole"):
        ckpt.latest_checkpoint(tmp_path)


def test_only_the_newest_are_kept_and_latest_points_to_the_last(tmp_path):
    for step in (5, 50, 500, 5000):
        write(tmp_path, step, keep=2)
        assert ckpt.read_state(tmp_path / "checkpoints" / ckpt.LATEST_LINK)["step"] == step
    assert list(ckpt.checkpoint_folders(tmp_path)) == [500, 5000]


def test_rotation_keeps_the_newest_whole_checkpoint_though_a_damaged_one_is_newer(tmp_path):
    damaged = write(tmp_path, 8)
    (damaged / ckpt.MODEL_FILE).unlink()
    write(tmp_path, 4, keep=1)
    write(tmp_path, 6, keep=1)
    assert ckpt.latest_checkpoint(tmp_path)[0] == 6
    assert list(ckpt.checkpoint_folders(tmp_path)) == [6, 8]


def test_a_rotation_that_was_killed_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path, monkeypatch
):
    folder = write(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(ckpt.shutil, "rmtree", None)
        ckpt.delete(folder)
    assert not ckpt.checkpoint_folders(tmp_path) and list(folder.parent.glob("*.tmp"))
    write(tmp_path, 2)
    assert not list(folder.parent.glob("*.tmp"))


def test_a_snapshot_is_not_changed_by_later_steps():
    weight = torch.ones(2, 3)
    state = {"state": {0: {"w": weight, "step": 3}}, "groups": [weight.T, (1, "x")]}
    copy = ckpt.snapshot(state)
    weight.zero_()
    assert copy["state"][0]["step"] == 3 and torch.equal(copy["state"][0]["w"], torch.ones(2, 3))
    assert torch.equal(copy["groups"][0], torch.ones(3, 2)) and copy["groups"][0].is_contiguous()


def test_the_background_writer_writes_in_turn_and_raises_what_went_wrong():
    done = []
    with ckpt.BackgroundWriter() as writer:
        writer.start(lambda: done.append(1))
        writer.start(lambda: done.append(2))
        writer.wait()
        assert done == [1, 2]
        writer.start(lambda: done.remove(5))
        with pytest.raises(ValueError):
            writer.wait()
        writer.wait()  # said once
        writer.start(lambda: done.append(3))
    assert done == [1, 2, 3]
