"""modeling/flow_model.py: what one training pass computes, and which losses may teach the projector."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import modeling.flow_model as module
from modeling.flow import FlowConfig, drop_to_null
from modeling.flow_model import FlowModel, draw_ends
from modeling.flowtok import FlowTokConfig
from modeling.losses import SourceLossConfig, flow_matching_loss, source_losses
from modeling.text_projector import TextProjectorConfig

B, K, C, T = 4, 5, 3, 16
PROJECTOR = TextProjectorConfig(
    K, T, width=T, depth=1, num_heads=2, mlp_width=16, token_channels=C, alignment_width=8
)
FLOWTOK = FlowTokConfig(num_tokens=K, token_channels=C, width=16, depth=1, num_heads=2)


def build():
    flow = FlowModel(PROJECTOR, FLOWTOK)
    for parameter in (
        flow.flowtok.parameters()
    ):  # away from the zero start, where no gradient gets through the network
        nn.init.normal_(parameter, std=0.2)
    return flow


def inputs():
    return torch.randn(B, K, T), torch.randn(B, K, C)


def flow_loss(result):
    return flow_matching_loss(result.velocity, result.target)


def taught(part):
    return {
        name for name, p in part.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }


@pytest.fixture
def fixed_times(monkeypatch):
    """t, and the second sample on the null flow with the first one's latent."""
    t, null = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([False, True, False, False])
    monkeypatch.setattr(module, "sample_times", lambda config, batch_size, device: t)
    monkeypatch.setattr(
        module, "drop_to_null", lambda image, probability: (null, image[[0, 0, 2, 3]])
    )
    return t, null


def test_pass_predicts_the_velocity_on_the_path_from_the_text_latent(fixed_times):
    flow, (states, image) = build().eval(), inputs()
    (t, null), image_used, s = fixed_times, image[[0, 0, 2, 3]], 0.1
    result = flow(states, image, FlowConfig(sigma_min=s))
    text, time = result.text_latents, t.view(-1, 1, 1)
    torch.testing.assert_close(result.target, image_used - (1 - s) * text)
    on_path = (1 - (1 - s) * time) * text + time * image_used
    torch.testing.assert_close(result.velocity, flow.flowtok(on_path, t, null))
    mean, logvar, alignment, log_temperature = flow.projector(states)
    for given, expected in zip(result[3:], (mean, logvar, alignment, log_temperature)):
        assert torch.equal(given, expected)


def test_text_latent_is_sampled_or_the_mean():
    flow, (states, image) = build().eval(), inputs()
    at_mean = flow(states, image, FlowConfig(sample_text_latent=False))
    assert torch.equal(at_mean.text_latents, at_mean.mean)
    first, second = (flow(states, image, FlowConfig()) for _ in range(2))
    assert torch.equal(first.mean, second.mean) and not torch.equal(
        first.text_latents, second.text_latents
    )
    noise = (first.text_latents - first.mean) * torch.exp(-0.5 * first.logvar)
    assert 0.6 < noise.std() < 1.4


def test_joint_flow_loss_teaches_the_whole_posterior_and_the_network():
    flow, (states, image) = build(), inputs()
    flow_loss(flow(states, image, FlowConfig(projector="joint", null_probability=0.5))).backward()
    assert taught(flow.flowtok) == {name for name, _ in flow.flowtok.named_parameters()}
    posterior_weights = {
        name for name, _ in flow.projector.named_parameters() if "alignment" not in name
    }
    assert taught(flow.projector) == posterior_weights


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"gradient_into_text": 0.25}, [0.25] * 4), ({"gradient_until": 0.25}, [1, 1, 0, 0])],
)
def test_the_flows_gradient_into_the_text_latent_is_limited_by_factor_or_time(
    fixed_times, monkeypatch, options, rows
):
    flow, (states, image) = build().eval(), inputs()  # no dropout
    full, limited = (
        FlowConfig(sample_text_latent=False),
        FlowConfig(sample_text_latent=False, **options),
    )
    found = []
    for config in (full, limited):
        result = flow(states, image, config)
        loss = flow_loss(result)
        found.append((loss, torch.autograd.grad(loss, result.text_latents)[0]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].abs().amin(dim=(1, 2)).min() > 0
    torch.testing.assert_close(found[1][1], found[0][1] * torch.tensor(rows).view(-1, 1, 1))


def test_detached_flow_loss_teaches_the_network_only():
    flow, (states, image) = build(), inputs()
    flow_loss(flow(states, image, FlowConfig(projector="detached"))).backward()
    assert taught(flow.flowtok) and not taught(flow.projector)


def test_detached_projector_still_learns_from_its_own_losses():
    flow, (states, image) = build(), inputs()
    result = flow(states, image, FlowConfig(projector="detached"))
    source_losses(SourceLossConfig(), *result[2:], image)["source"].backward()
    assert taught(flow.projector) == {name for name, _ in flow.projector.named_parameters()}


def test_frozen_projector_gets_no_gradient_and_keeps_no_graph():
    flow, (states, image) = build(), inputs()
    flow.freeze_projector()
    result = flow(states.requires_grad_(), image, FlowConfig(projector="frozen"))
    assert not any(x.requires_grad for x in result[2:])
    flow_loss(result).backward()
    assert taught(flow.flowtok) and all(
        p.grad is None and not p.requires_grad for p in flow.projector.parameters()
    )


def test_frozen_projector_stays_in_eval_mode_while_the_network_trains():
    flow = build()
    assert flow.train().projector.training
    flow.freeze_projector()
    flow.train()
    assert flow.training and flow.flowtok.training
    assert not any(part.training for part in flow.projector.modules())
    assert not flow.eval().flowtok.training


def test_pass_without_gradients_keeps_no_graph():
    flow, (states, image) = build(), inputs()
    with torch.no_grad():
        assert not any(x.requires_grad for x in flow(states, image, FlowConfig())[:-1])


def test_latent_scale_is_saved_and_loaded_with_the_weights():
    flow, other = build(), build()
    assert flow.latent_scale == 1
    flow.latent_scale.fill_(1.7)
    other.load_state_dict(flow.state_dict())
    assert other.latent_scale.item() == pytest.approx(1.7)


def test_projector_and_network_of_different_token_shapes_are_refused():
    with pytest.raises(
        ValueError,
        match="the projector gives \\(5, 3\\) tokens x channels, flowtok expects \\(6, 3\\)",
    ):
        FlowModel(PROJECTOR, replace(FLOWTOK, num_tokens=6))


# The other direction, and both


def test_to_text_the_path_begins_at_the_image_and_ends_at_the_text_latent(monkeypatch):
    t, null = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([False, True, False, False])
    monkeypatch.setattr(module, "sample_times", lambda config, batch_size, device: t)
    monkeypatch.setattr(module, "drop_to_null", lambda end, probability: (null, end[[0, 0, 2, 3]]))
    flow, (states, image), s = build().eval(), inputs(), 0.1
    result = flow(
        states, image, FlowConfig(sigma_min=s, direction="image_to_text", projector="frozen")
    )
    text, time = result.text_latents[[0, 0, 2, 3]], t.view(-1, 1, 1)
    torch.testing.assert_close(result.target, text - (1 - s) * image)
    on_path = (1 - (1 - s) * time) * image + time * text
    torch.testing.assert_close(result.velocity, flow.flowtok(on_path, t, null))


def test_in_joint_training_each_sample_has_its_own_direction_and_no_end_is_of_the_wrong_kind():
    text, image = (
        torch.arange(200.0).view(200, 1, 1).expand(200, 2, 3),
        -1 - torch.arange(200.0).view(200, 1, 1),
    )
    image = image.expand(200, 2, 3)
    start, null, end, to_text = draw_ends(
        text, image, FlowConfig(direction="joint", null_probability=0.3)
    )
    assert 60 < to_text.sum() < 140 and 30 < null.sum() < 90
    assert torch.equal(start, torch.where(to_text.view(-1, 1, 1), image, text))
    assert torch.equal(
        end[:, 0, 0] >= 0, to_text
    )  # text latents are the numbers from 0 on, image latents those below
    number = torch.where(to_text, end[:, 0, 0], -1 - end[:, 0, 0])
    assert torch.equal(number == torch.arange(200), ~null)


def test_joint_training_tells_the_network_the_direction(monkeypatch):
    flow = FlowModel(PROJECTOR, replace(FLOWTOK, two_way=True))
    told = []
    monkeypatch.setattr(
        flow.flowtok, "forward", lambda x, t, null, to_text: told.append(to_text) or x
    )
    flow(*inputs(), FlowConfig(direction="joint", projector="frozen"))
    flow(*inputs(), FlowConfig())
    assert told[0].dtype == torch.bool and told[0].shape == (B,) and told[1] is None


def test_the_random_numbers_of_text_to_image_are_as_they_were():
    text, image = torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    torch.manual_seed(3)
    null, end = drop_to_null(image, 0.5)
    torch.manual_seed(3)
    start, drawn, target, to_text = draw_ends(text, image, FlowConfig(null_probability=0.5))
    assert (
        start is text and torch.equal(drawn, null) and torch.equal(target, end) and to_text is None
    )
