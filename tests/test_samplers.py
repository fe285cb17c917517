"""modeling/samplers.py: Euler against closed-form solutions, both time grids, precision, errors."""

import math
from itertools import pairwise

import pytest
import torch

from modeling.samplers import GRIDS, integrate, make_grid

SHAPE = (3, 5, 4)


def decay(x, t):
    return -x


def test_euler_of_exponential_decay_is_its_closed_form_and_converges_with_order_one():
    x, errors = torch.randn(SHAPE), []
    for steps in (10, 20, 40, 80):
        end = integrate(decay, x, make_grid("euler", steps))
        torch.testing.assert_close(end, x * (1 - 1 / steps) ** steps)
        errors.append((end - x * math.exp(-1)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.12)


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("steps", [1, 7])
def test_straight_field_is_exact_in_any_number_of_steps(name, steps):
    x, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    end = integrate(lambda x, t: velocity, x, make_grid(name, steps))
    torch.testing.assert_close(end, x + velocity)


def test_euler_evaluates_at_i_over_n_and_steps_one_over_n():
    assert make_grid("euler", 4) == [(0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]


def test_release_grid_evaluates_at_i_over_n_minus_one_while_stepping_one_over_n():
    times, sizes = zip(*make_grid("euler_release", 5))
    assert times == (0, 0.25, 0.5, 0.75, 1) and sizes == (0.2,) * 5
    assert make_grid("euler_release", 1) == [(0, 1)]


def test_grids_differ_on_a_field_that_depends_on_time():
    def ends(name):
        return integrate(lambda x, t: 2 * t.view(-1, 1, 1).expand(SHAPE), torch.zeros(SHAPE), make_grid(name, 10))

    torch.testing.assert_close(ends("euler"), torch.full(SHAPE, 0.9))  # sum of 2 i / N^2
    torch.testing.assert_close(ends("euler_release"), torch.full(SHAPE, 1.0))


def test_field_is_called_once_a_step_with_one_time_for_each_sample():
    times = []

    def field(x, t):
        times.append(t)
        return x

    integrate(field, torch.randn(SHAPE), make_grid("euler", 4))
    assert torch.equal(torch.stack(times), torch.tensor([0.0, 0.25, 0.5, 0.75])[:, None].expand(4, 3))


def test_state_is_float32_whatever_the_precision_of_start_and_network():
    steps = 1000  # each step is below bfloat16's resolution of the state
    start = torch.full(SHAPE, 8.0, dtype=torch.bfloat16)
    end = integrate(lambda x, t: torch.ones_like(x, dtype=torch.bfloat16), start, make_grid("euler", steps))
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, torch.full(SHAPE, 9.0), rtol=0, atol=1e-3)


def test_integration_leaves_its_start_as_it_is_and_keeps_no_graph():
    start = torch.randn(SHAPE, requires_grad=True)
    before = start.detach().clone()
    assert not integrate(decay, start, make_grid("euler", 2)).requires_grad
    assert torch.equal(start.detach(), before)


def test_unknown_sampler_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match="unknown sampler 'heun'; valid: euler, euler_release"):
        make_grid("heun", 4)


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        make_grid("euler", steps)
