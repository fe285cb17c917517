"""What a training pass gives the losses; named tuples, so that DDP sees their tensors."""

from typing import NamedTuple

from torch import Tensor


class SourcePass(NamedTuple):
    """Where the flow starts, and what the losses on it need."""

    latents: Tensor  # B x L x C
    mean: Tensor  # B x L x C
    logvar: Tensor  # B x L x C
    alignment: Tensor  # B x L x C, target of the alignment
    log_temperature: Tensor  # scalar


class FlowPass(NamedTuple):
    """A velocity and its target, at a random time of each sample."""

    velocity: Tensor  # B x K x C, predicted
    target: Tensor  # B x K x C
    source: SourcePass  # before any detaching
