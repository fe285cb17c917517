"""Exponential moving average of weights: float32, one fused update per step."""

import copy

import torch
from torch import nn


class EMA:
    """Keeps `average`, a frozen copy of the model in eval mode; buffers are copied as they are.

    decay_n = min(decay, (1 + n) / (10 + n)) at update n, so that the average follows quickly at first.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"training.ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.average = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._source = [p for p in model.parameters() if p.requires_grad]
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        self._target = [p for name, p in self.average.named_parameters() if name in names]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's current weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._target, self._source, 1 - decay)
        self.num_updates += 1
