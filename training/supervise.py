"""What can happen to a training process from outside, behind one door: `with supervised(...)`.

- SIGTERM, SIGUSR1 (Slurm's warning), SIGINT (Ctrl-C) or the time limit: the step finishes, the loop
  writes a checkpoint and ends with STOPPED_STATUS. A second SIGTERM or SIGINT ends at once, unless
  it comes with the first: queue, launcher and torchrun may each pass on the same request.
- A data worker or another rank dies, or something hangs: the program ends with one line on it.
  Programs that do not train have that part of the watch: `with watched(loader)`, and a Watchdog.
The last checkpoint is whole in each case, and the same command continues from it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

import data.workers as data_workers
from training.errors import ERROR_STATUS, report_error
from training.run import Run, locked, process_group_timeout

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 1.0
CONTINUE = "Run the same command again to continue"
POLLS_PER_TIMEOUT = 20  # how often the watchdog looks before it aborts
PROGRAM_FOLDERS = ("training", "eval", "scripts")
WORKER_GRACE_SECONDS = 30  # after a data worker's death; a waiting loader looks every 5


@contextmanager
def supervised(
    run: Run, loader, max_hours: float, timeout_minutes: float
) -> Iterator[tuple[Iterator[dict], Callable[[], None], Callable[[], str]]]:
    """Watch over a training; abort if no heartbeat comes for `timeout_minutes`.

    Yields the loader's batches, heartbeat() and stop_reason(), both to be called after every step.
    max_hours: wall clock since the program's start, 0: no limit.

    Raises:
        ChildProcessError, ConnectionError: a data worker or another training process died.
        ValueError: another process trains in this folder.
    """
    loader.worker_init_fn = data_workers.start_training_worker
    with ExitStack() as stack:
        # Workers are forked first, before there are threads, a lock and handlers to inherit.
        batches = stack.enter_context(watched(loader))
        stack.enter_context(locked(run))
        silence = f"no step for training.timeout_minutes={timeout_minutes:g}"
        watchdog = stack.enter_context(Watchdog(timeout_minutes, silence))
        stop = stack.enter_context(StopRequest(run.started, max_hours, timeout_minutes))
        yield batches, watchdog.heartbeat, stop.reason


@contextmanager
def watched(loader) -> Iterator[Iterator[dict]]:
    """The batches of a loader, whose workers are started and watched.

    Raises:
        ChildProcessError: one died.
        ConnectionError: another process of the program did.
        OSError: they cannot be started.
    """
    data_workers.restore_sigchld_default()
    workers: list[BaseProcess] = []
    try:
        others = multiprocessing.active_children()
        batches = data_workers.start_batches(loader)
        workers += [each for each in multiprocessing.active_children() if each not in others]
        with abort_if_worker_dies(workers):
            yield batches
    except (RuntimeError, OSError, EOFError) as error:
        # What torch says of a death is an error of the queue or socket that it broke.
        if reason := describe_dead_worker(workers) or data_workers.describe_lost_batch(error):
            raise ChildProcessError(f"{reason}. {CONTINUE}") from error
        if "gloo/" in str(error) or isinstance(error, dist.DistError):
            reason = "another training process ended; its own output says why"
            raise ConnectionError(f"{reason}. {CONTINUE}") from error
        raise


class StopRequest:
    """Whether the run is to stop after this step, and why. A context: old handlers come back.

    timeout_minutes: of the processes' agreement to stop together; None: each stops by itself.
    """

    def __init__(
        self, started: float = 0.0, max_hours: float = 0.0, timeout_minutes: float | None = None
    ):
        self._deadline = started + 3600 * max_hours if max_hours else float("inf")
        self._max_hours = max_hours
        self._timeout_minutes = timeout_minutes
        self._reason = ""
        self._signalled_at: float | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._group = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        agrees = self._timeout_minutes is not None
        if agrees and dist.is_initialized() and dist.get_world_size() > 1:
            # gloo: the processes agree on the CPU, without a device sync
            timeout = process_group_timeout(self._timeout_minutes)
            self._group = dist.new_group(timeout=timeout, backend="gloo")
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        # It only takes a note: a checkpoint that is begun here could be in the middle of a step.
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self._reason = f"signal {signal.Signals(number).name}"
        elif number != signal.SIGUSR1 and now > self._signalled_at + SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def reason(self) -> str:
        """Why all processes stop now, "" if they go on. Every process calls it after every step.

        Of processes that agree the answer is that of the step before, so that nobody waits for it.
        """
        if not self._reason and time.monotonic() > self._deadline:
            self._reason = f"training.max_hours={self._max_hours:g} are over"
        if self._group is None:
            return self._reason
        # Who stopped alone would leave the others waiting for its gradients.
        agreed = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([float(bool(self._reason))])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)
        return (self._reason or "another process was told to stop") if agreed else ""


class Watchdog:
    """Aborts with one line if no heartbeat comes for `minutes`. A context.

    silence: what did not happen, for the line. It has its own thread: the main one may wait for a
    rank, a worker, a disk or a device, where nothing else reaches it. Time in which the whole
    program was suspended does not count.
    """

    def __init__(self, minutes: float, silence: str):
        self.minutes = minutes
        self.silence = silence
        self._alive = False
        self._done = threading.Event()
        self._owner = threading.get_ident()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()

    def heartbeat(self) -> None:
        self._alive = True

    def _watch(self) -> None:
        # Counted by polls, not by the clock, which goes on while the program is suspended.
        silent_polls = 0
        while not self._done.wait(60 * self.minutes / POLLS_PER_TIMEOUT):
            silent_polls = 0 if self._alive else silent_polls + 1
            self._alive = False
            if silent_polls == POLLS_PER_TIMEOUT:
                abort(
                    f"{self.silence}: another process, the storage or a device hangs; this one "
                    f"waits in {self._where()}"
                )

    def _where(self) -> str:
        """The line of a program of ours in which the main thread is, however deep in a library."""
        frame = sys._current_frames()[self._owner]
        while frame.f_back and Path(frame.f_code.co_filename).parent.name not in PROGRAM_FOLDERS:
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}"


def describe_dead_worker(workers: Sequence[BaseProcess]) -> str:
    """One line on a worker that failed, "" if none did: those with no more data end, too."""
    # What it has broken is noticed a moment before its exit code is there.
    if living := {worker.sentinel: worker for worker in workers if worker.exitcode is None}:
        for sentinel in wait([*living], timeout=1):
            living[sentinel].join()
    dead = next((worker for worker in workers if worker.exitcode), None)
    if dead is None:
        return ""
    if dead.exitcode == -signal.SIGKILL:
        how = "was killed (SIGKILL): if memory ran out, lower data.num_workers or shuffle_buffer"
    elif dead.exitcode == -signal.SIGBUS:  # a page that there was no room for
        how = f"was killed (SIGBUS): {data_workers.SHARED_MEMORY_CURE}"
    else:
        how = f"ended with status {dead.exitcode} (-N: signal N)"
    return f"a data worker (process {dead.pid}) {how}"


@contextmanager
def abort_if_worker_dies(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Abort if the main thread waits forever for a worker that died in the middle of a message."""
    done = threading.Event()

    # The loader looks by itself, but not while it waits for the rest of a message.
    def watch() -> None:
        while not any(worker.exitcode for worker in workers):
            if done.wait(1.0):
                return
        if not done.wait(WORKER_GRACE_SECONDS):
            abort(describe_dead_worker(workers))

    if workers:
        threading.Thread(target=watch, daemon=True, name="workers").start()
    try:
        yield
    finally:
        done.set()


def abort(reason: str) -> None:
    """End the program from a thread, whose exceptions do not reach the main one."""
    # Not sys.exit: it waits for workers, threads and devices, one of which is what hangs.
    for worker in multiprocessing.active_children():
        worker.kill()
    report_error(f"error: {reason}. {CONTINUE}")
    os._exit(ERROR_STATUS)
