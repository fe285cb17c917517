"""modeling/flowtok.py: the adaLN-Zero start, errors.

Formulas and gradients are those of test_plain_flow.py, and of the release in
test_convert_checkpoint.py.
"""

import torch
from torch import nn

from modeling.flowtok import FlowTok, FlowTokConfig

B, K, C, W = 3, 5, 4, 24
CONFIG = FlowTokConfig(num_tokens=K, token_channels=C, width=W, depth=2, num_heads=3)


def test_velocity_is_zero_and_blocks_are_the_identity_at_the_start():
    network, null = FlowTok(CONFIG), torch.zeros(B, dtype=torch.bool)
    velocity = network(torch.randn(B, K, C), torch.rand(B), null)
    assert torch.equal(velocity, torch.zeros(B, K, C))
    x = torch.randn(B, K, W)
    assert torch.equal(network.blocks[0](x, torch.randn(B, W)), x)


def test_init_misses_no_parameter():
    network = FlowTok(CONFIG)
    for parameter in network.parameters():
        nn.init.constant_(parameter, float("nan"))
    network.init_weights()
    assert not [name for name, p in network.named_parameters() if p.isnan().any()]
