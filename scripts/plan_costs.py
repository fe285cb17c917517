"""The numbers of scripts/plan.py, stage by stage, as plain nested values: measured costs x batch, steps and GPUs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from configs.schema import (
    FlowTokStage,
    ReportStage,
    StageConfig,
    TextEncoderStage,
    TokenizerStage,
    TokensStage,
)

from configs.load import load_config
from eval.budget import (
    DAY,
    GIB,
    GPUS,
    RESERVE,
    Machine,
    Resident,
    checkpoint_bytes,
    find_fit,
    largest_batch,
    num_bytes,
    num_trained,
    per_sample,
    resident_bytes,
)
from eval.planning import Cost, at_batch, measure_forward, measure_step
from modeling.samplers import SOLVERS, evaluations_a_step
from scripts.plan_stages import (
    TRAINING_STEPS,
    Sizes,
    build_decoding,
    build_encoding,
    build_projection,
    build_tower_alone,
    build_velocity,
    find_sizes,
    weights_by_part,
)

GIGA = 1e9


@dataclass
class Published:
    """What the paper says of one size of its DiT, by (width, depth, heads)."""

    name: str
    weights_in_millions: float  # with projector, alignment MLP and the fixed position table
    days: float | None = None  # on 8 A100, pre-training and fine-tuning
    images_per_second: float | None = None  # at 256 px, on a GPU that is not said
    batch_per_gpu: int | None = (
        None  # on A100 80 GB, "without gradient checkpointing or accumulation"
    )


PUBLISHED = {
    (768, 12, 12): Published("B", 153.93),
    (1152, 28, 16): Published("XL", 698.08, 20.4, 22.7),
    (1280, 36, 20): Published("H", 1092.10, 26.1, 18.2, 1024),
}
PAPER_MACHINE = Machine(GPUS["a100-80g"], num_gpus=8, share=1.0)
PAPER_SAMPLES = 4096 * (250_000 + 150_000)


def gflop(build: Callable, *sizes) -> float:
    """GFLOP a sample of what `build(*sizes)` gives, which runs forward only."""
    return per_sample(measure_forward(partial(build, *sizes)).forward_flops, 1, 1) / GIGA


def plan_training(config: StageConfig, path: Path, machine: Machine) -> dict:
    """A stage that trains."""
    run = plan_run(config, machine)
    sizes = None if isinstance(config, TextEncoderStage) else find_sizes(config, path)
    build = partial(
        TRAINING_STEPS[type(config)], config, sizes
    )  # (activation checkpointing, step) -> workload
    accumulates = run["gradient_accumulation"] > 1
    costs = measure_modes(config, build, accumulates)
    with torch.device("meta"):
        work = build("none", run["steps"] - 1)
        resident, checkpoint = (
            resident_bytes(work, machine.num_gpus, accumulates),
            checkpoint_bytes(work),
        )
        weights, trained = weights_by_part(work), num_trained(work)
    plan = {
        "run": run,
        "weights": weights,
        "trained_weights": trained,
        "gflop_per_sample": plan_flops(config, sizes, costs, run, machine),
        "memory_gib": plan_memory(costs, resident, run, machine),
        "activation_checkpointing": plan_modes(costs, resident, run, machine),
        "time": plan_time(config, build, costs, run, machine),
        "disk": {
            "checkpoint_gib": checkpoint / GIB,
            "run_gib": checkpoint
            * (config.training.keep_checkpoints + 1)
            / GIB,  # one more while it is written
        },
        "notes": sizes.notes if sizes else [],
    }
    if isinstance(config, TokenizerStage):
        encoder, decoder = gflop(build_encoding, sizes, False), gflop(build_decoding, sizes)
        plan["gflop_per_image"] = {"encoder": encoder, "decoder": decoder}
    if isinstance(config, FlowTokStage) and config.flow.direction == "text_to_image":
        plan["gflop_per_image"] = plan_image(config, sizes)
        costs = measure_modes(config, build, False) if accumulates else costs
        plan["paper"] = plan_paper(config, plan, costs, replace(resident, has_gradients=False))
    return plan


def plan_run(config: StageConfig, machine: Machine) -> dict:
    """Batch and length of a training stage.

    Raises:
        ValueError: the batch can't be divided evenly.
    """
    training = config.training
    per_gpu, rest = divmod(training.batch_size, machine.num_gpus * training.gradient_accumulation)
    if rest:
        raise ValueError(
            f"training.batch_size {training.batch_size} is not divisible by --num-gpus x gradient_accumulation = "
            f"{machine.num_gpus} x {training.gradient_accumulation}"
        )
    return {
        "precision": training.precision,
        "batch_size": training.batch_size,
        "batch_per_gpu_and_pass": per_gpu,
        "gradient_accumulation": training.gradient_accumulation,
        "activation_checkpointing": getattr(config, "activation_checkpointing", "none"),
        "steps": training.max_steps,
        "samples": training.max_steps * training.batch_size,
    }


def measure_modes(config: StageConfig, build: Callable, has_gradients: bool) -> dict[str, Cost]:
    """Cost of the last step, the heaviest, with each activation checkpointing that the stage offers."""
    modes = (
        ("none", "selective", "full") if hasattr(config, "activation_checkpointing") else ("none",)
    )
    last = config.training.max_steps - 1
    return {
        mode: measure_step(partial(build, mode, last), config.training.precision, has_gradients)
        for mode in modes
    }


def plan_flops(
    config: StageConfig, sizes: Sizes | None, costs: dict[str, Cost], run: dict, machine: Machine
) -> dict:
    """GFLOP of a training sample at the last step; "recompute" is the activation checkpointing's."""
    batch, num_gpus = run["batch_per_gpu_and_pass"], machine.num_gpus
    plain, chosen = costs["none"], costs[run["activation_checkpointing"]]
    reads_text = sizes is not None and not (
        isinstance(config, TokenizerStage) and not config.tokenizer.text_guidance
    )
    tower = gflop(build_tower_alone, sizes) if reads_text else 0.0
    forward, training, total = (
        per_sample(flops, batch, num_gpus) / GIGA
        for flops in (plain.forward_flops, plain.training_flops, chosen.training_flops)
    )
    parts = {"text_tower": tower, "forward": forward - tower, "backward": training - forward}
    return parts | {"recompute": total - training, "total": total}


def plan_memory(costs: dict[str, Cost], resident: Resident, run: dict, machine: Machine) -> dict:
    """GiB of one GPU. The peak is less than the sum of the rest: gradients come while activations go."""
    cost, batch = costs[run["activation_checkpointing"]], run["batch_per_gpu_and_pass"]
    parts = {name: size for name, size in asdict(resident).items() if name != "has_gradients"}
    parts["activations"] = int(at_batch(cost.kept_bytes, batch, machine.num_gpus))
    parts["peak"] = resident.total() + cost.peak_bytes(batch, machine.num_gpus)
    return {name: size / GIB for name, size in (parts | {"limit": machine.limit}).items()}


def plan_modes(costs: dict[str, Cost], resident: Resident, run: dict, machine: Machine) -> dict:
    """What fits with each activation checkpointing, and its extra compute against none."""
    batch, num_gpus, passes = (
        run["batch_per_gpu_and_pass"],
        machine.num_gpus,
        run["gradient_accumulation"],
    )
    flops = {mode: per_sample(cost.training_flops, batch, num_gpus) for mode, cost in costs.items()}
    return {
        mode: asdict(find_fit(cost, resident, machine, batch, passes))
        | {"extra_compute": flops[mode] / flops["none"] - 1}
        for mode, cost in costs.items()
    }


def plan_time(
    config: StageConfig, build: Callable, costs: dict[str, Cost], run: dict, machine: Machine
) -> dict:
    """Days of all steps; before the discriminator's start they are cheaper."""
    batch, mode = run["batch_per_gpu_and_pass"], run["activation_checkpointing"]
    cheap_steps = 0
    if isinstance(config, TokenizerStage) and config.adversarial.weight:
        cheap_steps = config.adversarial.start_step
    flops = (run["steps"] - cheap_steps) * per_sample(
        costs[mode].training_flops, batch, machine.num_gpus
    )
    if cheap_steps:
        cost = measure_step(partial(build, mode, 0), run["precision"])
        flops += cheap_steps * per_sample(cost.training_flops, batch, machine.num_gpus)
    seconds = machine.seconds(flops * run["batch_size"], run["precision"])
    return {"days": seconds / DAY, "samples_per_second": run["samples"] / seconds}


def plan_image(config: FlowTokStage, sizes: Sizes) -> dict:
    """GFLOP of a generated image by part."""
    sampling = config.sampling
    evaluations = sampling.steps * evaluations_a_step(SOLVERS[sampling.sampler])
    parts = {
        "text_tower": gflop(build_tower_alone, sizes),
        "projector": gflop(build_projection, config.projector),
        "flow": evaluations * gflop(build_velocity, config.flowtok, sampling.guidance),
        "decoder": gflop(build_decoding, sizes),
    }
    return parts | {"total": sum(parts.values())}


def plan_paper(
    config: FlowTokStage, plan: dict, costs: dict[str, Cost], resident: Resident
) -> dict:
    """The paper's figures for this size of the DiT, and what they would take here.

    {size weights_in_millions weights_in_millions_here days share_for_days images_per_second
    share_for_images_per_second batch_per_gpu at_batch: {MODE: {peak_gib fits extra_compute}}}. The shares are of the
    bf16 peak of A100s: 8 for the days; one for the images, for the paper does not say.
    """
    net = config.flowtok
    published = PUBLISHED.get((net.width, net.depth, net.num_heads))
    if published is None:
        return {}
    here = (
        sum(plan["weights"][part] for part in ("projector", "alignment", "dit"))
        + net.num_tokens * net.width
    )
    found = {
        "size": published.name,
        "weights_in_millions": published.weights_in_millions,
        "weights_in_millions_here": here / 1e6,
    }
    if published.days:
        flops = (
            PAPER_SAMPLES
            * GIGA
            * (plan["gflop_per_sample"]["total"] - plan["gflop_per_sample"]["recompute"])
        )
        found["days"] = published.days
        found["share_for_days"] = PAPER_MACHINE.seconds(flops, "bf16") / (published.days * DAY)
        flops = published.images_per_second * GIGA * plan["gflop_per_image"]["total"]
        found["images_per_second"] = published.images_per_second
        found["share_for_images_per_second"] = replace(PAPER_MACHINE, num_gpus=1).seconds(
            flops, "bf16"
        )
    if published.batch_per_gpu:
        run = plan["run"] | {
            "batch_per_gpu_and_pass": published.batch_per_gpu,
            "gradient_accumulation": 1,
        }
        resident = replace(resident, gradient_buckets=resident.gradients)
        modes = plan_modes(costs, resident, run, PAPER_MACHINE)
        found["batch_per_gpu"] = published.batch_per_gpu
        wanted = ("peak_gib", "fits", "extra_compute")
        found["at_batch"] = {mode: {key: fit[key] for key in wanted} for mode, fit in modes.items()}
    return found


def plan_encoding(config: TokensStage, path: Path, machine: Machine) -> dict:
    """scripts/encode_tokens.py: no training, float32, every process on its own shards."""
    sizes = find_sizes(config, path)
    build = partial(build_encoding, sizes, config.store_text_states)
    cost = measure_forward(build)
    with torch.device("meta"):
        work = build()
        weights = weights_by_part(work)
        resident = sum(num_bytes(module) for module in (work.model, *work.frozen))
    flops = per_sample(cost.forward_flops, config.batch_size, 1)

    def peak(batch_size: int) -> int:
        return resident + cost.peak_bytes(batch_size)

    return {
        "run": {"precision": "fp32", "batch_per_gpu_and_pass": config.batch_size},
        "weights": weights,
        "gflop_per_image": {"total": flops / GIGA},
        "memory_gib": {
            "weights": resident / GIB,
            "peak": peak(config.batch_size) / GIB,
            "limit": machine.limit / GIB,
        },
        "largest_batch_per_gpu": largest_batch(peak, machine.limit),
        "time": {"images_per_second": 1 / machine.seconds(flops, "fp32")},
        "notes": sizes.notes,
    }


def make_plan(file: str, overrides: list[str], gpu: str, num_gpus: int, share: float) -> dict:
    """Everything that --json prints.

    Raises:
        ValueError: a bad config, or a batch that the GPUs can't share.
    """
    config, machine = load_config(file, overrides), Machine(GPUS[gpu], num_gpus, share)
    plan = {"config": file, "stage": config.stage}
    if isinstance(config, ReportStage):
        return plan | {
            "notes": ["trains nothing: generates images and measures them, on one GPU or the CPU"]
        }
    about = {"name": gpu, "num_gpus": num_gpus, "memory_gib": machine.gpu.memory_gib}
    about["reserve_gib"] = machine.gpu.memory_gib * RESERVE
    make = plan_encoding if isinstance(config, TokensStage) else plan_training
    plan |= make(config, Path(file), machine)
    about["peak_tflop_per_second"] = machine.peak_tflop_per_second(plan["run"]["precision"])
    return plan | {"gpu": about | {"share": share}}
