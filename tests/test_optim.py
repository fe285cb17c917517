"""training/optim.py: the schedule against closed forms, and which weights are decayed."""

import math

import pytest
import torch
from torch import nn

from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.text_projector import TextProjectorConfig
from training.optim import (
    OptimizerConfig,
    build_optimizer,
    decay_groups,
    learning_rate,
    load_optimizer,
)


def tokenizer():
    size = TransformerSize(16, 1, 2)
    config = ImageTokenizerConfig(16, 8, 4, 4, size, size, text_tokens=4, text_width=8)
    return ImageTokenizer(config)


def flow():
    projector = TextProjectorConfig(
        text_tokens=4, text_width=8, width=16, depth=1, num_heads=2, mlp_width=16, token_channels=4
    )
    flowtok = FlowTokConfig(num_tokens=4, token_channels=4, width=16, depth=1, num_heads=2)
    return build_flow(projector, flowtok, FlowConfig())


def test_warmup_is_linear_and_ends_at_the_peak():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_a_constant_rate_stays_at_the_peak():
    assert learning_rate(OptimizerConfig(learning_rate=3.0), 10**6, 10) == 3.0


def test_cosine_falls_from_the_peak_over_the_middle_to_the_final_rate():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="cosine", final_learning_rate=0.2
    )
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.6)
    assert learning_rate(config, 35, 110) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)


def test_hold_fraction_keeps_the_peak_before_the_decay():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="cosine", hold_fraction=0.5
    )
    assert [learning_rate(config, step, 110) for step in (10, 35, 60)] == [1.0, 1.0, 1.0]
    assert learning_rate(config, 85, 110) == pytest.approx(0.5)
    assert learning_rate(config, 110, 110) == pytest.approx(0.0)


def test_the_rate_never_rises_after_warmup_and_is_never_negative():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=5, schedule="cosine", hold_fraction=0.3
    )
    rates = [learning_rate(config, step, 50) for step in range(5, 50)]
    assert rates == sorted(rates, reverse=True) and min(rates) > 0


def test_a_run_that_ends_inside_its_warmup_has_no_division_by_zero():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate(config, 4, 5) == 0.5
    assert learning_rate(config, 10, 10) == 1.0


@pytest.mark.parametrize("build", [tokenizer, flow])
def test_every_trainable_weight_is_in_exactly_one_group_and_no_frozen_one(build):
    model = build()
    next(model.parameters()).requires_grad_(False)
    grouped = [id(p) for group in decay_groups(model, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", [tokenizer, flow])
def test_matrices_are_decayed_and_biases_norms_tokens_and_positions_are_not(build):
    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = (
        [names[id(p)] for p in group["params"]] for group in decay_groups(model, 0.1)
    )
    owners = dict(model.named_modules())
    assert all(name.endswith("weight") and model.get_parameter(name).ndim >= 2 for name in decayed)
    assert not any(isinstance(owners[name.rpartition(".")[0]], nn.LayerNorm) for name in decayed)
    assert all(
        name.endswith(("bias", "token", "tokens", "positions", "log_temperature")) or "norm" in name
        for name in others
    )


def test_the_optimizer_decays_the_first_group_only():
    config = OptimizerConfig(learning_rate=0.1, betas=[0.8, 0.9], weight_decay=0.5)
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer, config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def stepped(config, layer):
    optimizer = build_optimizer(layer, config)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_loading_keeps_the_moments_of_the_file_and_betas_and_decay_of_the_config(tmp_path):
    old = stepped(OptimizerConfig(betas=[0.8, 0.9], weight_decay=0.5), nn.Linear(2, 2))
    torch.save(old.state_dict(), tmp_path / "optimizer.pt")
    new = build_optimizer(nn.Linear(2, 2), OptimizerConfig(betas=[0.7, 0.6], weight_decay=0.25))
    load_optimizer(new, tmp_path / "optimizer.pt")
    assert [(tuple(g["betas"]), g["weight_decay"]) for g in new.param_groups] == [
        ((0.7, 0.6), 0.25),
        ((0.7, 0.6), 0.0),
    ]
    for before, after in zip(
        old.state_dict()["state"].values(), new.state_dict()["state"].values(), strict=True
    ):
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )


def test_loading_the_state_of_other_trainable_weights_names_the_file_and_the_options(tmp_path):
    torch.save(stepped(OptimizerConfig(), nn.Linear(2, 2)).state_dict(), tmp_path / "optimizer.pt")
    optimizer = build_optimizer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), OptimizerConfig())
    with pytest.raises(
        ValueError, match="optimizer.pt is of another set of trainable weights .*flow.projector"
    ):
        load_optimizer(optimizer, tmp_path / "optimizer.pt")


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"warmup_steps": -1}, {"betas": [0.9]}, {"hold_fraction": 1.0}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
