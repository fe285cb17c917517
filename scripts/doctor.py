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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run as a file, Python looks into scripts/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.state import AcceleratorState

from configs.load import load_dataclass, one_line
from data.shards import PREFETCH_BATCHES
from data.workers import SHARED_MEMORY, SHARED_MEMORY_CURE
from eval.feature_nets import PUBLISHED
from eval.protocol import Protocol, protocol_file
from modeling.clip_weights import AbsentWeights, check_clip, find_weights, why_hub_is_silent
from modeling.perceptual import CONVNEXT_FILE, VGG16_FILE
from modeling.published import PublishedWeights
from modeling.text_encoder import TextEncoderConfig
from modeling.transformers_text import load_part
from scripts.benchmark import DTYPES, mm_rate, seconds_per_call
from scripts.plan import DAY, batch_sizes, disk_gib, fit_mode
from scripts.run_experiment import checks, node
from scripts.run_experiment.__main__ import count_cores
from scripts.run_experiment.node import Row
from scripts.run_experiment.processes import Job, clean, find_job
from scripts.run_experiment.stages import Stage, read_stages
from scripts.workload.fake import GIB, measure_step
from scripts.workload.sizes import Stage as SizedStage
from scripts.workload.sizes import read_stage
from scripts.workload.steps import build_workload, make_batch, repeated_step
from training.errors import exit_on_error, printable
from training.run import start_run

OTHER_FILES = 256  # that a process has open beside its workers' batches
WITHOUT_A_STEP = ("scenes", "artists", "report")


def main(args: argparse.Namespace) -> int:
    """Print the table and return the exit status."""
    stages = read_stages(args.words, os.environ.get("STAGES", ""), Path("configs"))
    stages, _ = checks.skip_stages(stages)
    job = find_job(
        os.environ, torch.cuda.device_count(), count_cores(), checks.cpu_processes(stages)
    )
    for name in os.environ.keys() - clean(os.environ).keys():
        del os.environ[name]  # of a launcher: this is one process
    rows = []
    for row in examine(stages, job, args.seconds):
        print(f"{row.verdict:4}  {row.what}: {printable(row.found)}", flush=True)
        rows.append(row)
    stops = sum(row.verdict == "STOP" for row in rows)
    print(f"{stops} of {len(rows)} would stop the run" if stops else "nothing would stop the run")
    return 1 if stops else 0


def examine(stages: Sequence[Stage], job: Job, seconds: float) -> Iterator[Row]:
    """All rows, the quick ones first."""
    yield from node.look_at_machine(job)
    yield node.look_at_exchange(job)
    try:
        checks.check_configs(stages, job.num_processes)
    except ValueError as error:
        yield Row("STOP", "configs", one_line(error))
        return
    yield from node.look_at_folders(stages)
    for stage, error in checks.input_errors(stages):
        verdict, found = ("STOP", one_line(error)) if error else ("ok", "there")
        yield Row(verdict, f"{stage} inputs", found)
        yield from look_at_weights(stage)

    # What each stage needs of the machine
    disk: dict[Path, float] = defaultdict(float)  # GiB
    for stage in stages:
        if stage.config.stage in WITHOUT_A_STEP:
            continue
        try:
            if checks.is_complete(stage):
                continue
            sized = read_stage(stage.file, stage.overrides)
        except ValueError as error:
            yield Row("STOP", f"{stage} sizes", one_line(error))
            continue
        yield from look_at_workers(stage, sized, job)
        row, run_gib = look_at_step(stage, sized, job, seconds)
        yield row
        saved = Path(stage.config.run_dir).glob("checkpoints/*/*")
        there = sum(file.stat().st_size for file in saved) / GIB
        disk[node.nearest_folder(stage.config.run_dir)] += max(0.0, run_gib - there)
    yield from node.look_at_disk(disk)


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
    if config.model.startswith(checks.LOCAL_TOWER):
        return Row("ok", what, config.model)  # there or made, as the inputs say
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
    text = f"{weights.title}'s weights are absent: {weights.ways_out}"
    return absent(what, text) if is_downloaded else Row("STOP", what, text)


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
    _, batch = batch_sizes(sized, job.num_processes)
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
    memory, device = node.process_memory_gib(job), torch.device("cuda" if job.on_gpus else "cpu")
    _, batch = batch_sizes(sized, job.num_processes)
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
    AcceleratorState._reset_state(reset_partial_state=True)  # the planner's, of a fake machine
    run, training = start_run("", sized.precision, seed=0), sized.training
    try:
        work = build_workload(sized, run)
        step = repeated_step(sized, work, make_batch(sized, samples))
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="EXPERIMENT or key=value")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a stage's step")
    arguments = parser.parse_args()
    sys.exit(exit_on_error(lambda: main(arguments)))
