"""Programs in real processes that start in milliseconds: forked from a server that only imports.

What is forked is what `python SCRIPT ARGUMENTS` has after its imports: a process of its own, in a
process group of its own, with its output in a file. A signal to it is a real signal.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.run_experiment.processes import free_port

ROOT = Path(__file__).parents[1]
PACE = 0.0005  # seconds between two looks
CLONE_NEWNS = 0x20000  # of <sched.h>; os.unshare is new in Python 3.12


class Program:
    """A started script, or module if it has no ".py"; `variables` are added to its environment.

    `first` is called in the new process before; it must be defined where the server can import it.
    """

    def __init__(
        self,
        log: Path,
        script: str,
        *arguments: str,
        first: Callable[[], object] | None = None,
        **variables: str,
    ):
        self.log = log
        words = (log, script, arguments, variables, first)
        self.process = server().Process(target=run_script, args=words)
        self.process.start()

    @property
    def pid(self) -> int:
        """Process id, and that of its group."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def children(self) -> list[int]:
        """Process ids of its data workers."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def wait(self, seconds: float = 120.0) -> int:
        """Exit status; negative: the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill_group()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    def wait_until(self, holds: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Look until `holds()`; False if the program ended before."""
        deadline = time.monotonic() + seconds
        while not holds():
            if self.process.exitcode is not None:
                return False
            if time.monotonic() > deadline:
                self.kill_group()
                raise AssertionError(f"waited {seconds} s for nothing:\n{self.output}")
            time.sleep(PACE)
        return True

    def signal_group(self, number: int) -> None:
        """To all processes of its group, as Ctrl-C in a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> int:
        """SIGKILL to the program only, whose data workers notice; returns the exit status."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def kill_group(self) -> int:
        """SIGKILL to all processes of its group that are left; returns the exit status."""
        with suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)
        self.process.join()
        return self.process.exitcode


def server() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from the server; the first call starts it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "tiny_experiment"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def run_script(
    log: Path,
    script: str,
    arguments: tuple,
    variables: dict[str, str],
    first: Callable[[], object] | None,
) -> None:
    """In the new process: become `python SCRIPT ARGUMENTS`."""
    os.setsid()
    # Of its data workers, as in a program of its own.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.chdir(ROOT)
    os.environ.update(variables)
    if first is not None:
        first()
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def wait_for_end(pids: Iterable[int | str], seconds: float = 60.0) -> None:
    """Until processes that need not be our children have ended."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_running(pid: int | str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def can_mount() -> bool:
    """Whether `mount_little` works here: in a container it often does not."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


def mount_little(place: str, size: str) -> None:
    """An empty disk of a size, as 100k or 1m, at a place that only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)


def in_two_processes(function: Callable[[int], object], folder: Path) -> list:
    """What function(rank) returns in each of two processes of a gloo group; `folder` is empty."""
    processes = [
        server().Process(target=run_rank, args=(function, folder, rank)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def run_rank(function: Callable[[int], object], folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def start_ranks(log: Path, number: int, script: str, *arguments: str) -> list[Program]:
    """Processes of one gloo group, by the variables that torchrun sets; logs are log.0, ..."""
    variables = {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_port())}
    variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(number))
    programs = []
    for rank in range(number):
        own = variables | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        own_log = log.with_name(f"{log.name}.{rank}")
        programs.append(Program(own_log, script, *arguments, **own))
    return programs
