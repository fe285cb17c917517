"""Muon: orthogonalised momentum for the matrices of transformer blocks, AdamW for the rest.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); the scale of an update is that of
Moonlight (Liu et al. 2025, arXiv:2502.16982), so that AdamW's learning rates can be used.
torch.optim.Muon does the same one matrix at a time and in bfloat16 everywhere, which is several
times slower on a CPU; here matrices of one shape are one batch, in float32 on a CPU.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from training.sharding import gather, split_like

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5
UPDATE_RMS = 0.2  # of an update at learning rate 1, about that of AdamW


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
