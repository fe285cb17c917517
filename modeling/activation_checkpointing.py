"""Activation checkpointing of transformer blocks: what is kept for the backward pass, and what is computed again.

none        keep every saved tensor.
selective   keep the outputs of matrix products and attention, compute the rest (norms, modulation, activations) again:
            about half the memory for almost no extra work.
full        keep only each block's input: the least memory, one more forward pass (a third more work).
Gradients are the same to the bit, dropout included.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]

ATEN = torch.ops.aten
KEPT_OPS = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
}


def keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep what is dear to compute again."""
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(block: nn.Module, mode: Recompute, *inputs: Tensor | tuple | slice) -> Tensor:
    """block(*inputs), with its activations kept for the backward pass as `mode` says."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    if mode == "full":
        return checkpoint(block, *inputs, use_reentrant=False)
    context_fn = partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=context_fn)
