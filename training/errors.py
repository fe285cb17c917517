"""Errors of the programs end in one line, which is the last thing on the screen.

`accelerate launch` and torchrun answer a failed program with a traceback of their own, in which its
one line is lost, and no exit status or option keeps them from it (accelerate's --quiet works for
one process). The other processes of a launch fail as well, each with an error of its own. So a
program that has said what is wrong ends its launcher and the others:

- accelerate with one process by SIGTERM;
- torchrun's agent, which turns that into a traceback too, by SIGKILL, then the other processes,
  which nobody else would end. A shell sees status 143 or 137 in place of the launchers' 1;
- train_flowtok.sh (scripts/run_experiment) is told by ERROR_SIGNAL, and ends them all.

The launcher is left alone when it has something to say: after a crash (a Python traceback, a
signal) and after a clean stop. Without /proc, as on macOS, it always is.
"""

import fcntl
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MESSAGE = 5000  # characters; a hostile name or value may be longer
OUR_LAUNCHERS = {"scripts.run_experiment", "run_experiment"}  # as a module, as a folder
ERROR_SIGNAL = signal.SIGUSR2
ERROR_STATUS = 2
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h, try again later: stopped on request, all is saved
SECONDS_TO_LIVE = 60.0  # while our launcher ends this process
# Other launchers: the name of their script, or the module after -m.
LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}


def exit_on_error(action: Callable):
    """Run `action`; an error that is the user's, the data's or a machine's ends with one line.

    Those are ValueError, FloatingPointError (numbers gone wild) and OSError (disks, processes).
    The exit status is 2; of several processes with the same error, one prints it.
    """
    try:
        result = action()
    except (ValueError, FloatingPointError, OSError) as error:
        # The nearest line of ours: a library's tells neither the user nor us what was tried.
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(filter(is_ours, reversed(frames)), frames[-1])
        message = printable(" ".join(str(error).split())[:MAX_MESSAGE]) or type(error).__name__
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        report_error(f"error: {message} ({place})")
        raise SystemExit(ERROR_STATUS) from None
    # NCCL warns of a group that is left to the exit. After an error it is: to end it may mean to
    # wait for a process that hangs. run_experiment never imports torch, which takes seconds.
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        dist.destroy_process_group()
    return result


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a line of a traceback is in this repository, not in a package."""
    path = Path(frame.filename)
    return ROOT in path.parents and "site-packages" not in path.parts


def printable(text: str) -> str:
    """Data or arguments with escapes for what a terminal would obey or can't print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def report_error(line: str) -> None:
    """Print the error that ends this program and end its launcher; the caller then exits.

    Of several processes of one launch the first one does so: most errors are found by all.
    """
    if is_first_of_launch():
        print(line, file=sys.stderr, flush=True)
        end_launcher(os.getppid())


def is_first_of_launch() -> bool:
    """Whether no other process of this machine's launch reports an error; if one does, wait for it.

    They race for a lock on a file that only they share and nobody has to delete: their parent's
    entry in /proc. The lock is held until the process ends.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return True
    try:
        lock = os.open(f"/proc/{os.getppid()}/cmdline", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Whoever exited before the first one is done would have the launcher say so.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return False
    except OSError:
        pass  # no such file, or one without locks
    return True


def end_launcher(parent: int) -> None:
    """End the launcher that waits for this process, if its parent is one."""
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
        launcher = program_of(command.split("\0"))
        if launcher not in OUR_LAUNCHERS | LAUNCHERS:
            return
        others = find_siblings(parent)
        if len(others) + 1 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            return  # one has crashed: how, the launcher will say
        if launcher in OUR_LAUNCHERS:
            # Alive until the others are ended: they would report the connection that breaks.
            if others:
                os.kill(parent, ERROR_SIGNAL)
                time.sleep(SECONDS_TO_LIVE)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            # The agent gave each process a group of its own: data workers end with it.
            os.kill(parent, signal.SIGKILL)
            for pid in others:
                os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(parent, signal.SIGTERM)
    except OSError:
        pass  # ended by itself meanwhile, or not ours to end


def program_of(words: Sequence[str]) -> str:
    """The script or module that a Python command line runs, "" if it is no Python's."""
    if not Path(words[0]).name.startswith("python"):
        return ""
    rest = dropwhile(lambda word: word.startswith("-") and word != "-m", words[1:])
    first = next(rest, "")
    return next(rest, "") if first == "-m" else Path(first).name


def find_siblings(parent: int) -> list[int]:
    """The other living processes of this launch on this machine."""
    if "MASTER_PORT" not in os.environ:
        return []
    # A launcher may start other programs as well; only those of one launch share a port.
    mark = f"MASTER_PORT={os.environ['MASTER_PORT']}".encode()
    children = [
        path.read_text().split() for path in Path(f"/proc/{parent}/task").glob("*/children")
    ]
    pids = {int(pid) for threads in children for pid in threads} - {os.getpid()}
    return [pid for pid in pids if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
