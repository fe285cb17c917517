"""A network of average velocities, for one or a few evaluations (MeanFlow, arXiv 2505.13447).

Times as in this code, from t = 0 to 1: u(z, t, h) is the mean of the velocity v over [t, t + h] on
the flow through z at t, so that z + h u(z, t, h) is the flow's point at t + h: one step of Euler's.
As h grows that point moves with the velocity where it is, u + h du/dh = v(z + h u, t + h): by this
the network teaches itself (Lagrangian self-distillation, Boffi et al. 2025, arXiv 2505.18825).
MeanFlow's own identity, u = v + h du/dt, is worse here (docs/beyond_the_paper.md). Pure functions,
no networks. z is B x K x C, t and h are B.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flow import FlowConfig, sample_times

AverageFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z, t, h) -> average velocity B x K x C
PLAIN_SHARE = 0.5  # of samples with h = 0: plain flow matching
WHOLE_SHARE = 0.25  # of samples with the interval [0, 1]: one evaluation


def num_plain(batch_size: int) -> int:
    """How many samples of a batch, the first ones, have intervals of length 0."""
    return int(PLAIN_SHARE * batch_size)


def sample_intervals(
    config: FlowConfig, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw starts t and lengths h of intervals in [0, 1], B each: both ends as `sample_times`.

    First those of length 0, then those of length 1, then the others.
    """
    start, end = (sample_times(config, batch_size, device) for _ in range(2))
    plain = num_plain(batch_size)
    whole = slice(plain, plain + int(WHOLE_SHARE * batch_size))
    end[:plain] = start[:plain]
    start[whole], end[whole] = 0, 1
    return torch.minimum(start, end), (start - end).abs()


@torch.no_grad()
def average_target(average: AverageFn, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """v(z + h u, t + h) - h du/dh, which u(z, t, h) is where it is right: B x K x C."""
    # Forward mode, which neither fused attention nor compiled blocks have.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        mean, slope = torch.func.jvp(lambda h: average(z, t, h), (h,), (torch.ones_like(h),))
    length = h.view(-1, 1, 1)
    return average(z + length * mean, t + h, torch.zeros_like(h)) - length * slope
