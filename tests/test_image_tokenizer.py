"""modeling/image_tokenizer.py and posterior.py: sizes, order of the sequences, positions, gradients, errors."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling.image_tokenizer import (
    ImageTokenizer,
    ImageTokenizerConfig,
    TransformerSize,
    squarest_grid,
)
from modeling.losses import kl_loss
from modeling.posterior import Posterior, split_moments

B, K, C, L, T, PIXELS, PATCH = 2, 5, 4, 6, 24, 16, 4
GRID = PIXELS // PATCH
SMALL = TransformerSize(width=32, depth=2, num_heads=2)
CONFIG = ImageTokenizerConfig(PIXELS, PATCH, K, C, SMALL, SMALL, text_tokens=L, text_width=T)


def build(**options):
    return ImageTokenizer(replace(CONFIG, **options))


def inputs(batch=B):
    return torch.rand(batch, 3, PIXELS, PIXELS), torch.randn(batch, L, T)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def paper_tokenizer():
    with torch.device("meta"):
        return ImageTokenizer(ImageTokenizerConfig())


def test_base_encoder_at_256_px_has_the_papers_weights(paper_tokenizer):
    encoder = paper_tokenizer.encoder
    assert encoder.latent_tokens.shape == encoder.latent_positions.shape == (77, 768)
    assert round((count(encoder) - encoder.latent_tokens.numel()) / 1e6, 2) == 85.74


def test_large_decoder_at_256_px_has_the_papers_weights(paper_tokenizer):
    assert round(count(paper_tokenizer.decoder) / 1e6, 2) == 304.05


def test_training_pass_gives_reconstructions_and_moments_in_their_shapes():
    images, states = inputs()
    reconstructions, mean, logvar = build()(images, states)
    assert reconstructions.shape == images.shape and mean.shape == logvar.shape == (B, K, C)


def test_training_pass_samples_and_its_moments_do_not():
    images, states = inputs()
    tokenizer = build()
    first, second = tokenizer(images, states), tokenizer(images, states)
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


def test_encoder_equals_its_layers_composed_by_hand():
    tokenizer, (images, _) = build(), inputs()
    encoder, transformer = tokenizer.encoder, tokenizer.encoder.transformer
    x = (
        F.conv2d(images, encoder.patch_embed.weight, encoder.patch_embed.bias, stride=PATCH)
        .flatten(2)
        .mT
    )
    latents = (encoder.latent_tokens + encoder.latent_positions).expand(B, -1, -1)
    x = transformer.norm_in(torch.cat([x, latents], dim=1))
    rope = (transformer.rope_cos, transformer.rope_sin)
    for block in transformer.blocks:
        x = x + block.attention(block.norm_attention(x), rope)
        x = x + block.mlp(block.norm_mlp(x))
    moments = encoder.to_moments(transformer.norm_out(x[:, -K:]))
    posterior = tokenizer.encode(images)
    torch.testing.assert_close(posterior.mean, moments[..., :C])
    torch.testing.assert_close(posterior.logvar, moments[..., C:])


def test_decoder_equals_its_layers_composed_by_hand():
    decoder, states, tokens = build().decoder, torch.randn(B, L, T), torch.randn(B, K, C)
    transformer = decoder.transformer
    latents = decoder.embed_tokens(tokens) + decoder.latent_positions
    text = decoder.embed_text(states) + decoder.text_positions
    masks = decoder.mask_token.expand(B, GRID**2, -1)
    x = transformer.norm_in(torch.cat([masks, latents, text], dim=1))
    for block in transformer.blocks:
        x = block(x, (transformer.rope_cos, transformer.rope_sin))
    pixels = decoder.to_pixels(transformer.norm_out(x[:, : GRID**2]))
    image = (
        pixels.view(B, GRID, GRID, PATCH, PATCH, 3)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(B, 3, PIXELS, PIXELS)
    )
    torch.testing.assert_close(decoder(tokens, states), decoder.smooth(image))


def test_pixels_of_a_patch_are_laid_out_row_column_channel():
    tokenizer = build()
    last = tokenizer.decoder.to_pixels
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.arange(3 * PATCH**2))
    image = tokenizer.decode(torch.randn(1, K, C), torch.randn(1, L, T))[0]
    expected = (
        torch.arange(3 * PATCH**2)
        .float()
        .view(PATCH, PATCH, 3)
        .permute(2, 0, 1)
        .repeat(1, GRID, GRID)
    )
    torch.testing.assert_close(image, expected)


def test_patches_turn_with_their_row_and_column_and_latents_and_text_do_not():
    tokenizer = build()
    for part, unrotated in ((tokenizer.encoder, K), (tokenizer.decoder, K + L)):
        angles = torch.atan2(part.transformer.rope_sin, part.transformer.rope_cos)
        assert angles.shape == (GRID**2 + unrotated, SMALL.width // SMALL.num_heads // 2)
        assert not angles[GRID**2 :].any()
        rows, columns = (
            angles[: GRID**2, 0],
            angles[: GRID**2, angles.shape[1] // 2],
        )  # both of frequency 1
        torch.testing.assert_close(
            rows.view(GRID, GRID), torch.arange(GRID).float()[:, None].expand(GRID, GRID)
        )
        torch.testing.assert_close(
            columns.view(GRID, GRID), torch.arange(GRID).float().expand(GRID, GRID)
        )


def test_latent_grid_puts_latents_at_the_centres_of_their_cells_and_leaves_text_unrotated():
    tokenizer = build(num_tokens=2, latent_grid=True)
    for part in (tokenizer.encoder, tokenizer.decoder):
        angles = torch.atan2(part.transformer.rope_sin, part.transformer.rope_cos)[GRID**2 :]
        positions = angles[:2, [0, angles.shape[1] // 2]]
        torch.testing.assert_close(
            positions, torch.tensor([[1.5, 0.5], [1.5, 2.5]])
        )  # a grid of 4 x 4 patches
        assert not angles[2:].any()


def test_the_latent_grid_is_the_most_square_one_with_no_more_rows_than_columns():
    grids = {32: (4, 8), 77: (7, 11), 16: (4, 4), 2: (1, 2), 13: (1, 13)}
    assert {number: squarest_grid(number) for number in grids} == grids


def test_latent_grid_of_the_patch_grid_gives_latents_the_patches_positions():
    transformer = build(num_tokens=GRID**2, latent_grid=True).encoder.transformer
    assert torch.equal(transformer.rope_sin[: GRID**2], transformer.rope_sin[GRID**2 :])


def test_gradient_reaches_every_parameter():
    tokenizer, (images, states) = build(), inputs()
    reconstructions, mean, logvar = tokenizer(images, states)
    (F.mse_loss(reconstructions, images) + 1e-3 * kl_loss(mean, logvar)).backward()
    silent = [
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not silent


def test_images_do_not_influence_each_other():
    tokenizer, (images, states) = build(), inputs(3)
    alone = tokenizer.encode(images[1:2]).mean
    torch.testing.assert_close(tokenizer.encode(images).mean[1:2], alone)
    torch.testing.assert_close(
        tokenizer.decode(alone, states[1:2]), tokenizer.decode(alone.expand(3, -1, -1), states)[1:2]
    )


def test_decoder_uses_the_text_states():
    tokenizer, (_, states) = build(), inputs()
    tokens = torch.randn(B, K, C)
    assert not torch.allclose(
        tokenizer.decode(tokens, states), tokenizer.decode(tokens, states.flip(0)), atol=1e-6
    )


@pytest.mark.parametrize("shape", [(B, 3, PIXELS, PIXELS + PATCH), (B, 1, PIXELS, PIXELS)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=f"expected B x 3 x {PIXELS} x {PIXELS}"):
        build().encode(torch.rand(shape))


@pytest.mark.parametrize(
    ("options", "key_and_value"),
    [
        ({"image_size": 18}, "image_size 18 .*patch_size 4"),
        ({"patch_size": 0}, "image_size 16 .*patch_size 0"),
        ({"encoder": TransformerSize(36, 1, 2)}, "encoder.width 36 .*num_heads = 8"),
        ({"decoder": TransformerSize(32, 1, 5)}, "decoder.width 32 .*num_heads = 20"),
    ],
)
def test_impossible_sizes_are_refused(options, key_and_value):
    with pytest.raises(ValueError, match=f"^{key_and_value}"):
        replace(CONFIG, **options)


def test_init_misses_no_parameter():
    tokenizer = build()
    norms = {
        id(p) for m in tokenizer.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()
    }
    for parameter in tokenizer.parameters():
        if id(parameter) not in norms:  # PyTorch starts these at 1 and 0 when they are made
            nn.init.constant_(parameter, float("nan"))
    tokenizer.init_weights()
    assert not [name for name, p in tokenizer.named_parameters() if p.isnan().any()]


def test_query_key_bias_sets_the_biases_of_queries_and_keys_only():
    for module in build(query_key_bias=0.7).modules():
        if hasattr(module, "qkv"):
            expected = torch.tensor([0.7, 0.7, 0.0]).repeat_interleave(SMALL.width)
            assert torch.equal(module.qkv.bias, expected)


def test_initial_logvar_is_the_posteriors_before_training():
    tokenizer, (images, _) = build(initial_logvar=-6.0), inputs()
    posterior = tokenizer.encode(images)
    assert (posterior.logvar + 6).abs().max() < 1 and posterior.mean.abs().max() < 1


def test_smoothing_convolution_starts_as_the_identity():
    images, _ = inputs()
    assert torch.equal(build().decoder.smooth(images), images)


def test_moments_are_mean_first_then_log_variance_clamped_in_float32():
    moments = torch.tensor([[[1.0, 2.0, -100.0, 100.0]], [[-50.0, 50.0, 0.5, -0.5]]])
    posterior = split_moments(moments.bfloat16())
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert posterior.mean.tolist() == [[[1.0, 2.0]], [[-50.0, 50.0]]]
    assert posterior.logvar.tolist() == [[[-30.0, 20.0]], [[0.5, -0.5]]]


def test_sample_of_a_posterior_has_its_mean_and_deviation_and_follows_its_generator():
    posterior = Posterior(torch.full((1, 1000, 20), 3.0), torch.full((1, 1000, 20), 4.0).log())
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    assert drawn.mean().item() == pytest.approx(
        3, abs=0.05
    ) and drawn.std().item() == pytest.approx(2, rel=0.02)
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(2)))


def test_four_images_of_one_caption_can_be_overfitted():
    tokenizer = build(
        num_tokens=8, query_key_bias=1.0, latent_grid=True, init_std=0.0, initial_logvar=-6.0
    )
    plane = torch.linspace(0, 1, PIXELS)[:, None].expand(PIXELS, PIXELS)
    colour = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    images = torch.stack([plane, plane.T, 1 - plane, (plane > 0.5).float()])[:, None] * colour
    states = torch.randn(1, L, T).expand(4, -1, -1)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    for _ in range(250):
        loss = F.mse_loss(tokenizer(images, states)[0], images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert F.mse_loss(tokenizer.decode(tokenizer.encode(images).mean, states), images) < 0.005
