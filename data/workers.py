"""Worker processes: of the loaders, and of one function over many items.

Every batch that a loader's worker makes arrives, or the program ends. torch sends batches from a
thread of the worker; on an error it prints it and drops the batch, and the loader waits for ever,
or goes on without it. So whatever can fail is done before, in the worker's main code, whose errors
reach the loader, and a worker that cannot send a batch exits.
"""

import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from data.files import errors_naming

SHARED_MEMORY = "/dev/shm"  # where Linux keeps it; a container has 64 MB unless told otherwise
LARGER_SHARED_MEMORY = f"give the container a larger {SHARED_MEMORY} (docker run --shm-size=8g)"
SHARED_MEMORY_CURE = (
    f"{LARGER_SHARED_MEMORY}, or use fewer workers (num_workers; 0 needs none) or smaller batches"
)
WORKER_ERROR = "Caught ValueError in DataLoader worker process"  # how torch begins the text of one


# ---------------------------------------------------------------------------------- in the workers


def start_worker(worker: int) -> None:
    """The worker_init_fn of every loader: a worker that cannot send a batch ends."""

    def end_worker(error: Exception, item: Any) -> None:
        print(f"error: a data worker cannot send a batch: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end_worker)


def start_training_worker(worker: int) -> None:
    """start_worker, deaf to requests to stop, which often reach the whole process group.

    The trainer needs batches to finish its step; a worker ends when its trainer ends it or is gone.
    """
    start_worker(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # a handler does not know who sent the signal, a thread that waits for it does
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_trainer_says_so, daemon=True).start()


def _exit_when_the_trainer_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass  # from others
    os._exit(0)


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
        size = sum(tensor.nbytes for tensor in tensors)
        # not there on macOS, which keeps it elsewhere
        free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
        reason = str(error).rpartition(": ")[2].partition("\n")[0]
        raise ValueError(
            f"no room for a batch of {size / 1e6:.1f} MB in {SHARED_MEMORY}, where "
            f"{free / 1e6:.1f} MB are free ({reason}): {SHARED_MEMORY_CURE}"
        ) from None
    return batch


# -------------------------------------------------------------------------------------- of a loader


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


# ----------------------------------------------------------------------------------- of a function


def map_in_processes(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterator[Any]:
    """function(item) of each item, in order. After an error the others finish what they have begun.

    Raises:
        BrokenProcessPool: a worker was killed.
        OSError: there is no room for what they share.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            pool = ProcessPoolExecutor(workers, initializer=_start_process)
        except OSError as error:  # of its semaphores
            reason = f"processes cannot be started ({error.strerror})"
            raise OSError(f"{reason}: use 1, or {LARGER_SHARED_MEMORY}") from error
        items, submit = iter(items), partial(pool.submit, _through_a_file, folder, function)
        try:
            # no more than can be worked on: the items may be many
            waiting = deque(map(submit, islice(items, 2 * workers)))
            while waiting:
                answer = Path(waiting.popleft().result())
                result = pickle.loads(answer.read_bytes())
                answer.unlink()
                yield result
                waiting.extend(map(submit, islice(items, 1)))
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Let a worker end with its parent, even a killed one: the next run writes the same files."""

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Ctrl-C reaches the parent, too, which says so
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))


def _through_a_file(folder: str, function: Callable[[Any], Any], item: Any) -> str:
    """A pipe takes 4 kB at once: all would wait for the rest of a longer, broken answer."""
    result = pickle.dumps(function(item))
    path = Path(folder, f"{os.getpid()}-{time.monotonic_ns()}")
    with errors_naming(path):
        path.write_bytes(result)
    return str(path)
