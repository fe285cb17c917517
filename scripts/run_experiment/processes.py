"""Machines and processes of a job, and a stage that runs in them.

The processes find each other by the variables that torchrun sets. They are started here, without
accelerate's launcher or torchrun in between: a signal reaches the trainers, their exit status is
the stage's, no traceback but their own is printed, and no config file of accelerate's is read.
"""

import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from training.errors import ERROR_SIGNAL, ERROR_STATUS, STOPPED_STATUS

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # of Linux's <sys/prctl.h>
POLL_SECONDS = 0.1
# A program that starts up does not hear a request to stop, so it is repeated.
REPEAT_SECONDS = 2.0
# What other launchers, MPI and accelerate's settings leave: our processes would wait for a group
# that nobody forms, or train in another way than their config says.
FOREIGN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|FORK_LAUNCHED|MPI_LOCAL\w+|"
    r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|TORCHELASTIC|PMI|OMPI_COMM|MV2_COMM)_\w+"
)
# glibc gives back what a step frees and faults it in again in the next one: up to a third of the
# time of a large network on a CPU.
KEEP_FREED_MEMORY = {
    "MALLOC_TOP_PAD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 35),
}


@dataclass(frozen=True)
class Job:
    """How many processes run where."""

    num_machines: int
    machine_rank: int
    num_processes: int  # of the whole job
    host: str  # of machine rank 0
    port: int  # there
    on_gpus: bool
    num_threads: int  # OpenMP's, of each process

    def __str__(self) -> str:
        return (
            f"NUM_MACHINES={self.num_machines} MACHINE_RANK={self.machine_rank} "
            f"MAIN_PROCESS_IP={self.host} MAIN_PROCESS_PORT={self.port} "
            f"NUM_PROCESSES={self.num_processes} OMP_NUM_THREADS={self.num_threads} "
            f"on {'GPUs' if self.on_gpus else 'the CPU'}"
        )

    @property
    def processes_here(self) -> int:
        """Those of this machine, as many as on every other."""
        return self.num_processes // self.num_machines

    def environments(self, variables: Mapping[str, str]) -> list[dict[str, str]]:
        common = clean(variables) | {"OMP_NUM_THREADS": str(self.num_threads)}
        if not self.on_gpus:
            common = KEEP_FREED_MEMORY | common | {"ACCELERATE_USE_CPU": "true"}
        # One process forms no group: nothing has to listen on a port.
        if self.num_processes == 1:
            return [common]
        common |= {
            "WORLD_SIZE": str(self.num_processes),
            "LOCAL_WORLD_SIZE": str(self.processes_here),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
        }
        first = self.machine_rank * self.processes_here
        return [
            common | {"LOCAL_RANK": str(local_rank), "RANK": str(first + local_rank)}
            for local_rank in range(self.processes_here)
        ]


def clean(variables: Mapping[str, str]) -> dict[str, str]:
    """An environment without what decides, beside our command and its config, how a stage runs."""
    return {name: value for name, value in variables.items() if not FOREIGN.fullmatch(name)}


def find_job(
    variables: Mapping[str, str], num_gpus: int, num_cores: int, cpu_processes: int = 1
) -> Job:
    """The job that our variables describe or, where one is not set, Slurm's or torchrun's.

    Args:
        num_gpus: of this machine, as num_cores.
        cpu_processes: on each machine without GPUs, where no variable says how many.

    Raises:
        ValueError: a variable that can't be, by name and value.
    """
    # VARIABLE= on the command line takes one away that the shell exports.
    variables = {name: value for name, value in variables.items() if value}
    if variables.get("SLURM_LOCALID", variables.get("LOCAL_RANK", "0")) != "0":
        raise ValueError("started more than once on a machine: start it once (--ntasks-per-node 1)")
    variables = launcher_defaults(variables) | variables

    # Machines, and where the first one is.
    num_machines = read_number(variables, "NUM_MACHINES", default=1, least=1)
    machine_rank = read_number(variables, "MACHINE_RANK", default=0, least=0)
    if machine_rank >= num_machines:
        raise ValueError(f"MACHINE_RANK={machine_rank} must be below NUM_MACHINES={num_machines}")
    host = variables.get("MAIN_PROCESS_IP") or first_host(variables, num_machines)
    port = read_number(variables, "MAIN_PROCESS_PORT", 29500 if num_machines > 1 else 0, least=0)

    # Processes: one a GPU
    wanted = num_machines * (num_gpus or min(cpu_processes, num_cores))
    num_processes = read_number(variables, "NUM_PROCESSES", default=wanted, least=1)
    per_machine, rest = divmod(num_processes, num_machines)
    if rest:
        raise ValueError(
            f"NUM_PROCESSES={num_processes}, of the whole job, must be a multiple of "
            f"NUM_MACHINES={num_machines}"
        )
    if 0 < num_gpus < per_machine:
        raise ValueError(
            f"NUM_PROCESSES={num_processes} needs {per_machine} GPUs on each of {num_machines} "
            f"machine(s); here are {num_gpus}"
        )
    threads = 1 if num_gpus else max(num_cores // per_machine, 1)
    return Job(
        num_machines=num_machines,
        machine_rank=machine_rank,
        num_processes=num_processes,
        host=host,
        port=port or free_port(),
        on_gpus=num_gpus > 0,
        num_threads=read_number(variables, "OMP_NUM_THREADS", default=threads, least=1),
    )


def count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launcher_defaults(variables: Mapping[str, str]) -> dict[str, str]:
    """Our variables from those of Slurm, or of torchrun."""
    if "SLURM_NNODES" in variables:
        rank = variables.get("SLURM_NODEID", "0")
        return {"NUM_MACHINES": variables["SLURM_NNODES"], "MACHINE_RANK": rank}
    names = {"MASTER_ADDR": "MAIN_PROCESS_IP", "MASTER_PORT": "MAIN_PROCESS_PORT"}
    found = {ours: variables[name] for name, ours in names.items() if name in variables}
    # WORLD_SIZE alone counts machines on some clusters.
    if {"WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= variables.keys():
        num_processes = read_number(variables, "WORLD_SIZE", default=1, least=1)
        per_machine = read_number(variables, "LOCAL_WORLD_SIZE", default=1, least=1)
        found["NUM_PROCESSES"] = str(num_processes)
        found["NUM_MACHINES"] = str(num_processes // per_machine)
        found["MACHINE_RANK"] = variables.get("GROUP_RANK", "0")
    return found


def read_number(variables: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = variables.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text} is not a number >= {least}")
    return int(text)


def first_host(variables: Mapping[str, str], num_machines: int) -> str:
    """The host of machine rank 0: this one, or the first of a Slurm job.

    Raises:
        ValueError: it is not known.
    """
    if num_machines == 1:
        return "127.0.0.1"
    nodes = variables.get("SLURM_JOB_NODELIST")
    if not nodes or not shutil.which("scontrol"):
        raise ValueError(f"NUM_MACHINES={num_machines}: set MAIN_PROCESS_IP to the host of rank 0")
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def free_port() -> int:
    # Below those that systems hand out to whoever asks: they are gone a moment later.
    while True:
        port = random.SystemRandom().randint(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Runner:
    """Runs one command at a time, and passes requests to stop on to its processes.

    The first request, by whichever signal, asks trainers to finish their step, write a checkpoint
    and end with STOPPED_STATUS; the second one ends the processes, the third one kills them.
    """

    def __init__(self):
        self.requests = 0
        self._has_error = False
        self._processes: list[subprocess.Popen] = []
        signal.signal(ERROR_SIGNAL, self._on_error)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        self.requests += 1
        # Between two stages the first request waits for the next one's start, the second does not.
        if not self._processes and self.requests > 1:
            raise SystemExit(128 + number)
        self._pass_on()

    def _on_error(self, number: int, frame) -> None:
        # One of several processes has printed its error and waits to be ended with the others.
        self._has_error = True
        self._kill()

    def _pass_on(self) -> None:
        numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)
        for process in self._processes:
            process.send_signal(numbers[min(self.requests, 3) - 1])

    def _kill(self) -> None:
        # With their data workers: what a process writes gets its name when it is whole.
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def run(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
        """Exit status of a command that runs once in each environment: that of the first failure.

        The processes have sessions of their own: Ctrl-C in a terminal comes to this program only.
        """
        own = {"start_new_session": True, "preexec_fn": partial(begin, launcher=os.getpid())}
        try:
            for environment in environments:
                self._processes.append(subprocess.Popen(command, env=environment, **own))

            # One that fails ends all: the others would wait for it. A clean stop is no failure.
            next_repeat = time.monotonic() + REPEAT_SECONDS
            while True:
                statuses = [process.poll() for process in self._processes]
                failed = [s for s in statuses if s not in (None, 0, STOPPED_STATUS)]
                if self._has_error:
                    return ERROR_STATUS
                if failed:
                    status = min(failed)
                    return status if status > 0 else 128 - status  # as a shell counts signals
                if None not in statuses:
                    return max(statuses, default=0)
                if self.requests and time.monotonic() > next_repeat:
                    self._pass_on()
                    next_repeat += REPEAT_SECONDS
                time.sleep(POLL_SECONDS)
        finally:
            self._kill()
            for process in self._processes:
                process.wait()
            self._processes = []


def begin(launcher: int) -> None:
    """In a new process: end with the launcher, and not by SIGUSR1 before there is a handler."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Other systems have no such call: there, what a kill -9 leaves goes on.
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The launcher was killed meanwhile.
        if os.getppid() != launcher:
            os._exit(1)
