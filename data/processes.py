"""One function over many items in several processes, in order."""

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from data.files import errors_naming


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
            pool = ProcessPoolExecutor(workers, initializer=_start_worker)
        except OSError as error:  # of its semaphores
            raise OSError(
                f"processes cannot be started ({error.strerror}): use 1, or give the container a "
                "larger /dev/shm (docker run --shm-size=8g)"
            ) from error
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


def _start_worker() -> None:
    """Let a worker end with its parent, even a killed one: the next run writes the same files."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches the parent, too, which says so
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _through_a_file(folder: str, function: Callable[[Any], Any], item: Any) -> str:
    """A pipe takes 4 kB at once: all would wait for the rest of a longer, broken answer."""
    result = pickle.dumps(function(item))
    path = Path(folder, f"{os.getpid()}-{time.monotonic_ns()}")
    with errors_naming(path):
        path.write_bytes(result)
    return str(path)
