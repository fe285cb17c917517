"""Improved MeanFlow: a network of average velocities, for one or a few evaluations.

Geng et al. 2025 (arXiv 2505.13447, MeanFlow) and arXiv 2512.02012 (improved MeanFlow). Times as in
this code, from t = 0 to 1: u(z, t, h) is the mean of the velocity v over [t, t + h] on the flow
through z at t, so that z + h u(z, t, h) is the flow's point at t + h: one step of Euler's. With the
interval's end held, u = v + h du/dt. Pure functions, no networks. z is B x K x C, t and h are B.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flow import FlowConfig, sample_times

AverageFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z, t, h) -> average velocity B x K x C
PLAIN_SHARE = 0.5  # of samples with h = 0: plain flow matching
WHOLE_SHARE = 0.25  # of samples with t = 0 and h = 1: one evaluation


def num_plain(batch_size: int) -> int:
    """How many samples of a batch, the first ones, have intervals of length 0."""
    return int(PLAIN_SHARE * batch_size)


def sample_intervals(
    config: FlowConfig, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw starts t and lengths h of intervals in [0, 1], B each: both ends as `sample_times`.

    First come the intervals of length 0, then those of length 1, then all others.
    """
    one, other = (sample_times(config, batch_size, device) for _ in range(2))
    plain = num_plain(batch_size)
    other[:plain] = one[:plain]
    whole = slice(plain, plain + int(WHOLE_SHARE * batch_size))
    one[whole], other[whole] = 0, 1
    return torch.minimum(one, other), (one - other).abs()


@torch.no_grad()
def drift(average: AverageFn, z: Tensor, t: Tensor, h: Tensor, velocity: Tensor) -> Tensor:
    """h du/dt along the velocity, with the interval's end held: B x K x C, without gradient."""
    # Forward mode, which neither fused attention nor compiled blocks have.
    inputs, tangents = (z, t, h), (velocity, torch.ones_like(t), -torch.ones_like(h))
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        _, derivative = torch.func.jvp(average, inputs, tangents)
    return h.view(-1, 1, 1) * derivative
