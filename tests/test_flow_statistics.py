"""research/flow_statistics.py on networks whose velocity is known."""

from types import SimpleNamespace

import pytest
import torch

from modeling.pipeline import SamplingConfig
from modeling.posterior import Posterior
from research.flow_statistics import TIMES, describe_flow, diversity, loss_by_time

N, K, C = 6, 3, 2


def make_parts(velocity, noise=0.0):
    """Source: the states themselves, plus noise; transport: nothing."""

    def source(states, sampling, seed, indices):
        generator = torch.Generator().manual_seed(seed)
        return states + noise * torch.randn(states.shape, generator=generator)

    projector = SimpleNamespace(
        posterior=lambda states: Posterior(states, torch.zeros_like(states))
    )
    flow = SimpleNamespace(flowtok=velocity, projector=projector)
    return SimpleNamespace(source=source, flow=flow, transport=lambda x, sampling: x)


def test_the_loss_is_that_of_each_time():
    text, image = torch.randn(N, K, C), torch.randn(N, K, C)
    parts = make_parts(lambda x, t, null: image - (1 - 1e-5) * text + t.view(-1, 1, 1))  # off by t
    losses = loss_by_time(parts, text, image, null=False)
    assert len(losses) == len(TIMES) == 10
    for name, loss in losses.items():
        assert loss == pytest.approx((int(name[1:]) / 100) ** 2, rel=1e-4)


def test_the_unconditional_flow_is_told_so_and_ends_at_another_image():
    text, image = torch.randn(N, K, C), torch.randn(N, K, C)
    ends = torch.stack([image, image.roll(1, dims=0)])  # of the indicator off and on
    parts = make_parts(lambda x, t, null: ends[null.long(), torch.arange(N)] - (1 - 1e-5) * text)
    found = describe_flow(parts, text, image, SamplingConfig(sample_text_latent=False), 0)
    for name in ("loss_by_time", "null_loss_by_time"):
        assert max(found[name].values()) < 1e-6


def test_a_source_that_is_the_same_for_every_caption_shows():
    states, image = torch.randn(1, K, C).expand(N, K, C), torch.randn(N, K, C)
    found = describe_flow(
        make_parts(lambda x, t, null: x), states, image, SamplingConfig(sample_text_latent=False), 0
    )
    assert (
        found["z_text_between_captions_std"] == pytest.approx(0, abs=1e-6)
        and found["diversity"] == 0
    )
    assert found["source_mse"] == pytest.approx((states - image).square().mean().item())


def test_diversity_is_the_deviation_over_draws_as_a_share_of_that_over_captions():
    states = 5 * torch.randn(2000, K, C, generator=torch.Generator().manual_seed(7))
    value = diversity(make_parts(None, noise=0.5), states, SamplingConfig(), 0)
    assert value == pytest.approx(0.1, rel=0.05)
