"""The image tokenizer: TA-TiTok with RoPE and SwiGLU as a VAE over 1D tokens (Sec. 3.2, 4.1).

Encoder: [patches; learned latent tokens] -> transformer -> posterior of K x C tokens.
Decoder: [mask tokens; latents; text states, the guidance] -> transformer -> image, not clamped.
Only patches and masks carry RoPE, unless `latent_grid` gives the latents a position, too.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .activation_checkpointing import ActivationCheckpointing, run_block
from .layers import (
    FROM_LOSSES,
    FROM_TEXT_ENCODER,
    FROM_VISION,
    Attention,
    Posterior,
    SwiGLU,
    axial_rope_table,
    check_heads,
    check_images,
    check_least,
    find_text,
    init_linear_,
    rotation_tables,
    split_moments,
    to_image,
)
from .vision_teacher import spread_tokens

CONTRAST_WIDTH = 64  # E


@dataclass
class TransformerSize:
    """Size of one transformer: small 512/8/8, base 768/12/12, large 1024/24/16 (as listed here)."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12

    def __post_init__(self):
        check_least(self, 1, "width", "depth", "num_heads")


@dataclass
class ImageTokenizerConfig:
    """Sizes of the tokenizer; the defaults are the paper's 256 px base encoder, large decoder."""

    image_size: int = 256  # pixels, a multiple of patch_size
    patch_size: int = 16  # pixels
    # K; 0: the text's L, as in the paper, where text flows into image token by token
    num_tokens: int = 0
    token_channels: int = 16  # C
    encoder: TransformerSize = field(default_factory=TransformerSize)
    decoder: TransformerSize = field(default_factory=lambda: TransformerSize(1024, 24, 16))
    text_tokens: int = field(default=77, metadata=FROM_TEXT_ENCODER)  # L
    text_width: int = field(default=768, metadata=FROM_TEXT_ENCODER)  # T
    # Zeros among the text states are padding, which the decoder does not look at.
    text_is_masked: bool = field(default=False, metadata=FROM_TEXT_ENCODER)

    # Not in the paper, for small scale (docs/recipe.md):
    # Give each latent token a RoPE position at the centre of its cell of a grid over the image.
    # With query_key_bias > 0 attention is local from the first step, which short runs need.
    latent_grid: bool = False
    query_key_bias: float = 0.0  # initial value of the biases of q and k
    # Of linear layers: TA-TiTok's; 0: Xavier uniform, which narrow networks need
    init_std: float = 0.02
    # Initial log-variance of the posterior; a lower one lets short runs use the latents at once
    initial_logvar: float = 0.0
    # T of the vision model that the latents are drawn to (modeling/vision_teacher.py); 0: none
    vision_width: int = field(default=0, metadata=FROM_VISION)
    # Whether there are heads for a contrast of latents and text, which only training reads
    contrasts_text: bool = field(default=False, metadata=FROM_LOSSES)

    def __post_init__(self):
        check_least(self, 0, "num_tokens")
        check_least(self, 1, "image_size", "patch_size")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        # Axial RoPE splits a head into rows and columns of channel pairs.
        check_heads(self.encoder, channels=4, part="encoder.")
        check_heads(self.decoder, channels=4, part="decoder.")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def for_text(self, shape: tuple[int, int], is_masked: bool) -> "ImageTokenizerConfig":
        """The config for a text tower: L x T of its states, and whether it hides padding."""
        length, width = shape
        return replace(
            self,
            num_tokens=self.num_tokens or length,
            text_tokens=length,
            text_width=width,
            text_is_masked=is_masked,
        )


class TokenizerBlock(nn.Module):
    """x += attn(ln(x)); x += swiglu(ln(x)); B x N x W."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        kept: slice | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """kept, mask: as in Attention."""
        attended = self.attention(self.norm_attention(x), rope, kept, mask)
        x = attended + (x if kept is None else x[:, kept])
        return x + self.mlp(self.norm_mlp(x))


class RopeTransformer(nn.Module):
    """LayerNorm, blocks, LayerNorm over a sequence of fixed RoPE angles. B x N x W -> B x N x W."""

    def __init__(self, size: TransformerSize, angles: Tensor):
        super().__init__()
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.norm_in = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(
            TokenizerBlock(size.width, size.num_heads) for _ in range(size.depth)
        )
        self.norm_out = nn.LayerNorm(size.width)
        cos, sin = rotation_tables(angles)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, x: Tensor, kept: slice, mask: Tensor | None = None) -> Tensor:
        """Run the blocks and return the tokens in `kept`, normalised. mask: as in Attention."""
        mode = self.activation_checkpointing
        x = self.norm_in(x)
        rope = (self.rope_cos, self.rope_sin)
        for block in self.blocks[:-1]:
            x = run_block(block, mode, x, rope, None, mask)
        # Nobody reads the last block's other tokens.
        return self.norm_out(run_block(self.blocks[-1], mode, x, rope, kept, mask))


def rope_angles(config: ImageTokenizerConfig, size: TransformerSize, num_unrotated: int) -> Tensor:
    """Angles of [patches; latents; others], N x head size / 2.

    Patches have integer positions on their grid, latents their grid cell or zero, others zero.
    """
    grid, head_dim = config.grid_size, size.width // size.num_heads
    patches = axial_rope_table(torch.arange(grid), torch.arange(grid), head_dim)
    latents = torch.zeros(config.num_tokens, head_dim // 2)
    if config.latent_grid:
        # Centres of the cells, in units of patches: cell i of n starts at i grid / n, and the first
        # patch, whose position is 0, has its centre at 1/2.
        cells = squarest_grid(config.num_tokens)
        centres = [(torch.arange(n) + 0.5) * grid / n - 0.5 for n in cells]
        latents = axial_rope_table(*centres, head_dim)
    return torch.cat([patches, latents, torch.zeros(num_unrotated, head_dim // 2)])


class ImageEncoder(nn.Module):
    """Images B x 3 x R x R in [0, 1] -> posterior over B x K x C tokens."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        size = config.encoder
        self.patch_embed = nn.Conv2d(3, size.width, config.patch_size, config.patch_size)
        self.latent_tokens = nn.Parameter(torch.empty(config.num_tokens, size.width))
        self.latent_positions = nn.Parameter(torch.empty(config.num_tokens, size.width))
        self.transformer = RopeTransformer(size, rope_angles(config, size, num_unrotated=0))
        self.to_moments = nn.Linear(size.width, 2 * config.token_channels)

    def forward(self, images: Tensor) -> Posterior:
        patches = rearrange(self.patch_embed(images), "b w h1 w1 -> b (h1 w1) w")  # B x grid^2 x W
        latents = repeat(self.latent_tokens + self.latent_positions, "k w -> b k w", b=len(images))
        tokens = torch.cat([patches, latents.to(patches.dtype)], dim=1)
        latents = self.transformer(tokens, kept=slice(patches.shape[1], None))  # B x K x W
        return split_moments(self.to_moments(latents))


class ImageDecoder(nn.Module):
    """Tokens B x K x C and text states B x L x T -> images B x 3 x R x R, not clamped."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        size = config.decoder
        self.text_is_masked = config.text_is_masked
        self.grid_size, self.patch_size = config.grid_size, config.patch_size
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.embed_tokens = nn.Linear(config.token_channels, size.width)
        self.latent_positions = nn.Parameter(torch.empty(config.num_tokens, size.width))
        self.embed_text = nn.Linear(config.text_width, size.width)
        self.text_positions = nn.Parameter(torch.empty(config.text_tokens, size.width))
        angles = rope_angles(config, size, num_unrotated=config.text_tokens)
        self.transformer = RopeTransformer(size, angles)
        self.to_pixels = nn.Linear(size.width, 3 * config.patch_size**2)
        self.smooth = nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor, text_states: Tensor) -> Tensor:
        num_patches = self.grid_size**2
        # One mask token for all patches: RoPE tells them apart.
        latents = self.embed_tokens(tokens) + self.latent_positions  # B x K x W
        masks = self.mask_token.expand(len(tokens), num_patches, -1).to(latents.dtype)
        text = self.embed_text(text_states.to(tokens.dtype)) + self.text_positions  # B x L x W
        sequence = torch.cat([masks, latents, text], dim=1)
        mask = None
        if self.text_is_masked:  # all but the padding of the text, which comes last
            is_text = find_text(text_states)[:, None, None]  # for all heads and queries
            mask = F.pad(is_text, (num_patches + latents.shape[1], 0), value=True)
        x = self.transformer(sequence, slice(0, num_patches), mask)  # B x grid^2 x W
        return self.smooth(to_image(self.to_pixels(x), self.patch_size))


class TokenizerPass(NamedTuple):
    """What a training pass gives the losses; a named tuple, so that DDP sees its tensors."""

    reconstructions: Tensor  # B x 3 x R x R
    mean: Tensor  # B x K x C
    logvar: Tensor  # B x K x C
    vision: Tensor | None  # B x grid^2 x T, predicted features of the vision model
    contrast: tuple[Tensor, Tensor, Tensor] | None  # B x 1 x E of image and text, log temperature


class ImageTokenizer(nn.Module):
    """Encoder and decoder. `forward` is the training pass: encode, sample, decode."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)
        self.decoder = ImageDecoder(config)
        self.to_vision = None  # only training reads it
        if config.vision_width:
            width = config.encoder.width
            self.to_vision = nn.Sequential(
                nn.Linear(config.token_channels, width),
                nn.SiLU(),
                nn.Linear(width, config.vision_width),
            )
        self.contrast = TextContrast(config) if config.contrasts_text else None
        self.init_weights()

    def encode(self, images: Tensor) -> Posterior:
        """Images B x 3 x R x R in [0, 1], of the tokenizer's size -> posterior, B x K x C."""
        check_images(images, self.config.image_size)
        return self.encoder(images)

    def decode(self, tokens: Tensor, text_states: Tensor) -> Tensor:
        """Tokens B x K x C, text states B x L x T -> images B x 3 x R x R, not clamped."""
        return self.decoder(tokens, text_states)

    def forward(self, images: Tensor, text_states: Tensor) -> TokenizerPass:
        """Training pass with a sampled posterior."""
        posterior = self.encode(images)
        tokens = posterior.sample()
        reconstructions = self.decode(tokens, text_states)
        vision = None
        if self.to_vision is not None:
            vision = self.to_vision(spread_tokens(tokens, self.config.grid_size**2))
        contrast = None
        if self.contrast is not None:
            # Of the mean: noise of the draw would only blur what a caption says.
            contrast = self.contrast(posterior.mean, text_states)
        return TokenizerPass(reconstructions, *posterior, vision, contrast)

    def freeze_encoder(self) -> None:
        """Freeze the encoder: the latents stay what they are."""
        self.encoder.requires_grad_(False)

    def init_weights(self) -> None:
        """Linear layers as `init_std` says, tokens and positions normal width^-0.5."""
        config = self.config
        for module in self.modules():
            init_linear_(module, std=config.init_std or None)
        logvar_bias = self.encoder.to_moments.bias[config.token_channels :]
        nn.init.constant_(logvar_bias, config.initial_logvar)
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters(recurse=False):  # tokens and positions
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        # The image starts near mid-grey, the smoothing convolution as the identity.
        init_linear_(self.decoder.to_pixels, std=0.02)
        nn.init.constant_(self.decoder.to_pixels.bias, 0.5)
        nn.init.dirac_(self.decoder.smooth.weight)
        for module in self.modules():
            if isinstance(module, Attention):
                module.bias_queries_and_keys(config.query_key_bias)


# Not in the paper, for small scale


class TextContrast(nn.Module):
    """Means of latents and of text, each B x 1 x E of one space, and the contrast's temperature."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.embed_latents = nn.Linear(config.token_channels, CONTRAST_WIDTH)
        self.norm_text = nn.LayerNorm(config.text_width)
        self.embed_text = nn.Linear(config.text_width, CONTRAST_WIDTH)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, latents: Tensor, text_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents B x K x C, text states B x L x T, of which padding is left out."""
        is_text = find_text(text_states).unsqueeze(-1)  # B x L x 1
        length = is_text.sum(1, keepdim=True).clamp(min=1)
        text = (text_states * is_text).sum(1, keepdim=True) / length  # B x 1 x T
        image = self.embed_latents(latents.mean(1, keepdim=True))
        return image, self.embed_text(self.norm_text(text)), self.log_temperature


def squarest_grid(num_cells: int) -> tuple[int, int]:
    """(rows, columns) of the most square grid with so many cells, rows <= columns: 32 -> (4, 8)."""
    rows = max(n for n in range(1, math.isqrt(num_cells) + 1) if num_cells % n == 0)
    return rows, num_cells // rows
