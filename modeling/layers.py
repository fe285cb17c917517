"""What networks share: attention with optional RoPE, SwiGLU, tables, init, weights; posteriors.

All modules are channel-last: B x N x W in, B x N x W out. Sources: RoPE as in TA-TiTok, SwiGLU of
Shazeer 2020, adaLN-Zero tables of DiT.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

# Metadata of dataclass fields that are known from elsewhere. A program fills them in before it
# builds the network; YAML files and the command line may not set them.
FROM_TEXT_ENCODER = {"derived": "the text encoder"}
FROM_LOSSES = {"derived": "the losses"}
FROM_VISION = {"derived": "the vision model"}
FROM_TOKENIZER = {"derived": "the tokenizer's run"}
FROM_PROJECTOR = {"derived": "the text projector"}
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


def check_least(config: Any, least: int, *names: str) -> None:
    """Refuse smaller fields of a config."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def check_share(config: Any, name: str) -> None:
    """Refuse a field outside [0, 1)."""
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")


def check_heads(size: Any, channels: int = 1, part: str = "") -> None:
    """Refuse a width that does not split into num_heads heads of a multiple of `channels`.

    part: what the size is of, with a dot.
    """
    check_least(size, 1, "width", "num_heads")
    unit = channels * size.num_heads
    if size.width % unit:
        times = f"{channels} * num_heads = {unit}" if channels > 1 else f"num_heads {unit}"
        raise ValueError(f"{part}width {size.width} must be a multiple of {times}")


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def axial_rope_table(rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """Angles of axial 2D RoPE for a grid's tokens: N = R C, row by row, x head_dim / 2, float32.

    rows, columns: their R and C positions, of integers or not.
    The first half of the channel pairs turns with the row, the second half with the column. Inside
    a half of size d: frequencies 10000^(-2i/d), i = 0..d/2-1, one per pair of adjacent channels.
    """
    # In float64, and rounded once at the end.
    half = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # head_dim / 4
    places = torch.meshgrid(rows.double(), columns.double(), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in places]
    return torch.cat(angles, dim=-1).float()  # N x head_dim / 2


def rotation_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(cosines, sines) of angles N x D / 2 as `rotate_pairs` takes them: N x D each.

    Both channels of a pair have its cosine; the first has minus its sine.
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: queries, keys or both, B x N x H x D.
        cos, sin: of `rotation_tables`, N x D. Angle 0 leaves a token unchanged.
    """
    # Arithmetic on whole rows: on every other channel it takes three times as long.
    cos, sin = (table.to(x.dtype)[:, None] for table in (cos, sin))  # N x 1 x D
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([b, a], dim=-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v; B x N x W -> B x N x W."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        kept: slice | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """B x N x W -> B x N x W, or the kept tokens.

        Args:
            rope: of `rotation_tables`, N x D each.
            kept: compute only these tokens, attending to all.
            mask: B x 1 x 1 x N bool, the tokens that are attended to.
        """
        parts = self.split(x, rope) if kept is None else self.split_kept(x, rope, kept)
        q, k, v = (part.transpose(1, 2) for part in parts)  # B x H x N x D each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))

    def bias_queries_and_keys(self, value: float) -> None:
        """Set their biases, which RoPE turns by position: tokens attend to those near them."""
        query, key, _ = self.qkv.bias.chunk(3)
        nn.init.constant_(query, value)
        nn.init.constant_(key, value)

    def split(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries and keys, rotated, and values of all tokens: B x N x H x D each."""
        heads = self.num_heads
        qkv = rearrange(self.qkv(x), "b n (parts d) -> b n parts d", parts=3 * heads)
        if rope is None:
            return qkv.chunk(3, dim=2)
        qk, v = qkv.split([2 * heads, heads], dim=2)
        q, k = rotate_pairs(qk, *rope).chunk(2, dim=2)
        return q, k, v

    def split_kept(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, kept: slice
    ) -> tuple[Tensor, ...]:
        """As `split`, but with queries of the kept tokens only."""
        # The same packed weights, so that checkpoints do not depend on which tokens are kept.
        width, heads = x.shape[-1], self.num_heads
        q = F.linear(x[:, kept], self.qkv.weight[:width], self.qkv.bias[:width])
        kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
        q = rearrange(q, "b n (h d) -> b n h d", h=heads)
        k, v = rearrange(kv, "b n (two h d) -> two b n h d", two=2, h=heads).unbind(0)
        if rope is not None:
            cos, sin = rope
            q = rotate_pairs(q, cos[kept], sin[kept])
            k = rotate_pairs(k, cos, sin)
        return q, k, v


class CrossAttention(nn.Module):
    """Tokens B x N x W attend to a context B x L x V, V = W if not given; B x N x W."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: B x 1 x 1 x L bool, the part of the context that is attended to."""
        heads = self.num_heads
        q = rearrange(self.query(x), "b n (h d) -> b h n d", h=heads)
        k, v = rearrange(self.key_value(context), "b n (two h d) -> two b h n d", two=2, h=heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


def find_text(text_states: Tensor) -> Tensor:
    """Which states B x L x T are no padding, B x L bool: a tower that hides it gives zeros."""
    return text_states.any(-1)


class SwiGLU(nn.Module):
    """W_out(silu(gate) * value); gate and value share one linear."""

    def __init__(self, width: int):
        super().__init__()
        # Three matrices in place of an MLP's two: 2/3 of its width keeps the number of weights.
        hidden = int(2 / 3 * 4 * width)
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)
        self.padding = -hidden % 16

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, out = self.gate_value.weight, self.gate_value.bias, self.out.weight
        # Rows of 2730 numbers, as at width 1024, slow matrix products down by a fifth: zeros fill
        # them up to a multiple of 64 bytes, and change nothing.
        if self.padding:
            fill = (0, self.padding)
            weight = F.pad(weight.unflatten(0, (2, -1)), (0, 0, *fill)).flatten(0, 1)
            bias = F.pad(bias.unflatten(0, (2, -1)), fill).flatten()
            out = F.pad(out, fill)
        gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, out, self.out.bias)


def position_angles(length: int, width: int) -> Tensor:
    """Position times 10000^(-2i/width): length x width / 2, float64."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


def sincos_position_table(length: int, width: int) -> Tensor:
    """Fixed 1D positions, length x width, float32: sines, then cosines of `position_angles`."""
    angles = position_angles(length, width)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def init_linear_(module: nn.Module, std: float | None = None) -> None:
    """Initialise a Linear or Conv2d, biases zero; leave any other module alone.

    Args:
        std: of a normal distribution cut at 2 std; None: Xavier uniform.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    weight = module.weight.flatten(1)
    if std is None:
        nn.init.xavier_uniform_(weight)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def fingerprint(module: nn.Module, salt: bytes = b"") -> str:
    """Hash of names, shapes and values of a module's state. salt: what weights do not show."""
    # Sorted: the order in which a module was built is not what it computes.
    digest = hashlib.sha256(salt)
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(module: nn.Module, path: Path) -> None:
    """Strictly load safetensors into a module; ValueError names the file and what is wrong."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own types, torch a RuntimeError
        raise ValueError(f"{path} does not fit the configured model: {error}") from error


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write safetensors that all may read; OSError names the file, of a full disk for example."""
    try:
        save_file(weights, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    # safetensors makes files that only their owner can read.
    path.chmod(0o644)


def check_images(images: Tensor, size: int) -> None:
    """Refuse images that are not B x 3 x size x size."""
    if images.shape[1:] != (3, size, size):
        found = tuple(images.shape)
        raise ValueError(f"images have shape {found}, expected B x 3 x {size} x {size}")


def to_image(pixels: Tensor, patch: int) -> Tensor:
    """Pixels of square grids of patches, B x G^2 x (patch^2 3) -> images B x 3 x R x R."""
    grid = math.isqrt(pixels.shape[1])
    return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=patch, q=patch)


def to_pil(image: Tensor) -> Image.Image:
    """3 x R x R in [0, 1] -> PIL image, rounded to 8 bits."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


# The diagonal Gaussian over latent tokens that image tokenizer and text projector output


class Posterior(NamedTuple):
    """Mean and log-variance, each B x K x C. A named tuple, so that DDP sees its tensors."""

    mean: Tensor
    logvar: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """mean + exp(logvar / 2) * noise: B x K x C, from unit noise of that shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.at(noise)


def split_moments(moments: Tensor) -> Posterior:
    """B x K x 2C -> Posterior; C channels of mean, then C of log-variance, clamped to [-30, 20]."""
    # Float32 in any autocast precision: exp(logvar) of a half-precision value is not usable.
    mean, logvar = moments.float().chunk(2, dim=-1)
    return Posterior(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))


# What a training pass gives the losses; named tuples, so that DDP sees their tensors.


class SourcePass(NamedTuple):
    """Where the flow starts, and what the losses on it need; None where the start is noise."""

    latents: Tensor  # B x L x C
    mean: Tensor | None = None  # B x L x C
    logvar: Tensor | None = None  # B x L x C
    alignment: Tensor | None = None  # B x L x C, target of the alignment
    log_temperature: Tensor | None = None  # scalar
    # B x L x W, what a velocity network with a condition reads of the text
    features: Tensor | None = None


class FlowPass(NamedTuple):
    """A velocity and its target, at a random time of each sample."""

    velocity: Tensor  # B x K x C, predicted
    target: Tensor  # B x K x C
    source: SourcePass  # before any detaching
    is_weighted: bool = False  # each sample's squared error by its inverse
