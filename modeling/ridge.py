"""Kernel ridge regression from text states to image latents: closed form, seconds for some thousand captions.

Where a projector can start from (projector.linear_start), and the baseline of a text-to-image flow on little data
(eval/demo.py): a flow that retrieves held-out images no better has not learned to generalise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # times the mean eigenvalue of the kernel


@dataclass(frozen=True)
class Ridge:
    """Fitted: text states B x L x T -> latents B x K x C."""

    states: Tensor  # N x D, those it was fitted on, centred, float64
    state_mean: Tensor  # D
    latent_mean: Tensor  # K x C
    coefficients: Tensor  # N x K C
    strength: float  # of STRENGTHS
    error: float  # mean squared error of each latent as predicted from all other samples

    def __call__(self, states: Tensor) -> Tensor:
        kernel = (states.flatten(1).to(self.states) - self.state_mean) @ self.states.T
        return (kernel @ self.coefficients).view(-1, *self.latent_mean.shape).float() + self.latent_mean


def fit_ridge(states: Tensor, latents: Tensor, strengths: Sequence[float] = STRENGTHS) -> Ridge:
    """Linear kernel on the flattened, centred states; of the strengths that with the least leave-one-out error.

    With K = X X^T and A = (K + s I)^-1 the coefficients are A Y, and the residual that sample i has when it is left
    out is (A Y)_i / A_ii (Allen's PRESS), so that no data is kept back to choose s. N^3 operations a strength.

    Args:
        states: text states N x L x T of at least 2 captions.
        latents: image latents N x K x C.
        strengths: times the mean eigenvalue of K; positive.
    """
    inputs, targets = states.flatten(1).double(), latents.flatten(1).double()
    state_mean, latent_mean = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - state_mean, targets - latent_mean
    kernel, best = inputs @ inputs.T, None
    for strength in strengths:
        shifted = kernel + strength * kernel.trace() / len(kernel) * torch.eye(len(kernel), dtype=kernel.dtype)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        coefficients = inverse @ targets  # N x K C
        error = (coefficients / inverse.diagonal()[:, None]).square().mean().item()
        if best is None or error < best.error:
            mean_image = latent_mean.view(latents.shape[1:]).float()
            best = Ridge(inputs, state_mean, mean_image, coefficients, strength, error)
    return best
