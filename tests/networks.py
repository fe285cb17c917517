"""A small flow, and what the tests ask of every network."""

from dataclasses import replace

import torch
from torch import nn

from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel, build_flow
from modeling.flowtok import FlowTokConfig
from modeling.text_projector import TextProjectorConfig

K, C, T, W = 5, 3, 16, 16  # tokens, their channels, width of the text states and of the networks
SIZE = {"width": W, "depth": 2, "num_heads": 2, "token_channels": C}
PROJECTOR = TextProjectorConfig(K, T, mlp_width=16, alignment_width=8, **SIZE)
CONDITIONS = ["addition", "cross_attention", "concatenation"]
NETWORK = FlowTokConfig(num_tokens=K, context_tokens=K, context_width=W, **SIZE)


def build(condition: str = "none", **options) -> FlowModel:
    """With weights away from the zero start, where no gradient gets through the network."""
    flow = build_flow(PROJECTOR, replace(NETWORK, condition=condition), FlowConfig(**options))
    for parameter in flow.flowtok.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow.eval()


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and image latents."""
    return torch.randn(batch, K, T), torch.randn(batch, K, C)


def silent(module: nn.Module) -> set[str]:
    """Names of the parameters that no loss has reached."""
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {name for name, x in gradients.items() if x is None or not x.abs().max() > 0}


def check_init(network: nn.Module) -> None:
    """init_weights sets every parameter, but those of LayerNorm."""
    layers = [m for m in network.modules() if not isinstance(m, nn.LayerNorm)]
    for parameter in (p for layer in layers for p in layer.parameters(recurse=False)):
        nn.init.constant_(parameter, float("nan"))
    network.init_weights()
    assert not [name for name, p in network.named_parameters() if p.isnan().any()]
