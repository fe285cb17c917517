"""Solvers of the flow's ODE, x at t = 0 -> x at t = 1; they know no networks or data (Sec. 3.1).

A solver is a function (velocity, x, times) -> x at the last time; x stays float32. All are exact on
a straight field. Network evaluations in N steps: euler, euler_release and adams2 N, midpoint and
heun 2N. To add one: write the function and name it in SOLVERS.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .flow import VelocityFn

Solver = Callable[[VelocityFn, Tensor, list[float]], Tensor]


def euler(velocity: VelocityFn, x: Tensor, times: list[float]) -> Tensor:
    """First order (the paper's)."""
    for time, after in pairwise(times):
        x = torch.add(x, velocity(x, time), alpha=after - time)
    return x


def euler_release(velocity: VelocityFn, x: Tensor, times: list[float]) -> Tensor:
    """Euler as in the release, for its numbers."""
    # Its quirk: steps of 1 / N, but the velocity is evaluated at i / (N - 1).
    steps = len(times) - 1
    for i in range(steps):
        x = torch.add(x, velocity(x, i / max(steps - 1, 1)), alpha=1 / steps)
    return x


def midpoint(velocity: VelocityFn, x: Tensor, times: list[float]) -> Tensor:
    """Second order: the velocity half a step ahead carries the whole step."""
    for time, after in pairwise(times):
        half = torch.add(x, velocity(x, time), alpha=(after - time) / 2)
        x = torch.add(x, velocity(half, (time + after) / 2), alpha=after - time)
    return x


def heun(velocity: VelocityFn, x: Tensor, times: list[float]) -> Tensor:
    """Second order: the mean of the velocities at both ends of the step."""
    for time, after in pairwise(times):
        first = velocity(x, time)
        second = velocity(torch.add(x, first, alpha=after - time), after)
        x = torch.add(x, first + second, alpha=(after - time) / 2)
    return x


def adams2(velocity: VelocityFn, x: Tensor, times: list[float]) -> Tensor:
    """Second order multistep (Adams-Bashforth 2, any step sizes): reuses the last velocity."""
    before, last_step = None, 1.0
    for time, after in pairwise(times):
        now = velocity(x, time)
        step = after - time
        # The line through both velocities, at the middle of the step: now + step/2 * its slope.
        slope = now if before is None else torch.lerp(before, now, 1 + step / (2 * last_step))
        x = torch.add(x, slope, alpha=step)
        before, last_step = now, step
    return x


# A name here is a name that sampling.sampler and --sampler take.
SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "euler_release": euler_release,
    "midpoint": midpoint,
    "heun": heun,
    "adams2": adams2,
}


def make_times(steps: int) -> list[float]:
    """N + 1 evenly spaced times from 0 to 1."""
    return [i / steps for i in range(steps + 1)]


def check_solver(name: str, steps: int) -> None:
    """Refuse an unknown solver, or fewer than 1 step."""
    if name not in SOLVERS:
        raise ValueError(f"unknown sampler {name!r}; valid: {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def evaluation_times(solver: Solver, times: list[float]) -> list[float]:
    """The distinct times at which a solver asks for the velocity, in its order."""
    # Found by letting it solve something, so that a new solver needs no table of its own.
    asked: list[float] = []

    def record(x: Tensor, time: float) -> Tensor:
        asked.append(time)
        return x

    solver(record, torch.zeros(()), times)
    return list(dict.fromkeys(asked))


@torch.no_grad()
def integrate(velocity: VelocityFn, x: Tensor, solver: Solver, times: list[float]) -> Tensor:
    """Follow the velocity: B x K x C at times[0] -> at times[-1]."""
    # The state is float32 in any precision: bfloat16 would lose the small steps.
    return solver(lambda state, time: velocity(state, time).float(), x.float(), times)
