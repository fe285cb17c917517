"""Pixel encoders and decoders of the dual tokenizer: images <-> maps of P channels on a grid.

Images are B x 3 x R x R in [-1, 1], not clamped when decoded; maps B x P x G x G.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .image_tokenizer import RopeTransformer, TransformerSize
from .layers import axial_rope_table, to_image

# The house's blocks, for small runs


def grid_transformer(size: TransformerSize, grid: int) -> RopeTransformer:
    """Blocks over grid x grid cells with RoPE at their rows and columns."""
    places = torch.arange(grid)
    return RopeTransformer(size, axial_rope_table(places, places, size.width // size.num_heads))


class PatchEncoder(nn.Module):
    """Patches -> blocks -> P channels a patch."""

    def __init__(self, size: TransformerSize, grid: int, patch_size: int, channels: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, size.width, patch_size, patch_size)
        self.transformer = grid_transformer(size, grid)
        self.to_codes = nn.Linear(size.width, channels)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)  # B x W x G x G
        x = self.transformer(rearrange(patches, "b w h1 w1 -> b (h1 w1) w"), kept=slice(None))
        return rearrange(self.to_codes(x), "b (h w) p -> b p h w", h=patches.shape[-1])


class PatchDecoder(nn.Module):
    """P channels a patch -> blocks -> pixels, smoothed."""

    def __init__(self, size: TransformerSize, grid: int, patch_size: int, channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.embed_codes = nn.Linear(channels, size.width)
        self.transformer = grid_transformer(size, grid)
        self.to_pixels = nn.Linear(size.width, 3 * patch_size**2)
        self.smooth = nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed_codes(rearrange(codes, "b p h w -> b (h w) p"))
        x = self.to_pixels(self.transformer(x, kept=slice(None)))
        return self.smooth(to_image(x, self.patch_size))


# VQGAN's convolutions (Esser et al. 2021). Names of modules are those of the published TokenFlow
# weights, and so are their order and the places of attention.


@dataclass
class ConvolutionSize:
    """Widths and depths; the defaults are those of the published base decoder."""

    channels: int = 128  # of the encoder's first level
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # of each level
    blocks: int = 2  # residual blocks a level; the decoder has one more
    decoder_channels: int = 128  # 256 in the enhanced decoder
    decoder_blocks: int = 2  # 4 in the enhanced decoder

    def __post_init__(self):
        if not self.multipliers:
            raise ValueError("multipliers must have a number for each level, got none")

    @property
    def stride(self) -> int:
        """Pixels a cell."""
        return 2 ** (len(self.multipliers) - 1)


MAP_CHANNELS = 256  # between convolutions and codes


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Twice (norm, swish, 3x3), added to the input."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        is_same = channels == out_channels
        self.nin_shortcut = nn.Identity() if is_same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class MapAttention(nn.Module):
    """Attention of one head over all cells, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # B x cells x channels
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks, each with attention after it or none, then another resolution or not."""

    def __init__(self, widths: Sequence[int], with_attention: bool, **change: nn.Module):
        """widths: before the first block and after each; change: downsample or upsample."""
        super().__init__()
        self.res = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        self.attn = nn.ModuleList(map(MapAttention if with_attention else nn.Identity, widths[1:]))
        # Its name in the published weights tells which one it is.
        self.change = list(change)
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.res, self.attn):
            x = attention(block(x))
        for name in self.change:
            x = getattr(self, name)(x)
        return x


def downsample(channels: int) -> nn.Sequential:
    """Half the size."""
    # Zeros are added right and below only, as in the original: a symmetric padding shifts maps.
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels: int) -> nn.Sequential:
    """Twice the size."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(enlarge=nn.Upsample(scale_factor=2.0), conv=conv))


def middle(channels: int) -> nn.Sequential:
    """What encoder and decoder have at their smallest grid."""
    blocks = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
    return nn.Sequential(blocks[0], MapAttention(channels), blocks[1])


class ConvolutionalEncoder(nn.Sequential):
    """Images -> maps of `out_channels`: the modules below, one after the other."""

    def __init__(self, size: ConvolutionSize, out_channels: int = MAP_CHANNELS):
        super().__init__()
        widths = [size.channels * multiplier for multiplier in [1, *size.multipliers]]
        self.conv_in = nn.Conv2d(3, size.channels, 3, padding=1)
        self.conv_blocks = nn.Sequential()
        for before, width in pairwise(widths):
            is_last = len(self.conv_blocks) == len(size.multipliers) - 1
            change = {} if is_last else {"downsample": downsample(width)}
            self.conv_blocks.append(Level([before] + [width] * size.blocks, is_last, **change))
        self.mid = middle(width)
        self.norm_out = group_norm(width)
        self.swish = nn.SiLU()
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)


class ConvolutionalDecoder(nn.Sequential):
    """Maps of `in_channels` -> images: the modules below, one after the other."""

    def __init__(self, size: ConvolutionSize, in_channels: int = MAP_CHANNELS):
        super().__init__()
        widths = [size.decoder_channels * multiplier for multiplier in reversed(size.multipliers)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.Sequential()
        for index, (before, width) in enumerate(pairwise([widths[0], *widths])):
            change = {"upsample": upsample(width)} if index < len(widths) - 1 else {}
            blocks = [before] + [width] * (size.decoder_blocks + 1)
            self.conv_blocks.append(Level(blocks, index == 0, **change))
        self.norm_out = group_norm(width)
        self.swish = nn.SiLU()
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)
