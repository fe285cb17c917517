"""training/optim.py: the schedule against closed forms, and which weights are decayed."""

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

SIZE = {"width": 16, "depth": 1, "num_heads": 2}


def tokenizer():
    size = TransformerSize(**SIZE)
    config = ImageTokenizerConfig(16, 8, 4, 4, size, size, text_tokens=4, text_width=8)
    return ImageTokenizer(config)


def flow():
    projector = TextProjectorConfig(4, 8, mlp_width=16, token_channels=4, **SIZE)
    flowtok = FlowTokConfig(num_tokens=4, token_channels=4, **SIZE)
    return build_flow(projector, flowtok, FlowConfig())


COSINE = {"schedule": "cosine", "learning_rate": 1.0, "warmup_steps": 10}


@pytest.mark.parametrize(
    ("options", "max_steps", "rates"),
    [
        ({"warmup_steps": 4, "learning_rate": 2.0}, 10, {0: 0.5, 2: 1.5, 3: 2.0, 4: 2.0, 10**6: 2}),
        # From the peak over the middle to the final rate, and no further.
        (
            COSINE | {"final_learning_rate": 0.2},
            110,
            {10: 1.0, 35: 0.2 + 0.4 * (1 + 0.5**0.5), 60: 0.6, 110: 0.2, 500: 0.2},
        ),
        (COSINE | {"hold_fraction": 0.5}, 110, {10: 1, 35: 1, 60: 1, 85: 0.5, 110: 0}),
        # A run that ends inside its warm-up.
        (COSINE, 10, {4: 0.5, 10: 1.0}),
    ],
)
def test_the_learning_rate_follows_its_schedule(options, max_steps, rates):
    config = OptimizerConfig(**options)
    found = {step: learning_rate(config, step, max_steps) for step in rates}
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("build", [tokenizer, flow])
def test_matrices_are_decayed_biases_norms_tokens_positions_are_not_frozen_ones_are_nowhere(build):
    model = build()
    next(model.parameters()).requires_grad_(False)
    grouped = [id(p) for group in decay_groups(model, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group["params"] for group in decay_groups(model, 0.1)]
    decayed, others = ([names[id(p)] for p in group] for group in groups)
    for name in decayed:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding), name
    free = ("bias", "token", "tokens", "positions", "log_temperature")
    assert all(name.endswith(free) or "norm" in name for name in others)


def test_the_optimizer_decays_the_first_group_only():
    config = OptimizerConfig(learning_rate=0.1, betas=[0.8, 0.9], weight_decay=0.5)
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer, config)
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
    assert [group["weight_decay"] for group in new.param_groups] == [0.25, 0.0]
    assert all(tuple(group["betas"]) == (0.7, 0.6) for group in new.param_groups)
    torch.testing.assert_close(new.state_dict()["state"], old.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(2, 3), lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))]
)
def test_loading_the_state_of_other_trainable_weights_names_the_file(tmp_path, build):
    torch.save(stepped(OptimizerConfig(), nn.Linear(2, 2)).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt(: .*\[3, 2\]| is of another .*projector)"):
        load_optimizer(build_optimizer(build(), OptimizerConfig()), tmp_path / "optimizer.pt")


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"warmup_steps": -1}, {"betas": [0.9]}, {"hold_fraction": 1.0}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
