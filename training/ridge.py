"""Kernel ridge regression from text states to image latents: closed form, seconds for thousands.

Fits the projector's linear skip (text_projector.yaml: linear_start), and is the baseline of a
text-to-image flow on little data (eval/report.py): a flow that retrieves held-out images no better
has not learned to generalise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from modeling.text_projector import LinearSkip

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # times the mean eigenvalue of the kernel


@dataclass(frozen=True)
class Ridge:
    """Fitted: text states B x L x T -> latents B x K x C."""

    states: Tensor  # N x D, those it was fitted on, centred, float64
    state_mean: Tensor  # D
    latent_mean: Tensor  # K x C
    coefficients: Tensor  # N x K C
    strength: float  # times the mean eigenvalue of the kernel
    # Of what all other samples predict for each sample (left out):
    top5: float  # share of samples whose own latent is among the five nearest to it
    error: float  # its mean squared error

    def __call__(self, states: Tensor) -> Tensor:
        kernel = (states.flatten(1).to(self.states) - self.state_mean) @ self.states.T  # B x N
        offsets = (kernel @ self.coefficients).view(-1, *self.latent_mean.shape)
        return offsets.float() + self.latent_mean


def fit_ridge(states: Tensor, latents: Tensor, strengths: Sequence[float] = STRENGTHS) -> Ridge:
    """The one of `fit_ridges` with the best left-out retrieval.

    Least squared error asks for more strength than retrieval does: it shrinks towards the mean
    image, which is near everything.
    """
    return max(fit_ridges(states, latents, strengths), key=attrgetter("top5"))


def fit_ridges(states: Tensor, latents: Tensor, strengths: Sequence[float]) -> list[Ridge]:
    """Linear kernel on flattened, centred states; a regression of each strength.

    With K = X X^T and A = (K + s I)^-1 the coefficients are A Y, and the residual that sample i has
    when it is left out, of the means too, is (A Y)_i / (A_ii - 1 / (s N)) (Allen's PRESS), so that
    no data is kept back to choose s. N^3 operations a strength.

    Args:
        states: text states N x L x T of at least 2 captions.
        latents: image latents N x K x C.
        strengths: times the mean eigenvalue of K; positive.
    """
    # Centred, so that the regression has no offset to learn
    inputs, targets = states.flatten(1).double(), latents.flatten(1).double()
    state_mean, latent_mean = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - state_mean, targets - latent_mean
    kernel = inputs @ inputs.T  # N x N
    ridges = []
    for strength in strengths:
        # A = (K + s I)^-1, by Cholesky
        shift = strength * kernel.trace() / len(kernel)
        shifted = kernel + shift * torch.eye(len(kernel), dtype=kernel.dtype)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        coefficients = inverse @ targets  # N x K C
        # How well the others predict each sample
        residuals = coefficients / (inverse.diagonal() - 1 / (shift * len(kernel)))[:, None]
        ridge = Ridge(
            states=inputs,
            state_mean=state_mean,
            latent_mean=latent_mean.view(latents.shape[1:]).float(),
            coefficients=coefficients,
            strength=strength,
            top5=retrieved(targets - residuals, targets),
            error=residuals.square().mean().item(),
        )
        ridges.append(ridge)
    return ridges


@torch.no_grad()
def fit_linear_skip(skip: LinearSkip, states: Tensor, latents: Tensor, strength: float) -> None:
    """Regress scaled image latents N x L x C on text states N x L x T into a projector's skip."""
    ridge = fit_ridge(states, latents, [strength])
    skip.matrix.copy_(ridge.states.T @ ridge.coefficients)
    predicted_mean = (ridge.state_mean.float() @ skip.matrix).view_as(skip.offset)
    skip.offset.copy_(ridge.latent_mean - predicted_mean)


def retrieved(predictions: Tensor, targets: Tensor) -> float:
    """Share of the rows, N x D each, whose own target is among the five nearest."""
    distances = torch.cdist(predictions, targets)
    return (distances < distances.diagonal()[:, None]).sum(dim=1).lt(5).double().mean().item()
