"""research/flow_statistics.py on networks whose velocity is known, and as a program."""

import json
from types import SimpleNamespace

import pytest
import torch

from modeling.flow import FlowConfig
from modeling.pipeline import SamplingConfig
from research.flow_statistics import TIMES, describe_flow, loss_by_time, main

N, K, C = 6, 3, 2


def make_parts(velocity):
    """Starts: the states themselves; transport: nothing."""
    source = SimpleNamespace(start=lambda states, noise: states)
    flow = SimpleNamespace(
        flowtok=velocity, projector=source, config=FlowConfig(), context=lambda states: None
    )
    return SimpleNamespace(
        start=lambda states, *drawn: states,
        flow=flow,
        transport=lambda x, states, sampling: x,
    )


def test_the_loss_is_that_of_each_time():
    text, image = torch.randn(2, N, K, C)
    straight = image - (1 - 1e-5) * text
    parts = make_parts(lambda x, t, null, context: straight + t.view(-1, 1, 1))  # off by t
    losses = loss_by_time(parts, text, text, image, null=False)
    assert len(losses) == len(TIMES) == 10
    for name, loss in losses.items():
        assert loss == pytest.approx((int(name[1:]) / 100) ** 2, rel=1e-4)


def test_the_unconditional_flow_is_told_so_and_ends_at_another_image():
    text, image = torch.randn(2, N, K, C)
    ends = torch.stack([image, image.roll(1, dims=0)])  # of the indicator off and on
    rows = torch.arange(N)
    parts = make_parts(lambda x, t, null, context: ends[null.long(), rows] - (1 - 1e-5) * text)
    found = describe_flow(parts, text, image, SamplingConfig(sample_text_latent=False), 0)
    for name in ("loss_by_time", "null_loss_by_time"):
        assert max(found[name].values()) < 1e-6


def test_a_start_that_is_the_same_for_every_caption_shows():
    states, image = torch.randn(1, K, C).expand(N, K, C), torch.randn(N, K, C)
    parts = make_parts(lambda x, t, null, context: x)
    found = describe_flow(parts, states, image, SamplingConfig(sample_text_latent=False), 0)
    assert found["z_text_between_captions_std"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"] == 0
    assert found["source_mse"] == pytest.approx((states - image).square().mean().item())


def test_the_program_writes_the_figures_of_both_sets(chain, tmp_path):
    for path in chain.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    main(chain.config("report", f"experiment_dir={tmp_path}"))
    report = json.loads((tmp_path / "flow_statistics.json").read_text())
    assert report.keys() == {"train", "heldout"}
    for part in report.values():
        assert len(part["loss_by_time"]) == 10 and part["source_mse"] > 0 < part["diversity"]
