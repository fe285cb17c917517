"""modeling/text_projector.py: block formulas, moments, dropout, alignment head, gradients, errors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from modeling.losses import contrastive_loss, kl_loss
from modeling.posterior import Posterior
from modeling.text_projector import (
    WHITENING_FLOOR,
    ProjectorBlock,
    TextProjector,
    TextProjectorConfig,
    TextWhitening,
    flatten_normalize,
)
from training.ridge import fit_ridge

B, L, T, C = 3, 5, 24, 4
CONFIG = TextProjectorConfig(
    L, T, width=T, depth=2, num_heads=2, mlp_width=20, token_channels=C, alignment_width=16
)


def build(**options):
    return TextProjector(replace(CONFIG, **options))


def states(batch=B):
    return torch.randn(batch, L, T)


def perturb_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)


def layer_norm(x, norm):
    centred = x - x.mean(dim=-1, keepdim=True)
    return (
        centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        + norm.bias
    )


def mlp(block, x):
    first, _, last = block.mlp
    return (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias


def test_post_norm_block_equals_its_formula():
    block = ProjectorBlock(CONFIG).double().eval()
    perturb_norms(block)
    x = states().double()
    y = layer_norm(x + block.attention(x), block.norm_attention)
    torch.testing.assert_close(block(x), layer_norm(y + mlp(block, y), block.norm_mlp))


def test_pre_norm_block_equals_its_formula():
    block = ProjectorBlock(replace(CONFIG, pre_norm=True)).double().eval()
    perturb_norms(block)
    x = states().double()
    y = x + block.attention(layer_norm(x, block.norm_attention))
    torch.testing.assert_close(block(x), y + mlp(block, layer_norm(y, block.norm_mlp)))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_dropout_acts_on_both_branches_in_training_only(pre_norm):
    block = ProjectorBlock(replace(CONFIG, pre_norm=pre_norm, dropout=0.5))
    x = states()
    assert torch.equal(block.eval()(x), block(x))
    assert not torch.equal(block.train()(x), block(x))
    for silenced in (
        block.attention.out,
        block.mlp[2],
    ):  # one branch off: the other one still varies
        saved = [p.detach().clone() for p in silenced.parameters()]
        for parameter in silenced.parameters():
            nn.init.zeros_(parameter)
        assert not torch.equal(block(x), block(x))
        with torch.no_grad():
            for parameter, value in zip(silenced.parameters(), saved):
                parameter.copy_(value)


def test_posterior_is_the_last_linear_split_into_mean_and_log_variance():
    projector, text = build(dropout=0.0), states()
    x = text
    for block in projector.blocks:
        x = block(x)
    moments = projector.to_moments(x)
    posterior = projector.posterior(text)
    torch.testing.assert_close(posterior.mean, moments[..., :C])
    torch.testing.assert_close(posterior.logvar, moments[..., C:])
    assert posterior.mean.shape == (B, L, C)


def test_another_width_than_the_text_states_puts_a_linear_first():
    assert isinstance(build(width=32).embed, nn.Linear) and isinstance(build().embed, nn.Identity)
    assert build(width=32).posterior(states()).mean.shape == (B, L, C)


def test_training_pass_is_the_posterior_and_the_alignment_head():
    projector, text = build(dropout=0.0), states()
    mean, logvar, alignment, log_temperature = projector(text)
    posterior = projector.posterior(text)
    assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
    assert alignment.shape == (B, L, C)
    assert torch.equal(alignment, projector.alignment.mlp(text))
    assert log_temperature.item() == pytest.approx(math.log(1 / 0.07))


def test_tokens_see_each_other_and_samples_do_not():
    projector, text = build().eval(), states()
    changed = text.clone()
    changed[0, 0] += 1
    before, after = projector.posterior(text).mean, projector.posterior(changed).mean
    assert torch.equal(before[1:], after[1:])
    assert ((before[0] - after[0]).abs().amax(dim=-1) > 1e-4).all()


FULL = {"pre_norm": True, "width": 32, "learned_positions": True, "whiten_text": True}


@pytest.mark.parametrize("options", [{}, {"pre_norm": True, "width": 32}, {"fixed_std": 0.5}, FULL])
def test_gradient_reaches_every_parameter(options):
    projector = build(**options)
    mean, logvar, alignment, log_temperature = projector(states())
    text = Posterior(mean, logvar).sample()
    (contrastive_loss(text, alignment, log_temperature) + kl_loss(mean, logvar)).backward()
    silent = [
        n for n, p in projector.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not silent


def test_init_misses_no_parameter(monkeypatch):
    def unset(layer):
        for parameter in layer.parameters(recurse=False):
            nn.init.constant_(parameter, float("nan"))

    monkeypatch.setattr(
        nn.Linear, "reset_parameters", unset
    )  # what PyTorch starts with must not be what is left
    assert not [name for name, p in build(**FULL).named_parameters() if p.isnan().any()]


def correlated():
    """Text states with correlated channels of unlike deviations around a mean, float64."""
    mix = torch.randn(T, T, dtype=torch.float64) + 3 * torch.eye(T, dtype=torch.float64)
    return torch.randn(200, L, T, dtype=torch.float64) @ mix + torch.linspace(
        -5, 5, T, dtype=torch.float64
    )


def test_whitened_states_have_zero_mean_unit_variance_and_no_correlation(monkeypatch):
    monkeypatch.setattr("modeling.text_projector.WHITENING_FLOOR", 0.0)
    monkeypatch.setattr(
        torch.Tensor, "float", torch.Tensor.double
    )  # forward rounds to float32 else
    text, whitening = correlated(), TextWhitening(T).double()
    whitening.fit(text.split(64))  # the last batch is smaller
    rows = whitening(text).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(T).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(T).double(), rtol=0, atol=1e-10)


def test_the_floor_shrinks_the_smallest_directions_only():
    text = correlated()
    text[..., 0] = text[..., 1]  # a direction without variance
    whitening = TextWhitening(T)
    whitening.fit([text])
    rows = whitening(text).flatten(0, 1)
    centred = text.flatten(0, 1) - text.flatten(0, 1).mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / len(centred))
    expected = (variances / (variances + WHITENING_FLOOR * variances.mean())).float()
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.diag(expected), rtol=0, atol=1e-3)
    assert rows.dtype == torch.float32 and expected[0] < 1e-6 < 0.9 < expected[-1]


def test_whitening_is_the_identity_until_fitted_and_is_kept_in_the_state_dict():
    projector, text = build(whiten_text=True).eval(), states()
    plain = build().eval()
    plain.load_state_dict({k: v for k, v in projector.state_dict().items() if "whitening" not in k})
    assert torch.equal(projector.posterior(text).mean, plain.posterior(text).mean)
    projector.whitening.fit([correlated().float()])
    assert not torch.allclose(projector.posterior(text).mean, plain.posterior(text).mean, atol=1e-3)
    assert {"whitening.mean", "whitening.matrix"} <= projector.state_dict().keys()
    assert not any("whitening" in name for name, _ in projector.named_parameters())
    loaded = build(whiten_text=True).eval()
    loaded.load_state_dict(projector.state_dict())
    assert torch.equal(loaded.posterior(text).mean, projector.posterior(text).mean)


def test_whitening_is_float32_under_autocast():
    whitening, text = TextWhitening(T), states()
    whitening.fit([correlated()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            torch.equal(whitening(text), whitening(text.float()))
            and whitening(text).dtype == torch.float32
        )
    assert torch.equal(whitening(text), (text - whitening.mean) @ whitening.matrix)


def test_a_fixed_deviation_is_that_of_every_token_and_leaves_the_mean_alone():
    free, fixed, text = build().eval(), build(fixed_std=0.5).eval(), states()
    weights = free.state_dict()
    weights |= {name: weights[name][:C] for name in ("to_moments.weight", "to_moments.bias")}
    fixed.load_state_dict(weights)
    posterior = fixed.posterior(text)
    torch.testing.assert_close(posterior.logvar.exp().sqrt(), torch.full((B, L, C), 0.5))
    torch.testing.assert_close(posterior.mean, free.posterior(text).mean)


def test_a_bounded_mean_stays_within_three_and_hardly_moves_inside_one():
    free, bounded, text = build(), build(mean_form="bounded"), states()
    nn.init.normal_(free.to_moments.weight, std=2.0)
    bounded.load_state_dict(free.state_dict())
    mean, found = (projector.eval().posterior(text).mean for projector in (free, bounded))
    assert mean.abs().max() > 4 and found.abs().max() <= 3
    torch.testing.assert_close(found, 3 * torch.tanh(mean / 3))


def test_an_rms_mean_has_tokens_of_root_mean_square_one():
    free, rms, text = build(), build(mean_form="rms"), states()
    rms.load_state_dict(free.state_dict())
    mean, found = (projector.eval().posterior(text).mean for projector in (free, rms))
    torch.testing.assert_close(found.square().mean(-1).sqrt(), torch.ones(B, L), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        found, mean / mean.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=1e-4
    )


LINEAR = {"pre_norm": True, "linear_start": 0.1}


def test_a_linear_start_gives_the_ridge_and_the_blocks_add_to_it():
    projector, text = build(**LINEAR).eval(), states(50)
    latents = torch.randn(50, L, C) + 1
    assert torch.equal(
        projector.posterior(text).mean, torch.zeros(50, L, C)
    )  # nothing is measured yet
    projector.linear_start.fit(text, latents)
    queries = states(7)
    torch.testing.assert_close(
        projector.posterior(queries).mean, fit_ridge(text, latents, [0.1])(queries)
    )
    nn.init.normal_(projector.to_moments.weight)
    plain = build(pre_norm=True).eval()
    plain.load_state_dict(
        {k: v for k, v in projector.state_dict().items() if "linear_start" not in k}
    )
    added = projector.posterior(queries).mean - projector.linear_start(queries)
    torch.testing.assert_close(added, plain.posterior(queries).mean, rtol=1e-4, atol=1e-5)


def test_a_linear_start_is_kept_in_the_state_dict_and_not_trained():
    projector, text = build(**LINEAR).eval(), states(50)
    projector.linear_start.fit(text, torch.randn(50, L, C))
    assert not any("linear_start" in name for name, _ in projector.named_parameters())
    loaded = build(**LINEAR).eval()
    loaded.load_state_dict(projector.state_dict())
    assert torch.equal(loaded.posterior(text).mean, projector.posterior(text).mean)


def test_gradient_reaches_every_parameter_beside_a_linear_start_after_the_first_step():
    projector = build(**FULL, linear_start=0.1)
    projector.linear_start.fit(states(50), torch.randn(50, L, C))
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    for _ in range(2):  # the layer that starts at zero lets no gradient through in the first
        optimizer.zero_grad()
        mean, logvar, alignment, log_temperature = projector(states())
        (contrastive_loss(mean, alignment, log_temperature) + kl_loss(mean, logvar)).backward()
        optimizer.step()
    assert not [
        n for n, p in projector.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]


def test_a_linear_start_is_float32_under_autocast():
    projector, text = build(**LINEAR), states(20)
    projector.linear_start.fit(text, torch.randn(20, L, C))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = projector.linear_start(text)
    assert torch.equal(found, projector.linear_start(text)) and found.dtype == torch.float32


def test_learned_positions_tell_equal_tokens_apart():
    same = torch.randn(1, 1, T).expand(B, L, T)
    blind, placed = build().eval(), build(learned_positions=True).eval()
    assert blind.positions is None and placed.positions.shape == (L, T)
    spread = [model.posterior(same).mean.std(dim=1).max() for model in (blind, placed)]
    assert spread[0] < 1e-5 and spread[1] > 1e-2
    before = placed.posterior(same).mean
    with torch.no_grad():
        placed.positions.copy_(placed.positions.roll(1, dims=0))
    torch.testing.assert_close(placed.posterior(same).mean, before.roll(1, dims=1))


def test_half_precision_states_give_float32_moments():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = build().posterior(states())
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


def test_text_states_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match="text states are B x \\(5, 23\\), the projector expects B x \\(5, 24\\)"
    ):
        build().posterior(torch.randn(B, L, T - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "projector.width 24 is not divisible by num_heads 5"),
        ({"linear_start": -0.1}, "projector.linear_start must not be negative, got -0.1"),
        ({"fixed_std": -1.0}, "projector.fixed_std must not be negative, got -1.0"),
        ({"dropout": 1.0}, "projector.dropout must be in \\[0, 1\\), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)


def test_flattened_rows_have_length_one_and_keep_their_direction():
    x = torch.randn(B, L, C, dtype=torch.float64)
    rows = flatten_normalize(x)
    assert rows.shape == (B, L * C) and rows.dtype == torch.float32
    expected = x.reshape(B, -1) / x.reshape(B, -1).square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(rows, expected.float())


def test_the_pooled_target_averages_neighbouring_channels_and_has_no_weights():
    config = TextProjectorConfig(
        2, 8, 8, 1, 2, 8, token_channels=4, alignment_target="average_pool"
    )
    head = TextProjector(config).alignment
    states = torch.arange(16.0).view(1, 2, 8)
    torch.testing.assert_close(
        head(states), torch.tensor([[[0.5, 2.5, 4.5, 6.5], [8.5, 10.5, 12.5, 14.5]]])
    )
    assert [name for name, _ in head.named_parameters()] == ["log_temperature"]
    with pytest.raises(ValueError, match="text_width 8 is not divisible by token_channels 3"):
        TextProjectorConfig(2, 8, 8, 1, 2, 8, token_channels=3, alignment_target="average_pool")
