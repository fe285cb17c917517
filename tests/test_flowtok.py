"""modeling/flowtok.py: the paper's sizes, the adaLN-Zero start, formulas, gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling.flowtok import FlowTok, FlowTokBlock, FlowTokConfig, TimeEmbedding

B, K, C, W = 3, 5, 4, 24
CONFIG = FlowTokConfig(num_tokens=K, token_channels=C, width=W, depth=2, num_heads=3)


def build(**options):
    return FlowTok(replace(CONFIG, **options))


def perturbed(module, std=0.1):
    """Away from adaLN-Zero's start, where most of the network does nothing."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def inputs(batch=B):
    return torch.randn(batch, K, C), torch.rand(batch), torch.zeros(batch, dtype=torch.bool)


def test_velocity_is_zero_and_blocks_are_the_identity_at_the_start():
    network, (tokens, t, null) = build(), inputs()
    assert torch.equal(network(tokens, t, null), torch.zeros(B, K, C))
    x = torch.randn(B, K, W)
    assert torch.equal(network.blocks[0](x, torch.randn(B, W)), x)


def test_block_equals_its_formula():
    block = perturbed(FlowTokBlock(CONFIG)).double()
    x, condition = torch.randn(B, K, W, dtype=torch.float64), torch.randn(B, W, dtype=torch.float64)

    def norm(y):
        centred = y - y.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    vectors = (condition @ block.modulation.weight.T + block.modulation.bias)[:, None]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.split(W, dim=-1)
    y = x + gate_a * block.attention(norm(x) * (1 + scale_a) + shift_a)
    first, _, last = block.mlp
    hidden = (norm(y) * (1 + scale_m) + shift_m) @ first.weight.T + first.bias
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    added = (0.5 * hidden * (1 + torch.tanh(inner))) @ last.weight.T + last.bias
    torch.testing.assert_close(block(x, condition), y + gate_m * added)


def test_time_embedding_is_two_linears_with_silu_on_256_sinusoids_of_the_unscaled_time():
    embed = perturbed(TimeEmbedding(W)).double()
    t = torch.tensor([0.0, 0.3, 1.0])
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
    first, _, last = embed.float().mlp
    hidden = sinusoids.float() @ first.weight.T + first.bias
    expected = hidden * torch.sigmoid(hidden) @ last.weight.T + last.bias
    torch.testing.assert_close(embed(t), expected)


def test_indicator_and_time_are_a_samples_own():
    network = perturbed(build())
    tokens, t, null = inputs()
    velocity = network(tokens, t, null)
    other_null, other_t = null.clone(), t.clone()
    other_null[0], other_t[2] = True, 1 - t[2]
    changed = network(tokens, other_t, other_null) - velocity
    assert changed[0].abs().max() > 1e-4 and changed[2].abs().max() > 1e-4
    assert changed[1].abs().max() < 1e-6


def test_tokens_have_positions_which_are_not_in_the_checkpoint():
    network, (tokens, t, null) = perturbed(build()), inputs()
    flipped = network(tokens.flip(1), t, null).flip(1)
    assert not torch.allclose(flipped, network(tokens, t, null), atol=1e-4)
    assert "positions" not in network.state_dict()


def test_gradient_reaches_every_parameter_away_from_the_zero_start():
    network, (tokens, t, null) = build(), inputs()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    null[0] = True
    target = torch.randn(B, K, C)

    def silent():
        optimizer.zero_grad()
        F.mse_loss(network(tokens, t, null), target).backward()
        grads = {name: p.grad for name, p in network.named_parameters()}
        return {name for name, x in grads.items() if x is None or not x.abs().max() > 0}

    last = {"to_velocity.weight", "to_velocity.bias"}
    assert silent() == {name for name, _ in network.named_parameters()} - last
    for _ in range(3):  # first the last layer, then its modulation and the blocks', then all
        optimizer.step()
        after = silent()
    assert after == set()


def test_init_misses_no_parameter():
    network = build()
    for parameter in network.parameters():
        nn.init.constant_(parameter, float("nan"))
    network.init_weights()
    assert not [name for name, p in network.named_parameters() if p.isnan().any()]


@pytest.mark.parametrize("options", [{"num_heads": 5}, {"width": 21, "num_heads": 3}])
def test_impossible_widths_are_refused(options):
    with pytest.raises(ValueError, match="^width .* num_heads"):
        replace(CONFIG, **options)
