"""Clocks of scripts/benchmark.py: ways of doing something in turn with the machine's matrix products; parts; memory.

A machine's speed changes while one measures. So the ways are timed in rounds, one after the other, each right after the
rate of torch.mm; figures are medians over the rounds, with the lowest and the highest.
"""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import torch

GIB = 2**30
MM_SIZES = {"cpu": (1024, 1536, 2048), "cuda": (4096, 6144, 8192)}  # of square matrices
MM_SECONDS = 0.2  # for each size, each time
WARM_UP_CALLS, WARM_UP_SECONDS = 2, 10.0  # the first call pays for allocations, and compilation
PARTS_SECONDS = 10.0  # then a call by parts is the last
# What train_flowtok.sh tells glibc's malloc on a CPU: to keep what is freed. Read when a process starts.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": 2**35,
    "MALLOC_TRIM_THRESHOLD_": 2**35,
    "MALLOC_TOP_PAD_": 2**30,
}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Way = Callable[[], Any]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(way: Way, device: torch.device, length: float) -> float:
    """Mean over calls for about `length` seconds, at least one; waits for the device after the first and the last."""
    wait(device)
    start = time.perf_counter()
    way()
    wait(device)
    more = int(length / (time.perf_counter() - start))
    for _ in range(more):
        way()
    wait(device)
    return (time.perf_counter() - start) / (1 + more)


class MatrixProducts:
    """FLOP/s of torch.mm: the best of a few large sizes."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.squares = [
            torch.randn(n, n, device=device, dtype=dtype) for n in MM_SIZES[device.type]
        ]

    def rate(self) -> float:
        """As of now."""
        rates = []
        for square in self.squares:
            seconds = seconds_per_call(
                lambda square=square: torch.mm(square, square), self.device, MM_SECONDS
            )
            rates.append(2 * len(square) ** 3 / seconds)
        return max(rates)


@dataclass
class Timing:
    """By way: seconds a call, and the FLOP/s of torch.mm right before, of each round."""

    seconds: dict[str, list[float]]
    peaks: dict[str, list[float]]

    def figures(self, name: str, samples: int, gflop_per_sample: float) -> dict:
        """A way whose call does `samples` samples, as it is reported."""
        times, peaks = self.seconds[name], self.peaks[name]
        flops = 1e9 * gflop_per_sample * samples
        return {
            "samples_per_second": spread(samples / t for t in times),
            "seconds_per_sample": spread(t / samples for t in times),
            "share": spread(flops / t / peak for t, peak in zip(times, peaks, strict=True)),
            "gflop_per_sample": gflop_per_sample,
            "peak_gflop_per_second": spread(peak / 1e9 for peak in peaks),
        }

    def ratio(self, slow: str, fast: str) -> dict:
        """How many times as long a way takes as another, of the same round."""
        return spread(s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=True))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    values = list(values)
    return {"median": median(values), "low": min(values), "high": max(values)}


def alternate(
    ways: dict[str, Way],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    rounds: int,
    is_warm: Collection[str] = (),
) -> Timing:
    """Time each way for `seconds` in all, in so many rounds; a round has one call at least. is_warm: ran before."""
    products = MatrixProducts(device, dtype)
    for way in (way for name, way in ways.items() if name not in is_warm):
        start = time.perf_counter()
        for _ in range(WARM_UP_CALLS):
            if time.perf_counter() - start < WARM_UP_SECONDS:
                way()
                wait(device)
    timing = Timing({name: [] for name in ways}, {name: [] for name in ways})
    for _ in range(rounds):
        for name, way in ways.items():
            timing.peaks[name].append(products.rate())
            timing.seconds[name].append(seconds_per_call(way, device, seconds / rounds))
    return timing


class Parts:
    """Seconds by part of one call. Waits for the device around each part, so that a call takes a little longer."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, whose time counts as part `name`."""

        @wraps(function)
        def wrapper(*args, **kwargs):
            wait(self.device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait(self.device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return wrapper

    def iterate(self, name: str, items: Iterator) -> Iterator:
        """The items, whose making counts as part `name`."""
        return iter(self.timed(name, items.__next__), object())

    def measure(
        self, call: Way, methods: list[tuple[str, object, str]], calls: int = 3
    ) -> dict[str, float]:
        """Seconds a call of each part, (name, object, its method), and of the rest, "other"; fewer calls if slow."""
        with ExitStack() as stack:
            for name, owner, method in methods:
                self.seconds.setdefault(name, 0.0)
                stack.enter_context(
                    replaced(owner, method, self.timed(name, getattr(owner, method)))
                )
            times = [seconds_per_call(call, self.device, 0)]
            while len(times) < calls and sum(times) < PARTS_SECONDS:
                times.append(seconds_per_call(call, self.device, 0))
        self.seconds["other"] = sum(times) - sum(self.seconds.values())
        return {name: seconds / len(times) for name, seconds in self.seconds.items()}


@contextmanager
def replaced(owner: object, name: str, value: object):
    """An attribute of one object for a while; its class stays as it is."""
    own = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, own)


class Memory:
    """Most memory since the start: of CUDA tensors, or what this process had in RAM above what it had then."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # where it can't be done, the start is an earlier peak
            CLEAR.write_text("5")  # Linux: the high-water mark goes down to what is there now
        self.start = high_water_mark()

    def peak_gib(self) -> float:
        """GiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        return (high_water_mark() - self.start) / GIB


def high_water_mark() -> int:
    """Bytes of RAM that this process had at most."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def start_again_keeping_memory() -> None:
    """Run this program anew with MALLOC, of which the user's own values stay; only on a CPU under Linux."""
    lacking = {name: str(value) for name, value in MALLOC.items() if name not in os.environ}
    if lacking and sys.platform == "linux" and not torch.cuda.is_available():
        os.execve(sys.executable, sys.orig_argv, os.environ | lacking)


def describe_machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "malloc": {name: os.environ[name] for name in MALLOC if name in os.environ},
        "load": os.getloadavg()[0],
    }


def cpu_model() -> str:
    """Its name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
