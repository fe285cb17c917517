"""Optimiser and learning-rate schedule.

The learning rate is a pure function of the step, written into the parameter groups before each step: there is no
scheduler state to save, and accelerate can't step it twice.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from training.checkpoint import load_plain


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 4e-4  # peak
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = (
        0.03  # on matrices only; biases, norms, tokens and positions are not decayed
    )
    warmup_steps: int = 0  # linear from 0
    schedule: Literal["constant", "cosine"] = "constant"
    hold_fraction: float = (
        0.0  # of cosine: share of the steps after warm-up at the peak, before the decay starts
    )
    final_learning_rate: float = 0.0  # of cosine: reached at the last step

    def __post_init__(self):
        if (
            self.learning_rate <= 0
            or self.warmup_steps < 0
            or len(self.betas) != 2
            or not 0 <= self.hold_fraction < 1
        ):
            raise ValueError(
                "optimizer needs learning_rate > 0, warmup_steps >= 0, two betas and hold_fraction in [0, 1), got "
                f"{self.learning_rate}, {self.warmup_steps}, {self.betas}, {self.hold_fraction}"
            )


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (counted from 0) of `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    after_warmup = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    progress = max(0.0, (after_warmup - config.hold_fraction) / (1 - config.hold_fraction))
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of the trainable weights: those of Linear, Conv and Embedding layers are decayed, no others."""
    decayed_types = (nn.Linear, nn.Conv2d, nn.Embedding)
    decayed_ids = {id(m.weight) for m in model.modules() if isinstance(m, decayed_types)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in decayed_ids], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable weights of `model`."""
    groups = decay_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore the moments; betas and weight decay stay those of the current config, not of the file.

    Raises:
        ValueError: the file belongs to another set of trainable weights.
    """
    kept = [
        {key: group[key] for key in ("betas", "weight_decay")} for group in optimizer.param_groups
    ]
    state = load_plain(path, mmap=True)
    try:
        optimizer.load_state_dict(state)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # all but the first: another file
        raise ValueError(
            f"{path} is of another set of trainable weights ({error}): options that freeze or add parts "
            "(flow.projector, losses.alignment_weight 0 or not) can't change in a started run"
        ) from error
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.ndim and moment.shape != weight.shape:
                raise ValueError(
                    f"{path}: {name} is {list(moment.shape)} for a weight of {list(weight.shape)}"
                )
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
