"""What a stage will cost, before it runs: weights, GFLOP, memory per GPU, days, disk. Needs no data, weights or GPU.

    python scripts/plan.py configs/flowtok_h/flowtok.yaml [key=value ...] [--gpu a100-80g] [--num-gpus 8] [--json]

FLOPs and memory are measured on fake tensors (eval/planning.py), the rest is arithmetic (eval/budget.py): days are the
FLOPs of all steps by those that the GPUs do at --share of their peak. A multiply-add is two FLOPs; GFLOP are 10^9, GiB
2^30 bytes. The text tower counts in each step, as without stored text states.

--json prints one object; what a stage does not have is absent:
  config stage notes   gpu: {name num_gpus memory_gib reserve_gib peak_tflop_per_second share}
  run: {precision batch_size batch_per_gpu_and_pass gradient_accumulation activation_checkpointing steps samples}
  weights: {PART: number}   trained_weights
  gflop_per_sample: {text_tower forward backward recompute total}   gflop_per_image: {PART ... total}
  memory_gib: {weights optimizer_moments ema frozen gradient_buckets gradients activations peak limit}, of one GPU
  activation_checkpointing: {MODE: {peak_gib fits largest_batch_per_gpu_and_pass gradient_accumulation_needed
  extra_compute}}   largest_batch_per_gpu (stage tokens)   time: {days samples_per_second} or {images_per_second}
  disk: {checkpoint_gib run_gib}   paper: {size weights_in_millions weights_in_millions_here days share_for_days
  images_per_second share_for_images_per_second batch_per_gpu at_batch: {MODE: {peak_gib fits extra_compute}}}
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

from eval.budget import DAY, GIB, GPUS
from scripts.plan_costs import GIGA, make_plan
from training.errors import exit_on_error

LABELS = {
    "dit": "DiT",
    "ema": "EMA",
    "activations": "activations kept for the backward",
    "peak": "peak of a whole step",
    "limit": "limit: memory less the reserve",
}


def table(values: dict[str, float]) -> list[str]:
    """A line a value, aligned."""
    return [
        f"  {LABELS.get(name, name.replace('_', ' ')):<34}{value:>14.2f}"
        for name, value in values.items()
    ]


def duration(days: float) -> str:
    """Days in a fitting unit."""
    if days >= 1:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 0.1 else f"{days * DAY:.2g} s"


def print_plan(plan: dict) -> None:
    """The plan as text."""
    print(f"{plan['config']}: stage {plan['stage']}")
    if "gpu" in plan:
        print(
            "\n".join(
                [*text_machine(plan), *text_weights(plan), *text_flops(plan), *text_memory(plan)]
            )
        )
        print("\n".join([*text_modes(plan), *text_time(plan), *text_paper(plan.get("paper", {}))]))
    for note in plan["notes"]:
        print(f"note: {note}")


def text_machine(plan: dict) -> list[str]:
    """GPUs, and the run's batch and length."""
    gpu, run = plan["gpu"], plan["run"]
    lines = [
        f"{gpu['num_gpus']} x {gpu['name']}: {gpu['peak_tflop_per_second']} TFLOP/s in {run['precision']}"
        f"{' (TF32)' if run['precision'] == 'fp32' else ''}, {gpu['memory_gib']} GiB = "
        f"{gpu['memory_gib'] * GIB / GIGA:.1f} GB each, of which {gpu['reserve_gib']:.1f} GiB are kept in reserve"
    ]
    if "steps" in run:
        lines.append(
            f"{run['steps']} steps of {run['batch_size']} samples: {run['batch_per_gpu_and_pass']} per GPU and pass, "
            f"gradient_accumulation {run['gradient_accumulation']}, "
            f"activation_checkpointing {run['activation_checkpointing']}"
        )
    else:
        lines.append(f"batches of {run['batch_per_gpu_and_pass']} images on each GPU, no training")
    return lines


def text_weights(plan: dict) -> list[str]:
    """Weights by part."""
    numbers = plan["weights"] | (
        {"trained": plan["trained_weights"]} if "trained_weights" in plan else {}
    )
    millions = {name: number / 1e6 for name, number in numbers.items()}
    return ["weights, millions (without fixed position tables)", *table(millions)]


def text_flops(plan: dict) -> list[str]:
    """GFLOP by part."""
    lines = []
    for key, title in (
        ("gflop_per_sample", "GFLOP per training sample"),
        ("gflop_per_image", "GFLOP per image"),
    ):
        if key in plan:
            lines += [title, *table(plan[key])]
    return lines


def text_memory(plan: dict) -> list[str]:
    """GiB of one GPU."""
    return ["memory of one GPU, GiB", *table(plan["memory_gib"])]


def text_modes(plan: dict) -> list[str]:
    """What fits."""
    if "largest_batch_per_gpu" in plan:
        return [f"largest batch that fits: {plan['largest_batch_per_gpu']}"]
    lines = [
        "activation      peak GiB at this batch   largest batch that fits   accumulation     extra FLOPs"
    ]
    lines += [
        "checkpointing                              per GPU and pass        needed           per sample"
    ]
    for mode, fit in plan["activation_checkpointing"].items():
        fits = "fits" if fit["fits"] else "does not fit"
        needed = fit["gradient_accumulation_needed"] or "never"
        lines.append(
            f"  {mode:<12}{fit['peak_gib']:>9.1f} {fits:<18}{fit['largest_batch_per_gpu_and_pass']:>14}{needed:>19}"
            f"{fit['extra_compute']:>16.1%}"
        )
    return lines


def text_time(plan: dict) -> list[str]:
    """Days, rate, disk."""
    gpu, time = plan["gpu"], plan["time"]
    if "images_per_second" in time:
        rate = time["images_per_second"]
        return [
            f"at {gpu['share']:.0%} of the peak: {rate:.0f} images/s, {duration(1e9 / rate / DAY)} for 10^9 images"
        ]
    disk = plan["disk"]
    return [
        f"at {gpu['share']:.0%} of the peak: {duration(time['days'])}, {time['samples_per_second']:.0f} samples/s, "
        f"{plan['run']['samples'] / 1e6:.4g} million samples",
        f"checkpoint: {disk['checkpoint_gib']:.2f} GiB; with those that are kept, up to {disk['run_gib']:.1f} GiB",
    ]


def text_paper(paper: dict) -> list[str]:
    """The paper's figures."""
    if not paper:
        return []
    lines = [
        f"paper, FlowTok-{paper['size']}: {paper['weights_in_millions']:.2f}M weights with the DiT's fixed position "
        f"table; here {paper['weights_in_millions_here']:.2f}M"
    ]
    if "days" in paper:
        lines += [
            f"  {paper['days']} days on 8 A100 for 250k + 150k steps of 4096: {paper['share_for_days']:.1%} of their "
            "bf16 peak",
            f"  {paper['images_per_second']} images/s: {paper['share_for_images_per_second']:.1%} of the peak of one "
            "A100, if it was one (the paper does not say)",
        ]
    for mode, fit in paper.get("at_batch", {}).items():
        verdict = "fits" if fit["fits"] else "does not fit"
        lines.append(
            f"  {paper['batch_per_gpu']} samples on each of 8 A100 80 GB, activation_checkpointing={mode}: "
            f"{fit['peak_gib']:.1f} GiB, {verdict}, {fit['extra_compute']:+.1%} FLOPs"
        )
    return lines


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="CONFIG", help="YAML file of any stage")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that override the file's"
    )
    parser.add_argument(
        "--gpu", choices=list(GPUS), default="a100-80g", help="default: %(default)s"
    )
    parser.add_argument(
        "--num-gpus", type=int, default=8, help="of the whole job (default: %(default)s)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.4,
        help="of the peak that is reached (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.num_gpus < 1 or not 0 < args.share <= 1:
        parser.error(
            f"expected --num-gpus >= 1 and 0 < --share <= 1, got {args.num_gpus} and {args.share}"
        )
    return args


def main() -> None:
    """Make the plan and print it."""
    args = parse_args()
    plan = exit_on_error(
        lambda: make_plan(args.file, args.overrides, args.gpu, args.num_gpus, args.share)
    )
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)


if __name__ == "__main__":
    main()
