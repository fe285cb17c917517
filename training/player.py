"""A network's part in a training step: gradients summed over passes, one clipped update; alone or against another."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.optim import OptimizerConfig, build_optimizer, learning_rate
from training.run import Run

OpponentLossFn = Callable[
    [nn.Module], dict[str, Tensor]
]  # (model) -> terms, on what the last loss left for it


class Player:
    """A network, its optimiser and its share in a step: gradients summed over passes, then one clipped update."""

    def __init__(self, run: Run, model: nn.Module, optimizer: OptimizerConfig):
        self.run, self.config = run, optimizer
        self.model = model.to(run.device)
        self.optimizer = build_optimizer(self.model, optimizer)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def prepare(self, with_compile: bool = False) -> None:
        """Wrap for the other processes, once the weights are those to start from; `with_compile` for speed.

        Blocks are compiled one by one, all of a kind with the same code: quick to compile, and the names of the weights
        stay what they are.
        """
        if with_compile:
            for blocks in (m for m in self.model.modules() if isinstance(m, nn.ModuleList)):
                for block in blocks:
                    block.compile()
        self.wrapped, self.wrapped_optimizer = self.run.accelerator.prepare(
            self.model, self.optimizer
        )

    def backward(
        self, loss_fn: Callable[[nn.Module], dict[str, Tensor]], passes: int, is_last: bool
    ) -> dict:
        """Add one pass's gradients; the processes exchange them in the last pass only. Returns the terms, detached."""
        with contextlib.nullcontext() if is_last else self.run.accelerator.no_sync(self.wrapped):
            terms = loss_fn(self.wrapped)
            self.run.accelerator.backward(terms["loss"] / passes)
        return {name: value.detach() / passes for name, value in terms.items()}

    def update(self, step: int, max_steps: int, max_gradient_norm: float) -> Tensor:
        """Clip (0: don't), step, clear; returns the gradient norm before clipping, on the device.

        A non-finite gradient changes nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, max_steps)
        limit = max_gradient_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, limit, foreach=True)
        self.optimizer.found_inf = (
            ~torch.isfinite(norm)
        ).float()  # the fused update then changes nothing
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        return norm


@dataclass
class Opponent:
    """The other side of an adversarial game, trained in the same steps from `start_step` (counted from 0) on.

    Its learning rate's schedule begins there, too.
    """

    player: Player
    loss_fn: OpponentLossFn
    after_step: Callable[[], None]
    start_step: int
