"""Loaded parts -> images: the one generation path, used by sample.py, evaluation and the trainers' sample grids.

In: captions or token ids. Out: image latents B x K x C, images B x 3 x R x R in [0, 1]. The randomness of an image is a
function of (seed, its index), not of the batch it was made in.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modeling.flow import check_guidance, guided_velocity
from modeling.flow_model import FlowModel
from modeling.flowtok import TimeTable
from modeling.image_tokenizer import ImageTokenizer
from modeling.posterior import Posterior
from modeling.samplers import SOLVERS, check_solver, evaluation_times, integrate, make_times
from modeling.text_encoder import TextEncoder, TextTokenizer

Precision = Literal["fp32", "bf16"]


@dataclass
class SamplingConfig:
    """How images are generated."""

    steps: int = 20
    guidance: float = 2.0
    sampler: str = "euler"  # one of modeling/samplers.py; euler_release for the release's numbers
    time_shift: float = 1.0  # above 1: smaller steps near text
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 1.0]
    )  # of t; outside it there is no guidance
    sample_text_latent: bool = True  # False: start at z_T's mean (one image per caption)
    precision: Precision = (
        "fp32"  # autocast of velocity network and decoder; the solver's state is fp32
    )

    def __post_init__(self):
        check_solver(self.sampler, self.steps, self.time_shift)
        if (
            len(self.guidance_interval) != 2
            or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1
        ):
            raise ValueError(
                f"guidance_interval must be [start, end] within [0, 1], got {self.guidance_interval}"
            )


def text_noise(shape: tuple[int, int], seed: int, indices: list[int]) -> Tensor:
    """Unit noise of shape len(indices) x K x C, each row a function of (seed, index) alone. CPU float32.

    NumPy's generator, because torch's CPU generator uses only the low 32 bits of its seed.
    """
    generators = [
        np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,))) for index in indices
    ]
    return torch.from_numpy(
        np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
    )


@dataclass
class ImageGenerator:
    """All parts of a trained run, in eval mode on one device."""

    tokenize: TextTokenizer
    text_encoder: TextEncoder
    tokenizer: ImageTokenizer
    flow: FlowModel

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.flow.latent_scale.device

    def autocast(self, precision: Precision) -> torch.autocast:
        """The context in which networks run in a precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions -> text states B x L x T."""
        return self.text_encoder(self.tokenize(captions).to(self.device)).float()

    @torch.no_grad()
    def source(
        self, text_states: Tensor, config: SamplingConfig, seed: int, indices: list[int]
    ) -> Tensor:
        """Text states -> start of the flow, B x K x C: z_T sampled with noise of (seed, index), or its mean."""
        posterior: Posterior = self.flow.projector.posterior(text_states)
        if not config.sample_text_latent:
            return posterior.mean
        noise = text_noise(tuple(posterior.mean.shape[1:]), seed, indices).to(self.device)
        return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise

    @torch.no_grad()
    def transport(self, source: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> image latents in the tokenizer's own scale, B x K x C."""
        check_guidance(config.guidance, self.flow.null_probability)
        solver, times = SOLVERS[config.sampler], make_times(config.steps, config.time_shift)
        with self.autocast(config.precision):
            table = TimeTable(self.flow.flowtok, evaluation_times(solver, times))
            velocity = guided_velocity(table, config.guidance, tuple(config.guidance_interval))
            return integrate(velocity, source, solver, times) / self.flow.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor, text_states: Tensor, precision: Precision = "fp32") -> Tensor:
        """Image latents -> images B x 3 x R x R, clamped to [0, 1], float32."""
        with self.autocast(precision):
            return self.tokenizer.decode(latents, text_states).float().clamp(0, 1)

    @torch.no_grad()
    def generate(
        self,
        captions: list[str],
        config: SamplingConfig,
        seed: int = 0,
        indices: list[int] | None = None,
    ):
        """Captions -> (images B x 3 x R x R in [0, 1], latents B x K x C) on the device.

        `indices` number the images for their randomness (default 0..B-1).
        """
        indices = list(range(len(captions))) if indices is None else indices
        text_states = self.encode_text(captions)
        latents = self.transport(self.source(text_states, config, seed, indices), config)
        return self.decode(latents, text_states, config.precision), latents
