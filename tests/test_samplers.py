"""modeling/samplers.py: solvers against closed forms, their order, times, precision.

The release's own solver: test_convert_checkpoint.py.
"""

import math
from itertools import pairwise

import pytest
import torch

from modeling.samplers import SOLVERS, euler, evaluation_times, integrate, make_times

SHAPE = (3, 5, 4)
SECOND_ORDER = ("midpoint", "heun", "adams2")


def decay(x, time):
    return -x


def curved(x, time):
    """x' = x (1 + 2 t): x(1) = x(0) exp(2)."""
    return x * (1 + 2 * time)


def uneven(steps):
    """Times whose steps grow from 0 to 1."""
    return [i / (i + 2.5 * (steps - i)) for i in range(steps + 1)]


def solve(field, x, name, steps):
    return integrate(field, x, SOLVERS[name], make_times(steps))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), *((name, 2) for name in SECOND_ORDER)])
@pytest.mark.parametrize("times", [make_times, uneven])
@pytest.mark.parametrize(("field", "growth"), [(decay, math.exp(-1)), (curved, math.exp(2))])
def test_solvers_converge_with_their_order_on_equal_and_uneven_steps(
    name, order, times, field, growth
):
    start = torch.ones(1, dtype=torch.float64)  # rounding is far below
    ends = [SOLVERS[name](field, start, times(steps)) for steps in (64, 128, 256)]
    for coarse, fine in pairwise((end - growth).abs().item() for end in ends):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 7])
def test_straight_field_is_exact_in_any_number_of_steps(name, steps):
    x, velocity = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    before = x.detach().clone()
    end = solve(lambda x, time: velocity, x, name, steps)
    torch.testing.assert_close(end, before + velocity)
    assert torch.equal(x.detach(), before) and not end.requires_grad  # the start stays, no graph


@pytest.mark.parametrize(
    ("name", "times", "number"),
    [
        ("euler", [0, 0.25, 0.5, 0.75], 4),
        ("euler_release", [0, 1 / 3, 2 / 3, 1], 4),
        ("adams2", [0, 0.25, 0.5, 0.75], 4),
        ("midpoint", [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875], 8),
        ("heun", [0, 0.25, 0.5, 0.75, 1], 8),  # inner ones asked twice
    ],
)
def test_evaluation_times_are_those_at_which_the_field_is_asked(name, times, number):
    asked = []

    def field(x, time):
        asked.append(time)
        return x

    solve(field, torch.randn(SHAPE), name, 4)
    found = evaluation_times(SOLVERS[name], make_times(4))
    assert found == list(dict.fromkeys(asked)) == pytest.approx(times)
    assert len(asked) == number


def test_state_is_float32_whatever_the_precision_of_start_and_network():
    # Each step is below bfloat16's resolution of the state.
    start = torch.full(SHAPE, 8.0, dtype=torch.bfloat16)
    end = integrate(lambda x, time: torch.ones_like(start), start, euler, make_times(1000))
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, torch.full(SHAPE, 9.0), rtol=0, atol=1e-3)
