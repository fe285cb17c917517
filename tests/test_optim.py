"""training/optim.py: schedule, decay, Muon against torch's own, the moving average's recursion."""

import pytest
import torch
from torch import nn

from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.text_projector import TextProjectorConfig
from training.optim import (
    EMA,
    Muon,
    OptimizerConfig,
    block_matrices,
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


# Muon


def network() -> FlowTok:
    torch.manual_seed(0)
    return FlowTok(FlowTokConfig(num_tokens=4, token_channels=4, width=16, depth=2, num_heads=2))


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_matrices_of_the_blocks_are_taken_and_nothing_else():
    model = network()
    taken = {id(weight) for weight in block_matrices(model)}
    names = {name for name, weight in model.named_parameters() if id(weight) in taken}
    layers = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    assert names == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    model.blocks[0].requires_grad_(False)
    assert len(block_matrices(model)) == 4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_three_steps_are_those_of_torch_up_to_its_bfloat16(shape):
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(2)]
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = Muon([{"params": weights, "weight_decay": 0.1, "muon": True}], lr=0.02)
    theirs = torch.optim.Muon(
        copies, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    before = weights[0].detach().clone()
    for _ in range(3):
        for weight, copy in zip(weights, copies):
            weight.grad = torch.randn(shape)
            copy.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    moved = (weights[0] - before).norm()
    for weight, copy in zip(weights, copies):
        assert (weight - copy).norm() < 0.03 * moved


def test_other_weights_move_as_under_adamw():
    model, twin = network(), network()
    for each, name in ((model, "muon"), (twin, "adamw")):
        config = OptimizerConfig(name, learning_rate=0.01, weight_decay=0.1)
        fill_gradients(each, seed=1)
        build_optimizer(each, config).step()
    taken = {id(weight) for weight in block_matrices(model)}
    for weight, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(weight, other) == (id(weight) not in taken)


def test_a_non_finite_gradient_changes_nothing():
    model = network()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    before = [weight.detach().clone() for weight in model.parameters()]
    fill_gradients(model, seed=1)
    model.blocks[0].attention.qkv.weight.grad[0, 0] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_momentum_is_saved_and_loaded(tmp_path):
    straight, resumed = network(), network()
    config = OptimizerConfig(name="muon", learning_rate=0.01)
    optimizer = build_optimizer(straight, config)
    for seed in (1, 2):
        fill_gradients(straight, seed)
        optimizer.step()
        if seed == 1:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            resumed.load_state_dict(straight.state_dict())
    again = build_optimizer(resumed, config)
    load_optimizer(again, tmp_path / "optimizer.pt")
    fill_gradients(resumed, seed=2)
    again.step()
    for weight, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other)
    with pytest.raises(ValueError, match="optimizer.name"):
        load_optimizer(build_optimizer(network(), OptimizerConfig()), tmp_path / "optimizer.pt")


# The moving average


@pytest.mark.parametrize(("num_updates", "moved"), [(0, 0.9), (10_000, 0.001)])
def test_the_number_of_updates_decides_the_decay_so_that_a_resume_continues_it(num_updates, moved):
    model = nn.Linear(1, 1)
    ema = EMA(model, 0.999)
    start, ema.num_updates = ema.average.weight.item(), num_updates
    model.weight.data.add_(1.0)
    ema.update()
    assert ema.average.weight.item() - start == pytest.approx(moved, abs=1e-5)


def test_the_average_is_a_frozen_copy_in_eval_mode_that_follows_what_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Dropout()).train()
    model.register_buffer("scale", torch.tensor(3.0))
    model[0].requires_grad_(False)
    ema = EMA(model, 0.5)
    assert not any(module.training for module in ema.average.modules()) and model.training
    assert not any(p.requires_grad for p in ema.average.parameters())
    start = [p.clone() for p in ema.average.parameters()]
    for weight in model.parameters():
        weight.data.add_(1.0)
    ema.update()
    is_same = [torch.equal(p, old) for p, old in zip(ema.average.parameters(), start)]
    assert is_same == [True, True, False, False] and ema.average.scale == 3.0
