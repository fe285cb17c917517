"""The next-scale generator: inputs, mask and drawing of the original; the stage and sample.py."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_experiment import draw, equal, metrics, weights
from tokenflow_vectors import arrays, quantizer_of, vectors
from torch import nn
from torch.nn import functional as F

from modeling.dual_quantizer import DualQuantizer, QuantizerConfig
from modeling.next_scale import (
    NextScale,
    NextScaleConfig,
    NextScaleGenerator,
    NextScaleSampling,
    block_causal_mask,
    draw_indices,
    keep_likely,
    known_inputs,
)
from training import checkpoint as ckpt
from training.pipelines import load_generator

QUANTIZER = QuantizerConfig(num_codes=20, semantic_channels=6, pixel_channels=4, scales=[1, 2, 3])
CONFIG = NextScaleConfig(
    width=16, depth=2, num_heads=2, text_tokens=5, text_width=8, quantizer=QUANTIZER
)


# What the network gets


@pytest.mark.parametrize(
    ("name", "number", "places"),
    [("", 5, None), ("", 2, 4 + 9), *((f"_refining_scale_{i}", i + 1, None) for i in (1, 2, 3, 4))],
)
def test_inputs_are_the_originals(name, number, places):
    quantizer = quantizer_of("pyramid")
    config = NextScaleConfig(quantizer=quantizer.config)
    maps = quantizer.code_maps(vectors("pyramid/indices"))[:number]
    found = known_inputs(config, maps, refined=bool(name))
    expected = vectors(f"generator/inputs{name}")[:, : found.shape[1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert places is None or found.shape[1] == places


def test_embeddings_and_mask_are_the_originals():
    scales, ids = vectors("sequence/scales").tolist(), vectors("sequence/ids")
    words = vectors("sequence/word_embeddings")
    first = int((ids[0] >= 40).nonzero()[0])  # of the codes; the prefix ends before it
    model = NextScale(NextScaleConfig(16, 1, 2, quantizer=QuantizerConfig(40, 8, 4, scales)))
    model.projector = nn.Linear(12, 16)
    model.projector.weight.data = vectors("sequence/projector_weight")
    model.projector.bias.data = vectors("sequence/projector_bias")
    model.levels.data = vectors("sequence/level_embeddings")
    model.positions.data = vectors("sequence/positions")
    model.start.data = words[ids[0, first - 1]]
    found = model.embed_image(vectors("sequence/features"))
    expected = vectors("sequence/embeds")[:1, first - 1 : first + 13]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    # Theirs goes on after the image
    mask = block_causal_mask(ids[:, : first - 1] != 39, model.scale_of)
    length = first + 13
    assert torch.equal(mask, vectors("sequence/mask")[:, :length, :length])


@torch.no_grad()
def test_a_scale_sees_itself_and_the_smaller_ones_only():
    model = NextScale(CONFIG).eval()
    nn.init.normal_(model.to_logits.weight)
    features, text = torch.randn(1, 13, 10), torch.randn(1, 5, 8)
    dropped = torch.tensor([False])
    before = model(features, text, dropped)
    changed = features.clone()
    changed[:, 4:] += 1  # scale 3
    after = model(changed, text, dropped)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] != before[:, 5:]).all(-1).all()
    torch.testing.assert_close(model(features[:, :4], text, dropped), before[:, :5])
    other = model(features, torch.randn(1, 5, 8), dropped)
    assert (other != before).any(-1).all()


@torch.no_grad()
def test_a_dropped_caption_is_not_read_and_padding_neither():
    model = NextScale(NextScaleConfig(**{**vars(CONFIG), "text_is_masked": True})).eval()
    nn.init.normal_(model.to_logits.weight)
    features, text = torch.randn(1, 13, 10).expand(2, -1, -1), torch.randn(2, 5, 8)
    left, right = model(features, text, torch.tensor([True, True]))
    torch.testing.assert_close(left, right)
    with torch.enable_grad():  # zeros are padding
        states = F.pad(text[:, :2], (0, 0, 0, 3)).requires_grad_()
        model(features, states, torch.tensor([False, True])).square().sum().backward()
    read = states.grad.abs().sum(-1) > 0
    assert read.tolist() == [[True, True, False, False, False], [False] * 5]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert (model.levels.grad.abs().sum(-1) > 0).tolist() == [True, False, True, True]


# Drawing


@pytest.mark.parametrize("name", [name for name in arrays() if name.startswith("sampler/kept")])
def test_what_can_be_drawn_is_the_originals(name):
    top_k, top_p = name.removeprefix("sampler/kept_k").split("_p")
    kept = keep_likely(vectors("sampler/logits"), int(top_k), float(top_p)).isfinite()
    assert torch.equal(kept, vectors(name))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).expand(1, 40_000, 4)
    noise = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    drawn = draw_indices(logits, noise)
    shares = torch.bincount(drawn.flatten(), minlength=4) / 40_000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.01, rtol=0)
    extreme = draw_indices(logits[:, :2], torch.tensor([[-40.0, 40.0]]))
    assert extreme.tolist() == [[0, 3]]


@torch.no_grad()
def test_a_skip_alone_draws_what_the_quantiser_chooses():
    quantizer, tokens = DualQuantizer(QUANTIZER).eval(), torch.randn(9, 10)
    model = NextScale(replace(CONFIG, linear_skip=True)).eval()
    model.skip.offset.copy_(tokens)
    model.codes.copy_(quantizer.codes())
    parts = NextScaleGenerator(None, SimpleNamespace(quantizer=quantizer), model)
    chosen = torch.cat(quantizer(tokens.T.unflatten(1, (3, 3))[None]).indices, dim=1)
    for passes in (1, 2):
        sampling = NextScaleSampling(2.0, [1] * passes, [0.0] * passes)
        drawn = parts.draw(torch.randn(1, 5, 8), sampling, torch.randn(1, passes, 14))
        assert torch.equal(drawn, chosen)


def test_a_network_that_never_went_without_a_caption_is_not_guided():
    model = NextScale(replace(CONFIG, null_probability=0.0))
    with pytest.raises(ValueError, match="guidance 2 .*next_scale.null_probability=0"):
        NextScaleGenerator(None, None, model).make_latents(
            torch.randn(1, 5, 8), NextScaleSampling(guidance=2.0), seed=0, indices=[0]
        )


# The stage


def test_the_stage_resumes_bit_for_bit_and_logs_each_scale(dual_chain):
    folder, run = dual_chain.folder, dual_chain.run
    again = f"run_dir={folder}/again"
    run("next_scale", again, "training.max_steps=2")
    run("next_scale", again)
    for file in (ckpt.MODEL_FILE, ckpt.EMA_FILE):
        assert equal(*(weights(folder / name, file) for name in ("next_scale", "again")))
    line = metrics(folder / "next_scale")[-1]
    assert line["loss"] == pytest.approx((line["loss/1"] + 4 * line["loss/2"]) / 5, rel=1e-5)
    # It starts without a preference
    assert metrics(folder / "next_scale")[0]["loss"] == pytest.approx(np.log(32), rel=0.05)


def test_a_ridge_regression_is_where_the_stage_starts(dual_chain):
    folder = dual_chain.folder
    skip = dual_chain.run("next_scale", f"run_dir={folder}/skip", "linear_start=1e-3")
    parts, _ = load_generator(skip, torch.device("cpu"))
    assert torch.equal(parts.model.codes, parts.tokenizer.quantizer.codes())
    assert metrics(skip)[0]["top1"] > metrics(folder / "next_scale")[0]["top1"]


def test_sample_draws_with_such_a_run_as_with_a_flow(dual_chain, tmp_path, capsys):
    folder = dual_chain.folder
    options = ["--prompts", "a red circle", "--images-per-prompt", "2", "--guidance", "1"]
    draw(folder, *options, "--output", tmp_path / "grid.png", "--save-dir", tmp_path / "single")
    assert "2 steps" in capsys.readouterr().out
    assert [Image.open(path).size for path in (tmp_path / "single").iterdir()] == [(32, 32)] * 2
    draw(folder, "--output", tmp_path / "own.png")  # the captions of its own pictures
    refused = {"steps": ["3"], "interpolate": ["a", "b"], "trajectory": ["a"]}
    for name, values in refused.items():
        with pytest.raises(ValueError, match="steps" if name == "steps" else "no flow"):
            draw(folder, f"--{name}", *values, "--output", tmp_path / "no.png")


@torch.no_grad()
def test_an_image_depends_on_seed_and_number_not_on_its_batch(dual_chain):
    parts, sampling = load_generator(dual_chain.folder, torch.device("cpu"))
    nn.init.normal_(parts.model.to_logits.weight, std=0.1)  # several indices are likely
    captions = ["a red circle", "a blue square", "a cat"]
    images, latents = parts.generate(captions, sampling, seed=3)
    _, part = parts.generate(captions[1:2], sampling, seed=3, indices=[1])
    assert torch.equal(latents[1], part[0])
    _, other = parts.generate(captions, sampling, seed=4)
    assert not torch.equal(latents, other)
    assert images.shape == (3, 3, 32, 32) and images.min() >= 0


@torch.no_grad()
def test_guidance_grows_from_none_at_the_first_scale(dual_chain):
    parts, sampling = load_generator(dual_chain.folder, torch.device("cpu"))
    parts.logits = Mock(wraps=parts.logits)
    parts.generate(["a cat"], sampling)
    calls = [call.args for call in parts.logits.mock_calls]
    seen = [(features.shape[1], guidance) for features, _, guidance in calls]
    assert seen == [(0, 0.0), (4, 2.0), (4, 2.0)]
