"""Loaded parts -> images: the one generation path, used by sample.py, evaluation and the trainers' sample grids.

In: captions or token ids. Out: image latents B x K x C, images B x 3 x R x R in [0, 1]. The randomness of an image is a
function of (seed, its index), not of the batch it was made in.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.flow import guided_velocity
from modeling.image_tokenizer import ImageTokenizer
from modeling.posterior import Posterior
from modeling.samplers import integrate, make_grid
from modeling.text_encoder import TextEncoder, TextTokenizer
from modeling.text_to_image import TextToImageFlow


@dataclass
class SamplingConfig:
    """How images are generated."""

    steps: int = 20
    guidance: float = 2.0
    sampler: str = "euler"  # euler, or euler_release for the release's numbers
    sample_text_latent: bool = True  # False: start at z_T's mean (one image per caption)


def text_noise(shape: tuple[int, int], seed: int, indices: list[int]) -> Tensor:
    """Unit noise of shape len(indices) x K x C, each row a function of (seed, index) alone. CPU float32.

    NumPy's generator, because torch's CPU generator uses only the low 32 bits of its seed.
    """
    generators = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,))) for index in indices]
    return torch.from_numpy(np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators]))


@dataclass
class TextToImage:
    """All parts of a trained run, in eval mode on one device."""

    tokenize: TextTokenizer
    text_encoder: TextEncoder
    tokenizer: ImageTokenizer
    flow: TextToImageFlow

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.flow.latent_scale.device

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions -> text states B x L x T."""
        return self.text_encoder(self.tokenize(captions).to(self.device)).float()

    @torch.no_grad()
    def source(self, text_states: Tensor, config: SamplingConfig, seed: int, indices: list[int]) -> Tensor:
        """Text states -> start of the flow, B x K x C: z_T sampled with noise of (seed, index), or its mean."""
        posterior: Posterior = self.flow.projector.posterior(text_states)
        if not config.sample_text_latent:
            return posterior.mean
        noise = text_noise(tuple(posterior.mean.shape[1:]), seed, indices).to(self.device)
        return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise

    @torch.no_grad()
    def transport(self, source: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> image latents in the tokenizer's own scale, B x K x C."""
        grid = make_grid(config.sampler, config.steps)
        return integrate(guided_velocity(self.flow.flowtok, config.guidance), source, grid) / self.flow.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor, text_states: Tensor) -> Tensor:
        """Image latents -> images B x 3 x R x R, clamped to [0, 1], float32."""
        return self.tokenizer.decode(latents, text_states).float().clamp(0, 1)

    @torch.no_grad()
    def generate(self, captions: list[str], config: SamplingConfig, seed: int = 0, indices: list[int] | None = None):
        """Captions -> (images B x 3 x R x R in [0, 1], latents B x K x C) on the device.

        `indices` number the images for their randomness (default 0..B-1).
        """
        indices = list(range(len(captions))) if indices is None else indices
        text_states = self.encode_text(captions)
        latents = self.transport(self.source(text_states, config, seed, indices), config)
        return self.decode(latents, text_states), latents
