"""training/metrics.py: means, the first bad step, and a metrics.jsonl without gaps or repeats after a resume."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from training.metrics import LoggingConfig, MetricLog, MetricWindow

CPU = torch.device("cpu")


def same(x):
    return x


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def open_log(folder, start_step, **options):
    return MetricLog(folder, LoggingConfig(**options), True, "runs/x/tokenizer", start_step)


def test_means_are_over_the_steps_since_the_last_reset():
    window = MetricWindow()
    for step, value in enumerate([1.0, 2.0, 6.0]):
        window.add(step, {"a": torch.tensor(value), "b": torch.tensor(-value)}, [])
    assert window.means(same) == {"a": 3.0, "b": -3.0}
    window.reset()
    window.add(3, {"a": torch.tensor(7.0), "b": torch.tensor(8.0)}, [])
    assert window.means(same) == {"a": 7.0, "b": 8.0}


def test_one_reduction_serves_all_values():
    window = MetricWindow()
    window.add(1, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, [])
    calls = []

    def with_another_process(x):  # whose values are 3 and 4
        calls.append(x)
        return (x + torch.tensor([3.0, 4.0])) / 2

    assert window.means(with_another_process) == {"a": 2.0, "b": 3.0}
    assert len(calls) == 1


def test_values_are_summed_in_float32_without_a_graph():
    window = MetricWindow()
    weight = torch.ones((), requires_grad=True)
    for step in range(300):
        window.add(step, {"a": (weight * 1).bfloat16()}, [])  # bfloat16 window would stop at 256
    assert window.means(same) == {"a": 1.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_names_step_terms_and_keys(bad):
    window = MetricWindow()
    window.add(4, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, ["x"])
    window.check_finite(Path("run"), rank=1)
    window.add(5, {"a": torch.tensor(5.0), "b": torch.tensor(bad)}, ["y", "z"])
    window.add(6, {"a": torch.tensor(3.0), "b": torch.tensor(4.0)}, ["w"])
    with pytest.raises(FloatingPointError) as caught:
        window.check_finite(Path("run"), rank=1)
    message = str(caught.value)
    assert all(part in message for part in ("step 5", "rank 1", "a 5", f"b {bad:.4g}", "y, z"))
    assert "w" not in message.split("samples: ")[1].split(".")[0]


def test_a_value_that_only_some_steps_have_is_averaged_over_these():
    window = MetricWindow()
    window.add(1, {"a": torch.tensor(1.0)}, [])
    window.add(2, {"a": torch.tensor(2.0), "late": torch.tensor(5.0)}, [])
    assert window.means(same) == {"a": 1.5, "late": 5.0}


def test_a_window_goes_on_where_its_state_was_saved():
    first, second = MetricWindow(), MetricWindow()
    first.add(1, {"a": torch.tensor(1.0)}, ["k"])
    second.load_state_dict(first.state_dict(), CPU)
    for window in (first, second):
        window.add(2, {"a": torch.tensor(0.3)}, ["k"])
    assert first.means(same) == second.means(same)


def test_the_log_has_a_line_a_step_on_the_console_and_in_the_file(tmp_path, capsys):
    log = open_log(tmp_path, 0)
    log.log(10, 20, {"loss": 0.123456}, seconds_left=90_061.4)
    log.log(20, 20, {"loss": 0.1, "learning_rate": 1e-4}, seconds_left=0)
    assert lines(tmp_path) == [
        {"step": 10, "loss": 0.123456},
        {"step": 20, "loss": 0.1, "learning_rate": 1e-4},
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "step 10/20  loss 0.1235  left 1 day, 1:01:01"
    assert "learning_rate 0.0001" in printed[1]


def test_a_resumed_log_drops_the_steps_that_will_be_done_again_and_a_half_line(tmp_path):
    log = open_log(tmp_path, 0)
    for step in (5, 10, 15, 20):
        log.log(step, 40, {"loss": float(step)}, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": 0.')  # killed while writing
    log = open_log(tmp_path, 10)
    for step in (15, 20, 25):
        log.log(step, 40, {"loss": step + 0.5}, 0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *((5, 5.0), (10, 10.0)),
        *((15, 15.5), (20, 20.5), (25, 25.5)),
    ]


def test_a_run_without_checkpoint_starts_its_log_anew(tmp_path):
    open_log(tmp_path, 0).log(5, 40, {"loss": 1.0}, 0)
    open_log(tmp_path, 0)
    assert lines(tmp_path) == []


def test_only_the_main_process_writes(tmp_path, capsys):
    log = MetricLog(tmp_path, LoggingConfig(wandb="online"), False, "x", 0)
    log.log(1, 2, {"loss": 1.0}, 0)
    log.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_wandb_gets_the_same_values_and_one_run_id_over_resumes(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "other").mkdir()
    log = open_log(tmp_path, 0, wandb="offline", wandb_project="mine")
    log.log(3, 5, {"loss": 2.0}, 0)
    log.close()
    options, *rest = calls
    assert rest == [(3, {"loss": 2.0}), "finish"]
    assert (options["mode"], options["project"], options["resume"]) == ("offline", "mine", "allow")
    assert options["name"] == "runs/x/tokenizer" and options["dir"] == tmp_path
    open_log(tmp_path, 3, wandb="offline").close()  # resumed
    assert calls[-2]["id"] == options["id"]
    open_log(tmp_path / "other", 0, wandb="offline").close()
    assert calls[-2]["id"] != options["id"]


def test_wandb_is_not_imported_when_it_is_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    open_log(tmp_path, 0, wandb="off").close()
