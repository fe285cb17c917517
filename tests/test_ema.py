"""training/optim.py: the moving average against its recursion, and what it leaves alone."""

import pytest
import torch
from torch import nn

from training.optim import EMA


def drift(model, step):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.sin(torch.arange(p.numel(), dtype=p.dtype).view_as(p) + step))


@pytest.mark.parametrize(("num_updates", "moved"), [(0, 0.9), (10_000, 0.001)])
def test_the_number_of_updates_decides_the_decay_so_that_a_resume_continues_it(num_updates, moved):
    model = nn.Linear(1, 1)
    ema = EMA(model, 0.999)
    start, ema.num_updates = ema.average.weight.item(), num_updates
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    assert ema.average.weight.item() - start == pytest.approx(moved, abs=1e-5)


def test_the_average_is_a_frozen_float32_copy_in_eval_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).bfloat16().train()
    ema = EMA(model, 0.9)
    assert not any(module.training for module in ema.average.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ema.average.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    drift(ema.average, 1)
    assert not torch.equal(ema.average[0].weight, model[0].weight.float())


def test_frozen_weights_and_buffers_are_not_averaged():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("scale", torch.tensor(3.0))
    model[0].requires_grad_(False)
    ema = EMA(model, 0.5)
    frozen = model[0].weight.clone()
    drift(model, 1)
    ema.update()
    assert torch.equal(ema.average[0].weight, frozen)
    assert not torch.equal(ema.average[1].weight, model[1].weight)
    assert ema.average.scale == 3.0


def test_an_impossible_decay_is_refused():
    with pytest.raises(ValueError, match=r"training.ema_decay must be in \[0, 1\)"):
        EMA(nn.Linear(1, 1), 1.0)
