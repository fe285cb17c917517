"""What scripts/benchmark.py counts instead of timing it: useful GFLOP, and what is kept for the backward pass.

All on fake tensors: 2 FLOPs a multiply-add, by the formulas of torch's FlopCounterMode. Useful is 3 times the forward
pass of what is trained; once that of a frozen network, and once more where the gradient goes through it to its input.
Recomputation counts nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from configs.schema import FlowTokStage, StageConfig, TokenizerStage
from torch._subclasses.fake_tensor import FakeTensorMode

from eval.budget import GPUS, Machine, find_fit, per_sample, resident_bytes
from eval.planning import PROBE_BATCH, Recorder, Workload, at_batch, measure_forward, measure_step
from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.pipeline import ImageGenerator
from scripts.benchmark_plain import plain_copy
from scripts.plan_costs import GIGA, gflop, measure_modes
from scripts.plan_stages import (
    TRAINING_STEPS,
    Sizes,
    build_encoding,
    build_projection,
    build_tower_alone,
    find_sizes,
)

MIB = 2**20
GPU = "a100-80g"


def training_gflop(config: StageConfig, sizes: Sizes, with_tower: bool) -> float:
    """Useful GFLOP of a training sample."""
    if isinstance(config, TokenizerStage):
        useful = tokenizer_gflop(config, sizes)
    else:
        is_frozen = isinstance(config, FlowTokStage) and config.flow.projector == "frozen"
        frozen_projector = gflop(build_projection, config.projector) if is_frozen else 0.0
        useful = 3 * forward_gflop(config, sizes) - 2 * frozen_projector
    return useful + (tower_gflop(config, sizes) if with_tower else 0.0)


def tower_gflop(config: StageConfig, sizes: Sizes) -> float:
    """Of the text tower, if the stage reads text."""
    reads_text = not isinstance(config, TokenizerStage) or config.tokenizer.text_guidance
    return gflop(build_tower_alone, sizes) if reads_text else 0.0


def forward_gflop(config: StageConfig, sizes: Sizes) -> float:
    """Forward pass and losses of a training sample at the first step, without the text tower."""
    cost = measure_forward(partial(TRAINING_STEPS[type(config)], config, sizes, "none", 0))
    return per_sample(cost.forward_flops, config.training.batch_size, 1) / GIGA - tower_gflop(
        config, sizes
    )


def tokenizer_gflop(config: TokenizerStage, sizes: Sizes) -> float:
    """As training_gflop, of stage 1 at its first step, without the text tower.

    The perceptual networks see images and reconstructions, and pass the gradient on to the latter: 1.5 times both
    forward passes. The discriminator passes it on to the reconstructions, then learns from images and reconstructions:
    8 times the forward pass of one image.
    """
    without = replace(config, losses=replace(config.losses, perceptual_weight=0.0))
    alone = replace(without, adversarial=replace(config.adversarial, weight=0.0))
    all_losses, no_perceptual, network = (forward_gflop(c, sizes) for c in (config, without, alone))
    frozen_encoder = gflop(build_encoding, sizes, False) if config.freeze_encoder else 0.0
    return (
        3 * network
        - 2 * frozen_encoder
        + 1.5 * (all_losses - no_perceptual)
        + 8 * (no_perceptual - network)
    )


def transport_gflop(config: FlowTokStage, batch_size: int) -> float:
    """Of an image, from the start of the flow to its latents by the config's sampler, in a batch."""
    net = config.flowtok
    with FakeTensorMode():
        parts = ImageGenerator(None, None, None, FlowModel(config.projector, net).eval())
        start = torch.empty(batch_size, net.num_tokens, net.token_channels)
        return count_gflop(partial(parts.transport, start, config.sampling)) / batch_size


def velocity_gflop(net: FlowTokConfig) -> float:
    """Of one forward pass of a sample through the DiT."""
    with FakeTensorMode():
        inputs = (
            torch.empty(1, net.num_tokens, net.token_channels),
            torch.empty(1),
            torch.empty(1, dtype=torch.bool),
        )
        return count_gflop(partial(FlowTok(net), *inputs))


@torch.no_grad()
def count_gflop(function: Callable) -> float:
    """GFLOP of a call on fake tensors."""
    recorder = Recorder()
    with recorder:
        function()
    return float(at_batch(recorder.flops(), PROBE_BATCH)) / GIGA


def measure_memory(config: StageConfig, path: Path, args) -> dict:
    """The part `memory`: what is kept a sample for the backward pass, and the batch that a GPU takes by it.

    By each activation checkpointing; of stage 3 also by the plain way of the same maths ("plain"). On fake tensors, in
    the run's precision, one GPU, without gradient accumulation (eval/planning.py).
    """
    sizes, last = find_sizes(config, path), config.training.max_steps - 1
    build = partial(TRAINING_STEPS[type(config)], config, sizes)
    with torch.device("meta"):
        work = build("none", last)
        resident = resident_bytes(work, 1, has_gradients=False)
    costs = {}
    if isinstance(config, FlowTokStage):

        def build_plain() -> Workload:
            work = build("none", last)
            return replace(work, model=plain_copy(work.model, config.projector, config.flowtok))

        costs["plain"] = measure_step(build_plain, config.training.precision)
    costs |= measure_modes(config, build, False)
    modes = {
        mode: {
            "activation_mib_per_sample": float(cost.kept_bytes[1]) / MIB,
            "largest_batch": find_fit(
                cost, resident, Machine(GPUS[GPU], 1, 1.0), 1, 1
            ).largest_batch_per_gpu_and_pass,
        }
        for mode, cost in costs.items()
    }
    return {"precision": config.training.precision, "gpu": GPU, "activation_checkpointing": modes}
