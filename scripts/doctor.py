"""Whether this machine can run an experiment, before a queue is waited for.

    python scripts/doctor.py [EXPERIMENT ...] [key=value ...]

Words and variables are those of train_flowtok.sh; run it on a node like those that will train. A
table: "ok", "note" or "STOP", what was looked at, what was found and what to do. Exit status: 0, or
1 if something would stop the run. A step of each stage runs on made-up data with random weights, at
the config's batch as far as it fits --seconds; days leave out reading data.
Nothing is downloaded, and nothing stays on the disk.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import accelerate
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from configs.load import load_dataclass, one_line
from data.files import folder_written_whole, write_text
from data.shards import PREFETCH_BATCHES
from data.workers import SHARED_MEMORY, SHARED_MEMORY_CURE
from eval.feature_nets import PUBLISHED
from eval.programs import build_parser
from eval.protocol import Protocol, protocol_file
from modeling.clip_weights import AbsentWeights, check_clip, find_weights, why_hub_is_silent
from modeling.perceptual import CONVNEXT_FILE, VGG16_FILE
from modeling.published import PublishedWeights
from modeling.text_encoder import TextEncoderConfig
from modeling.transformers_text import load_part
from scripts.benchmark import DTYPES, mm_rate, seconds_per_call
from scripts.plan import DAY, RESERVE, disk_gib, fit_mode
from scripts.run_experiment import checks
from scripts.run_experiment.processes import Job, clean, count_cores, find_job
from scripts.run_experiment.stages import WITHOUT_NETWORK, Stage, read_stages
from scripts.workload.fake import GIB, measure_step
from scripts.workload.sizes import Stage as SizedStage
from scripts.workload.sizes import is_of_codes, read_stage, why_unplanned
from scripts.workload.steps import make_batch, repeated_step
from training.errors import exit_on_error, printable
from training.run import start_run

OTHER_FILES = 256  # that a process has open beside its workers' batches
ALL_REDUCE_MIB, ALL_REDUCE_CALLS = 64, 5
EXCHANGE_LIMIT = timedelta(seconds=60)


class Row(NamedTuple):
    verdict: str  # ok, note, STOP
    what: str
    found: str


def main(args: argparse.Namespace) -> int:
    stages = read_stages(args.words, os.environ.get("STAGES", ""), Path("configs"))
    stages, _ = checks.skip_stages(stages)
    job = find_job(
        os.environ, torch.cuda.device_count(), count_cores(), checks.cpu_processes(stages)
    )
    # A launcher's variables would have this one process wait for others.
    for name in os.environ.keys() - clean(os.environ).keys():
        del os.environ[name]
    rows = []
    for row in examine(stages, job, args.seconds):
        print(f"{row.verdict:4}  {row.what}: {printable(row.found)}", flush=True)
        rows.append(row)
    stops = sum(row.verdict == "STOP" for row in rows)
    print(f"{stops} of {len(rows)} would stop the run" if stops else "nothing would stop the run")
    return 1 if stops else 0


def examine(stages: Sequence[Stage], job: Job, seconds: float) -> Iterator[Row]:
    # The quick ones first: a step of each stage takes minutes.
    yield from look_at_machine(job)
    yield look_at_exchange(job)
    try:
        checks.check_configs(stages, job.num_processes)
    except ValueError as error:
        yield Row("STOP", "configs", one_line(error))
        return
    yield from look_at_folders(stages)
    for stage, error in checks.input_errors(stages):
        verdict, found = ("STOP", one_line(error)) if error else ("ok", "there")
        yield Row(verdict, f"{stage} inputs", found)
        yield from look_at_weights(stage)

    # What each stage needs of the machine
    disk: dict[Path, float] = defaultdict(float)  # GiB
    for stage in stages:
        if stage.config.stage in WITHOUT_NETWORK:
            continue
        try:
            if checks.is_complete(stage):
                continue
            unplanned = why_unplanned(stage.config)
            sized = None if is_of_codes(stage.config) else read_stage(stage.file, stage.overrides)
        except ValueError as error:
            yield Row("STOP", f"{stage} sizes", one_line(error))
            continue
        if sized:
            yield from look_at_workers(stage, sized, job)
        if unplanned:
            yield Row("note", f"{stage} step", unplanned)
            continue
        row, run_gib = look_at_step(stage, sized, job, seconds)
        yield row
        # What an earlier start has saved needs no further place
        saved = Path(stage.config.run_dir).glob("checkpoints/*/*")
        there = sum(file.stat().st_size for file in saved) / GIB
        disk[nearest_folder(stage.config.run_dir)] += max(0.0, run_gib - there)
    yield from look_at_disk(disk)


# What the machine offers


def look_at_machine(job: Job) -> Iterator[Row]:
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
    # float64: float32 can't hold the total that is asserted, of 17 processes 17^6
    values = torch.ones(ALL_REDUCE_MIB * 2**17, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    start = time.perf_counter()
    for _ in range(ALL_REDUCE_CALLS):
        dist.all_reduce(values)
    # Reading a value waits for the device.
    total = values[0].item()
    if rank == 0:
        seconds = (time.perf_counter() - start) / ALL_REDUCE_CALLS
        result.write_text(str(values.nbytes / seconds / 1e9))
    assert total == processes ** (1 + ALL_REDUCE_CALLS)
    dist.destroy_process_group()


def nearest_folder(path: str) -> Path:
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
    # The smallest GPU decides: every process has the same share of the work.
    if job.on_gpus:
        totals = range(torch.cuda.device_count())
        total = min(torch.cuda.get_device_properties(index).total_memory for index in totals)
    else:
        total = psutil.virtual_memory().available // job.processes_here
    return total / GIB * (1 - RESERVE)


# What a stage reads


def look_at_weights(stage: Stage) -> Iterator[Row]:
    """Published weights that the stage loads."""
    config = stage.config
    if config.stage == "tokenizer":
        yield look_at_tower(f"{stage} text tower", config.text_encoder)
        perceptual, is_used = config.perceptual, config.losses.perceptual_weight
        if is_used and perceptual.lpips_weight:
            yield look_at_file(f"{stage} VGG16", VGG16_FILE, perceptual.vgg_weights)
        if is_used and perceptual.convnext_weight:
            yield look_at_file(f"{stage} ConvNeXt", CONVNEXT_FILE, perceptual.convnext_weights)
    if config.stage == "flowtok" and config.evaluation.every_steps:
        path = protocol_file(config.evaluation.protocol)
        protocol = load_dataclass(Protocol, path, config.evaluation.overrides)
        kind = protocol.features
        if kind in PUBLISHED and {*protocol.metrics} - {"clip_score"}:
            yield look_at_file(f"{stage} {kind}", PUBLISHED[kind], None, is_downloaded=False)


def look_at_tower(what: str, config: TextEncoderConfig) -> Row:
    """The text tower's weights, which a trainer downloads if the hub answers."""
    # It is there or will be made: the row of the inputs says so.
    if config.model.startswith(checks.LOCAL_TOWER):
        return Row("ok", what, config.model)
    try:
        if config.family == "transformers":
            load_part("AutoConfig", config)
            return Row("ok", what, f"{config.model}'s config is there; its weights: not looked at")
        check_clip(config)
    except ValueError as error:
        return Row("STOP", what, one_line(error))
    try:
        found = find_weights(config, download=False) if not config.names_its_weights else "the hub"
    except AbsentWeights as error:
        return absent(what, one_line(error))
    except ValueError as error:
        return Row("STOP", what, one_line(error))
    return Row("ok", what, found)


def look_at_file(
    what: str, weights: PublishedWeights, path: str | None, is_downloaded: bool = True
) -> Row:
    """A published file; is_downloaded: the trainer fetches it if it is absent."""
    try:
        file = weights.find(path, download=False)
    except ValueError as error:
        return Row("STOP", what, one_line(error))
    if file:
        return Row("ok", what, str(file))
    return absent(what, weights.absence) if is_downloaded else Row("STOP", what, weights.absence)


def absent(what: str, text: str) -> Row:
    """What the trainer would download."""
    if why_hub_is_silent():
        return Row("STOP", what, text)
    return Row("note", what, f"will be downloaded. {text}")


# What a stage needs


def look_at_workers(stage: Stage, sized: SizedStage, job: Job) -> Iterator[Row]:
    """Shared memory and open files for the batches that data workers keep ready."""
    workers, processes = sized.config.data.num_workers, job.processes_here
    if not workers:
        return
    # A batch that waits lies in shared memory, a file for each of its tensors
    batch = sized.batch(job.num_processes)
    tensors = [value[0] for value in make_batch(sized, 1).values()]
    batches = processes * workers * PREFETCH_BATCHES
    needed = batches * batch * sum(tensor.nbytes for tensor in tensors)
    text = f"{needed / 1e6:.1f} MB for {workers} workers in each of {processes} processes"
    if os.path.isdir(SHARED_MEMORY):
        free = shutil.disk_usage(SHARED_MEMORY).free
        fits = needed <= free
        text += f", {free / 1e6:.1f} MB free" + ("" if fits else f": {SHARED_MEMORY_CURE}")
        yield Row("ok" if fits else "STOP", f"{stage} {SHARED_MEMORY}", text)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OTHER_FILES + workers * PREFETCH_BATCHES * len(tensors)
    if 0 <= limit < files:
        text = f"the limit is {limit}, {files} may be needed: ulimit -n {2 * files}"
        yield Row("STOP", f"{stage} open files", text)


def look_at_step(stage: Stage, sized: SizedStage, job: Job, seconds: float) -> tuple[Row, float]:
    """(memory and time of a step, GiB of the run's checkpoints)."""
    memory, device = process_memory_gib(job), torch.device("cuda" if job.on_gpus else "cpu")
    batch = sized.batch(job.num_processes)
    cost = measure_step(sized, job.num_processes, batch)
    run_gib = disk_gib(cost, sized.training)["run"] if sized.training else 0.0

    # What does not fit is not tried.
    text = f"{cost.peak_gib:.2f} of {memory:.1f} GiB at {batch} samples a pass"
    if cost.peak_gib > memory:
        mode = getattr(sized.config, "activation_checkpointing", "none")
        _, fit = fit_mode(sized, mode, job.num_processes, batch, memory)
        cure = "set training.gradient_accumulation, a smaller batch, or training.shard=full"
        return Row("STOP", f"{stage} step", f"{text}; {fit['largest_batch']} fit: {cure}"), run_gib

    # What needs all processes is not tried, either: this is one.
    if cost.resident_gib["gathered"]:
        return Row("ok", f"{stage} step", f"{text}; sharded, so not timed here"), run_gib

    # Samples for a third of the time: the first call takes longer than the timed one.
    rate = mm_rate(device, DTYPES[sized.precision])
    samples = max(1, min(batch, int(seconds / 3 * rate / cost.flops)))
    return time_step(stage, sized, job, samples, text), run_gib


def time_step(stage: Stage, sized: SizedStage, job: Job, samples: int, memory: str) -> Row:
    """A real step with so many samples; memory: what is known of it."""
    # The planner has left accelerate the settings of its fake machine.
    AcceleratorState._reset_state(reset_partial_state=True)
    run, training = start_run("", sized.precision, seed=0), sized.training
    try:
        step = repeated_step(sized, run, samples)
        step()  # the first one also makes the optimiser's moments
        seconds = seconds_per_call(step, run.device, 0) / samples / job.num_processes
    except torch.OutOfMemoryError as error:
        return Row("STOP", f"{stage} step", f"{memory}; {one_line(error)}")
    text = f"{memory}, {1 / seconds:.3g} samples/s, measured with {samples}"
    if training:
        days = training.max_steps * training.batch_size * seconds / DAY
        length = f"{days:.1f} days" if days > 1 else f"{24 * days:.2g} hours"
        text += f": {length} for {training.max_steps} steps"
    return Row("ok", f"{stage} step", text)


if __name__ == "__main__":
    parser = build_parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="EXPERIMENT or key=value")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a stage's step")
    arguments = parser.parse_intermixed_args()
    sys.exit(exit_on_error(lambda: main(arguments)))
