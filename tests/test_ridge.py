"""modeling/ridge.py against the textbook's formula and against leaving samples out for real."""

import torch

from modeling.ridge import STRENGTHS, fit_ridge


def make_data(number=40, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(number, 3, 4, generator=generator)
    matrix = torch.randn(12, 10, generator=generator)
    latents = states.flatten(1) @ matrix + noise * torch.randn(number, 10, generator=generator) + 2.0
    return states, latents.view(number, 5, 2)


def primal(states, latents, queries, scale):
    """(X^T X + s I)^-1 X^T Y, the form without a kernel."""
    x, y = states.flatten(1).double(), latents.flatten(1).double()
    centred, target = x - x.mean(0), y - y.mean(0)
    weights = torch.linalg.solve(centred.T @ centred + scale * torch.eye(x.shape[1]).double(), centred.T @ target)
    return ((queries.flatten(1).double() - x.mean(0)) @ weights + y.mean(0)).view(-1, *latents.shape[1:]).float()


def kernel_scale(states, strength):
    centred = states.flatten(1).double() - states.flatten(1).double().mean(0)
    return strength * centred.square().sum().item() / len(states)  # trace / N: the mean eigenvalue


def test_predictions_are_those_of_the_primal_form():
    states, latents = make_data()
    queries = torch.randn(7, 3, 4)
    ridge = fit_ridge(states, latents)
    expected = primal(states, latents, queries, kernel_scale(states, ridge.strength))
    torch.testing.assert_close(ridge(queries), expected, rtol=1e-4, atol=1e-4)


def test_the_strength_with_the_least_error_on_left_out_samples_is_taken():
    states, latents = make_data(noise=3.0)
    ridge, errors = fit_ridge(states, latents), {}
    for strength in STRENGTHS:
        scale, residuals = kernel_scale(states, strength), []
        for i in range(len(states)):
            kept = [j for j in range(len(states)) if j != i]
            # the closed form keeps the mean of all samples
            x, y = states.flatten(1).double(), latents.flatten(1).double()
            centred, target = x - x.mean(0), y - y.mean(0)
            a, b = centred[kept], target[kept]
            weights = torch.linalg.solve(a.T @ a + scale * torch.eye(12).double(), a.T @ b)
            residuals.append(centred[i] @ weights - target[i])
        errors[strength] = torch.stack(residuals).square().mean().item()
    assert ridge.strength == min(errors, key=errors.get)
    assert abs(ridge.error - errors[ridge.strength]) < 1e-6 * ridge.error


def test_noise_asks_for_more_strength():
    assert fit_ridge(*make_data(noise=0.01)).strength < fit_ridge(*make_data(noise=10.0)).strength
