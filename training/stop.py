"""Stopping a run cleanly: signals, a wall-clock limit, and what all processes agree on.

SIGTERM, SIGUSR1 (Slurm's warning) and SIGINT (Ctrl-C) let the current step finish; the trainer then writes a checkpoint
and ends the program with STOPPED_STATUS, by which a requeue script knows it. A second SIGTERM or SIGINT ends it at
once, but not one that comes together with the first: queue, launcher and torchrun may each pass on the same request.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from training.run import TIMEOUT_MINUTES, patience

STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOPPED_FILE = (
    "stopped"  # in the run folder: why it stopped. torchrun turns every exit status into 1
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST = 1.0  # seconds


class StopRequest:
    """Whether the run is to stop after this step, and why. Use as a context: the old signal handlers come back."""

    def __init__(self, max_hours: float, started: float, timeout_minutes: float = TIMEOUT_MINUTES):
        self._deadline = started + 3600 * max_hours if max_hours else float("inf")
        self._max_hours = max_hours
        self._patience = patience(timeout_minutes)
        self._reason = ""
        self._signalled: float | None = None  # when the first signal came
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._group = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(
                timeout=self._patience, backend="gloo"
            )  # on the CPU: no device sync
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled, self._reason = now, f"signal {signal.Signals(number).name}"
        elif number != signal.SIGUSR1 and now > self._signalled + SAME_REQUEST:
            os._exit(128 + number)

    def reason(self) -> str:
        """Why all processes stop now; "" if they go on. Called by every process after every step.

        With several processes the answer is that of the step before, so that nobody waits for it.
        """
        if not self._reason and time.monotonic() > self._deadline:
            self._reason = f"training.max_hours={self._max_hours:g} are over"
        if self._group is None:
            return self._reason
        agreed = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([float(bool(self._reason))])
        self._pending = (
            flag,
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True),
        )
        return (self._reason or "another process was told to") if agreed else ""


@contextmanager
def stop_at_once(run_dir: Path) -> Iterator[None]:
    """For work that is written whole, piece by piece: a signal ends the program with STOPPED_STATUS, after a note.

    Processes that are forked inside don't listen: what is sent to the whole group is for this one.
    """
    clear_mark(run_dir)
    owner = os.getpid()

    def on_signal(number: int, frame) -> None:
        if os.getpid() == owner:
            for other in SIGNALS:
                signal.signal(other, signal.SIG_IGN if other == signal.SIGUSR1 else signal.SIG_DFL)
            reason = f"signal {signal.Signals(number).name}"
            mark_stopped(run_dir, reason)
            print(f"{run_dir}: stopped ({reason}); run the same command again to go on", flush=True)
            raise SystemExit(STOPPED_STATUS)

    handlers = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def mark_stopped(run_dir: Path, reason: str) -> None:
    """Leave a note for the launcher."""
    (run_dir / STOPPED_FILE).write_text(reason + "\n")


def clear_mark(run_dir: Path) -> None:
    """Remove the note of an earlier start."""
    (run_dir / STOPPED_FILE).unlink(missing_ok=True)
