"""The real step of every stage with random weights: no data, no weights files, no compilation."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import flop_counter

import train_flowtok
import train_text_decoder
import train_text_projector
import train_tokenizer
from modeling import perceptual
from modeling.discriminator import Discriminator
from modeling.image_tokenizer import ImageTokenizer
from modeling.losses import freeze_unused_alignment
from modeling.text_encoder import TextEncoder
from modeling.text_projector import TextProjector
from modeling.vision_teacher import VisionConfig, VisionTeacher
from scripts import train_text_encoder
from scripts.workload.sizes import Stage
from training.optim import EMA, OptimizedNetwork, descend
from training.run import Run
from training.tokens import (
    StoredText,
    StoredTokens,
    encode_images,
    text_states,
    unknown_tokens,
)

MAX_TOKEN_ID = 32_000  # below the vocabularies of T5 and CLIP
# What a stage's loader gives: images, or stored tokens
READ_IMAGES = ("text_encoder", "tokenizer", "tokens")
READ_TOKENS = ("text_projector", "flowtok")

# torch counts the FLOPs of attention by CUDA's kernels only.
for kernel, formula in (
    ("_scaled_dot_product_flash_attention_for_cpu", flop_counter.sdpa_flop),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", flop_counter.sdpa_backward_flop),
):
    register = flop_counter.register_flop_formula(getattr(torch.ops.aten, kernel), get_raw=True)
    register(formula)


def make_batch(stage: Stage, count: int, stored_states: bool = False) -> dict:
    """Random samples, with the fields that the stage's loader gives.

    stored_states: stages 2 and 3 read text states in place of token ids.
    """
    config, sizes = stage.config, stage.tokenizer
    length, image_size = sizes.text_tokens, sizes.image_size
    if config.stage == "text_encoder":
        length, image_size = config.clip.context_length, config.clip.image_size
    batch = {}
    if config.stage in READ_IMAGES:
        shape = (count, 3, image_size, image_size)
        batch["image"] = torch.randint(256, shape, dtype=torch.uint8)
    if config.stage in READ_TOKENS:
        shape = (count, sizes.num_tokens, sizes.token_channels)
        batch["latent_mean"] = torch.randn(shape)
        # A small variance, as a trained tokenizer's
        batch["latent_logvar"] = torch.randn(shape) - 4
    if stored_states and config.stage in READ_TOKENS:
        batch["text_states"] = torch.randn(count, length, sizes.text_width).half()
    else:
        batch["token_ids"] = torch.randint(MAX_TOKEN_ID, (count, length))
    return batch


@dataclass
class Workload:
    """A stage's own step."""

    networks: dict[str, OptimizedNetwork]  # what is trained; "" is the one with an EMA
    frozen: dict[str, nn.Module]  # what else is on the GPU
    step: Callable[[Sequence[dict], int], Any]  # (batches, index)


def build_workload(stage: Stage, run: Run, stored_states: bool = False) -> Workload:
    """The step of any stage; stored_states: see make_batch."""
    config = stage.config
    tower = None
    if stage.make_tower and not (stored_states and config.stage in READ_TOKENS):
        tower = stage.make_tower().to(run.device)
    if config.stage == "tokens":
        return encoding_workload(stage, run, tower)
    if config.stage == "tokenizer":
        return tokenizer_workload(stage, run, tower)

    # The other stages train one network by one loss.
    training = config.training
    model, loss_fn = build_loss(stage, run, tower)
    network = OptimizedNetwork(run, model, config.optimizer, training.max_gradient_norm)
    # Not compiled, whatever the config says: it takes a minute, and changes no FLOPs.
    network.wrap()

    def step(batches: Sequence[dict], index: int) -> dict[str, Tensor]:
        return descend(network, batches, loss_fn, index, training.max_steps)

    return Workload({"": network}, {"text_tower": tower} if tower else {}, step)


def repeated_step(
    stage: Stage, run: Run, count: int, stored_states: bool = False
) -> Callable[[], None]:
    """The next step on one made-up batch each time it is called, with the EMA's update."""
    work = build_workload(stage, run, stored_states)
    for network in work.networks.values():
        fill_zeros(network.module)
    batch = make_batch(stage, count, stored_states)
    ema = EMA(work.networks[""].module, stage.training.ema_decay) if work.networks else None
    indices = itertools.count()

    def step() -> None:
        work.step([batch], next(indices))
        if ema:
            ema.update()

    return step


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    # Gates and last layers start at zero: products with zeros are not what is to be timed.
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def build_loss(stage: Stage, run: Run, tower: TextEncoder | None) -> tuple[nn.Module, Callable]:
    """(network, loss of a batch) of a stage that trains one network."""
    config, sizes = stage.config, stage.tokenizer
    if config.stage == "text_encoder":
        clip = train_text_encoder.open_clip_config(config.clip)
        return train_text_encoder.ClipPair(clip), partial(train_text_encoder.compute_losses, run)
    if config.stage == "text_decoder":
        captions = StoredText(run, None, None, tower)
        decoder = train_text_decoder.build_model(config, None)
        return decoder, partial(train_text_decoder.compute_losses, config, captions)
    info = unknown_tokens(sizes.num_tokens, sizes.token_channels, latent_scale=1.0)
    tokens = StoredTokens(run, None, None, tower, info)
    if config.stage == "flowtok":
        flow = train_flowtok.build_model(config, info, None)
        return flow, partial(train_flowtok.compute_losses, config, tokens)
    projector = TextProjector(config.projector)
    freeze_unused_alignment(projector, config.losses)
    return projector, partial(train_text_projector.compute_losses, config, tokens)


def tokenizer_workload(stage: Stage, run: Run, tower: TextEncoder) -> Workload:
    """Stage 1: tokenizer and discriminator in turn."""
    config, frozen = stage.config, {"text_tower": tower}
    if config.losses.perceptual_weight:
        frozen["perceptual"] = made_up_distance(config.perceptual).to(run.device)
    if config.losses.vision_weight:
        teacher = made_up_teacher(config.vision, config.tokenizer.grid_size).to(run.device)
        frozen["vision"] = teacher
        config.tokenizer = replace(config.tokenizer, vision_width=teacher.width)
    model = train_tokenizer.build_model(config, run, has_checkpoint=True)
    clip = config.training.max_gradient_norm
    networks = {"": OptimizedNetwork(run, model, config.optimizer, clip)}
    if config.adversarial.weight:
        discriminator = Discriminator()
        optimizer = config.discriminator_optimizer
        networks["discriminator_"] = OptimizedNetwork(run, discriminator, optimizer, clip)
    for network in networks.values():
        network.wrap()
    parts = train_tokenizer.Parts(run, tower, frozen.get("perceptual"), frozen.get("vision"))
    step = partial(train_tokenizer.train_step, config, parts, networks)
    return Workload(networks, frozen, step)


def made_up_distance(config: perceptual.PerceptualConfig) -> perceptual.PerceptualLoss:
    """Stage 1's perceptual networks, with random numbers in place of their weights files."""
    # Without files the networks stay on the meta device, but for LPIPS' heads.
    with (
        patch.object(perceptual.PublishedWeights, "find", return_value=None),
        patch.object(perceptual, "_load_into", lambda net, file, prefix="": net),
    ):
        distance = perceptual.PerceptualLoss(config)
    # All get weights of one sign, so that no distance is zero or infinite.
    for module in distance.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = 0.02 * torch.rand(parameter.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return distance


def made_up_teacher(config: VisionConfig, grid: int) -> VisionTeacher:
    """Stage 1's vision model, with random weights in place of its file."""
    # Imported here: it takes a second.
    import timm

    create = timm.create_model
    with (
        patch.object(timm, "create_model", lambda name, pretrained, **rest: create(name, **rest)),
        # timm reads a number for each block from it, which a fake tensor does not have
        patch.object(torch, "linspace", lambda *ends, **device: np.linspace(*ends)),
    ):
        return VisionTeacher(config, grid)


def encoding_workload(stage: Stage, run: Run, tower: TextEncoder) -> Workload:
    """scripts/encode_tokens.py: nothing is trained."""
    tokenizer = ImageTokenizer(stage.tokenizer).requires_grad_(False).eval().to(run.device)

    def encode(batches: Sequence[dict], index: int) -> None:
        for batch in batches:
            encode_images(run, tokenizer, batch)
            if stage.config.store_text_states:
                text_states(run, tower, batch)

    return Workload({}, {"tokenizer": tokenizer, "text_tower": tower}, encode)
