"""training/metrics.py: means, the first bad step, a log without gaps or repeats after a resume."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import refusal

from training.metrics import LoggingConfig, MetricLog, MetricWindow


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def open_log(folder, start_step, **options):
    return MetricLog(folder, LoggingConfig(**options), True, start_step)


def window_of(*steps):
    """A window of scalars by name; steps count from 1."""
    window = MetricWindow()
    for step, values in enumerate(steps, start=1):
        window.add(step, {name: torch.tensor(x) for name, x in values.items()}, [f"key{step}"])
    return window


def test_means_are_over_the_steps_since_the_last_reset_that_had_the_value():
    window = window_of({"a": 1.0}, {"a": 2.0, "late": 5.0}, {"a": 6.0, "late": 7.0})
    assert window.means(lambda x: x) == {"a": 3.0, "late": 6.0}
    window.reset()
    window.add(3, {"a": torch.tensor(7.0)}, [])
    assert window.means(lambda x: x) == {"a": 7.0}


def test_one_reduction_in_float32_serves_all_values():
    window, calls = MetricWindow(), []
    for step in range(300):  # a sum in bfloat16 would stop at 256
        window.add(step, {"a": torch.ones(()).bfloat16(), "b": torch.tensor(2.0)}, [])

    def with_another_process(x):  # whose values are 3 and 4
        calls.append(x.dtype)
        return (x + torch.tensor([3.0, 4.0])) / 2

    assert window.means(with_another_process) == {"a": 2.0, "b": 3.0}
    assert calls == [torch.float32]


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_non_finite_value_names_the_first_step_its_terms_and_keys(bad):
    window_of({"a": 1.0, "b": 2.0}).check_finite(Path("run"), rank=1)
    window = window_of({"a": 1.0, "b": 2.0}, {"a": 5.0, "b": bad}, {"a": bad, "b": 4.0})
    parts = ("step 2", "rank 1", "a 5", f"b {bad:.4g}", "samples: key2.")
    with refusal(*parts, kind=FloatingPointError):
        window.check_finite(Path("run"), rank=1)


def test_the_log_has_a_line_a_step_on_the_console_and_in_the_file(tmp_path, capsys):
    log, values = open_log(tmp_path, 0), {"loss": 0.123456, "posterior_std/3": 0.5}
    log.log(10, 20, values, seconds_left=90_061.4)
    log.log(20, 20, {"loss": 0.1, "learning_rate": 1e-4}, seconds_left=0)
    expected = [{"step": 10, **values}, {"step": 20, "loss": 0.1, "learning_rate": 1e-4}]
    assert lines(tmp_path) == expected
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "step 10/20  loss 0.1235  left 1 day, 1:01:01"
    assert "learning_rate 0.0001" in printed[1]


@pytest.mark.parametrize("start", [0, 10])
def test_a_resumed_log_drops_the_steps_that_will_be_done_again_and_broken_lines(tmp_path, start):
    log = open_log(tmp_path, 0)
    for step in (5, 10, 15, 20):
        log.log(step, 40, {"loss": float(step)}, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[5]\n{"step": "5"}\n{"loss": 1.0}\n')
        file.write('{"step": 25, "loss": 0.')  # killed while writing
    log = open_log(tmp_path, start)
    log.log(15, 40, {"loss": 15.5}, 0)
    kept = [(5, 5.0), (10, 10.0)] if start else []
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [*kept, (15, 15.5)]


def test_wandb_gets_the_same_values_and_one_run_id_over_resumes(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_log(tmp_path, 0, wandb="offline", wandb_project="mine")
    log.log(3, 5, {"loss": 2.0}, 0)
    log.close()
    options, *rest = calls
    assert rest == [(3, {"loss": 2.0}), "finish"]
    assert (options["mode"], options["project"], options["resume"]) == ("offline", "mine", "allow")
    assert options["name"] == str(tmp_path) and options["dir"] == tmp_path
    for start_step, is_same in ((3, True), (0, False)):  # resumed, made anew
        open_log(tmp_path, start_step, wandb="offline").close()
        assert (calls[-2]["id"] == options["id"]) == is_same


@pytest.mark.parametrize(
    ("package", "option", "value"),
    [("wandb", "wandb", "online"), ("torch.utils.tensorboard", "tensorboard", True)],
)
def test_a_service_is_imported_only_when_it_is_on_and_named_where_it_is_absent(
    tmp_path, monkeypatch, package, option, value
):
    monkeypatch.setitem(sys.modules, package, None)  # an import fails
    open_log(tmp_path, 0).close()
    with pytest.raises(ValueError, match=f"logging.{option}"):
        open_log(tmp_path, 0, **{option: value})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = open_log(tmp_path, start_step, tensorboard=True)
        for step in steps:
            log.log(step, 4, {"loss": step + 10.0 * start_step}, seconds_left=0)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
