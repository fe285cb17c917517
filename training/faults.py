"""What other processes do to this one: data workers that die, training processes that die or hang.

Each ends the training with one line that names the cause, as an OSError; the last checkpoint is whole, and running the
same command again goes on from it.
"""

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch.distributed as dist

GO_ON = "Run the same command again to go on"


@contextmanager
def explain_faults(timeout_minutes: float) -> Iterator[list[BaseProcess]]:
    """Turn errors that another process caused into one line. The caller puts its data workers into the list it gets.

    Raises:
        ChildProcessError: a data worker died.
        ConnectionError: another training process died.
        TimeoutError: one of both was silent for `timeout_minutes`.
    """
    workers: list[BaseProcess] = []
    try:
        yield workers
    except (RuntimeError, OSError, EOFError) as error:  # of a dead worker: whatever was being read from it
        text = str(error)
        if reason := describe_dead_worker(error, workers):
            raise ChildProcessError(f"{reason}. {GO_ON}") from error
        from_worker, from_trainer = text.startswith("DataLoader"), "gloo/" in text or isinstance(error, dist.DistError)
        if not (from_worker or from_trainer):
            raise
        if "timed out" in text.lower():
            who = "the data workers gave no batch" if from_worker else "another process of this training did not answer"
            reason = f"{who} for training.timeout_minutes={timeout_minutes:g}: it hangs, or storage or a machine does"
            raise TimeoutError(f"{reason}. {GO_ON}") from error
        raise ConnectionError(f"another process of this training ended; its own output says why. {GO_ON}") from error


def describe_dead_worker(error: Exception, workers: list[BaseProcess]) -> str:
    """One line on the first data worker that is dead, "" if all live."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    dead = [worker for worker in workers if worker.sentinel in ended]
    if dead:
        dead[0].join()
        name, status = f"a data worker (process {dead[0].pid})", dead[0].exitcode
        if status == -signal.SIGKILL:
            return (
                f"{name} was killed (SIGKILL), as the system does when memory runs out: if so, lower data.num_workers "
                "or data.shuffle_buffer"
            )
        return f"{name} ended with {f'signal {-status}' if status < 0 else f'status {status}'}"
    return str(error) if str(error).startswith("DataLoader worker") else ""


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
