"""scripts/check_run.py: a sound experiment has no problem; each kind of damage is named."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experiment import PROGRAMS

from scripts import check_run
from training import checkpoint as ckpt

NEWEST = "checkpoints/step_00000004"


def problems(folder):
    """Texts of the problems, without the run's name."""
    return [text for run in check_run.find_runs(folder) for text in check_run.check_folder(run)[1]]


def test_a_sound_experiment_has_no_problem_and_a_line_per_run(chain, capsys):
    assert check_run.main(SimpleNamespace(run=chain.folder)) == 0
    *rows, end = capsys.readouterr().out.splitlines()
    assert end == "no problem"
    names = dict(row.split(": ") for row in rows)
    assert names.keys() == PROGRAMS.keys() - {"report"}
    assert names["tokenizer"] == "step 4 of 4, checkpoints 2, 4"
    assert names["tokens"] == "2 shards, 48 samples"


def rewrite(run, name, change):
    """Let a checkpoint's file hold something else, as if it had been written so."""
    path = run / NEWEST / name
    change(path)
    state = json.loads((run / NEWEST / ckpt.STATE_FILE).read_text())
    state["files"][name] = {"bytes": path.stat().st_size, "crc32": ckpt.file_crc32(path)}
    (run / NEWEST / ckpt.STATE_FILE).write_text(json.dumps(state))


def spoil_weight(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path)


def spoil_moment(path):
    saved = torch.load(path, weights_only=True)
    saved["state"][3]["exp_avg"].view(-1)[0] = torch.inf
    torch.save(saved, path)


def append(run, text):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": (lambda run: cut(run / NEWEST / ckpt.MODEL_FILE), [ckpt.MODEL_FILE, "bytes instead"]),
    "flip": (lambda run: flip(run / NEWEST / ckpt.EMA_FILE), [ckpt.EMA_FILE, "other contents"]),
    "lost": (lambda run: (run / NEWEST / "rank_00000.pt").unlink(), ["rank_00000.pt", "missing"]),
    "nan": (lambda run: rewrite(run, ckpt.EMA_FILE, spoil_weight), [ckpt.EMA_FILE, "finite"]),
    "moment": (
        lambda run: rewrite(run, ckpt.OPTIMIZER_FILE, spoil_moment),
        ["exp_avg of weight 3"],
    ),
    "repeat": (lambda run: append(run, '{"step": 2}\n'), ["step 2", "after step 4"]),
    "no line": (lambda run: append(run, "half a li"), ["line 3"]),
    "config": (lambda run: (run / "config.yaml").write_text("[1"), ["config.yaml"]),
    "nothing": (lambda run: shutil.rmtree(run / "checkpoints"), ["no checkpoint"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(chain, tmp_path, name):
    damage, texts = DAMAGE[name]
    run = shutil.copytree(chain.folder / "tokenizer", tmp_path / "tokenizer", symlinks=True)
    damage(run)
    found = problems(run)
    assert len(found) == 1 and all(text in found[0] for text in texts)


def test_lost_tokens_are_named(chain, tmp_path):
    tokens = shutil.copytree(chain.folder / "tokens", tmp_path / "tokens")
    path = tokens / "tokens.json"
    path.write_text(path.read_text().replace('"num_samples": 48', '"num_samples": 49'))
    assert "49 samples, the shards hold 48" in problems(tokens)[0]
    (tokens / "train-00001.tar").unlink()
    assert "train-00001.tar" in problems(tokens)[0]


def test_a_folder_without_runs_is_refused_naming_what_it_holds(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="photos"):
        check_run.find_runs(tmp_path)
