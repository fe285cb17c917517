"""Transformer parts shared by the networks: attention with optional axial RoPE, SwiGLU, sinusoidal tables, init.

Sources: RoPE as TA-TiTok with RoPE uses it (axial, row half first, adjacent channel pairs), SwiGLU of Shazeer 2020,
adaLN-Zero tables of DiT. All modules are channel-last: B x N x W in, B x N x W out.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def axial_rope_table(rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """Angles of axial 2D RoPE for tokens at (row, column): N x head_dim / 2, float32.

    The first half of the pairs turns with the row, the second half with the column; inside a half of size d,
    frequencies 10000^(-2i/d), i = 0..d/2-1, each for one pair of adjacent channels.

    Raises:
        ValueError: if head_dim is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"axial RoPE needs a head size that is a multiple of 4, got {head_dim}")
    half = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # head_dim / 4
    angles = torch.cat(
        [rows.double()[:, None] * frequencies, columns.double()[:, None] * frequencies], dim=-1
    )
    return angles.float()  # N x head_dim / 2


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: B x H x N x D queries or keys.
        cos, sin: N x D / 2, in the dtype of x. A token with angle 0 is left as it is.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # B x H x N x D/2 each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v; B x N x W -> B x N x W."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, kept: slice | None = None
    ) -> Tensor:
        """rope: cosines and sines, N x D / 2. kept: the tokens that are computed, from all of them."""
        q, k, v = self.split(x) if kept is None else self.split_kept(x, kept)
        if rope is not None:
            cos, sin = (table.to(q.dtype) for table in rope)
            k = rotate_pairs(k, cos, sin)
            q = rotate_pairs(q, cos, sin) if kept is None else rotate_pairs(q, cos[kept], sin[kept])
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all tokens, B x H x N x D each."""
        return rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        ).unbind(0)

    def split_kept(self, x: Tensor, kept: slice) -> tuple[Tensor, ...]:
        """As `split`, with the queries of the kept tokens alone."""
        width = x.shape[-1]
        q = F.linear(x[:, kept], self.qkv.weight[:width], self.qkv.bias[:width])
        kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=self.num_heads).unbind(0)
        return rearrange(q, "b n (h d) -> b h n d", h=self.num_heads), k, v


class SwiGLU(nn.Module):
    """out = W_out(silu(gate) * value), gate and value from one packed linear; hidden size int(2/3 * 4 * width)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


def sincos_position_table(length: int, width: int) -> Tensor:
    """Fixed 1D positions: length x width, sines first, then cosines; frequencies 10000^(-2i/width). float32."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def timestep_sinusoids(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids of t itself (t in [0, 1], not scaled): B -> B x dim, cosines first; frequencies 10000^(-i/(dim/2))."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def init_linear_(module: nn.Module, std: float | None = None) -> None:
    """Initialise one Linear or Conv2d: Xavier uniform, or a normal of deviation `std` cut at 2 std; biases zero."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    weight = module.weight.flatten(1)
    if std is None:
        nn.init.xavier_uniform_(weight)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
