"""modeling/flowtok.py: the adaLN-Zero start, conditions, sampling.

Its formulas are those of the release, whose numbers test_convert_checkpoint.py has.
"""

from dataclasses import replace

import pytest
import torch
from networks import CONDITIONS, NETWORK, C, K, W, build, check_init

from modeling.flowtok import FlowTok
from modeling.layers import CrossAttention

B = 4


@pytest.mark.parametrize("condition", ["none", *CONDITIONS])
def test_velocity_is_zero_and_blocks_are_the_identity_at_the_start(condition):
    network = FlowTok(replace(NETWORK, condition=condition), takes_interval=True)
    x, c, context = torch.randn(B, K, W), torch.randn(B, W), torch.randn(B, K, W)
    null, t = torch.zeros(B, dtype=torch.bool), torch.rand(B)
    velocity = network(torch.randn(B, K, C), t, null, context, t)
    assert torch.equal(velocity, torch.zeros(B, K, C))
    assert torch.equal(network.blocks[0](x, c, context), x)


def test_init_misses_no_parameter():
    check_init(FlowTok(NETWORK, takes_interval=True))


@pytest.mark.parametrize("condition", ["none", *CONDITIONS])
def test_sampling_computes_what_the_networks_own_forward_does(condition):
    network = build(condition).flowtok
    x, features = torch.randn(B, K, C), torch.randn(B, K, W)
    table = network.at_times([0.25, 0.5], features)
    for time in (0.25, 0.5):
        t = torch.full((B,), time)
        for null in ((False,), (True,), (False, True)):
            rows = [network(x, t, torch.full((B,), flag), features) for flag in null]
            torch.testing.assert_close(table(x, time, null), torch.cat(rows))


def test_cross_attention_is_softmax_over_the_context():
    attention = CrossAttention(W, num_heads=1).double()
    x, context = (torch.randn(2, n, W, dtype=torch.float64) for n in (3, 7))
    k, v = attention.key_value(context).chunk(2, dim=-1)
    shares = (attention.query(x) @ k.mT / W**0.5).softmax(-1)
    torch.testing.assert_close(attention(x, context), attention.out(shares @ v))
