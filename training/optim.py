"""AdamW or Muon, its learning rate, and one update of a network from the losses of batches.

The learning rate is a pure function of the step, written into the parameter groups before each
step: there is no scheduler state to save, and accelerate can't step it twice.

Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), orthogonalised momentum for
the matrices of transformer blocks. The scale of an update is that of Moonlight (Liu et al. 2025,
arXiv:2502.16982), so that AdamW's learning rates can be used. torch.optim.Muon does the same one
matrix at a time and in bfloat16 everywhere, which is several times slower on a CPU; here matrices
of one shape are one batch, in float32 on a CPU.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeling.layers import check_least
from training.checkpoint import load_plain
from training.run import Run
from training.sharding import clip_gradients, gather, gather_network, shard_network, split_like

# Of Muon
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5
UPDATE_RMS = 0.2  # of an update at learning rate 1, about that of AdamW

LossFn = Callable[[nn.Module, Any], dict[str, Tensor]]  # (network, batch) -> terms with "loss"


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule."""

    # muon: for the matrices of the blocks, AdamW for the rest, at AdamW's learning rate
    # (not in the paper). The scenes' tokenizer learns faster with it.
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 4e-4  # peak
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # On matrices only; biases, norms, tokens and positions are not decayed
    weight_decay: float = 0.03
    warmup_steps: int = 0  # linear from 0
    schedule: Literal["constant", "cosine"] = "constant"
    # Of cosine: share of the steps after warm-up at the peak, before the decay starts
    hold_fraction: float = 0.0
    final_learning_rate: float = 0.0  # of cosine: reached at the last step

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        # torch looks at the decay of an optimizer, not at those of its groups
        check_least(self, 0, "weight_decay", "warmup_steps", "final_learning_rate")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}")
        if not 0 <= self.hold_fraction < 1:
            raise ValueError(f"hold_fraction must be in [0, 1), got {self.hold_fraction}")


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (counted from 0) of `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    # Half a cosine over what is left after warm-up and hold; progress goes from 0 to 1 in it.
    after_warmup = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    progress = max(0.0, (after_warmup - config.hold_fraction) / (1 - config.hold_fraction))
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable weights in two groups: the decayed ones, of Linear, Conv, Embedding; the others."""
    # By the kind of layer, not by the number of dimensions: learned tokens are matrices as well.
    decayed_types = (nn.Linear, nn.Conv2d, nn.Embedding)
    decayed_ids = {id(m.weight) for m in model.modules() if isinstance(m, decayed_types)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in decayed_ids], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable weights of `model`, or Muon with it."""
    # Fused: one kernel for all weights, and it looks at found_inf on the device.
    groups = decay_groups(model, config.weight_decay)
    settings = {"lr": config.learning_rate, "betas": tuple(config.betas), "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    matrices = block_matrices(model)
    taken = {id(matrix) for matrix in matrices}
    for group in groups:
        group["params"] = [weight for weight in group["params"] if id(weight) not in taken]
        group["muon"] = False
    groups.append({"params": matrices, "weight_decay": config.weight_decay, "muon": True})
    return Muon(groups, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore the moments; betas and weight decay stay those of the current config.

    Raises:
        ValueError: the file belongs to another set of trainable weights.
    """
    # A resumed run may have another decay, but torch loads the old one with the moments.
    names = ("betas", "weight_decay")
    kept = [{name: group[name] for name in names} for group in optimizer.param_groups]
    state = load_plain(path, mmap=True)
    weights = dict(enumerate(w for group in optimizer.param_groups for w in group["params"]))
    try:
        for index, moments in state["state"].items():
            for name, moment in moments.items():
                moments[name] = split_like(moment, weights[index])
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is of another set of trainable weights ({error}): optimizer.name and what "
            "freezes or adds parts (flow.projector, losses.alignment_weight 0 or not) can't change "
            "in a started run"
        ) from error

    # torch compares the number of weights only: moments of another shape would fail in a step.
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.ndim and moment.shape != weight.shape:
                raise ValueError(
                    f"{path}: {name} is {list(moment.shape)} for a weight of {list(weight.shape)}"
                )
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


# Muon


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of Linear layers inside lists of blocks, without adaLN's modulations.

    Embeddings, modulations, heads, norms and biases are left to AdamW, as Muon's authors advise.
    """
    matrices = {}  # each once, in order: lists of blocks may lie in others
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            for name, module in blocks.named_modules():
                if isinstance(module, nn.Linear) and "modulation" not in name:
                    matrices[module.weight] = None
    return [matrix for matrix in matrices if matrix.requires_grad]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1 (0.7 to 1.2): N x R x S -> N x R x S, float32.

    A Newton-Schulz iteration, in bfloat16 on a GPU.
    """
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    # The Gram matrix is the smaller one of both.
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).float()


class Muon(torch.optim.AdamW):
    """AdamW over parameter groups, of which those with `muon=True` hold matrices for Muon."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; `found_inf`, if it is set to 1, makes it change nothing."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        # AdamW leaves alone what has no gradient, so the matrices are not its business.
        super().step(closure)

    def _step_matrices(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[weight.shape].append(weight)
        skip = getattr(self, "found_inf", None)
        for shape, weights in by_shape.items():
            gradients = torch.stack([weight.grad for weight in weights])  # N x R x S
            if skip is not None:
                gradients = torch.where(skip.bool(), 0.0, gradients)

            # Nesterov momentum, kept per weight as any optimizer's state is
            buffers = [self._momentum(weight) for weight in weights]
            torch._foreach_lerp_(buffers, list(gradients.unbind()), 1 - MOMENTUM)
            directions = gradients.lerp(torch.stack(buffers), MOMENTUM)
            # Of sharded matrices each process orthogonalises the wholes, and takes its rows.
            updates = split_like(orthogonalize(gather(directions)), directions)
            updates = updates * (UPDATE_RMS * max(shape) ** 0.5)
            decay = group["lr"] * group["weight_decay"]
            step_size = torch.as_tensor(1.0 if skip is None else 1 - skip, device=updates.device)
            for weight, update in zip(weights, updates):
                weight.sub_((group["lr"] * update + decay * weight) * step_size)
                weight.grad = None

    def _momentum(self, weight: nn.Parameter) -> Tensor:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # nobody counts, but AdamW's loading looks for it
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


# What is trained


class EMA:
    """Keeps `average`, a frozen copy of the model in eval mode; buffers are copied as they are."""

    def __init__(self, model: nn.Module, decay: float, average: nn.Module | None = None):
        """average: the copy, where the model is sharded already."""
        self.decay = decay
        self.num_updates = 0
        self.average = (average or copy.deepcopy(model)).float().eval().requires_grad_(False)
        # Frozen weights do not move: they need no average.
        self._source = [p for p in model.parameters() if p.requires_grad]
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        self._target = [p for name, p in self.average.named_parameters() if name in names]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's current weights."""
        # Over the first updates the decay rises, so that the random start is soon forgotten.
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._target, self._source, 1 - decay)
        self.num_updates += 1

    def whole(self) -> nn.Module:
        """The average with all its weights; all processes call it, since it may be sharded."""
        return gather_network(self.average)


class OptimizedNetwork:
    """A network with its optimiser: gradients add up over batches, then one clipped update."""

    def __init__(
        self, run: Run, module: nn.Module, config: OptimizerConfig, max_gradient_norm: float
    ):
        """max_gradient_norm: 0 turns clipping off."""
        self.run = run
        self.module = module.to(run.device)
        self.config = config
        self.optimizer = build_optimizer(self.module, config)
        self.trainable = [p for p in self.module.parameters() if p.requires_grad]
        self.max_gradient_norm = max_gradient_norm or float("inf")
        self.is_sharded = False

    def shard(self) -> nn.Module | None:
        """Keep a part of the weights and moments; returns a copy for an EMA, None in one process.

        Called at the start, when there are no moments.
        """
        if self.run.accelerator.num_processes == 1:
            return None
        # FSDP replaces the weights, so the optimizer of the whole ones is dropped.
        average = shard_network(self.module, self.run.device)
        self.optimizer = build_optimizer(self.module, self.config)
        self.trainable = [p for p in self.module.parameters() if p.requires_grad]
        self.is_sharded = True
        return average

    def wrap(self, with_compile: bool = False) -> None:
        """Wrap for the other processes, once the weights are those to start from."""
        # Blocks are compiled one by one, all of a kind with the same code: quick to compile, and
        # the names of the weights stay what they are.
        if with_compile:
            for blocks in (m for m in self.module.modules() if isinstance(m, nn.ModuleList)):
                for block in blocks:
                    block.compile()
        # FSDP is in its modules already: of accelerate's preparation only autocast is left.
        prepare = self.run.accelerator.prepare_model
        self.wrapped = prepare(self.module, evaluation_mode=self.is_sharded)
        self.wrapped.train()

    def update(self, step: int, max_steps: int) -> Tensor:
        """Clip, step, clear; returns the gradient norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, max_steps)
        if self.is_sharded:
            norm = clip_gradients(self.trainable, self.max_gradient_norm)
        else:
            norm = nn.utils.clip_grad_norm_(self.trainable, self.max_gradient_norm, foreach=True)

        # The fused update reads found_inf: a non-finite gradient changes nothing, and the loop
        # finds it in the log and stops. Nobody waits for the device here.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def descend(
    network: OptimizedNetwork, batches: Sequence, loss_fn: LossFn, step: int, max_steps: int
) -> dict[str, Tensor]:
    """One update by the mean loss of the batches. Returns the mean terms and gradient_norm."""
    accelerator, model = network.run.accelerator, network.wrapped
    means: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        # The processes exchange gradients in the last batch; sharded ones do in each: nobody has
        # room for gradients of all weights.
        is_last = index == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            terms = loss_fn(model, batch)
            accelerator.backward(terms["loss"] / len(batches))
        # Summed where they are: to read one would wait for the device.
        for name, value in terms.items():
            part = value.detach() / len(batches)
            means[name] = part + means[name] if name in means else part
    means["gradient_norm"] = network.update(step, max_steps)
    return means
