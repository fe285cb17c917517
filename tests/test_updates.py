"""AdamW, clipping, schedule and EMA against a naive implementation, tensor by tensor."""

import copy
from pathlib import Path

import torch
from torch.nn import functional as F

from modeling.flowtok import FlowTok, FlowTokConfig
from training.optim import (
    EMA,
    OptimizedNetwork,
    OptimizerConfig,
    decay_groups,
    descend,
    learning_rate,
)
from training.run import start_run

NET = FlowTokConfig(width=96, depth=2, num_heads=3)
TOLERANCE = 1e-4


def test_steps_of_optimizer_and_ema_agree():
    config, decay, max_norm = OptimizerConfig(learning_rate=1e-3, warmup_steps=2), 0.9, 0.5
    model = FlowTok(NET)
    with torch.no_grad():
        for parameter in model.parameters():  # none stays zero
            parameter.add_(0.03 * torch.randn_like(parameter))
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
