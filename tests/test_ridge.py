"""training/ridge.py against the textbook's formula and against leaving samples out for real."""

import pytest
import torch

from training.ridge import STRENGTHS, fit_ridge


def make_data(number=40, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(number, 3, 4, generator=generator)
    matrix = torch.randn(12, 10, generator=generator)
    latents = (
        states.flatten(1) @ matrix + noise * torch.randn(number, 10, generator=generator) + 2.0
    )
    return states, latents.view(number, 5, 2)


def primal(states, latents, queries, scale):
    """(X^T X + s I)^-1 X^T Y, the form without a kernel; N x D float64."""
    x, y = states.flatten(1).double(), latents.flatten(1).double()
    centred, target = x - x.mean(0), y - y.mean(0)
    matrix = centred.T @ centred + scale * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(matrix, centred.T @ target)
    return (queries.flatten(1).double() - x.mean(0)) @ weights + y.mean(0)


def kernel_scale(states, strength):
    centred = states.flatten(1).double() - states.flatten(1).double().mean(0)
    return strength * centred.square().sum().item() / len(states)  # trace / N: the mean eigenvalue


def test_predictions_are_those_of_the_primal_form():
    states, latents = make_data()
    queries = torch.randn(7, 3, 4)
    ridge = fit_ridge(states, latents)
    expected = primal(states, latents, queries, kernel_scale(states, ridge.strength))
    torch.testing.assert_close(ridge(queries).flatten(1).double(), expected, rtol=1e-4, atol=1e-4)


def leave_out(states, latents, strength):
    """Each sample's prediction from all others, by their own mean, N x D; the penalty of all."""
    scale, predictions = kernel_scale(states, strength), []
    for i in range(len(states)):
        kept = [j for j in range(len(states)) if j != i]
        predictions.append(primal(states[kept], latents[kept], states[i : i + 1], scale))
    return torch.cat(predictions), latents.flatten(1).double()


@pytest.mark.parametrize("strength", [STRENGTHS[0], STRENGTHS[-1]])
@pytest.mark.parametrize("number", [40, 9])  # more and fewer samples than dimensions
def test_error_and_retrieval_are_those_of_samples_left_out(number, strength):
    states, latents = make_data(number, noise=3.0)
    ridge = fit_ridge(states, latents, [strength])
    predictions, targets = leave_out(states, latents, strength)
    assert ridge.error == pytest.approx((predictions - targets).square().mean().item())
    ranks = [
        sorted(range(number), key=lambda j: (p - targets[j]).norm()).index(i)
        for i, p in enumerate(predictions)
    ]
    assert ridge.top5 == sum(rank < 5 for rank in ranks) / number


def test_the_strength_that_retrieves_best_is_taken():
    states, latents = make_data(noise=3.0)
    found = {strength: fit_ridge(states, latents, [strength]).top5 for strength in STRENGTHS}
    assert len({*found.values()}) > 1
    assert fit_ridge(states, latents).strength == max(found, key=found.get)
