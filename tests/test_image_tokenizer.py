"""modeling/image_tokenizer.py: the latent grid, gradients, the start, moments, errors.

Encoder and decoder compute what the release does (test_convert_checkpoint.py).
"""

from dataclasses import replace

import pytest
import torch
from networks import check_init, silent
from torch.nn import functional as F

from modeling.image_tokenizer import (
    ImageTokenizer,
    ImageTokenizerConfig,
    TransformerSize,
    squarest_grid,
)
from modeling.layers import Posterior, split_moments
from modeling.losses import contrastive_loss, kl_loss

B, K, C, L, T, PIXELS, PATCH = 2, 5, 4, 6, 24, 16, 4
GRID = PIXELS // PATCH
SMALL = TransformerSize(width=32, depth=2, num_heads=2)
CONFIG = ImageTokenizerConfig(PIXELS, PATCH, K, C, SMALL, SMALL, text_tokens=L, text_width=T)


def build(**options):
    return ImageTokenizer(replace(CONFIG, **options))


def inputs(batch=B):
    return torch.rand(batch, 3, PIXELS, PIXELS), torch.randn(batch, L, T)


def test_training_pass_samples_and_its_moments_do_not():
    tokenizer, (images, states) = build(), inputs()
    first, second = tokenizer(images, states), tokenizer(images, states)
    assert [x.shape for x in first[:3]] == [images.shape, (B, K, C), (B, K, C)]
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


def test_latent_grid_puts_latents_at_the_centres_of_their_cells_and_leaves_text_unrotated():
    tokenizer = build(num_tokens=2, latent_grid=True)  # over 4 x 4 patches
    for part in (tokenizer.encoder.transformer, tokenizer.decoder.transformer):
        # Of each pair of channels, by its second one, whose sine has the angle's sign
        angles = torch.atan2(part.rope_sin, part.rope_cos)[GRID**2 :, 1::2]
        positions = angles[:2, [0, angles.shape[1] // 2]]
        torch.testing.assert_close(positions, torch.tensor([[1.5, 0.5], [1.5, 2.5]]))
        assert not angles[2:].any()
    grids = {32: (4, 8), 77: (7, 11), 16: (4, 4), 13: (1, 13)}  # the most square ones
    assert {number: squarest_grid(number) for number in grids} == grids


def test_gradient_reaches_every_parameter():
    tokenizer, (images, states) = build(vision_width=6, contrasts_text=True), inputs()
    output = tokenizer(images, states)
    loss = F.mse_loss(output.reconstructions, images) + output.vision.square().mean()
    loss = loss + contrastive_loss(*output.contrast)
    (loss + 1e-3 * kl_loss(output.mean, output.logvar)).backward()
    assert not silent(tokenizer)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=f"expected B x 3 x {PIXELS} x {PIXELS}"):
        build().encode(torch.rand(B, 3, PIXELS, PIXELS + PATCH))


def test_init_misses_no_parameter():
    check_init(build())


def test_the_start_is_that_of_the_options():
    images, _ = inputs()
    tokenizer = build(query_key_bias=0.7, initial_logvar=-6.0)
    expected = torch.tensor([0.7, 0.7, 0.0]).repeat_interleave(SMALL.width)
    biases = [module.qkv.bias for module in tokenizer.modules() if hasattr(module, "qkv")]
    assert biases and all(torch.equal(bias, expected) for bias in biases)
    posterior = tokenizer.encode(images)
    assert (posterior.logvar + 6).abs().max() < 1 and posterior.mean.abs().max() < 1
    assert torch.equal(tokenizer.decoder.smooth(images), images)


def test_moments_are_mean_first_then_log_variance_clamped_in_float32():
    moments = torch.tensor([[[1.0, 2.0, -100.0, 100.0]], [[-50.0, 50.0, 0.5, -0.5]]])
    posterior = split_moments(moments.bfloat16())
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert posterior.mean.tolist() == [[[1.0, 2.0]], [[-50.0, 50.0]]]
    assert posterior.logvar.tolist() == [[[-30.0, 20.0]], [[0.5, -0.5]]]


def test_sample_of_a_posterior_has_its_mean_and_deviation_and_follows_its_generator():
    posterior = Posterior(torch.full((1, 1000, 20), 3.0), torch.full((1, 1000, 20), 4.0).log())
    first, same, other = (posterior.sample(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.mean().item() == pytest.approx(3, abs=0.05)
    assert first.std().item() == pytest.approx(2, rel=0.02)
    assert torch.equal(first, same) and not torch.equal(first, other)
