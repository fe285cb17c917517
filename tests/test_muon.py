"""training/muon.py: what is orthogonalised, against torch's own Muon, and what changes nothing."""

import pytest
import torch
from torch import nn

from modeling.flowtok import FlowTok, FlowTokConfig
from training.muon import Muon, block_matrices, orthogonalize
from training.optim import OptimizerConfig, build_optimizer, load_optimizer


def network() -> FlowTok:
    torch.manual_seed(0)
    return FlowTok(FlowTokConfig(num_tokens=4, token_channels=4, width=16, depth=2, num_heads=2))


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (1, 16, 64)])
def test_all_singular_values_come_near_one_and_the_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.diagonal(u.mT @ result @ vh.mT, dim1=-2, dim2=-1)
    # The iteration's fixed band; the smallest values of a square matrix may still be below it.
    assert values.max() < 1.25
    assert values.median() > 0.65
    off_diagonal = u.mT @ result @ vh.mT - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 1e-3


def test_matrices_of_the_blocks_are_taken_and_nothing_else():
    model = network()
    taken = {id(weight) for weight in block_matrices(model)}
    names = {name for name, weight in model.named_parameters() if id(weight) in taken}
    layers = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    assert names == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    model.blocks[0].requires_grad_(False)
    assert len(block_matrices(model)) == 4


def test_three_steps_are_those_of_torch_up_to_its_bfloat16():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    weights = [nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(8, 24))]
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = Muon([{"params": weights, "weight_decay": 0.1, "muon": True}], lr=0.02)
    theirs = torch.optim.Muon(
        copies, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    before = weights[0].detach().clone()
    for step in range(3):
        for number, (weight, copy) in enumerate(zip(weights, copies, strict=True)):
            generator = torch.Generator().manual_seed(10 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator)
            copy.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    moved = (weights[0] - before).norm()
    for weight, copy in zip(weights, copies, strict=True):
        assert (weight - copy).norm() < 0.03 * moved


def test_other_weights_move_as_under_adamw():
    model, twin = network(), network()
    config = {"learning_rate": 0.01, "weight_decay": 0.1}
    optimizers = [
        build_optimizer(model, OptimizerConfig(name="muon", **config)),
        build_optimizer(twin, OptimizerConfig(**config)),
    ]
    fill_gradients(model, seed=1)
    fill_gradients(twin, seed=1)
    for optimizer in optimizers:
        optimizer.step()
    taken = {id(weight) for weight in block_matrices(model)}
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
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
