"""modeling/text_projector.py: block formulas, moments, dropout, alignment, gradients, errors."""

import math
from dataclasses import replace

import pytest
import torch
from networks import silent
from torch import nn

from modeling.losses import contrastive_loss, kl_loss
from modeling.text_projector import (
    WHITENING_FLOOR,
    ProjectorBlock,
    TextProjector,
    TextProjectorConfig,
    TextWhitening,
)
from training.ridge import fit_linear_skip, fit_ridge

B, L, T, C = 3, 5, 24, 4
CONFIG = TextProjectorConfig(
    L, T, width=T, depth=2, num_heads=2, mlp_width=20, token_channels=C, alignment_width=16
)


def build(**options):
    return TextProjector(replace(CONFIG, **options))


def states(batch=B):
    return torch.randn(batch, L, T)


def test_a_pre_norm_block_adds_to_its_input():  # a post-norm one is the release's
    block, x = ProjectorBlock(replace(CONFIG, pre_norm=True)).eval(), states()
    y = x + block.attention(block.norm_attention(x))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm_mlp(y)))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_acts_on_both_branches_in_training_only(pre_norm, branch):
    block, x = ProjectorBlock(replace(CONFIG, pre_norm=pre_norm, dropout=0.5)), states()
    assert torch.equal(block.eval()(x), block(x))
    silenced = block.attention.out if branch == "attention" else block.mlp[2]
    for parameter in silenced.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(block.train()(x), block(x))  # the other branch still varies


def test_training_pass_is_the_posterior_and_the_alignment_head():
    projector, text = build(dropout=0.0), states()
    output, posterior = projector(text, sample=False), projector.posterior(text)
    assert output.latents is output.mean and output.mean.shape == (B, L, C)
    assert torch.equal(output.mean, posterior.mean)
    assert torch.equal(output.logvar, posterior.logvar)
    assert torch.equal(output.alignment, projector.alignment(text))
    assert output.log_temperature.item() == pytest.approx(math.log(1 / 0.07))
    first, second = projector(text, sample=True), projector(text, sample=True)
    assert not torch.equal(first.latents, second.latents)
    noise = (first.latents - first.mean) * torch.exp(-0.5 * first.logvar)
    assert 0.6 < noise.std() < 1.4


def loss_of(output):
    """A loss that reads all that a training pass gives."""
    contrast = contrastive_loss(output.latents, output.alignment, output.log_temperature)
    return contrast + kl_loss(output.mean, output.logvar)


FULL = {"pre_norm": True, "width": 32, "learned_positions": True, "whiten_text": True}
QUERIES = FULL | {"num_queries": 7}
SKIP = {"pre_norm": True, "linear_skip": True}


@pytest.mark.parametrize(
    "options",
    [{}, {"pre_norm": True, "width": 32}, {"fixed_std": 0.5}, FULL, QUERIES, FULL | SKIP],
)
def test_gradient_reaches_every_parameter(options):
    projector = build(**options)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    # A layer that starts at zero, beside a skip, lets no gradient through in the first step.
    for _ in range(2 if projector.config.linear_skip else 1):
        optimizer.zero_grad()
        loss_of(projector(states(), sample=True)).backward()
        optimizer.step()
    assert not silent(projector)


def test_init_misses_no_parameter(monkeypatch):
    def unset(layer):
        for parameter in layer.parameters(recurse=False):
            nn.init.constant_(parameter, float("nan"))

    # What PyTorch starts with must not be what is left.
    monkeypatch.setattr(nn.Linear, "reset_parameters", unset)
    assert not [name for name, p in build(**QUERIES).named_parameters() if p.isnan().any()]


def correlated():
    """Text states with correlated channels of unlike deviations around a mean, float64."""
    mix = torch.randn(T, T, dtype=torch.float64) + 3 * torch.eye(T, dtype=torch.float64)
    mean = torch.linspace(-5, 5, T, dtype=torch.float64)
    return torch.randn(200, L, T, dtype=torch.float64) @ mix + mean


def test_the_floor_shrinks_the_smallest_directions_only():
    text = correlated()
    text[..., 0] = text[..., 1]  # a direction without variance
    whitening = TextWhitening(T)
    whitening.fit(text.split(64))  # the last batch is smaller
    rows = whitening(text).flatten(0, 1)
    centred = text.flatten(0, 1) - text.flatten(0, 1).mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / len(centred))
    expected = (variances / (variances + WHITENING_FLOOR * variances.mean())).float()
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.diag(expected), rtol=0, atol=1e-3)
    assert rows.dtype == torch.float32 and expected[0] < 1e-6 < 0.9 < expected[-1]


def test_whitening_is_the_identity_until_fitted_and_is_not_trained():
    projector, text = build(whiten_text=True).eval(), states()
    assert torch.equal(projector.whitening(text), text)
    projector.whitening.fit([correlated().float()])
    assert not torch.allclose(projector.whitening(text), text, atol=1e-3)
    check_is_kept(projector, "whitening", whiten_text=True)


def check_is_kept(projector, name, **options):
    """What was fitted is in the state dict, not trained, and float32 under autocast."""
    loaded, text = build(**options).eval(), states()
    loaded.load_state_dict(projector.state_dict())
    fitted = getattr(projector, name)
    assert torch.equal(getattr(loaded, name)(text), fitted(text))
    assert not list(fitted.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fitted(text)
    assert torch.equal(found, fitted(text)) and found.dtype == torch.float32


def test_a_fixed_deviation_is_that_of_every_token_and_leaves_the_mean_alone():
    free, fixed, text = build().eval(), build(fixed_std=0.5).eval(), states()
    weights = free.state_dict()
    weights |= {name: weights[name][:C] for name in ("to_moments.weight", "to_moments.bias")}
    fixed.load_state_dict(weights)
    posterior = fixed.posterior(text)
    torch.testing.assert_close(posterior.logvar.exp().sqrt(), torch.full((B, L, C), 0.5))
    torch.testing.assert_close(posterior.mean, free.posterior(text).mean)


@pytest.mark.parametrize("num_queries", [0, 7])
def test_a_linear_skip_gives_the_ridge_and_the_blocks_add_to_it(num_queries):
    projector = build(**SKIP, num_queries=num_queries).eval()
    text, queries = states(50), states(7)
    latents = torch.randn(50, num_queries or L, C) + 1
    assert not projector.posterior(text).mean.any()  # nothing is fitted yet
    fit_linear_skip(projector.linear_skip, text, latents, 0.1)
    expected = fit_ridge(text, latents, [0.1])(queries)
    torch.testing.assert_close(projector.posterior(queries).mean, expected)
    nn.init.normal_(projector.to_moments.weight)
    plain = build(pre_norm=True, num_queries=num_queries).eval()
    plain.load_state_dict(projector.state_dict(), strict=False)
    added = projector.posterior(queries).mean - projector.linear_skip(queries)
    torch.testing.assert_close(added, plain.posterior(queries).mean, rtol=1e-4, atol=1e-5)


def test_a_linear_skip_is_kept_in_the_state_dict_and_not_trained():
    projector = build(**SKIP).eval()
    fit_linear_skip(projector.linear_skip, states(50), torch.randn(50, L, C), 0.1)
    check_is_kept(projector, "linear_skip", **SKIP)


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


def test_text_states_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 23\).*\(5, 24\)"):
        build().posterior(torch.randn(B, L, T - 1))


@pytest.mark.parametrize("text_depth", [0, 1])
def test_learned_queries_look_at_text_and_never_at_padding(text_depth):
    options = {"num_queries": 7, "width": 32, "text_depth": text_depth}
    projector, text = build(**options).eval(), states()
    with_padding = torch.cat([text[:, :2], torch.zeros(B, L - 2, T)], dim=1)
    before, after = projector.posterior(text).mean, projector.posterior(with_padding).mean
    assert projector.shape == (7, C) == before.shape[1:] and not torch.allclose(before, after)

    # As if the text had two tokens: the padding's number and places do not count.
    short = build(**options, text_tokens=2).eval()
    short.load_state_dict(projector.state_dict())
    torch.testing.assert_close(short.posterior(text[:, :2]).mean, after)
    pooled = build(**options, alignment_target="average_pool")
    assert pooled(text, sample=False).alignment.shape == (B, 7, C)


def test_blocks_over_the_text_need_queries():
    with pytest.raises(ValueError, match=r"text_depth=1 .*expected 0"):
        build(text_depth=1)


def test_the_pooled_target_averages_neighbouring_channels_and_has_no_weights():
    head = build(text_width=8, alignment_target="average_pool").alignment
    expected = [[[0.5, 2.5, 4.5, 6.5], [8.5, 10.5, 12.5, 14.5]]]
    assert head(torch.arange(16.0).view(1, 2, 8)).tolist() == expected
    assert [name for name, _ in head.named_parameters()] == ["log_temperature"]
