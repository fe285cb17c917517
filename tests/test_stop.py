"""training/supervise.py: a signal or the time limit leaves a checkpoint and a status."""

import gc
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from test_processes import leave_room_for
from test_resume import program, start, state
from tiny_experiment import equal, metrics
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from data.workers import start_worker
from training import checkpoint as ckpt
from training import supervise
from training.supervise import STOPPED_STATUS, StopRequest, watched

LONG = ["training.max_steps=100000", "training.checkpoint_every_steps=100000"]
LONG += ["training.log_every_steps=7", "training.sample_every_steps=0"]
LONG += ["optimizer.schedule=constant"]


def test_without_a_signal_or_limit_nothing_stops():
    with StopRequest(time.monotonic() - 1e6, 0.0, 60.0) as stop:
        assert stop.reason() == ""


def test_the_time_limit_counts_from_the_start():
    with StopRequest(time.monotonic() - 3599, 1.0, 60.0) as stop:
        assert stop.reason() == ""
    with StopRequest(time.monotonic() - 3601, 1.0, 60.0) as stop:
        assert stop.reason() == "training.max_hours=1 are over"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_reason_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest(0.0, 0.0, 60.0) as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)  # the same request, passed on by someone else
        assert stop.reason() == f"signal {signal.Signals(number).name}"
    assert signal.getsignal(number) is before


SECOND_SIGNAL = """
import os, signal, time
from training.supervise import StopRequest
with StopRequest(time.monotonic(), 0.0, 60.0):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on", flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never")
"""


def test_a_second_signal_ends_at_once_unless_it_comes_with_the_first():
    process = start([sys.executable, "-c", SECOND_SIGNAL])
    output, _ = process.communicate(timeout=120)
    assert (output, process.returncode) == ("goes on\n", 128 + signal.SIGTERM)


def read_item(item):
    """In a data worker: items that are signals end it."""
    return os.kill(os.getpid(), item) if isinstance(item, signal.Signals) else item


def loader_of(items):
    options = {"batch_size": None, "num_workers": 2, "worker_init_fn": start_worker}
    return DataLoader(items, collate_fn=read_item, **options)


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (signal.SIGKILL, "was killed (SIGKILL): if memory ran out"),
        (signal.SIGBUS, "was killed (SIGBUS): give the container a larger /dev/shm"),
        (lambda: "what no pipe takes", "ended with status 1"),
    ],
)
def test_a_worker_that_dies_or_cannot_send_a_batch_ends_the_program_with_one_line(item, named):
    with pytest.raises(ChildProcessError) as error, watched(loader_of([1, 2, item, 3])) as batches:
        list(batches)
    assert "a data worker (process " in str(error.value) and named in str(error.value)


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("number", [0, 3, 9])  # fails at a queue, at an event, at the next queue
def test_no_room_for_the_first_semaphores_is_one_error_and_nothing_else(monkeypatch, kind, number):
    ignored = []
    leave_room_for(monkeypatch, number)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    loader = kind(range(4), batch_size=None, num_workers=2)
    with pytest.raises(OSError, match="workers cannot be started.*--shm-size"), watched(loader):
        pass
    gc.collect()
    assert not ignored


def test_workers_that_have_no_more_data_are_no_fault(monkeypatch):
    monkeypatch.setattr(supervise, "WORKER_GRACE_SECONDS", 0)
    monkeypatch.setattr(supervise, "abort", lambda reason: aborted.append(reason))
    aborted = []
    with watched(loader_of(range(4))) as batches:
        assert list(batches) == [0, 1, 2, 3]
        time.sleep(0.5)
    assert not aborted


def wait_for_steps(run, process):
    """Until the first line of the log is there."""
    for _ in range(10_000):
        if (run / "metrics.jsonl").is_file() or process.poll() is not None:
            break
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signalled_training_checkpoints_ends_with_its_status_and_goes_on_undisturbed(
    chain, tmp_path, number
):
    folder = tmp_path / "stopped"
    words = program(chain, folder, "tokenizer", *LONG, "data.num_workers=1")
    process, run = start([sys.executable, "train_tokenizer.py", *words]), folder / "tokenizer"
    wait_for_steps(run, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED_STATUS, output
    stopped_at = ckpt.latest_checkpoint(run)[0]
    assert 7 <= stopped_at < 100000
    assert f"stopped at step {stopped_at} (signal {signal.Signals(number).name})" in output
    last = stopped_at + 10
    options = [*LONG, f"training.max_steps={last}"]
    chain.run_in(folder, "tokenizer", *options, "data.num_workers=1")
    whole = chain.run_in(tmp_path / "whole", "tokenizer", *options, "data.num_workers=1")
    assert equal(state(run), state(whole))
    assert metrics(run) == metrics(whole)  # the window of the log, too, went on inside


def test_max_hours_stops_cleanly(chain, tmp_path):
    options = [*LONG, "training.max_hours=1e-7"]
    with pytest.raises(SystemExit) as stop:
        chain.run_in(tmp_path, "tokenizer", *options)
    assert stop.value.code == STOPPED_STATUS
    assert list(ckpt.checkpoint_folders(tmp_path / "tokenizer")) == [1]


def test_two_processes_stop_together_when_one_is_told_to(chain, tmp_path):
    flags = "--num_processes 2 --num_machines 1 --multi_gpu --main_process_port 0 "
    flags += "--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"
    words = ["train_tokenizer.py", *program(chain, tmp_path, "tokenizer", *LONG)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *words]
    process, run = start(command, ACCELERATE_USE_CPU="true"), tmp_path / "tokenizer"
    wait_for_steps(run, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)  # one of the two trainers
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    step = ckpt.latest_checkpoint(run)[0]
    assert f"stopped at step {step}" in output
    states = [ckpt.latest_checkpoint(run)[1] / ckpt.rank_file(rank) for rank in (0, 1)]
    assert all(path.is_file() for path in states)


def test_a_run_that_is_being_trained_is_not_trained_twice(chain, tmp_path):
    command = [sys.executable, "train_tokenizer.py", *program(chain, tmp_path, "tokenizer", *LONG)]
    process = start(command)
    wait_for_steps(tmp_path / "tokenizer", process)
    with pytest.raises(ValueError, match=f"by another process: process {process.pid} on "):
        chain.run_in(tmp_path, "tokenizer", *LONG)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
