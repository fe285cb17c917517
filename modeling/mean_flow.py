"""Improved MeanFlow: a network of average velocities, for one or a few evaluations.

Geng et al. 2025 (arXiv 2505.13447, MeanFlow) and arXiv 2512.02012 (improved MeanFlow). Times as in
this code, from t = 0 to 1: u(z, t, h) is the mean of the velocity v over [t, t + h] on the flow
through z at t, so that z + h u(z, t, h) is the flow's point at t + h: one step of Euler's. With the
interval's end held, u = v + h du/dt; the whole interval's u is also the mean of its shorter steps'.
z is B x K x C, t and h are B.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flow import FlowConfig, sample_times

AverageFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z, t, h) -> average velocity B x K x C
PLAIN_SHARE = 0.5  # of samples with h = 0: plain flow matching
WHOLE_SHARE = 0.25  # of samples with t = 0 and h = 1: one evaluation
WHOLE_STEPS = 4  # of the network's own that are a whole interval's target


def split_batch(batch_size: int) -> tuple[slice, slice, slice]:
    """Which samples of a batch have intervals of length 0, which others, and which of length 1."""
    plain = int(PLAIN_SHARE * batch_size)
    whole = batch_size - int(WHOLE_SHARE * batch_size)
    return slice(0, plain), slice(plain, whole), slice(whole, batch_size)


def sample_intervals(
    config: FlowConfig, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw starts t and lengths h of intervals in [0, 1], B each: both ends as `sample_times`.

    Those of length 0 and 1 lie where `split_batch` says.
    """
    one, other = (sample_times(config, batch_size, device) for _ in range(2))
    plain, _, whole = split_batch(batch_size)
    # Of length 0 the average is the velocity, which the data teach; all others lean on it.
    other[plain] = one[plain]
    one[whole], other[whole] = 0, 1
    return torch.minimum(one, other), (one - other).abs()


@torch.no_grad()
def average_target(
    network: nn.Module,
    velocity: Tensor,
    z: Tensor,
    t: Tensor,
    h: Tensor,
    null: Tensor,
    context: Tensor,
    guidance: float,
) -> Tensor:
    """What a FlowTok's average over [t, t + h] is to be, given the path's velocity: B x K x C."""
    plain, between, whole = split_batch(len(z))

    def average(samples: slice) -> AverageFn:
        return lambda z, t, h: network(z, t, null[samples], context[samples], h).to(z)

    # The mean of paths away from the unconditional velocity is the guided one (MeanFlow, Sec. 4.2);
    # whole intervals learn from the network alone.
    if guidance != 1:
        z_path, t_path, off = z[: whole.start], t[: whole.start], null[: whole.start]
        text, velocity = context[: whole.start], velocity[: whole.start]
        hidden = network(z_path, t_path, torch.ones_like(off), text, torch.zeros_like(t_path))
        guided = torch.lerp(hidden.to(velocity), velocity, guidance)
        velocity = torch.where(off.view(-1, 1, 1), velocity, guided)

    # Along its own velocity, a function of z as the path's is not (improved MeanFlow).
    z_between, t_between = z[between], t[between]
    own = average(between)(z_between, t_between, torch.zeros_like(t_between))
    change = drift(average(between), z_between, t_between, h[between], own)
    by_steps = whole_average(average(whole), z[whole])
    return torch.cat([velocity[plain], velocity[between] + change, by_steps])


@torch.no_grad()
def drift(average: AverageFn, z: Tensor, t: Tensor, h: Tensor, velocity: Tensor) -> Tensor:
    """h du/dt along the velocity, with the interval's end held: B x K x C, without gradient."""
    # Forward mode, which neither fused attention nor compiled blocks have.
    inputs, tangents = (z, t, h), (velocity, torch.ones_like(t), -torch.ones_like(h))
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        _, derivative = torch.func.jvp(average, inputs, tangents)
    return h.view(-1, 1, 1) * derivative


@torch.no_grad()
def whole_average(average: AverageFn, z: Tensor) -> Tensor:
    """Average velocity over [0, 1] from z, by shorter steps of the network: B x K x C.

    Shortcut models' self-consistency (Frans et al. 2024, arXiv 2410.12557): unlike the path of one
    image, it is a function of z, so that one evaluation has little else to learn.
    """
    total = torch.zeros_like(z)
    h = torch.full_like(z[:, 0, 0], 1 / WHOLE_STEPS)
    for step in range(WHOLE_STEPS):
        velocity = average(z + total, step * h, h)
        total = total + velocity / WHOLE_STEPS
    return total
