"""The flow against a naive implementation of the same maths: equal to 1e-4, no weight being zero.

Each formula as it is written: attention by matmul, softmax, matmul; x * (1 + scale) + shift out of
place; modulations of each sample and step; one pass for each branch of the guidance; optimiser and
EMA tensor by tensor. The plain networks take the fast ones' weights and use none of their code.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.pipeline import SamplingConfig, transport
from modeling.text_projector import TextProjectorConfig
from training.optim import (
    EMA,
    OptimizedNetwork,
    OptimizerConfig,
    decay_groups,
    descend,
    learning_rate,
)
from training.run import start_run

NET = FlowTokConfig(width=192, depth=3, num_heads=3)
PROJECTOR = TextProjectorConfig(text_width=96, width=64, depth=1, num_heads=4)
TOLERANCE = 1e-4


class PlainFlowTok(nn.Module):
    """The velocity network, with the weights of a fast one."""

    def __init__(self, fast):
        super().__init__()
        self.weights = copy.deepcopy(fast)  # their names and values

    def forward(self, tokens, t, null):
        net = self.weights
        c = net.embed_time.mlp(sinusoids(t, 256, "cos")) + net.embed_null.weight[null.long()]
        positions = sinusoids(torch.arange(tokens.shape[1]), c.shape[1], "sin")
        x = net.embed_tokens(tokens) + positions
        for block in net.blocks:
            modulation = block.modulation(F.silu(c))[:, None]  # B x 1 x 6 W
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
            inner = normalize(x) * (1 + scale_a) + shift_a
            x = x + gate_a * attend(block.attention, inner)
            inner = normalize(x) * (1 + scale_m) + shift_m
            x = x + gate_m * block.mlp(inner)
        shift, scale = net.modulation_out(F.silu(c))[:, None].chunk(2, dim=-1)
        return net.to_velocity(normalize(x) * (1 + scale) + shift)


def attend(weights, x):
    qkv = rearrange(weights.qkv(x), "b n (p h d) -> p b h n d", p=3, h=weights.num_heads)
    scores = qkv[0] @ qkv[1].transpose(-1, -2) / math.sqrt(qkv.shape[-1])
    return weights.out(rearrange(scores.softmax(-1) @ qkv[2], "b h n d -> b n (h d)"))


def normalize(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def sinusoids(values, width, first):
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = values.double()[:, None] * frequencies
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts if first == "sin" else parts[::-1], dim=-1).float()


def fill(module):
    """No weight stays zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return module


def assert_close(a, b):
    assert (a - b).abs().max() <= TOLERANCE * b.abs().max().clamp(min=1)


def test_velocities_and_gradients_agree():
    fast = fill(FlowTok(NET))
    plain = PlainFlowTok(fast)
    inputs = torch.randn(4, 77, 16), torch.rand(4), torch.tensor([False, True, False, True])
    target, velocities = torch.randn(4, 77, 16), []
    for network in (fast, plain):
        velocities.append(network(*inputs))
        F.mse_loss(velocities[-1], target).backward()
    assert velocities[0].std() > 0.1
    assert_close(*velocities)
    others = dict(plain.weights.named_parameters())
    for name, parameter in fast.named_parameters():
        size = parameter.grad.abs().max()
        assert size > 0, name
        assert (parameter.grad - others[name].grad).abs().max() <= 10 * TOLERANCE * size, name


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_twenty_steps_end_at_the_same_latents(guidance):
    flow = build_flow(PROJECTOR, NET, FlowConfig()).eval()
    plain = PlainFlowTok(fill(flow.flowtok))
    x = start = torch.randn(3, 77, 16)
    on = torch.ones(3, dtype=torch.bool)
    for step in range(20):
        t = torch.full((3,), step / 20)
        conditional, unconditional = plain(x, t, ~on), plain(x, t, on)
        x = x + (unconditional + guidance * (conditional - unconditional)) / 20
    assert (x - start).std() > 0.1
    assert_close(transport(flow, start, None, SamplingConfig(steps=20, guidance=guidance)), x)


def test_steps_of_optimizer_and_ema_agree():
    config, decay, max_norm = OptimizerConfig(learning_rate=1e-3, warmup_steps=2), 0.9, 0.5
    model = fill(FlowTok(NET))
    before, plain, average = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    network = OptimizedNetwork(start_run(Path(), "fp32", 0), model, config, max_norm)
    network.wrap()
    ema = EMA(model, decay)
    groups = decay_groups(plain, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.betas), foreach=False, fused=False)
    batch = torch.randn(4, 77, 16), torch.rand(4), torch.zeros(4, dtype=torch.bool)

    def losses(network, batch):
        return {"loss": 10 * F.mse_loss(network(*batch), torch.ones(4, 77, 16))}

    for step in range(3):
        descend(network, [batch], losses, step, max_steps=10)
        ema.update()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, 10)
        losses(plain, batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        rate = min(decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), plain.parameters(), strict=True):
                mean.mul_(rate).add_(weight, alpha=1 - rate)

    starts = before.state_dict()
    for fast, other in ((model, plain), (ema.average, average)):
        expected = other.state_dict()
        for name, weight in fast.state_dict().items():
            if not name.endswith("qkv.bias"):  # that of k has no gradient but rounding
                assert (weight - starts[name]).abs().max() > 2 * TOLERANCE, name
                assert (weight - expected[name]).abs().max() <= TOLERANCE, name
