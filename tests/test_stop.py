"""training/supervise.py: a signal or the time limit leaves a checkpoint and a status."""

import gc
import os
import signal
import sys
import time

import pytest
from forks import Program
from test_processes import leave_room_for
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from data.workers import start_worker
from training import checkpoint as ckpt
from training import supervise
from training.errors import STOPPED_STATUS
from training.supervise import StopRequest, watched


def test_nothing_stops_but_a_time_limit_that_counts_from_the_start():
    for seconds, hours, reason in (
        (1e6, 0.0, ""),
        (3599, 1.0, ""),
        (3601, 1.0, "training.max_hours=1 are over"),
    ):
        with StopRequest(time.monotonic() - seconds, hours, 60.0) as stop:
            assert stop.reason() == reason


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


def test_a_second_signal_ends_at_once_unless_it_comes_with_the_first(tmp_path):
    (tmp_path / "script.py").write_text(SECOND_SIGNAL)
    process = Program(tmp_path / "log", str(tmp_path / "script.py"))
    assert process.wait() == 128 + signal.SIGTERM
    assert process.output == "goes on\n"


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


class Killer:
    """A dataset that ends the process which reads its last item."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index if index < 19 else os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_of_another_loader_that_is_killed_ends_with_an_error_that_says_so():
    # In the middle of a batch, or between two.
    reason = "a data worker ended while a batch|DataLoader worker .* exited unexpectedly"
    with pytest.raises(ChildProcessError, match=reason), watched(DataLoader([])):
        list(DataLoader(Killer(), num_workers=2))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # no error comes up elsewhere


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


def test_max_hours_stops_cleanly(chain, tmp_path):
    with pytest.raises(SystemExit) as stop:
        chain.run_in(tmp_path, "tokenizer", "training.max_hours=1e-7")
    assert stop.value.code == STOPPED_STATUS
    assert list(ckpt.checkpoint_folders(tmp_path / "tokenizer")) == [1]
