"""A small flow: what it computes and what its losses teach is tested on it."""

from dataclasses import replace

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
