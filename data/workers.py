"""Worker processes of the loaders: every batch that one makes arrives, or the program ends.

torch sends batches from a thread of the worker; on an error it prints it and drops the batch. The
loader then waits for ever, or goes on without it. So whatever can fail is done before, in the
worker's main code, whose errors reach the loader, and a worker that cannot send a batch exits.
"""

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler
from torch.utils.data.dataloader import _BaseDataLoaderIter

SHARED_MEMORY = "/dev/shm"  # where Linux keeps it; a container has 64 MB unless told otherwise
SHARED_MEMORY_CURE = (
    f"give the container a larger {SHARED_MEMORY} (docker run --shm-size=8g), or use fewer workers "
    "(num_workers; 0 needs none) or smaller batches"
)
WORKER_ERROR = "Caught ValueError in DataLoader worker process"  # how torch begins the text of one


def start_worker(worker: int) -> None:
    """The worker_init_fn of every loader: a worker that cannot send a batch ends."""
    Queue._on_queue_feeder_error = staticmethod(_end_worker)


def start_training_worker(worker: int) -> None:
    """start_worker, deaf to requests to stop, which often reach the whole process group.

    The trainer needs batches to finish its step; a worker ends when its trainer ends it or is gone.
    """
    start_worker(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_when_the_trainer_says_so, daemon=True).start()


def exit_when_the_trainer_says_so() -> None:
    """Wait for a SIGTERM from the parent; those from others are ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _end_worker(error: Exception, item: Any) -> None:
    print(f"error: a data worker cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def share_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch; in a worker, its tensors are moved into shared memory.

    Raises:
        ValueError: there is no room for it.
    """
    if get_worker_info() is None:
        return batch
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        place = f"{SHARED_MEMORY}, where {_free_megabytes()} MB are free"
        reason = str(error).rpartition(": ")[2].partition("\n")[0]
        raise ValueError(
            f"no room for a batch of {size:.1f} MB in {place} ({reason}): {SHARED_MEMORY_CURE}"
        ) from None
    return batch


def _free_megabytes() -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # not there: macOS keeps it elsewhere
        return "no"
    return f"{usage.free / 1e6:.1f} of {usage.total / 1e6:.1f}"


def start_batches(loader) -> Iterator[dict[str, Any]]:
    """The batches of a loader, whose workers are started.

    Raises:
        OSError: they cannot be.
    """
    try:
        return with_short_errors(iter(loader))
    except OSError as error:  # of the semaphores, which lie in shared memory, or of fork
        # what was begun would fail once more, with a traceback, when it is thrown away
        for frame, _ in traceback.walk_tb(error.__traceback__):
            begun = frame.f_locals.get("self")
            if isinstance(begun, _BaseDataLoaderIter):
                begun._shutdown = True
        reason = f"data workers cannot be started ({error.strerror})"
        raise OSError(f"{reason}: {SHARED_MEMORY_CURE}") from error


def with_short_errors(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches; torch puts a worker's traceback into the message of its error."""
    try:
        yield from batches
    except ValueError as error:
        text = str(error)
        if not text.startswith(WORKER_ERROR):
            raise
        raise ValueError(text.rpartition("\nValueError: ")[2].strip()) from error


def restore_sigchld_default() -> None:
    """Undo torch's SIGCHLD handler, which raises between any two instructions, even in a save.

    A loader that waits for a batch checks every few seconds that its workers are alive.
    """
    _set_SIGCHLD_handler()  # torch sets it once per process: not again for the next loader
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def describe_lost_batch(error: Exception) -> str:
    """One line if a worker of another loader, e.g. an evaluation's, caused the error; else ""."""
    # gloo's connection errors are RuntimeErrors, so these are a worker's
    if isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError):
        return "a data worker ended while a batch was read from it"
    return str(error) if str(error).startswith("DataLoader worker") else ""
