"""data/workers.py: results in order, and no hang whenever a worker is killed."""

import errno
import multiprocessing
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import SemLock

import pytest

from data import workers
from data.workers import map_in_processes


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class HalfAnAnswer:
    """Its bytes end in the death of the process that makes them."""

    def __reduce__(self):
        die()


def die_in_an_answer(item):
    return ["x" * 100_000, HalfAnAnswer()]


def die_unless_first(item):
    return time.sleep(0.2) if item == 0 else die()


@pytest.mark.parametrize("function", [die, die_in_an_answer, die_unless_first, None])
def test_a_worker_that_is_killed_at_whatever_moment_holds_nobody_up(function, monkeypatch):
    if function is None:  # before it begins
        monkeypatch.setattr(workers, "_start_process", die)
    with pytest.raises(BrokenProcessPool):
        list(map_in_processes(function or abs, range(20), workers=3))
    assert not multiprocessing.active_children()


def leave_room_for(monkeypatch, number):
    """So many semaphores: each takes 4 kB of shared memory."""
    made, original = [], SemLock.__init__

    def limited(*arguments, **options):
        if len(made) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(original(*arguments, **options))

    monkeypatch.setattr(SemLock, "__init__", limited)


def test_no_room_for_what_processes_share_names_the_way_out(monkeypatch):
    leave_room_for(monkeypatch, 0)
    with pytest.raises(OSError, match="No space left.*--shm-size"):
        list(map_in_processes(abs, range(20), workers=3))


def give_back_later(seconds):
    time.sleep(seconds)
    return 1 / seconds


def test_processes_give_back_the_results_in_order_and_the_error_of_their_function():
    items = [0.02, 0.001, 0.01, 0.002, 0.003]
    for number in (1, 2):
        results = map_in_processes(give_back_later, items, number)
        assert list(results) == [1 / item for item in items]
        with pytest.raises(ZeroDivisionError):
            list(map_in_processes(give_back_later, [*items, 0], number))
    assert list(map_in_processes(abs, [], workers=3)) == []
    assert not multiprocessing.active_children()
