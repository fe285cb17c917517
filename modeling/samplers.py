"""Solvers of the flow's ODE: velocity_fn, x at t = 0 -> x at t = 1; without networks and data (paper, Sec. 3.1).

A grid is a list of (time at which the velocity is evaluated, step size). GRIDS names them for configs and commands.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.flow import VelocityFn

Grid = list[tuple[float, float]]


def euler_grid(steps: int) -> Grid:
    """Consistent Euler: evaluate at i / N, step 1 / N, i = 0..N-1."""
    return [(i / steps, 1 / steps) for i in range(steps)]


def release_grid(steps: int) -> Grid:
    """The release's quirk: evaluate at i / (N - 1) while stepping 1 / N. Needed for its numbers, not otherwise."""
    return [(i / max(steps - 1, 1), 1 / steps) for i in range(steps)]


GRIDS: dict[str, Callable[[int], Grid]] = {"euler": euler_grid, "euler_release": release_grid}


def make_grid(name: str, steps: int) -> Grid:
    """Look up a grid by name.

    Raises:
        ValueError: unknown name, or fewer than 1 step.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown sampler {name!r}; valid: {', '.join(GRIDS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return GRIDS[name](steps)


@torch.no_grad()
def integrate(velocity_fn: VelocityFn, x: Tensor, grid: Grid) -> Tensor:
    """Follow the velocity along the grid: B x K x C at t = 0 -> B x K x C at t = 1. Keeps x in float32."""
    x = x.float()
    for time, step in grid:
        t = torch.full((len(x),), time, device=x.device)
        x = torch.add(x, velocity_fn(x, t).float(), alpha=step)
    return x
