"""scripts/check_run.py: a sound experiment has no problem; each kind of damage is named, in one line."""

import json
import re
import shutil

import pytest
import torch
import yaml
from forks import Program
from safetensors.torch import load_file, save_file
from tiny_experiment import weights

from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.released import Converted
from modeling.text_encoder import TextEncoderConfig
from scripts import check_run
from scripts.convert_checkpoint import write_run
from training import checkpoint as ckpt
from training.loading import read_run_config, section

LATER = ["text_projector", "text_decoder", "flowtok"]
NEWEST = "checkpoints/step_00000004"


def problems(folder, *flags):
    """Texts of the problems, without the run's name."""
    reports = [
        check_run.check_folder(run, "--quick" in flags) for run in check_run.find_runs(folder)
    ]
    return [text for report in reports for text in report.problems]


def rehash(folder):
    """A manifest that fits what the checkpoint's files have become."""
    files = [path for path in folder.iterdir() if path.name != ckpt.MANIFEST_FILE]
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": ckpt.file_hash(path)} for path in files
    }
    (folder / ckpt.MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_a_sound_experiment_has_no_problem_and_a_line_per_stage(chain, capsys, flags):
    assert check_run.main(check_run.parse_args([str(chain.folder), *flags])) == 0
    head, *rows, end = capsys.readouterr().out.splitlines()
    assert (
        head.split() == ["stage", "steps", "size", "checkpoints", "last", "losses"]
        and end == "no problem"
    )
    assert [row.split()[0] for row in rows] == ["text_encoder", "tokenizer", "tokens", *LATER]
    tokenizer = next(row for row in rows if row.startswith("tokenizer"))
    assert " 4/4 " in tokenizer and " MB   2 4 " in tokenizer and " loss 0." in tokenizer
    assert "2 shards, 48 samples" in rows[2]


def change_tensors(file, change):
    def damage(run):
        path = run / NEWEST / file
        save_file(change(load_file(path)), path)
        rehash(run / NEWEST)

    return damage


def change_saved(file, change):
    def damage(run):
        path = run / NEWEST / file
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        rehash(run / NEWEST)

    return damage


def change_state(**values):
    def damage(run):
        path = run / NEWEST / ckpt.STATE_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        rehash(run / NEWEST)

    return damage


def change_config(run):
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["tokenizer"]["encoder"]["width"] = 32
    path.write_text(yaml.safe_dump(config))


def remove(file):
    def damage(run):
        (run / file).unlink()
        if (run / file).parent.name.startswith("step"):
            rehash(run / NEWEST)

    return damage


def cut(run):
    path = run / NEWEST / ckpt.MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1])


def flip(run):
    path = run / NEWEST / ckpt.EMA_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def append(text):
    def damage(run):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(text)

    return damage


def noise(tensors):
    return {
        name: torch.randn_like(x) if x.is_floating_point() else x for name, x in tensors.items()
    }


def one_nan(tensors):
    name = sorted(tensors)[0]
    return {**tensors, name: torch.full_like(tensors[name], float("nan"))}


READING_NAMES = [  # found from names, sizes and shapes alone
    (cut, "step_00000004 is damaged: model.safetensors has .* bytes instead of"),
    (remove("config.yaml"), "config file .*config.yaml does not exist"),
    (change_config, "model.safetensors does not fit the network of config.yaml: .* expected 32"),
    (
        change_tensors(ckpt.EMA_FILE, lambda x: dict(list(x.items())[1:])),
        "ema.safetensors does not fit .* is missing",
    ),
    (
        remove(f"{NEWEST}/{ckpt.rank_file(0)}"),
        "rank_00000.pt, the data position of process 0 of 1, is missing",
    ),
    (
        change_state(num_processes=2),
        "rank_00001.pt, the data position of process 1 of 2, is missing",
    ),
    (change_state(step=3), "state.json says step 3"),
    (change_state(ema_updates=2), "the EMA has followed 2 of 4 steps"),
    (
        change_saved(ckpt.OPTIMIZER_FILE, lambda x: x["state"].clear()),
        "optimizer.pt holds no moments",
    ),
    (
        change_saved(ckpt.OPTIMIZER_FILE, lambda x: x["state"][0].pop("exp_avg")),
        "exp_avg of weight 0 is missing",
    ),
    (
        change_saved(ckpt.rank_file(0), lambda x: x.pop("loader")),
        "rank_00000.pt holds no data position",
    ),
    (append('{"step": 4, "loss": 1.0}\n'), "metrics.jsonl: step 4 comes after step 4"),
    (append('{"step": 6, "los'), "metrics.jsonl: line 3 is no JSON object with a step"),
    (
        remove("metrics.jsonl"),
        "metrics.jsonl ends at step 0, the newest whole checkpoint is of step 4",
    ),
]
READING_WEIGHTS = [
    (flip, "step_00000004 is damaged: ema.safetensors has other contents"),
    (change_tensors(ckpt.MODEL_FILE, one_nan), "model.safetensors: .* is not finite"),
    (change_tensors(ckpt.EMA_FILE, noise), "the EMA is .* times the weights' norm away"),
    (
        change_saved(
            ckpt.OPTIMIZER_FILE, lambda x: x["state"][0]["exp_avg_sq"].fill_(float("inf"))
        ),
        "optimizer.pt: exp_avg_sq of weight 0 is not finite",
    ),
]


@pytest.mark.parametrize(
    ("damage", "text", "is_quick"),
    [(*case, True) for case in READING_NAMES] + [(*case, False) for case in READING_WEIGHTS],
)
def test_each_damage_is_named(chain, tmp_path, damage, text, is_quick):
    run = tmp_path / "tokenizer"
    shutil.copytree(chain.folder / "tokenizer", run, symlinks=True)
    damage(run)
    found = problems(run)
    assert any(re.search(text, line) for line in found), found
    assert (problems(run, "--quick") != []) == is_quick


def test_a_damaged_newest_checkpoint_leaves_the_others_to_be_checked(chain, tmp_path):
    run = tmp_path / "tokenizer"
    shutil.copytree(chain.folder / "tokenizer", run, symlinks=True)
    cut(run)
    assert len(problems(run)) == 1
    report = check_run.check_folder(run, quick=False)
    assert (report.steps, report.checkpoints) == ("2/4", "2 4(damaged)")


def test_lost_and_shortened_token_shards_are_found(chain, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(chain.folder / "tokens", tokens)
    shutil.copy(tokens / "train-00000.tar", tokens / "train-00001.tar")
    assert problems(tokens) == []  # of the same number of samples
    info = json.loads((tokens / "tokens.json").read_text())
    (tokens / "tokens.json").write_text(json.dumps(info | {"num_samples": 49}))
    assert problems(tokens) == ["tokens.json says 49 samples, the shards hold 48"]
    (tokens / "train-00001.tar").unlink()
    assert problems(tokens) == ["1 shards are missing, the first: train-00001.tar"]
    assert problems(tokens, "--quick") == problems(tokens)


def test_a_converted_run_is_sound_without_optimizer_and_log(chain, tmp_path):
    config = read_run_config(chain.folder / "tokenizer")
    networks = {"tokenizer": section(config, "tokenizer", ImageTokenizerConfig)}
    converted = Converted("tokenizer", networks, weights(chain.folder / "tokenizer", ckpt.EMA_FILE))
    write_run(converted, TextEncoderConfig(), tmp_path / "run", tmp_path / "run")
    assert problems(tmp_path / "run") == problems(tmp_path / "run", "--quick") == []
    path = tmp_path / "run/checkpoints/step_00000000" / ckpt.EMA_FILE
    save_file({"x": torch.zeros(1)}, path)
    rehash(path.parent)
    assert "ema.safetensors does not fit the network" in problems(tmp_path / "run")[0]


def test_the_exit_status_says_sound_damaged_or_no_run(chain, tmp_path):
    run = tmp_path / "tokenizer"
    shutil.copytree(chain.folder / "tokenizer", run, symlinks=True)
    empty = tmp_path / "empty"
    empty.mkdir()

    def status(folder, name):
        program = Program(tmp_path / name, "scripts/check_run.py", str(folder))
        return program.wait(), program.output

    assert status(run, "sound")[0] == 0
    cut(run)
    number, output = status(run, "damaged")
    assert number == 1 and output.splitlines()[-1].startswith(
        "problem: tokenizer: step_00000004 is damaged"
    )
    number, output = status(empty, "none")
    assert number == 2 and "is no run folder and holds none; in it: nothing" in output
