"""What this machine offers a job: devices, exchange between processes, file systems, memory.

Rows of the table of scripts/doctor.py.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import accelerate
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from configs.load import one_line
from data.files import folder_written_whole, write_text
from scripts.plan import RESERVE
from scripts.run_experiment.processes import Job
from scripts.run_experiment.stages import Stage
from scripts.workload.fake import GIB

ALL_REDUCE_MIB, ALL_REDUCE_CALLS = 64, 5
EXCHANGE_LIMIT = timedelta(seconds=60)


class Row(NamedTuple):
    """A line of the table."""

    verdict: str  # ok, note, STOP
    what: str
    found: str


def look_at_machine(job: Job) -> Iterator[Row]:
    """Versions and devices."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = f"Python {python}, torch {torch.__version__}, accelerate {accelerate.__version__}"
    yield Row("ok", "versions", versions)
    if not job.on_gpus:
        yield Row("note", "devices", f"no GPU, {job.num_threads} CPU threads a process")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        text = f"{device.name}, {device.total_memory / GIB:.1f} GiB, bf16 {'yes' if bf16 else 'no'}"
        yield Row("ok" if bf16 else "note", f"GPU {index}", text)


def look_at_exchange(job: Job) -> Row:
    """The rate of an all-reduce between this machine's processes, NCCL's or gloo's."""
    processes = job.processes_here
    if processes == 1:
        return Row("ok", "all-reduce", "one process on this machine")
    backend = "nccl" if job.on_gpus else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        meeting, result = f"file://{folder}/meeting", Path(folder) / "rate"
        arguments = (processes, backend, meeting, result)
        try:
            # Forked from one that has imported everything, and has not touched a GPU
            mp.start_processes(measure_exchange, arguments, processes, start_method="forkserver")
            rate = float(result.read_text())
        except Exception as error:  # of the workers, of NCCL
            return Row("STOP", "all-reduce", f"{backend} fails: {one_line(error)[-300:]}")
    return Row("ok", "all-reduce", f"{rate:.2f} GB/s between {processes} processes by {backend}")


def measure_exchange(rank: int, processes: int, backend: str, meeting: str, result: Path) -> None:
    """In each process; rank 0 writes GB/s."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend, init_method=meeting, timeout=EXCHANGE_LIMIT, rank=rank, world_size=processes
    )
    values = torch.ones(ALL_REDUCE_MIB * 2**18, device=device)
    dist.all_reduce(values)
    start = time.perf_counter()
    for _ in range(ALL_REDUCE_CALLS):
        dist.all_reduce(values)
    total = values[0].item()  # waits
    if rank == 0:
        seconds = (time.perf_counter() - start) / ALL_REDUCE_CALLS
        result.write_text(str(values.nbytes / seconds / 1e9))
    assert total == processes ** (1 + ALL_REDUCE_CALLS)
    dist.destroy_process_group()


def nearest_folder(path: str) -> Path:
    """The folder itself or the first above it that is there."""
    whole = Path(path).absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def look_at_folders(stages: Sequence[Stage]) -> Iterator[Row]:
    """Whether files and folders can be written, flushed and renamed where the results go."""
    for place in sorted({nearest_folder(stage.config.run_dir) for stage in stages}):
        try:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                start = time.perf_counter()
                with folder_written_whole(Path(folder) / "checkpoint") as partial:
                    write_text("x", partial / "file")
                milliseconds = 1000 * (time.perf_counter() - start)
        except OSError as error:
            yield Row("STOP", str(place), f"can't be written, flushed and renamed in: {error}")
        else:
            yield Row("ok", str(place), f"a file flushed and renamed in {milliseconds:.0f} ms")


def look_at_disk(needs: dict[Path, float]) -> Iterator[Row]:
    """Free space for the checkpoints. needs: GiB by the folder that holds them."""
    by_disk: dict[int, list[Path]] = {}
    for place in needs:
        by_disk.setdefault(place.stat().st_dev, []).append(place)
    for places in by_disk.values():
        needed = sum(needs[place] for place in places)
        free = shutil.disk_usage(places[0]).free / GIB
        text = f"{needed:.2f} GiB for checkpoints, {free:.2f} GiB free"
        if needed > free:
            text += ": free some, set runs_dir, or lower training.keep_checkpoints"
        yield Row("STOP" if needed > free else "ok", f"disk of {places[0]}", text)


def process_memory_gib(job: Job) -> float:
    """Memory for each process of this machine, but for a reserve."""
    if job.on_gpus:
        totals = range(torch.cuda.device_count())
        total = min(torch.cuda.get_device_properties(index).total_memory for index in totals)
    else:
        total = psutil.virtual_memory().available // job.processes_here
    return total / GIB * (1 - RESERVE)
