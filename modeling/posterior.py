"""The diagonal Gaussian over latent tokens that image tokenizer and text projector output."""

from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class Posterior(NamedTuple):
    """Mean and log-variance, each B x K x C. A named tuple, so that DDP sees its tensors."""

    mean: Tensor
    logvar: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """mean + exp(logvar / 2) * noise: B x K x C, from unit noise of that shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.at(noise)


def split_moments(moments: Tensor) -> Posterior:
    """B x K x 2C -> Posterior; C channels of mean, then C of log-variance, clamped to [-30, 20]."""
    # Float32 in any autocast precision: exp(logvar) of a half-precision value is not usable.
    mean, logvar = moments.float().chunk(2, dim=-1)
    return Posterior(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))


# What a training pass gives the losses; named tuples, so that DDP sees their tensors.


class SourcePass(NamedTuple):
    """Where the flow starts, and what the losses on it need; None where the start is noise."""

    latents: Tensor  # B x L x C
    features: Tensor  # B x L x W, what a velocity network with a condition reads of the text
    mean: Tensor | None = None  # B x L x C
    logvar: Tensor | None = None  # B x L x C
    alignment: Tensor | None = None  # B x L x C, target of the alignment
    log_temperature: Tensor | None = None  # scalar


class FlowPass(NamedTuple):
    """A velocity and its target, at a random time of each sample."""

    velocity: Tensor  # B x K x C, predicted
    target: Tensor  # B x K x C
    source: SourcePass  # before any detaching
