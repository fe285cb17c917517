"""modeling/flow_model.py: what one training pass computes, and which losses teach the projector."""

import pytest
import torch
from torch import nn

import modeling.flow_model as module
from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel, build_flow
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.losses import FlowLossConfig, ProjectorLossConfig, projector_losses, velocity_losses
from modeling.text_projector import TextProjector, TextProjectorConfig

B, K, C, T = 4, 5, 3, 16
SIZE = {"width": 16, "depth": 1, "num_heads": 2, "token_channels": C}
PROJECTOR = TextProjectorConfig(K, T, mlp_width=16, alignment_width=8, **SIZE)
FLOWTOK = FlowTokConfig(num_tokens=K, **SIZE)


def build(**options):
    """A flow with weights away from the zero start, where no gradient gets through the network."""
    flow = build_flow(PROJECTOR, FLOWTOK, FlowConfig(**options))
    for parameter in flow.flowtok.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow


def inputs():
    return torch.randn(B, K, T), torch.randn(B, K, C)


def flow_loss(result):
    return velocity_losses(FlowLossConfig(), result)["flow_matching"]


def taught(part):
    """Names of the parameters that a loss has reached."""
    grads = {name: p.grad for name, p in part.named_parameters()}
    return {name for name, x in grads.items() if x is not None and x.abs().max() > 0}


@pytest.fixture
def fixed_times(monkeypatch):
    """t, and the second sample on the null flow with the first one's latent."""
    t, null = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([False, True, False, False])
    monkeypatch.setattr(module, "sample_times", lambda config, batch_size, device: t)
    monkeypatch.setattr(module, "draw_null", lambda batch_size, probability, device: null)
    monkeypatch.setattr(module, "swap_targets", lambda end, null: end[[0, 0, 2, 3]])
    return t, null


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_pass_predicts_the_velocity_on_the_path_between_text_and_image(fixed_times, direction):
    s = 0.1
    flow, (states, image) = build(sigma_min=s, direction=direction).eval(), inputs()
    result = flow(states, image)
    ends = [result.source.latents, image]
    start, end = ends if direction == "text_to_image" else reversed(ends)
    (t, null), end = fixed_times, end[[0, 0, 2, 3]]
    torch.testing.assert_close(result.target, end - (1 - s) * start)
    time = t.view(-1, 1, 1)
    on_path = (1 - (1 - s) * time) * start + time * end
    torch.testing.assert_close(result.velocity, flow.flowtok(on_path, t, null))


def test_detached_projector_learns_from_its_own_losses_only():
    flow, (states, image) = build(projector="detached"), inputs()
    result = flow(states, image)
    flow_loss(result).backward(retain_graph=True)
    assert taught(flow.flowtok) and not taught(flow.projector)
    sum(projector_losses(ProjectorLossConfig(), result.source, image).values()).backward()
    assert taught(flow.projector) == {name for name, _ in flow.projector.named_parameters()}


def test_frozen_projector_gets_no_gradient_and_keeps_no_graph():
    flow = build(projector="frozen")
    result = flow.train()(*inputs())
    assert flow.flowtok.training and not flow.projector.training
    assert not any(x.requires_grad for x in result.source)
    flow_loss(result).backward()
    assert taught(flow.flowtok)
    assert all(p.grad is None and not p.requires_grad for p in flow.projector.parameters())


def test_source_and_network_of_different_token_shapes_are_refused():
    network = FlowTok(FlowTokConfig(num_tokens=6, **SIZE))
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(6, 3\)"):
        FlowModel(TextProjector(PROJECTOR), network, FlowConfig())
