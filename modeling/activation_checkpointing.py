"""Activation checkpointing of transformer blocks: what is kept for the backward pass.

none        keep every saved tensor.
selective   keep the outputs of matrix products and attention and recompute the rest (norms,
            modulation, activations): about half the memory for almost no extra work.
full        keep only each block's input: the least memory, one more forward pass (a third more
            work).
Gradients are the same to the bit.
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

ActivationCheckpointing = Literal["none", "selective", "full"]

# What costs more to compute again than to keep: matrix products, and attention by every kernel that
# a GPU or a CPU may choose.
ATEN = torch.ops.aten
SAVED_OPS = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
}


def save_expensive_ops(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(
    block: nn.Module, mode: ActivationCheckpointing, *inputs: Tensor | tuple | slice
) -> Tensor:
    """block(*inputs), keeping its activations for the backward pass as `mode` says."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    # The reentrant form has no policies, and gives no gradient where only weights need one.
    if mode == "full":
        return checkpoint(block, *inputs, use_reentrant=False)
    context_fn = partial(create_selective_checkpoint_contexts, save_expensive_ops)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=context_fn)


def set_activation_checkpointing(network: nn.Module, mode: ActivationCheckpointing) -> None:
    """Choose the mode of every transformer of a network; weights do not depend on it."""
    for module in network.modules():
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = mode
