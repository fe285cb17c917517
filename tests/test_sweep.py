"""research/sweep.py: a grid of the tiny experiment through the real launcher; equal work; going on; refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_launch import this_python
from test_resume import environment

from research import sweep

ROOT = Path(__file__).parents[1]
METRICS = {"loss": "text_projector/metrics.jsonl:loss", "epoch": "report_like.json:deep.value"}


@pytest.fixture
def lab(chain, tmp_path, monkeypatch):
    """A copy of the repository whose code is linked, with the tiny experiment among its configs."""
    root = tmp_path / "repository"
    (root / "configs").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in ("configs", "runs") and not path.name.startswith("."):
            (root / path.name).symlink_to(path)
    for path in (ROOT / "configs").glob("*.py"):
        (root / "configs" / path.name).symlink_to(path)
    shutil.copytree(chain.folder / "configs", root / "configs" / "tiny")
    monkeypatch.setattr(sweep, "ROOT", root)
    monkeypatch.setattr(sys, "prefix", str(this_python(tmp_path / "env")))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return tmp_path


def write_sweep(folder, chain, **changes):
    """A sweep of stage 2 from the finished tiny experiment."""
    values = {
        "experiment": "tiny",
        "stages": ["text_projector"],
        "start_from": str(chain.folder),
        "seeds": [0, 1],
        "overrides": ["text_projector.training.log_every_steps=1"],
        "variants": {"base": [], "fast": ["text_projector.optimizer.learning_rate=0.1"]},
        "metrics": {"loss": "text_projector/metrics.jsonl:loss"},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(values | changes))
    return folder / "grid.yaml"


def run(file, output, *options):
    sweep.main(sweep.parse_args([str(file), "--output", str(output), *options]))


@pytest.mark.slow
def test_a_grid_becomes_a_table_and_pictures_though_a_run_fails_and_the_same_command_trains_nothing(
    lab, chain, capsys
):
    variants = {"base": [], "broken": ["text_projector.data.shards=[/nowhere/*.tar]"]}
    file, output = write_sweep(lab, chain, variants=variants), lab / "out"
    with pytest.raises(SystemExit) as stopped:
        run(file, output)
    assert stopped.value.code == 1
    results = json.loads((output / "results.json").read_text())["results"]
    assert [(r["variant"], r["seed"]) for r in results] == [
        ("base", 0),
        ("base", 1),
        ("broken", 0),
        ("broken", 1),
    ]
    losses = [r["metrics"]["loss"] for r in results[:2]]
    assert losses[0] != losses[1]  # the seed reaches the training
    logged = (output / "base" / "1" / "text_projector" / "metrics.jsonl").read_text().splitlines()
    assert (
        len(logged) == 4 and json.loads(logged[-1])["loss"] == losses[1]
    )  # so does the override of all variants
    linked = output / "base" / "0"
    assert (linked / "tokenizer").is_symlink() and not (linked / "text_projector").is_symlink()
    base, broken = (output / "table.md").read_text().splitlines()[2:4]
    assert base.startswith(f"| base | {sum(losses) / 2:.4g} +- ") and base.endswith("| 2 |")
    assert broken == "| broken |  | 0 |"
    assert (output / "loss.png").read_bytes()[:4] == b"\x89PNG"
    text = capsys.readouterr().out
    assert "[4/4] broken, seed 1: exit status 2" in text and "/nowhere/*.tar" in text
    trained = (linked / "log").stat().st_mtime
    run(file, output, "--only", "base")
    assert (linked / "log").stat().st_mtime == trained
    assert "broken" not in (output / "table.md").read_text()
    write_sweep(
        lab, chain, variants=variants, overrides=["text_projector.training.log_every_steps=2"]
    )
    with pytest.raises(ValueError, match="base/0 was made by another command"):
        run(file, output)


def test_equal_work_gives_a_larger_network_fewer_steps(lab, chain):
    wider = ["text_projector.projector.mlp_width=512"]
    file = write_sweep(
        lab, chain, gflop={"text_projector": 2.0}, variants={"base": [], "wide": wider}
    )
    loaded = sweep.load_sweep(file)
    steps = {name: sweep.budget_steps(loaded, "text_projector", name) for name in loaded.variants}
    assert steps["base"] > 1.5 * steps["wide"] > 10
    command = sweep.command_of(loaded, "wide", 5, lab / "x")
    assert (
        f"text_projector.training.max_steps={steps['wide']}" in command
        and "text_projector.training.seed=5" in command
    )
    assert command[-2:] == ["text_projector.training.log_every_steps=1", *wider]
    with pytest.raises(ValueError, match="less than one step of variant base"):
        sweep.load_sweep(write_sweep(lab, chain, gflop={"text_projector": 1e-9}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"metrics": {}}, "metrics is empty"),
        ({"variant": {}}, "variant"),
        ({"seeds": "many"}, "seeds"),
        ({"variants": {"../up": []}}, "variants are names of folders"),
        ({"start_from": "/nowhere"}, "start_from=/nowhere is no folder"),
        ({"variants": {"a": ["text_projector.optimizer.lr=1"]}}, "optimizer.lr"),
        ({"experiment": "none"}, "none/text_projector.yaml"),
    ],
)
def test_a_wrong_file_is_refused_before_any_run(lab, chain, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(write_sweep(lab, chain, **changes), lab / "out")
    assert not (lab / "out").exists()


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("research/sweeps/*.yaml")), ids=lambda path: path.stem
)
def test_a_shipped_sweep_loads_and_its_header_has_its_command(file, tmp_path):
    text = file.read_text()
    assert f"# python research/sweep.py research/sweeps/{file.name}" in text
    values = yaml.safe_load(text)
    assert len(values["seeds"]) >= 3
    (tmp_path / file.name).write_text(
        yaml.safe_dump(values | {"start_from": ""})
    )  # it is not trained here
    sweep.load_sweep(tmp_path / file.name)


def test_a_missing_metric_names_file_and_key(lab, chain):
    loaded = sweep.load_sweep(write_sweep(lab, chain, metrics=METRICS))
    (lab / "text_projector").mkdir()
    (lab / "text_projector" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n')
    (lab / "report_like.json").write_text('{"deep": {"value": 4}}')
    assert sweep.read_metrics(loaded, lab) == {"loss": 2.5, "epoch": 4}
    (lab / "report_like.json").write_text('{"deep": 4}')
    with pytest.raises(
        ValueError, match=r"metrics.epoch: .*report_like.json has no number 'deep.value'"
    ):
        sweep.read_metrics(loaded, lab)


def test_only_names_a_variant_that_exists(lab, chain):
    with pytest.raises(ValueError, match=r"--only \['other'\]: no such variant; valid: base, fast"):
        run(write_sweep(lab, chain), lab / "out", "--only", "other")


def test_help_is_the_manual():
    program = [sys.executable, str(ROOT / "research" / "sweep.py"), "--help"]
    assert (
        "SweepConfig" in subprocess.run(program, capture_output=True, text=True, check=True).stdout
    )
