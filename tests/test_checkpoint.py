"""training/checkpoint.py: what counts as a checkpoint, rotation, and strict loading that executes nothing."""

import re

import pytest
import torch
from torch import nn

from training import checkpoint as ckpt
from training.ema import EMA
from training.optim import OptimizerConfig, build_optimizer


def write(run_dir, step, keep=9, model=None):
    model = model or nn.Linear(2, 2)
    partial = ckpt.begin_checkpoint(run_dir, step)
    optimizer = build_optimizer(model, OptimizerConfig())
    ckpt.write_shared_state(partial, model, EMA(model, 0.9).average, optimizer, {"step": step, "ema_updates": 3})
    return ckpt.commit_checkpoint(partial, keep)


def test_a_committed_checkpoint_has_its_files_and_is_read_back(tmp_path):
    model = nn.Linear(2, 2)
    folder = write(tmp_path, 7, model=model)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [ckpt.MODEL_FILE, ckpt.EMA_FILE, ckpt.OPTIMIZER_FILE, ckpt.STATE_FILE]
    )
    assert ckpt.read_state(folder) == {"step": 7, "ema_updates": 3}
    other = nn.Linear(2, 2)
    ckpt.load_weights(other, folder / ckpt.MODEL_FILE)
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert ckpt.latest_checkpoint(tmp_path) == (7, folder)


def test_without_checkpoints_there_is_no_latest(tmp_path):
    assert ckpt.latest_checkpoint(tmp_path) is None
    assert ckpt.latest_checkpoint(tmp_path / "nowhere") is None


def test_a_half_written_folder_is_ignored_and_removed_when_its_step_comes_again(tmp_path):
    folder = write(tmp_path, 1)
    half = ckpt.begin_checkpoint(tmp_path, 2)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "left_over").touch()
    assert ckpt.latest_checkpoint(tmp_path) == (1, folder)
    whole = write(tmp_path, 2)
    assert ckpt.latest_checkpoint(tmp_path) == (2, whole)
    assert not half.exists() and not (whole / "left_over").exists()


def test_foreign_names_are_no_checkpoints(tmp_path):
    folder = write(tmp_path, 3)
    (tmp_path / "checkpoints" / "step_00000009").touch()  # a file
    for name in ("step_best", "step_", "epoch_00000010", "step_00000011_backup"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert ckpt.checkpoint_folders(tmp_path) == {3: folder}


def test_the_newest_is_the_highest_step_whatever_its_name_size_or_age(tmp_path):
    large = write(tmp_path, 100_000_000)  # nine digits: sorts before 99999999 by name
    small = write(tmp_path, 99_999_999)
    (small / "padding").write_bytes(b"x" * 100_000)
    assert list(ckpt.checkpoint_folders(tmp_path)) == [99_999_999, 100_000_000]
    assert ckpt.latest_checkpoint(tmp_path) == (100_000_000, large)


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 50, 500, 5000):
        write(tmp_path, step, keep=2)
    assert list(ckpt.checkpoint_folders(tmp_path)) == [500, 5000]
    write(tmp_path, 6000, keep=1)
    assert list(ckpt.checkpoint_folders(tmp_path)) == [6000]


def test_writing_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 4)
    model = nn.Linear(2, 2)
    folder = write(tmp_path, 4, model=model)
    other = nn.Linear(2, 2)
    ckpt.load_weights(other, folder / ckpt.MODEL_FILE)
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Linear(2, 2, bias=False), "Unexpected key.*bias"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Missing key.*0.weight"),
        (lambda: nn.Linear(3, 2), "size mismatch for weight"),
    ],
    ids=["too_many", "too_few", "other_shape"],
)
def test_loading_is_strict_and_names_file_and_tensors(tmp_path, build, reason):
    path = write(tmp_path, 1) / ckpt.MODEL_FILE
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(path))} does not fit the configured model: .*{reason}"):
        ckpt.load_weights(build(), path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    path = write(tmp_path, 1) / ckpt.MODEL_FILE
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        ckpt.load_weights(nn.Linear(2, 2), path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} does not exist"):
        ckpt.load_weights(nn.Linear(2, 2), path)


def test_inputs_are_compared_with_those_of_the_checkpoint(tmp_path):
    partial = ckpt.begin_checkpoint(tmp_path, 1)
    model = nn.Linear(2, 2)
    state = {"step": 1, "inputs": {"a": "1", "b": 2.5, "lost": "x"}}
    ckpt.write_shared_state(partial, model, model, build_optimizer(model, OptimizerConfig()), state)
    folder = ckpt.commit_checkpoint(partial, 1)
    ckpt.check_inputs(folder, {"lost": "x", "b": 2.5, "a": "1"})
    with pytest.raises(ValueError) as caught:
        ckpt.check_inputs(folder, {"a": "2", "b": 2.5, "new": "y"})
    assert str(caught.value).startswith(f"{tmp_path} was trained on")
    assert "changed: a was 1, is 2; lost was x, is None; new was None, is y. Delete" in str(caught.value)


def test_weights_are_stored_contiguous_on_the_cpu(tmp_path):
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.arange(6.0).view(3, 2).T)  # not contiguous
    ckpt.save_weights(model, tmp_path / "x.safetensors")
    other = nn.Linear(3, 2)
    ckpt.load_weights(other, tmp_path / "x.safetensors")
    assert torch.equal(other.weight, model.weight)
