"""research/sweep.py: a grid of the tiny experiment through the real launcher; what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from test_launch import this_python
from test_resume import environment

from research import sweep

ROOT = Path(__file__).parents[1]


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
def test_a_grid_becomes_a_table_though_a_run_fails_and_the_same_command_trains_nothing(
    lab, chain, capsys
):
    variants = {"base": [], "broken": ["text_projector.data.shards=[/nowhere/*.tar]"]}
    file, output = write_sweep(lab, chain, variants=variants), lab / "out"
    with pytest.raises(SystemExit) as stopped:
        run(file, output)
    assert stopped.value.code == 1
    results = json.loads((output / "results.json").read_text())["results"]
    expected = [("base", 0), ("base", 1), ("broken", 0), ("broken", 1)]
    assert [(result["variant"], result["seed"]) for result in results] == expected

    # Seeds and the overrides of all variants reach the training.
    losses = [result["metrics"]["loss"] for result in results[:2]]
    assert losses[0] != losses[1]
    logged = (output / "base" / "1" / "text_projector" / "metrics.jsonl").read_text().splitlines()
    assert len(logged) == 4
    assert json.loads(logged[-1])["loss"] == losses[1]
    linked = output / "base" / "0"
    assert (linked / "tokenizer").is_symlink() and not (linked / "text_projector").is_symlink()

    # What is written and said.
    base, broken = (output / "table.md").read_text().splitlines()[2:4]
    assert base.startswith(f"| base | {sum(losses) / 2:.4g} +- ") and base.endswith("| 2 |")
    assert broken == "| broken |  | 0 |"
    assert (output / "loss.png").read_bytes()[:4] == b"\x89PNG"
    text = capsys.readouterr().out
    assert "[4/4] broken, seed 1: exit status 2" in text and "/nowhere/*.tar" in text

    # The same command reads what is there; another one does not continue it.
    trained = (linked / "log").stat().st_mtime
    run(file, output, "--only", "base")
    assert (linked / "log").stat().st_mtime == trained
    assert "broken" not in (output / "table.md").read_text()
    write_sweep(lab, chain, overrides=["text_projector.training.log_every_steps=2"])
    with pytest.raises(ValueError, match="base/0 was made by another command"):
        run(file, output)


def test_equal_work_gives_a_larger_network_fewer_steps(lab, chain):
    wider = "text_projector.projector.mlp_width=512"
    budget, variants = {"text_projector": 2.0}, {"base": [], "wide": [wider]}
    loaded = sweep.load_sweep(write_sweep(lab, chain, gflop=budget, variants=variants))
    steps, key = {}, "text_projector.training.max_steps="
    for name in variants:
        command = sweep.command_of(loaded, name, 5, lab / "x")
        assert "text_projector.training.seed=5" in command
        steps[name] = next(int(word.removeprefix(key)) for word in command if key in word)
    assert steps["base"] > 1.5 * steps["wide"] > 10
    assert command[-2:] == ["text_projector.training.log_every_steps=1", wider]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"metrics": {}}, "metrics is empty"),
        ({"variant": {}}, "variant"),
        ({"seeds": "many"}, "seeds"),
        ({"variants": {"../up": []}}, r"variants: '\.\./up'"),
        ({"start_from": "/nowhere"}, "start_from=/nowhere"),
        ({"variants": {"a": ["text_projector.optimizer.lr=1"]}}, r"optimizer\.lr"),
        ({"experiment": "none"}, "'none'"),
        ({"gflop": {"text_projector": 1e-9}}, "less than one step of variant base"),
        ({"gflop": {"flowtok": 1.0}}, r"gflop has \['flowtok'\]"),
    ],
)
def test_a_wrong_file_is_refused_before_any_run(lab, chain, changes, message):
    with pytest.raises(ValueError, match=message):
        run(write_sweep(lab, chain, **changes), lab / "out")
    assert not (lab / "out").exists()


def test_only_names_a_variant_that_exists(lab, chain):
    with pytest.raises(ValueError, match=r"--only \['other'\].* base, fast"):
        run(write_sweep(lab, chain), lab / "out", "--only", "other")


@pytest.mark.parametrize("file", sorted(ROOT.glob("research/sweeps/*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_sweep_loads_with_three_seeds(file, tmp_path):
    values = yaml.safe_load(file.read_text()) | {"start_from": ""}  # it is not trained here
    (tmp_path / file.name).write_text(yaml.safe_dump(values))
    assert len(sweep.load_sweep(tmp_path / file.name).seeds) >= 3


def test_a_missing_metric_names_file_and_key(tmp_path):
    metrics = {"loss": "metrics.jsonl:loss", "deep": "report.json:deep.value"}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n')
    (tmp_path / "report.json").write_text('{"deep": {"value": 4}}')
    loaded = sweep.SweepConfig(metrics=metrics)
    assert sweep.read_metrics(loaded, tmp_path) == {"loss": 2.5, "deep": 4}
    (tmp_path / "report.json").write_text('{"deep": 4}')
    with pytest.raises(ValueError, match=r"metrics\.deep: .*report\.json .* 'deep\.value'"):
        sweep.read_metrics(loaded, tmp_path)
