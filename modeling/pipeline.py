"""Loaded parts -> images or captions: the one generation path of sample.py, eval and training.

ImageGenerator: captions -> z_T -> flow -> image latents -> images (paper, Sec. 3.1). The randomness
of an image is a function of (seed, its index), not of the batch it was made in.
Captioner: images -> z_I -> flow -> z_T -> text decoder -> captions (Sec. 4.1). Nothing is drawn: an
image has one caption.
Images are B x 3 x R x R in [0, 1], latents B x K x C.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .flow import check_guidance, guided_velocity
from .flow_model import FlowModel
from .image_tokenizer import ImageTokenizer
from .samplers import SOLVERS, check_solver, evaluation_times, integrate, make_times
from .text_decoder import TextDecoder
from .text_encoder import TextEncoder, Tokenizer

Precision = Literal["fp32", "bf16"]

# Spaces that decoded BPE tokens have around punctuation and between digits
SUPERFLUOUS_SPACES = re.compile(
    r" (?=[,.;:!?%)\]}]|'\w)|(?<=[(\[{]) |(?<=\d) (?=\d)| (?=-)|(?<=-) "
)


@dataclass
class SamplingConfig:
    """How images and captions are sampled."""

    steps: int = 20
    guidance: float = 2.0
    sampler: str = "euler"  # one of modeling/samplers.py; euler_release for the release's numbers
    # [start, end] of t with guidance
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    sample_text_latent: bool = True  # False: start at z_T's mean (one image per caption)
    # Autocast of velocity network and decoder; the solver's state is float32
    precision: Precision = "fp32"

    def __post_init__(self):
        check_solver(self.sampler, self.steps)
        bounds = [0.0, *self.guidance_interval, 1.0]
        if len(self.guidance_interval) != 2 or bounds != sorted(bounds):
            raise ValueError(
                "guidance_interval must be [start, end] within [0, 1], got "
                f"{self.guidance_interval}"
            )


def unit_noise(shape: tuple[int, int], seed: int, indices: list[int]) -> Tensor:
    """Unit noise, len(indices) x K x C, each row a function of (seed, index). CPU float32.

    NumPy's generator, because torch's CPU generator uses only the low 32 bits of its seed.
    """
    seeds = [np.random.SeedSequence(seed, spawn_key=(index,)) for index in indices]
    rows = [np.random.default_rng(s).standard_normal(shape, dtype=np.float32) for s in seeds]
    return torch.from_numpy(np.stack(rows))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which networks run in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def transport(
    flow: FlowModel, start: Tensor, context: Tensor | None, config: SamplingConfig
) -> Tensor:
    """Follow the guided flow from t = 0 to t = 1: B x K x C -> B x K x C.

    Args:
        context: what the velocity network reads beside the tokens (FlowModel.context).
    """
    check_guidance(config.guidance, flow.config.null_probability)
    solver = SOLVERS[config.sampler]
    times = make_times(config.steps)
    with autocast(start.device, config.precision):
        branches = flow.flowtok.at_times(evaluation_times(solver, times), context)
        velocity = guided_velocity(branches, config.guidance, tuple(config.guidance_interval))
        return integrate(velocity, start, solver, times)


@dataclass
class ImageGenerator:
    """All parts of a trained run that flows from text to image, in eval mode on one device."""

    text_encoder: TextEncoder
    tokenizer: ImageTokenizer
    flow: FlowModel

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.flow.latent_scale.device

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions -> text states B x L x T."""
        token_ids = self.text_encoder.tokenize(captions)
        return self.text_encoder(token_ids.to(self.device)).float()

    @torch.no_grad()
    def start(
        self, text_states: Tensor, config: SamplingConfig, seed: int, indices: list[int]
    ) -> Tensor:
        """Text states -> start of the flow, B x K x C, with noise of (seed, index)."""
        source, noise = self.flow.projector, None
        if config.sample_text_latent:
            noise = unit_noise(source.shape, seed, indices).to(self.device)
        return source.start(text_states, noise)

    @torch.no_grad()
    def transport(self, start: Tensor, text_states: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> image latents in the tokenizer's own scale, B x K x C."""
        context = self.flow.context(text_states)
        return transport(self.flow, start, context, config) / self.flow.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor, text_states: Tensor, precision: Precision = "fp32") -> Tensor:
        """Image latents -> images B x 3 x R x R, clamped to [0, 1], float32."""
        with autocast(self.device, precision):
            return self.tokenizer.decode(latents, text_states).float().clamp(0, 1)

    @torch.no_grad()
    def generate(
        self,
        captions: list[str],
        config: SamplingConfig,
        seed: int = 0,
        indices: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Captions -> (images B x 3 x R x R in [0, 1], latents B x K x C) on the device.

        `indices` number the images for their randomness (default 0..B-1).
        """
        if indices is None:
            indices = list(range(len(captions)))
        text_states = self.encode_text(captions)
        start = self.start(text_states, config, seed, indices)
        latents = self.transport(start, text_states, config)
        return self.decode(latents, text_states, config.precision), latents


def join_punctuation(text: str) -> str:
    """Decoded tokens as they are usually written: "cat , t - rex ( 1 0 )" -> "cat, t-rex (10)"."""
    return SUPERFLUOUS_SPACES.sub("", text)


@dataclass
class Captioner:
    """All parts of a trained run that flows from image to text, in eval mode on one device."""

    tokenize: Tokenizer
    tokenizer: ImageTokenizer
    flow: FlowModel
    decoder: TextDecoder

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.flow.latent_scale.device

    @torch.no_grad()
    def start(self, images: Tensor) -> Tensor:
        """Images B x 3 x R x R in [0, 1] -> start of the flow, the mean of z_I: B x K x C."""
        return self.tokenizer.encode(images.to(self.device)).mean * self.flow.latent_scale

    def transport(self, start: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> z_T, B x K x C."""
        return transport(self.flow, start, None, config)

    @torch.no_grad()
    def read(self, latents: Tensor) -> list[str]:
        """z_T B x K x C -> captions; what comes after the first end token is cut off."""
        token_ids = self.decoder(latents).cpu()
        return [join_punctuation(self.tokenize.decode(ids)) for ids in token_ids]

    def captions(self, images: Tensor, config: SamplingConfig) -> list[str]:
        """Images B x 3 x R x R in [0, 1] -> captions, lower case as CLIP's tokenizer has it."""
        return self.read(self.transport(self.start(images), config))
