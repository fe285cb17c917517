"""The usual way, to compare with: a flow from noise whose network reads the text; and both."""

from dataclasses import replace

import pytest
import torch
from tiny_experiment import draw, metrics, weights
from torch import nn
from torch.nn import functional as F

import modeling.flow_model as module
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.layers import CrossAttention
from modeling.text_projector import TextProjectorConfig

B, K, C, T, W = 4, 5, 3, 16, 16
SIZE = {"width": W, "depth": 2, "num_heads": 2, "token_channels": C}
PROJECTOR = TextProjectorConfig(K, T, mlp_width=16, alignment_width=8, **SIZE)
NETWORK = FlowTokConfig(num_tokens=K, context_tokens=K, context_width=W, **SIZE)
CONDITIONS = ["addition", "cross_attention", "concatenation"]
NOISE = ["flow.source=noise", "losses.alignment_weight=0", "losses.kl_weight=0"]


def build(condition, **options):
    """A flow with weights away from the zero start, where no gradient gets through the network."""
    flow = build_flow(PROJECTOR, replace(NETWORK, condition=condition), FlowConfig(**options))
    for parameter in flow.flowtok.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow.eval()


@pytest.fixture
def second_is_null(monkeypatch):
    """The second sample is unconditional; a swapped target is the first one's."""
    null = torch.tensor([False, True, False, False])
    monkeypatch.setattr(module, "draw_null", lambda batch_size, probability, device: null)
    monkeypatch.setattr(module, "swap_targets", lambda end, null: end[[0, 0, 2, 3]])


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


@pytest.mark.parametrize("source", ["text", "noise"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_flow_loss_teaches_all_that_learns(condition, source):
    flow = build(condition, source=source, null_probability=0.5).train()
    for _ in range(8):  # dropout and the null samples leave out some
        result = flow(torch.randn(B, K, T), torch.randn(B, K, C))
        F.mse_loss(result.velocity, result.target).backward()
    silent = {n for n, p in flow.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    frozen = {n for n, p in flow.named_parameters() if not p.requires_grad}
    alignment = {n for n, _ in flow.named_parameters() if "alignment" in n}
    assert silent == (frozen if source == "noise" else alignment)
    assert all("to_moments" in name or "alignment" in name for name in frozen)


def test_a_detached_projector_learns_nothing_through_the_context():
    flow = build("concatenation", projector="detached")
    result = flow(torch.randn(B, K, T), torch.randn(B, K, C))
    F.mse_loss(result.velocity, result.target).backward()
    assert all(p.grad is None for p in flow.projector.parameters())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_sampling_computes_what_the_networks_own_forward_does(condition):
    network = build(condition).flowtok
    x, features = torch.randn(B, K, C), torch.randn(B, K, W)
    table = network.at_times([0.25, 0.5], features)
    for time in (0.25, 0.5):
        t = torch.full((B,), time)
        for null in ((False,), (True,), (False, True)):
            rows = [network(x, t, torch.full((B,), flag), features) for flag in null]
            torch.testing.assert_close(table(x, time, null), torch.cat(rows))


def test_cross_attention_is_softmax_over_the_context():
    attention = CrossAttention(W, num_heads=1).double()
    x, context = (torch.randn(2, n, W, dtype=torch.float64) for n in (3, 7))
    k, v = attention.key_value(context).chunk(2, dim=-1)
    shares = (attention.query(x) @ k.mT / W**0.5).softmax(-1)
    torch.testing.assert_close(attention(x, context), attention.out(shares @ v))


def test_a_block_with_cross_attention_starts_as_the_identity():
    network = FlowTok(replace(NETWORK, condition="cross_attention"))
    x, context = torch.randn(B, K, W), torch.randn(B, K, W)
    assert torch.equal(network.blocks[0](x, torch.randn(B, W), context), x)


def test_noise_is_the_start_and_has_no_mean():
    source = build("concatenation", source="noise").projector
    states, noise = torch.randn(B, K, T), torch.randn(B, K, C)
    assert source.start(states, noise) is noise
    with pytest.raises(ValueError, match="sample_text_latent=true"):
        source.start(states, None)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_flow_from_noise_trains_resumes_and_draws(chain, tmp_path, condition):
    options = [*NOISE, f"flowtok.condition={condition}"]
    run = chain.run_in(tmp_path, "flowtok", *options, "training.max_steps=2")
    chain.run_in(tmp_path, "flowtok", *options)
    assert [line["step"] for line in metrics(run)] == [2, 4]
    assert any("embed_context" in name for name in weights(run))
    for seed in (0, 1):
        out = tmp_path / f"{seed}.png"
        draw(tmp_path, "--prompts", "a red circle", "--seed", seed, "--output", out)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
