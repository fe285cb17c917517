"""research/sweep.py: a grid of the tiny experiment becomes a table; what is refused."""

import json
import time
from pathlib import Path

import pytest
import yaml
from forks import Program

from research import sweep

ROOT = Path(__file__).parents[1]
EVERY_STEP = "text_projector.training.log_every_steps=1"


def write_sweep(folder, chain, **changes):
    """A sweep of stage 2 from the finished tiny experiment."""
    values = {
        "experiment": f"{chain.folder}/configs",
        "stages": ["text_projector"],
        "start_from": str(chain.folder),
        "seeds": [0, 1],
        "overrides": [EVERY_STEP],
        "variants": {"base": [], "fast": ["text_projector.optimizer.learning_rate=0.1"]},
        "metrics": {"loss": "text_projector/metrics.jsonl:loss"},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(values | changes))
    return folder / "grid.yaml"


def run(file, output, *options):
    sweep.main(sweep.parse_args([str(file), "--output", str(output), *options]))


@pytest.fixture
def quick(chain, monkeypatch):
    """In place of train_flowtok.sh, which takes its time to start: the program of stage 2."""

    def run_command(_, command, log):
        config = ["--config", str(chain.config_file("text_projector"))]
        overrides = [word.removeprefix("text_projector.") for word in command[3:]]
        return Program(log, "train_text_projector.py", *config, *overrides).wait()

    monkeypatch.setattr(sweep, "run_command", run_command)


def test_a_grid_becomes_a_table_though_a_run_fails_and_the_same_command_trains_nothing(
    quick, chain, tmp_path, capsys
):
    variants = {"base": [], "broken": ["text_projector.data.shards=[/nowhere/*.tar]"]}
    file, output = write_sweep(tmp_path, chain, variants=variants), tmp_path / "out"
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
    text = capsys.readouterr().out
    assert "[4/4] broken, seed 1: exit status 2" in text and "/nowhere" in text

    # The same command reads what is there; another one does not continue it.
    trained = (linked / "log").stat().st_mtime
    run(file, output, "--only", "base")
    assert (linked / "log").stat().st_mtime == trained
    assert "broken" not in (output / "table.md").read_text()
    write_sweep(tmp_path, chain, overrides=["text_projector.training.log_every_steps=2"])
    with pytest.raises(ValueError, match="base/0 was made by another command"):
        run(file, output)
    missing = sweep.SweepConfig(metrics={"deep": "command.json:deep.value"})
    with pytest.raises(ValueError, match=r"metrics\.deep: .*command\.json .* 'deep\.value'"):
        sweep.read_metrics(missing, linked)


def test_after_an_error_of_the_sweep_no_further_run_is_started(chain, tmp_path, monkeypatch):
    started = []

    def run_one(_, variant, seed, *others):
        started.append((variant, seed))
        if len(started) == 1:
            raise ValueError("metrics.loss: no number")
        time.sleep(1)  # may have begun before the error is seen

    monkeypatch.setattr(sweep, "run_one", run_one)
    with pytest.raises(ValueError, match="no number"):
        run(write_sweep(tmp_path, chain), tmp_path / "out")
    assert len(started) < 4


def test_a_command_is_that_of_the_launcher_and_equal_work_gives_a_larger_network_fewer_steps(
    chain, tmp_path
):
    wider = "text_projector.projector.mlp_width=512"
    budget, variants = {"text_projector": 2.0}, {"base": [], "wide": [wider]}
    loaded = sweep.load_sweep(write_sweep(tmp_path, chain, gflop=budget, variants=variants))
    steps, key = {}, "text_projector.training.max_steps="
    for name in variants:
        command = sweep.command_of(loaded, name, 5, tmp_path / "x")
        assert command[:3] == ["bash", f"{ROOT}/train_flowtok.sh", f"{chain.folder}/configs"]
        assert "text_projector.training.seed=5" in command
        steps[name] = next(int(word.removeprefix(key)) for word in command if key in word)
    assert steps["base"] > 1.5 * steps["wide"] > 10
    assert command[-2:] == [EVERY_STEP, wider]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"../up": []}}, r"variants: '\.\./up'"),
        ({"start_from": "/nowhere"}, "start_from=/nowhere"),
        ({"variants": {"a": ["text_projector.optimizer.lr=1"]}}, r"optimizer\.lr"),
    ],
)
def test_a_wrong_file_is_refused_before_any_run(chain, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(write_sweep(tmp_path, chain, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted(ROOT.glob("research/sweeps/*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_sweep_loads_with_three_seeds(file, tmp_path):
    values = yaml.safe_load(file.read_text())
    values |= {"start_from": "", "gflop": {}}  # not trained here; work takes long to measure
    (tmp_path / file.name).write_text(yaml.safe_dump(values))
    assert len(sweep.load_sweep(tmp_path / file.name).seeds) >= 3
