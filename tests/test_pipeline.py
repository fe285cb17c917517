"""modeling/pipeline.py: the start of an image, clamping, cost, precision; captions.

That an image does not depend on its batch: tests/test_generation.py and test_sample.py.

The path itself is that of the release (test_convert_checkpoint.py).
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.pipeline import (
    Captioner,
    ImageGenerator,
    SamplingConfig,
    join_punctuation,
    transport,
    unit_noise,
)
from modeling.text_decoder import TextDecoder, TextDecoderConfig
from modeling.text_encoder import TextEncoderConfig, load_text_encoder
from modeling.text_projector import TextProjectorConfig

K, C, T, PIXELS = 16, 4, 32, 16
CAPTIONS = ["a red circle", "a green square", "a blue triangle", "a black circle", "a red square"]
SAMPLING = SamplingConfig(steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def parts(tiny_clip_dir):
    """All parts with random weights that do something."""
    torch.manual_seed(1)
    text_encoder = load_text_encoder(TextEncoderConfig(model=f"local-dir:{tiny_clip_dir}"))
    size = TransformerSize(width=16, depth=1, num_heads=2)
    config = ImageTokenizerConfig(PIXELS, 4, K, C, size, size, text_tokens=K, text_width=T)
    tokenizer = ImageTokenizer(config)
    projector = TextProjectorConfig(K, T, T, 1, 2, mlp_width=32, token_channels=C)
    flowtok = FlowTokConfig(num_tokens=K, token_channels=C, width=16, depth=2, num_heads=2)
    flow = build_flow(projector, flowtok, FlowConfig())
    for parameter in [*tokenizer.parameters(), *flow.flowtok.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    flow.latent_scale.fill_(1.5)
    return ImageGenerator(text_encoder, tokenizer.eval(), flow.eval())


def test_images_are_clamped_to_the_unit_range_in_their_shape(parts):
    images, latents = parts.generate(CAPTIONS, SAMPLING)
    assert images.shape == (5, 3, PIXELS, PIXELS) and latents.shape == (5, K, C)
    assert images.dtype == torch.float32 and not images.requires_grad
    assert images.min() == 0 and images.max() == 1  # both ends are clamped here


def test_noise_is_normal_and_a_function_of_seed_and_index_only():
    together = unit_noise((K, C), 7, [0, 1, 5, 2**33])
    assert together.shape == (4, K, C) and together.dtype == torch.float32
    for row, index in zip(together, [0, 1, 5, 2**33]):
        assert torch.equal(unit_noise((K, C), 7, [index])[0], row)
    cases = [(s, i) for s in (0, 1, 2, 2**31, 2**32, 2**40) for i in (0, 1, 2, 3)]
    rows = torch.stack([unit_noise((K, C), seed, [index])[0] for seed, index in cases]).flatten(1)
    assert (torch.cdist(rows, rows) + 100 * torch.eye(len(cases))).min() > 5  # all differ
    noise = unit_noise((K, C), 0, list(range(500)))
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)


def test_start_is_the_posterior_sampled_with_that_noise(parts):
    states = parts.encode_text(CAPTIONS)
    mean, logvar = parts.flow.projector.posterior(states)
    expected = mean + torch.exp(logvar / 2) * unit_noise((K, C), 4, [3, 1, 4, 1, 5])
    torch.testing.assert_close(parts.start(states, SAMPLING, 4, [3, 1, 4, 1, 5]), expected)

    config = replace(SAMPLING, sample_text_latent=False)
    assert torch.equal(parts.start(states, config, 0, [0] * 5), mean)


def test_a_step_costs_a_second_branch_where_it_is_guided_only(parts):
    calls, first = [], parts.flow.flowtok.blocks[0].attention
    hook = first.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    parts.generate(CAPTIONS, replace(SAMPLING, guidance_interval=[0.25, 0.5]))
    hook.remove()
    assert calls == [5, 10, 10, 5]


def test_bf16_is_close_to_fp32_and_keeps_images_and_latents_in_float32(parts):
    images, latents = parts.generate(CAPTIONS, SAMPLING)
    rough, rough_latents = parts.generate(CAPTIONS, replace(SAMPLING, precision="bf16"))
    assert rough.dtype == rough_latents.dtype == torch.float32
    assert 0 < (rough_latents - latents).std() < 0.05 * latents.std()


def test_a_captioner_follows_the_same_flow_from_the_scaled_image_latent_to_the_decoder(parts):
    size = TextDecoderConfig(width=16, depth=1, num_heads=2, mlp_width=16)
    decoder = TextDecoder(size, K, C).eval()
    captioner = Captioner(parts.text_encoder.tokenize, parts.tokenizer, parts.flow, decoder)
    images = torch.rand(3, 3, PIXELS, PIXELS)
    start = captioner.start(images)
    assert torch.equal(start, parts.tokenizer.encode(images).mean * 1.5)
    latents = captioner.transport(start, SAMPLING)
    assert torch.equal(latents, transport(parts.flow, start, None, SAMPLING))
    words = [parts.text_encoder.tokenize.decode(ids) for ids in decoder(latents)]
    assert captioner.captions(images, SAMPLING) == list(map(join_punctuation, words))
