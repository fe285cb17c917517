"""The image tokenizer: TA-TiTok with RoPE and SwiGLU as a VAE over 1D tokens (paper, Sec. 3.2 and 4.1).

Encoder: patches + learned latent tokens -> transformer -> posterior of K x C tokens.
Decoder: mask tokens + latent tokens + text states (the guidance) -> transformer -> image.
In and out: images B x 3 x R x R in [0, 1] (the decoder's output is not clamped), tokens B x K x C.
Sequences are ordered [patches; latents] and [masks; latents; text]; only patches and masks carry RoPE, unless
`latent_grid` also gives the latents a position on a coarse grid over the image.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from modeling.activation_checkpointing import Recompute, run_block
from modeling.layers import Attention, SwiGLU, axial_rope_table, init_linear_
from modeling.posterior import Posterior, split_moments


@dataclass
class TransformerSize:
    """Size of one plain transformer: small 512/8/8, base 768/12/12, large 1024/24/16 (width/depth/num_heads)."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12


@dataclass
class ImageTokenizerConfig:
    """Sizes of the tokenizer; the defaults are the paper's 256 px base encoder and large decoder."""

    image_size: int = 256  # pixels, a multiple of patch_size
    patch_size: int = 16  # pixels
    num_tokens: int = 77  # K, must equal the text tower's context length for the flow stages
    token_channels: int = 16  # C
    encoder: TransformerSize = field(default_factory=TransformerSize)
    decoder: TransformerSize = field(default_factory=lambda: TransformerSize(1024, 24, 16))
    text_guidance: bool = True  # the decoder reads the caption's text states
    text_tokens: int = 77  # L of the text states
    text_width: int = 768  # channels of the text states
    # Not in the paper: give latent token k a RoPE position at the centre of its cell of a rows x columns grid over the
    # image. With query_key_bias > 0 attention is local from the first step, which short runs need
    # (README, "The demo's recipe"). Empty: latents carry no position, as in the paper.
    latent_grid: list[int] = field(
        default_factory=list
    )  # [rows, columns], rows * columns = num_tokens
    query_key_bias: float = 0.0  # initial value of the biases of q and k; 0 in the paper
    init_std: float = (
        0.02  # of linear layers, TA-TiTok's; 0: Xavier uniform, which narrow networks need
    )
    initial_logvar: float = (
        0.0  # initial log-variance of the posterior; lower lets short runs use the latents at once
    )

    def __post_init__(self):
        if self.patch_size <= 0 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.latent_grid and (
            len(self.latent_grid) != 2
            or self.latent_grid[0] * self.latent_grid[1] != self.num_tokens
        ):
            raise ValueError(
                f"latent_grid {self.latent_grid} must be [rows, columns] with {self.num_tokens} cells (num_tokens)"
            )
        for name, size in (("encoder", self.encoder), ("decoder", self.decoder)):
            if size.width % (4 * size.num_heads):
                raise ValueError(
                    f"{name}.width {size.width} must be a multiple of 4 * num_heads = {4 * size.num_heads}"
                )

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


class TokenizerBlock(nn.Module):
    """x += attn(ln(x)); x += swiglu(ln(x)); B x N x W."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kept: slice | None = None) -> Tensor:
        """`kept`: compute these tokens alone, from all; the last block's others are never read."""
        attended = self.attention(self.norm_attention(x), rope, kept)
        x = attended + (x if kept is None else x[:, kept])
        return x + self.mlp(self.norm_mlp(x))


class RopeTransformer(nn.Module):
    """LayerNorm, blocks, LayerNorm over a sequence whose RoPE angles are fixed. B x N x W -> B x N x W."""

    def __init__(self, size: TransformerSize, angles: Tensor):
        super().__init__()
        self.recompute: Recompute = "none"  # activation checkpointing; training sets it
        self.norm_in = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(
            TokenizerBlock(size.width, size.num_heads) for _ in range(size.depth)
        )
        self.norm_out = nn.LayerNorm(size.width)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, kept: slice) -> Tensor:
        """Run the blocks and return the tokens in `kept`, normalised."""
        x = self.norm_in(x)
        rope = self.rope_cos, self.rope_sin
        for block in self.blocks[:-1]:
            x = run_block(block, self.recompute, x, rope)
        return self.norm_out(run_block(self.blocks[-1], self.recompute, x, rope, kept))


def rope_angles(config: ImageTokenizerConfig, size: TransformerSize, num_unrotated: int) -> Tensor:
    """Angles of [patches; latents; others]: integer grid positions, grid cells or zero, zero. N x head size / 2."""
    grid, head_dim = config.grid_size, size.width // size.num_heads
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    parts = [axial_rope_table(rows.flatten(), columns.flatten(), head_dim)]
    if config.latent_grid:
        cells = [
            (torch.arange(n) + 0.5) * grid / n - 0.5 for n in config.latent_grid
        ]  # cell centres in patch units
        rows, columns = torch.meshgrid(*cells, indexing="ij")
        parts.append(axial_rope_table(rows.flatten(), columns.flatten(), head_dim))
    else:
        parts.append(torch.zeros(config.num_tokens, head_dim // 2))
    parts.append(torch.zeros(num_unrotated, head_dim // 2))
    return torch.cat(parts)


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
        self.grid_size, self.patch_size = config.grid_size, config.patch_size
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.embed_tokens = nn.Linear(config.token_channels, size.width)
        self.latent_positions = nn.Parameter(torch.empty(config.num_tokens, size.width))
        num_text = config.text_tokens if config.text_guidance else 0
        if config.text_guidance:
            self.embed_text = nn.Linear(config.text_width, size.width)
            self.text_positions = nn.Parameter(torch.empty(config.text_tokens, size.width))
        self.text_guidance = config.text_guidance
        self.transformer = RopeTransformer(size, rope_angles(config, size, num_unrotated=num_text))
        self.to_pixels = nn.Linear(size.width, 3 * config.patch_size**2)
        self.smooth = nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor, text_states: Tensor | None) -> Tensor:
        if self.text_guidance and text_states is None:
            raise ValueError(
                "this tokenizer was built with text_guidance: its decoder needs the caption's text states"
            )
        latents = self.embed_tokens(tokens) + self.latent_positions  # B x K x W
        masks = self.mask_token.expand(len(tokens), self.grid_size**2, -1).to(latents.dtype)
        parts = [masks, latents]
        if self.text_guidance:
            parts.append(self.embed_text(text_states.to(tokens.dtype)) + self.text_positions)
        x = self.transformer(
            torch.cat(parts, dim=1), kept=slice(0, self.grid_size**2)
        )  # B x grid^2 x W
        p = self.patch_size
        pixels = rearrange(
            self.to_pixels(x), "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid_size, p=p, q=p
        )
        return self.smooth(pixels)


class ImageTokenizer(nn.Module):
    """Encoder and decoder. `forward` is the training pass: encode, sample, decode."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)
        self.decoder = ImageDecoder(config)
        self.init_weights()

    def encode(self, images: Tensor) -> Posterior:
        """Images B x 3 x R x R in [0, 1] -> posterior of B x K x C tokens.

        Raises:
            ValueError: if the images have another size than the tokenizer's.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected B x 3 x {size} x {size}"
            )
        return self.encoder(images)

    def decode(self, tokens: Tensor, text_states: Tensor | None) -> Tensor:
        """Tokens B x K x C and text states B x L x T -> images B x 3 x R x R, not clamped to [0, 1]."""
        return self.decoder(tokens, text_states)

    def set_recompute(self, mode: Recompute) -> None:
        """Choose the activation checkpointing of both transformers."""
        self.encoder.transformer.recompute = self.decoder.transformer.recompute = mode

    def forward(self, images: Tensor, text_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass with a sampled posterior: (reconstructions, mean, logvar)."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(), text_states), posterior.mean, posterior.logvar

    def init_weights(self) -> None:
        """Normal for linear layers, normal width^-0.5 for tokens and positions, the smoothing conv at identity."""
        for module in self.modules():
            init_linear_(module, std=self.config.init_std or None)
        nn.init.constant_(
            self.encoder.to_moments.bias[self.config.token_channels :], self.config.initial_logvar
        )
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters(recurse=False):  # tokens and positions
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        init_linear_(self.decoder.to_pixels, std=0.02)
        nn.init.constant_(self.decoder.to_pixels.bias, 0.5)  # start near mid-grey
        nn.init.dirac_(self.decoder.smooth.weight)
        if self.config.query_key_bias:
            for module in self.modules():
                if isinstance(module, Attention):
                    nn.init.constant_(module.qkv.bias.chunk(3)[0], self.config.query_key_bias)
                    nn.init.constant_(module.qkv.bias.chunk(3)[1], self.config.query_key_bias)
