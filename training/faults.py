"""What other processes and machines do to a training process: they die, or they hang.

Each ends the training with one line that says so; the last checkpoint is whole, and the same command goes on from it.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

GO_ON = "Run the same command again to go on"
LOOKS = 20  # of the watchdog, in the time after which it bites
NOTICE_SECONDS = 30  # after a data worker's death; the loader looks every 5 when it waits
HUNG_STATUS = 2


@contextmanager
def explain_faults() -> Iterator[list[BaseProcess]]:
    """Name the cause of an error that another process's death caused. The caller lists its data workers.

    Raises:
        ChildProcessError: a data worker died.
        ConnectionError: another training process died.
    """
    leave_dead_workers_to_their_loader()
    workers: list[BaseProcess] = []
    try:
        yield workers
    except (
        RuntimeError,
        OSError,
        EOFError,
    ) as error:  # of a dead worker: whatever was being read from it
        if reason := describe_dead_worker(workers) or describe_lost_batch(error):
            raise ChildProcessError(f"{reason}. {GO_ON}") from error
        if "gloo/" in str(error) or isinstance(error, dist.DistError):
            raise ConnectionError(
                f"another training process ended; its own output says why. {GO_ON}"
            ) from error
        raise


def leave_dead_workers_to_their_loader() -> None:
    """Undo torch's handler of SIGCHLD, which raises between any two instructions, also of an `except` or a save.

    A loader that waits for a batch looks every few seconds whether its workers live. For the rest of the program.
    """
    _set_SIGCHLD_handler()  # torch does so once a process: not again when another loader starts
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def describe_dead_worker(workers: Sequence[BaseProcess]) -> str:
    """One line on the first of these that is dead, "" if all live."""
    ended = wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    dead = [worker for worker in workers if worker.sentinel in ended]
    if not dead:
        return ""
    dead[0].join()
    name, status = f"a data worker (process {dead[0].pid})", dead[0].exitcode
    if status == -signal.SIGKILL:
        advice = "as the system does when memory runs out: if so, lower data.num_workers or data.shuffle_buffer"
        return f"{name} was killed (SIGKILL), {advice}"
    return f"{name} ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


def describe_lost_batch(error: Exception) -> str:
    """One line if the error comes from a dead worker of another loader, that of an evaluation say; else ""."""
    if isinstance(
        error, (ConnectionResetError, ConnectionRefusedError, EOFError)
    ):  # of gloo they are RuntimeErrors
        return "a data worker ended while a batch was read from it"
    return str(error) if str(error).startswith("DataLoader worker") else ""


@contextmanager
def end_without(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """End the program, with one line, if a data worker dies and the main thread does not notice.

    It waits for ever where the worker died in the middle of a message; without pinned memory nothing else reads it.
    """
    done = threading.Event()

    def watch() -> None:
        wait([worker.sentinel for worker in workers])
        if not done.wait(NOTICE_SECONDS):
            end_program(describe_dead_worker(workers))

    if workers:
        threading.Thread(target=watch, daemon=True, name="workers").start()
    try:
        yield
    finally:
        done.set()


def end_program(reason: str) -> None:
    """From a thread, where no exception reaches the main one."""
    print(f"error: {reason}. {GO_ON}", file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(HUNG_STATUS)


class Watchdog:
    """Ends the program, with one line, when it is not patted for so many minutes. Use as a context.

    From a thread of its own: the main one may wait for a rank, a data worker, a disk or a device, where nothing else
    reaches it. Time in which the whole program was suspended does not count.
    """

    def __init__(self, minutes: float):
        self.minutes = minutes
        self._patted, self._done = False, threading.Event()
        self._owner = threading.get_ident()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()

    def pat(self) -> None:
        """Say that a step is done."""
        self._patted = True

    def _watch(self) -> None:
        looks = 0
        while not self._done.wait(60 * self.minutes / LOOKS):
            looks, self._patted = (0 if self._patted else looks + 1), False
            if looks == LOOKS:
                self._bite()

    def _bite(self) -> None:
        frame = sys._current_frames()[self._owner]
        while (
            frame.f_back is not None
            and Path(frame.f_code.co_filename).parent != Path(__file__).parent
        ):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}"
        end_program(
            f"no step for training.timeout_minutes={self.minutes:g}: another process, the storage or a device hangs; "
            f"this one waits in {where}"
        )


def outlive_requests(worker: int) -> None:
    """For data workers, as their worker_init_fn: a request to stop is for the trainer alone.

    It often reaches all processes of a group, and the trainer needs batches to finish its step. A worker ends when its
    trainer ends it or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_word_of_the_trainer, daemon=True).start()


def _end_on_word_of_the_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
