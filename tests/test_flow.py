"""modeling/flow.py: path and velocity in float64, times, targets of the null flow, guidance."""

import pytest
import torch

from modeling.flow import (
    FlowConfig,
    draw_null,
    guided_velocity,
    interpolate,
    sample_times,
    swap_targets,
    target_velocity,
)

B, K, C, SIGMA = 4, 5, 3, 1e-5
CPU = torch.device("cpu")


def latents():
    return torch.randn(2, B, K, C, dtype=torch.float64)


def drop(end, probability):
    """Null indicators and the targets that follow from them."""
    null = draw_null(len(end), probability, CPU)
    return null, swap_targets(end, null)


def numbered_latents(batch):
    """Latent of sample i holds i everywhere."""
    return torch.arange(batch).float().view(-1, 1, 1).expand(-1, K, C)


@pytest.mark.parametrize("sigma_min", [0.0, SIGMA, 0.3])
def test_velocity_is_the_paths_derivative_at_every_time(sigma_min):
    text, image = latents()
    t = torch.rand(B, dtype=torch.float64)
    _, derivative = torch.func.jvp(
        lambda t: interpolate(text, image, t, sigma_min), (t,), (torch.ones_like(t),)
    )
    velocity = target_velocity(text, image, sigma_min)
    torch.testing.assert_close(velocity, derivative, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "cumulative"),
    [
        ({}, lambda t: t),
        ({"time_distribution": "logit_normal"}, lambda t: torch.special.ndtr(torch.logit(t))),
        (
            {"time_distribution": "logit_normal", "time_mean": -0.8},
            lambda t: torch.special.ndtr(torch.logit(t) + 0.8),
        ),
        ({"time_distribution": "power", "time_power": 3.0}, lambda t: t ** (1 / 3)),
    ],
    ids=["uniform", "logit_normal", "early", "power"],
)
def test_times_follow_their_distribution(options, cumulative):
    number = 20_000
    t = sample_times(FlowConfig(**options), number, CPU)
    assert t.shape == (number,) and t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    empirical = (torch.arange(number) + 0.5) / number
    distance = (cumulative(t.double().sort().values) - empirical).abs().max()
    assert distance < 1.95 / number**0.5  # Kolmogorov-Smirnov, 0.1%


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5])
def test_share_of_chosen_samples_is_the_null_probability(probability):
    null, targets = drop(numbered_latents(20_000), probability)
    assert null.float().mean().item() == pytest.approx(probability, abs=0.012)
    assert torch.equal((targets != numbered_latents(20_000))[:, 0, 0], null)


def test_every_other_sample_can_be_the_target():
    image, seen = numbered_latents(4).clone(), {i: set() for i in range(4)}
    for _ in range(200):
        null, targets = drop(image, 0.9)
        for i in null.nonzero().flatten().tolist():
            seen[i].add(int(targets[i, 0, 0]))
    assert seen == {i: {0, 1, 2, 3} - {i} for i in range(4)}
    assert torch.equal(image, numbered_latents(4))  # the given latents stay as they are


def test_a_batch_of_one_keeps_its_latent():
    chosen = [drop(torch.ones(1, K, C), 0.5) for _ in range(50)]
    assert all(torch.equal(targets, torch.ones(1, K, C)) for _, targets in chosen)
    assert {bool(null) for null, _ in chosen} == {False, True}


def recording_branches(calls):
    """v = 3 x + t where the flow is conditional, -x where it is not."""

    def branches(x, time, null):
        calls.append((len(x), null))
        return torch.cat([-x if off else 3 * x + time for off in null])

    return branches


@pytest.mark.parametrize(
    ("guidance", "null"),
    [(0, (True,)), (1.0, (False,)), (0.5, (False, True)), (2.0, (False, True))],
)
def test_guidance_extrapolates_from_null_in_one_call_of_what_it_needs(guidance, null):
    calls, (x, _) = [], latents()
    velocity = guided_velocity(recording_branches(calls), guidance)(x, 0.25)
    assert calls == [(B, null)]
    torch.testing.assert_close(velocity, -x + guidance * (3 * x + 0.25 + x))


@pytest.mark.parametrize(
    ("time", "is_guided"), [(0.0, False), (0.19, False), (0.2, True), (0.7, True), (0.71, False)]
)
def test_outside_its_interval_guidance_costs_nothing_and_changes_nothing(time, is_guided):
    calls, (x, _) = [], latents()
    velocity = guided_velocity(recording_branches(calls), 4.0, (0.2, 0.7))(x, time)
    assert calls == [(B, (False, True) if is_guided else (False,))]
    assert torch.equal(velocity, 3 * x + time) != is_guided
