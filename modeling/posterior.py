"""The diagonal Gaussian over latent tokens that the image tokenizer and the text projector both output."""

from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class Posterior(NamedTuple):
    """Mean and log-variance, each B x K x C. A named tuple, so that DDP sees its tensors."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + exp(logvar / 2) * eps with eps ~ N(0, 1): B x K x C."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def split_moments(moments: Tensor) -> Posterior:
    """B x K x 2C -> Posterior; the first C channels are the mean, the last C the log-variance, clamped to [-30, 20].

    Computed in float32 whatever the autocast precision: exp(logvar) of a half-precision value is not usable.
    """
    mean, logvar = moments.float().chunk(2, dim=-1)
    return Posterior(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))
