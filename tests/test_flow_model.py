"""modeling/flow_model.py: what one training pass computes, which losses teach what; conditions.

A condition is the usual way, to compare with: a network that reads the text, from noise or both.
"""

import pytest
import torch
from networks import CONDITIONS, PROJECTOR, SIZE, C, K, T, build, inputs, silent
from tiny_experiment import draw, metrics, weights

import modeling.flow_model as module
from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.losses import FlowLossConfig, ProjectorLossConfig, projector_losses, velocity_losses
from modeling.text_projector import TextProjector

B = 4


def flow_loss(result):
    return velocity_losses(FlowLossConfig(), result)["flow_matching"]


@pytest.fixture
def second_is_null(monkeypatch):
    """The null indicators: the second sample has none, and a swapped target is the first one's."""
    null = torch.tensor([False, True, False, False])
    monkeypatch.setattr(module, "draw_null", lambda batch_size, probability, device: null)
    monkeypatch.setattr(module, "swap_targets", lambda end, null: end[[0, 0, 2, 3]])
    return null


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_pass_predicts_the_velocity_on_the_path_between_text_and_image(
    second_is_null, monkeypatch, direction
):
    s, t = 0.1, torch.tensor([0.0, 0.25, 0.5, 1.0])
    monkeypatch.setattr(module, "sample_times", lambda config, batch_size, device: t)
    flow, (states, image) = build(sigma_min=s, direction=direction), inputs(B)
    result = flow(states, image)
    ends = [result.source.latents, image]
    start, end = ends if direction == "text_to_image" else reversed(ends)
    end = end[[0, 0, 2, 3]]
    torch.testing.assert_close(result.target, end - (1 - s) * start)
    time = t.view(-1, 1, 1)
    on_path = (1 - (1 - s) * time) * start + time * end
    torch.testing.assert_close(result.velocity, flow.flowtok(on_path, t, second_is_null))


@pytest.mark.parametrize("condition", ["none", "concatenation"])  # of the projector's features
def test_detached_projector_learns_from_its_own_losses_only(condition):
    flow, (states, image) = build(condition, projector="detached"), inputs(B)
    result = flow(states, image)
    flow_loss(result).backward(retain_graph=True)
    projector = {name for name, _ in flow.projector.named_parameters()}
    assert silent(flow.projector) == projector and "embed_tokens.weight" not in silent(flow.flowtok)
    sum(projector_losses(ProjectorLossConfig(), result.source, image).values()).backward()
    assert not silent(flow.projector)


def test_frozen_projector_gets_no_gradient_and_keeps_no_graph():
    flow = build(projector="frozen")
    result = flow.train()(*inputs(B))
    assert flow.flowtok.training and not flow.projector.training
    assert not any(x.requires_grad for x in result.source)
    flow_loss(result).backward()
    assert "embed_tokens.weight" not in silent(flow.flowtok)
    assert all(p.grad is None and not p.requires_grad for p in flow.projector.parameters())


def test_source_and_network_of_different_token_shapes_are_refused():
    network = FlowTok(FlowTokConfig(num_tokens=6, **SIZE))
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(6, 3\)"):
        FlowModel(TextProjector(PROJECTOR), network, FlowConfig())


# Conditions


@pytest.mark.parametrize("source", ["text", "noise"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_unconditional_samples_learn_nothing_of_their_text(second_is_null, condition, source):
    flow = build(condition, source=source, sample_text_latent=source == "noise")
    states, others, image = (torch.randn(B, K, width) for width in (T, T, C))
    torch.manual_seed(0)
    result = flow(states, image)

    # A start that tells the text has another sample's target; noise tells nothing.
    end = image if source == "noise" else image[[0, 0, 2, 3]]
    torch.testing.assert_close(result.target, end - (1 - 1e-5) * result.source.latents)
    if source == "text":
        return
    torch.manual_seed(0)
    changed = flow(others, image).velocity - result.velocity
    assert changed[1].abs().max() < 1e-6
    assert all(changed[i].abs().max() > 1e-3 for i in (0, 2, 3))


@pytest.mark.parametrize("objective", ["velocity", "mean_flow"])
@pytest.mark.parametrize("source", ["text", "noise"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_flow_loss_teaches_all_that_learns(condition, source, objective):
    flow = build(condition, source=source, objective=objective, null_probability=0.5).train()
    for _ in range(8):  # dropout and the null samples leave out some
        flow_loss(flow(*inputs(B))).backward()
    frozen = {n for n, p in flow.named_parameters() if not p.requires_grad}
    alignment = {n for n, _ in flow.named_parameters() if "alignment" in n}
    assert silent(flow) == (frozen if source == "noise" else alignment)
    assert all("to_moments" in name or "alignment" in name for name in frozen)


def test_noise_is_the_start_and_has_no_mean():
    source = build("concatenation", source="noise").projector
    states, noise = torch.randn(B, K, T), torch.randn(B, K, C)
    assert source.start(states, noise) is noise
    with pytest.raises(ValueError, match="sample_text_latent=true"):
        source.start(states, None)


def test_a_flow_from_noise_trains_resumes_and_draws(chain, tmp_path):
    options = ["flow.source=noise", "losses.alignment_weight=0", "losses.kl_weight=0"]
    options.append("flowtok.condition=concatenation")
    run = chain.run_in(tmp_path, "flowtok", *options, "training.max_steps=2")
    chain.run_in(tmp_path, "flowtok", *options)
    assert [line["step"] for line in metrics(run)] == [2, 4]
    assert any("embed_context" in name for name in weights(run))
    for seed in (0, 1):
        out = tmp_path / f"{seed}.png"
        draw(tmp_path, "--prompts", "a red circle", "--seed", seed, "--output", out)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
