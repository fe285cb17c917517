"""modeling/losses.py: each term in closed form, two processes against one, what weights switch."""

import math

import pytest
import torch
import torch.distributed as dist
from forks import in_two_processes
from torch import nn
from torch.distributions import Normal, kl_divergence

from modeling.layers import FlowPass, SourcePass
from modeling.losses import (
    FlowLossConfig,
    ProjectorLossConfig,
    contrastive_loss,
    cosine_margin_loss,
    freeze_unused_alignment,
    has_projector_loss,
    kl_loss,
    latent_statistics,
    loss_weights,
    posterior_statistics,
    projector_losses,
    reconstruction_losses,
    velocity_losses,
    weighted_terms,
)
from modeling.text_projector import TextProjector, TextProjectorConfig

B, L, C = 4, 5, 3
LOG_TEMPERATURE = math.log(1 / 0.07)


def moments():
    return torch.randn(B, L, C), torch.randn(B, L, C)


def test_kl_is_summed_per_sample_and_averaged_over_the_batch_in_each_form():
    mean, logvar = moments()
    posterior = Normal(mean.double(), (0.5 * logvar.double()).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum() / B
    torch.testing.assert_close(kl_loss(mean, logvar).double(), expected)
    wall = -0.5 * (1 + logvar - (0.3 * mean) ** 6 - logvar.exp()).sum() / B  # the release's
    torch.testing.assert_close(kl_loss(mean, logvar, "wall"), wall)
    centred = kl_loss(torch.zeros_like(mean), logvar)  # leaves the mean alone
    torch.testing.assert_close(kl_loss(mean, logvar, "variance"), centred)


def manual_contrastive(latents, targets, log_temperature):
    """Row by row in float64."""
    z, a = (x.double().reshape(len(x), -1) for x in (latents, targets))
    z, a = z / z.norm(dim=1, keepdim=True), a / a.norm(dim=1, keepdim=True)
    loss = 0.0
    for i in range(len(z)):
        for own, others in ((z, a), (a, z)):
            logits = [log_temperature.exp().item() * (own[i] @ other).item() for other in others]
            loss += (math.log(sum(math.exp(x) for x in logits)) - logits[i]) / (2 * len(z))
    return loss


def test_contrastive_loss_is_the_symmetric_cross_entropy_of_normalised_rows_in_float32():
    leaves = [x.requires_grad_() for x in (*moments(), torch.tensor(LOG_TEMPERATURE))]
    loss = contrastive_loss(*leaves)
    loss.backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves)
    assert loss.item() == pytest.approx(manual_contrastive(*leaves), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(*leaves), loss)


def shared_weights_loss(model, log_temperature, x):
    z, a = model(x).view(-1, L, 2 * C).split(C, dim=-1)
    return contrastive_loss(z, a, log_temperature)


def two_process_setup():
    torch.manual_seed(5)
    return nn.Linear(6, L * 2 * C), nn.Parameter(torch.tensor(1.0)), torch.randn(2 * B, 6)


def shared_gradients(rank):
    model, log_temperature, x = two_process_setup()
    loss = shared_weights_loss(model, log_temperature, x[rank * B : (rank + 1) * B])
    loss.backward()
    values = [*(p.grad for p in model.parameters()), log_temperature.grad, loss.detach()]
    for value in values:  # as DDP averages gradients
        dist.all_reduce(value)
    return [value / 2 for value in values]


def test_two_processes_give_the_gradient_of_one_process_with_the_joined_batch(tmp_path):
    found = in_two_processes(shared_gradients, tmp_path)
    model, log_temperature, x = two_process_setup()
    loss = shared_weights_loss(model, log_temperature, x)
    loss.backward()
    expected = [*(p.grad for p in model.parameters()), log_temperature.grad, loss.detach()]
    torch.testing.assert_close(found, [expected, expected])
    halves = [shared_weights_loss(model, log_temperature, half) for half in x.split(B)]
    assert abs(sum(halves) / 2 - loss) > 0.1  # negatives of one process only would be another loss


def test_cosine_margin_loss_pulls_pairs_up_to_the_margin_only():
    targets = torch.eye(3, 4, dtype=torch.float64)
    angles = torch.tensor([[0.0], [60.0], [90.0]], dtype=torch.float64).deg2rad()
    latents = angles.cos() * targets + angles.sin() * targets.roll(1, dims=1)  # cosines 1, 1/2, 0
    latents, targets = latents.view(3, 2, 2), targets.view(3, 2, 2)
    assert cosine_margin_loss(5 * latents, targets, 0.0).item() == pytest.approx(1 / 2)
    assert cosine_margin_loss(latents, targets, 0.25).item() == pytest.approx(1 / 3)
    latents.requires_grad_(True)
    cosine_margin_loss(latents, targets, 0.75).backward()
    assert [bool(g.abs().sum() > 1e-9) for g in latents.grad] == [False, False, True]


@pytest.mark.parametrize(
    ("options", "head", "temperature"),
    [
        ({}, True, True),
        ({"alignment_form": "cosine_margin"}, True, False),
        ({"alignment_weight": 0.0}, False, False),
    ],
)
def test_alignment_weights_without_gradient_are_frozen(options, head, temperature):
    sizes = TextProjectorConfig(5, 16, 16, 1, 2, 16, token_channels=4, alignment_width=8)
    projector = TextProjector(sizes)
    freeze_unused_alignment(projector, ProjectorLossConfig(**options))
    assert all(p.requires_grad == head for p in projector.alignment.mlp.parameters())
    assert projector.alignment.log_temperature.requires_grad == temperature
    found = projector(torch.randn(B, 5, 16), sample=False).alignment
    assert (found is not None) == (ProjectorLossConfig(**options).alignment_weight > 0)
    assert projector.to_moments.weight.requires_grad


def test_reconstruction_losses_of_a_constant_error_and_of_ramps_along_both_axes():
    images = torch.rand(B, 3, 8, 8)
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)  # grows by 1 a column
    found = reconstruction_losses(images, images + 0.5)
    assert found["l2"].item() == pytest.approx(0.25)
    assert found["l1"].item() == pytest.approx(0.5)
    assert found["gradient"].item() == pytest.approx(0, abs=1e-6)
    for image, gradient in ((ramp, 0.5), (3 * ramp.mT, 1.5)):
        found = reconstruction_losses(torch.zeros_like(ramp), image)
        assert found["gradient"].item() == pytest.approx(gradient)


def test_latent_statistics_are_population_deviations_without_gradient():
    mean = torch.randn(B, L, C, requires_grad=True)
    found = latent_statistics(mean)
    values = mean.detach().double()
    between = ((values - values.mean(dim=0)) ** 2).mean().sqrt()
    overall = ((values - values.mean()) ** 2).mean().sqrt()
    assert found["z_text_between_captions_std"].item() == pytest.approx(between.item(), rel=1e-5)
    assert found["z_text_std"].item() == pytest.approx(overall.item(), rel=1e-5)
    assert not any(value.requires_grad for value in found.values())


def source_pass():
    latents, mean, logvar, alignment, image_mean = torch.randn(5, B, L, C)
    return SourcePass(latents, mean, logvar, alignment, torch.tensor(1.0)), image_mean


def test_terms_on_the_text_latents_are_those_of_their_functions():
    source, image_mean = source_pass()
    config = ProjectorLossConfig(0.3, kl_weight=0.02, kl_form="wall", image_regression_weight=2.0)
    expected = {
        "alignment": contrastive_loss(source.latents, source.alignment, source.log_temperature),
        "kl": kl_loss(source.mean, source.logvar, "wall"),
        "image_regression": ((source.mean - image_mean) ** 2).mean(),
    }
    torch.testing.assert_close(projector_losses(config, source, image_mean), expected)
    margin = ProjectorLossConfig(alignment_form="cosine_margin", alignment_margin=0.75)
    found = projector_losses(margin, source, image_mean)["alignment"]
    assert found == cosine_margin_loss(source.latents, source.alignment, 0.75)


@pytest.mark.parametrize("name", loss_weights(ProjectorLossConfig()))
def test_each_weight_switches_its_own_term(name):
    off = {f"{other}_weight": 0.0 for other in loss_weights(ProjectorLossConfig())}
    assert not has_projector_loss(ProjectorLossConfig(**off))
    assert projector_losses(ProjectorLossConfig(**off), *source_pass()) == {}
    config = ProjectorLossConfig(**(off | {f"{name}_weight": 0.5}))
    assert has_projector_loss(config)
    assert projector_losses(config, *source_pass()).keys() == {name}


def test_the_velocity_loss_is_the_mean_squared_error_in_float32():
    velocity, target = torch.randn(2, B, L, C)
    half = FlowPass(velocity.bfloat16(), target, source_pass()[0])
    found = velocity_losses(FlowLossConfig(), half)["flow_matching"]
    torch.testing.assert_close(found, ((velocity.bfloat16().float() - target) ** 2).mean())


def test_weighted_terms_leave_out_what_has_no_weight_or_was_not_computed():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "off": torch.tensor(float("inf"))}
    found = weighted_terms(terms, {"a": 0.5, "b": 2.0, "off": 0.0, "absent": 1.0})
    assert found == {"a": torch.tensor(1.0), "b": torch.tensor(6.0)}


def test_posterior_statistics_show_channels_that_carry_nothing():
    mean = torch.randn(64, L, 4) * torch.tensor([1.0, 0.5, 0.05, 0.0])
    logvar = torch.tensor([-4.0, -2.0, 0.0, 0.0]).expand(64, L, 4)
    found = posterior_statistics(mean.requires_grad_(), logvar)
    deviations = [math.exp(-2), math.exp(-1), 1, 1]
    assert found["channels_in_use"] == 0.5
    assert [found[f"posterior_std/{c}"].item() for c in range(4)] == pytest.approx(deviations)
    assert found["posterior_std"].item() == pytest.approx(sum(deviations) / 4)
    assert not any(value.requires_grad for value in found.values())
