"""What a stage will cost before it runs: weights, GFLOP, memory per GPU, days, disk.

    python scripts/plan.py configs/flowtok_h/flowtok.yaml --gpu a100-80g --num-gpus 8 [key=value]

Needs no data, weights or GPU: the stage's own step runs on fake tensors, which have shapes but no
values. A multiply-add is 2 FLOPs, GFLOP are 10^9, GiB 2^30 bytes. Days are all FLOPs over those
that the GPUs do at --share of their peak. The text tower counts in each step, as without stored
text states. The output is YAML.

Of training.shard=full, --num-gpus are the processes, and what FSDP gathers is estimated.

Refused: the stages of a dual tokenizer, and flow.objective=mean_flow.

Not counted: reading data; pictures and evaluations; the CUDA context, workspaces inside kernels,
NCCL's buffers and fragmentation, for which a tenth of the memory is kept free; that the perceptual
networks run in float32, at half the peak.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from data.files import integer
from eval.programs import build_parser
from scripts.workload import print_figures
from scripts.workload.fake import Cost, measure_step, tower_flops
from scripts.workload.sizes import Stage, read_stage
from training.errors import exit_on_error
from training.stage import TrainingConfig

DAY = 86400  # seconds
RESERVE = 0.10  # of a GPU's memory
PROBE_BATCH = 8192  # samples more, to see how memory grows
MODES = ("none", "selective", "full")  # of activation checkpointing
# Memory in GiB as torch.cuda reports it; dense TFLOP/s of the data sheet in bf16 and in TF32
GPUS = {
    "a100-80g": (79.1, 312, 156),
    "a100-40g": (39.4, 312, 156),
    "h100-80g": (79.1, 989, 495),
    "h200": (139.7, 989, 495),
    "l40s": (44.4, 362, 183),
    "l4": (22.0, 121, 60),
    "rtx4090": (23.6, 165, 83),
    "rtx3090": (23.6, 71, 36),
}


def make_plan(
    file: str | Path,
    overrides: Sequence[str] = (),
    gpu: str = "a100-80g",
    num_gpus: int = 8,
    share: float = 0.4,
) -> dict:
    """Everything that is printed; a stage that does not train has no days and disk.

    Raises:
        ValueError: a bad config, a run of unknown sizes, or a batch that the GPUs can't share.
    """
    # What the GPUs have, and the samples of one GPU in one pass.
    stage = read_stage(file, overrides)
    training = stage.training
    memory, bf16_tflops, tf32_tflops = GPUS[gpu]
    usable_gib = memory * (1 - RESERVE)
    peak_tflops = bf16_tflops if stage.precision == "bf16" else tf32_tflops
    batch = stage.batch(num_gpus)
    batch_size = training.batch_size if training else num_gpus * batch

    # Each activation checkpointing that the stage offers.
    chosen = getattr(stage.config, "activation_checkpointing", "none")
    costs, modes = {}, {}
    for mode in MODES if hasattr(stage.config, "activation_checkpointing") else MODES[:1]:
        costs[mode], modes[mode] = fit_mode(stage, mode, num_gpus, batch, usable_gib)
    cost = costs[chosen]

    # How long, at a share of the peak that the user believes in
    rate = share * num_gpus * peak_tflops * 1e12 / mean_flops(stage, cost, num_gpus, batch)
    plan = {
        "config": str(file),
        "stage": stage.config.stage,
        "machine": {"gpu": gpu, "num_gpus": num_gpus, "usable_gib": usable_gib},
        "run": {
            "precision": stage.precision,
            "batch_size": batch_size,
            "batch_per_gpu_and_pass": batch,
            "activation_checkpointing": chosen,
        },
        "weights": cost.weights,
        "gflop_per_sample": {
            "text_tower": tower_flops(stage) / 1e9,
            "recompute": (cost.flops - costs["none"].flops) / 1e9,
            "total": cost.flops / 1e9,
        },
        "memory_gib": cost.resident_gib | {"peak": cost.peak_gib},
        "activation_checkpointing": modes,
        "time": {"tflops": peak_tflops, "share": share, "samples_per_second": rate},
    }
    if training:
        plan["time"]["days"] = training.max_steps * batch_size / rate / DAY
        plan["disk_gib"] = disk_gib(cost, training)
    return plan


def disk_gib(cost: Cost, training: TrainingConfig) -> dict[str, float]:
    # One checkpoint more than are kept is there while it is written.
    run = cost.checkpoint_gib * (training.keep_checkpoints + 1)
    return {"checkpoint": cost.checkpoint_gib, "run": run}


def fit_mode(
    stage: Stage, mode: str, num_gpus: int, batch: int, usable_gib: float
) -> tuple[Cost, dict[str, Any]]:
    """Cost with an activation checkpointing at a batch per GPU and pass, and what fits a GPU."""
    if hasattr(stage.config, "activation_checkpointing"):
        stage = replace(stage, config=replace(stage.config, activation_checkpointing=mode))
    cost = measure_step(stage, num_gpus, batch)
    free = usable_gib - cost.peak_gib

    def growth(more: int) -> float:
        return (measure_step(stage, num_gpus, batch + more).peak_gib - cost.peak_gib) / more

    gib_per_sample = growth(PROBE_BATCH)
    more = free / gib_per_sample
    there = max(math.floor(more), 1 - batch)
    if there not in (0, PROBE_BATCH):
        # The contrastive loss compares each sample with each other: of a large network it shows
        # far away, of a tiny one before the probed batch. free = (slope + curve * more) * more,
        # without a solution where not one sample fits.
        curve = (growth(there) - gib_per_sample) / (there - PROBE_BATCH)
        slope = gib_per_sample - curve * PROBE_BATCH
        more = 2 * free / (slope + max(0, slope**2 + 4 * curve * free) ** 0.5)
    return cost, {
        "peak_gib": cost.peak_gib,
        "fits": free >= 0,
        "largest_batch": max(0, batch + math.floor(more)),
        "mib_per_sample": 1024 * gib_per_sample,
        "gflop_per_sample": cost.flops / 1e9,
    }


def mean_flops(stage: Stage, cost: Cost, num_gpus: int, batch: int) -> float:
    """Of a sample over all steps: before the discriminator's start a step costs less."""
    if "discriminator_network" not in cost.weights:
        return cost.flops
    first = measure_step(stage, num_gpus, batch, is_last=False)
    early = stage.config.adversarial.start_step / stage.training.max_steps
    return early * first.flops + (1 - early) * cost.flops


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("file", metavar="CONFIG", help="YAML file of a stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", choices=GPUS, default="a100-80g")
    parser.add_argument("--num-gpus", type=integer(1), default=8, help="of the whole job")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    args = parser.parse_intermixed_args()
    if not 0 < args.share <= 1:
        parser.error(f"--share {args.share} is out of range")
    plan = make_plan(args.file, args.overrides, args.gpu, args.num_gpus, args.share)
    print_figures(plan)


if __name__ == "__main__":
    exit_on_error(main)
