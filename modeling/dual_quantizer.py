"""Two codebooks with one index: each cell of a map becomes a semantic and a pixel code (TokenFlow).

Entry i of the one codebook belongs to entry i of the other; a cell takes the pair whose summed
distance to its two vectors is smallest (TokenFlow, CVPR 2025, arXiv 2412.03069). A map is coded as
a residual pyramid over growing grids (VAR, arXiv 2404.02905): each scale codes what is left of it.
Features B x (S + P) x G x G have the S semantic channels first. Float32 in any precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import check_least, exact_products

CHUNK = 4096  # codes compared at a time: bounds the memory of a lookup
MEMORY_STEPS = 100  # after which a code that was not chosen again counts as unused


@dataclass
class QuantizerConfig:
    """Codebooks and scales; the defaults are the paper's, for a grid of 16 x 16."""

    num_codes: int = 32768  # K, pairs
    semantic_channels: int = 32  # S
    pixel_channels: int = 8  # P
    # Cells along a side, growing; the last is the grid. One alone: no pyramid
    scales: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8, 10, 12, 14, 16])
    pixel_distance_weight: float = 1.0  # of the pixel half's distance; the semantic one has 1
    # Training leaves one scale out, not the first, in this share of the steps
    drop_scale_probability: float = 0.1

    def __post_init__(self):
        check_least(self, 1, "num_codes", "semantic_channels", "pixel_channels")
        grows = all(a < b for a, b in pairwise(self.scales))
        if not self.scales or self.scales[0] < 1 or not grows:
            raise ValueError(f"scales must be positive and growing, got {self.scales}")
        if not 0 <= self.drop_scale_probability <= 1:
            value = self.drop_scale_probability
            raise ValueError(f"drop_scale_probability must be in [0, 1], got {value}")

    @property
    def channels(self) -> int:
        """S + P."""
        return self.semantic_channels + self.pixel_channels

    def normalise(self, vectors: Tensor) -> Tensor:
        """... x (S + P) with each half scaled to length 1: 32 channels then count as 8 do."""
        halves = vectors.split([self.semantic_channels, self.pixel_channels], dim=-1)
        return torch.cat([F.normalize(half, dim=-1) for half in halves], dim=-1)

    @property
    def num_tokens(self) -> int:
        """Indices of an image, over all scales."""
        return sum(scale**2 for scale in self.scales)

    def first_scales(self, num_tokens: int) -> list[int]:
        """Those scales that have so many indices together."""
        ends = [*accumulate(scale**2 for scale in self.scales)]
        return self.scales[: ends.index(num_tokens) + 1]


class Quantised(NamedTuple):
    """A quantised map, and the losses of its lookups, averaged over them."""

    codes: Tensor  # B x (S + P) x G x G; the gradient passes to the features
    indices: list[Tensor]  # B x s^2 of each scale that was not left out, row-major
    codebook: Tensor  # scalar: draws codes to the features
    commitment: Tensor  # scalar: draws features to the codes


class DualQuantizer(nn.Module):
    """The two codebooks, and how often their pairs were chosen lately."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        # No Embedding: weight decay is for its weights, and must spare these.
        self.semantic_codes = nn.Parameter(torch.empty(config.num_codes, config.semantic_channels))
        self.pixel_codes = nn.Parameter(torch.empty(config.num_codes, config.pixel_channels))
        self.register_buffer("counts", torch.zeros(len(config.scales), config.num_codes))
        self.init_weights()

    def init_weights(self) -> None:
        """Directions of a uniform cube, as in the original."""
        for codes in (self.semantic_codes, self.pixel_codes):
            nn.init.uniform_(codes, -1, 1)
            codes.data = F.normalize(codes.data, dim=-1)

    def codes(self) -> Tensor:
        """K x (S + P): both halves of each pair have length 1."""
        codes = torch.cat([self.semantic_codes, self.pixel_codes], dim=-1)
        return self.config.normalise(codes.float())

    @torch.no_grad()
    def nearest(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Indices, N, of the pairs at the smallest distance from unit vectors N x (S + P)."""
        # Of unit vectors: 2 (1 + w) - 2 (cos_semantic + w cos_pixel) is smallest where the sum of
        # cosines is largest.
        weights = vectors.new_ones(self.config.channels)
        weights[self.config.semantic_channels :] = self.config.pixel_distance_weight
        weighted = vectors * weights
        # TF32 would choose other codes.
        with exact_products():
            chosen = [(weighted @ chunk.T).max(dim=1) for chunk in codes.split(CHUNK)]
        scores, indices = (torch.stack(part) for part in zip(*chosen))  # chunks x N each
        best = scores.argmax(dim=0, keepdim=True)
        return (indices.gather(0, best) + CHUNK * best)[0]

    def lookup(self, features: Tensor, codes: Tensor) -> Quantised:
        """One grid: features B x (S + P) x h x w -> their codes, of `codes()`."""
        batch, _, height, _ = features.shape
        vectors = self.config.normalise(features.permute(0, 2, 3, 1).flatten(0, 2))  # N x (S + P)
        indices = self.nearest(vectors, codes)
        found = F.embedding(indices, codes)
        # Straight through: the codes' values, the vectors' gradient.
        passed = vectors + (found - vectors).detach()
        return Quantised(
            codes=passed.unflatten(0, (batch, height, -1)).permute(0, 3, 1, 2),
            indices=[indices.unflatten(0, (batch, -1))],
            codebook=F.mse_loss(found, vectors.detach()),
            commitment=F.mse_loss(vectors, found.detach()),
        )

    def forward(self, features: Tensor) -> Quantised:
        """The residual pyramid: features B x (S + P) x G x G, G the last scale."""
        parts = []
        with torch.autocast(features.device.type, enabled=False):
            codes, residual = self.codes(), features.float()
            total = torch.zeros_like(residual)
            for scale in self.draw_scales():
                pooled = F.interpolate(residual, size=(scale, scale), mode="area")
                parts.append(self.lookup(pooled, codes))
                enlarged = resize(parts[-1].codes, features.shape[-1])
                total = total + enlarged
                # The next scale sees what is left, but teaches nothing of this one's choice.
                residual = residual - enlarged.detach()
        return Quantised(
            codes=total,
            indices=[part.indices[0] for part in parts],
            codebook=torch.stack([part.codebook for part in parts]).mean(),
            commitment=torch.stack([part.commitment for part in parts]).mean(),
        )

    def draw_scales(self) -> list[int]:
        """All scales; in training now and then all but one."""
        scales = list(self.config.scales)
        probability = self.config.drop_scale_probability
        if self.training and len(scales) > 1 and torch.rand(()).item() < probability:
            del scales[int(torch.randint(1, len(scales), ()))]
        return scales

    def code_maps(self, indices: Tensor) -> list[Tensor]:
        """Indices B x L of all or the first scales -> codes of each, B x (S + P) x s x s."""
        scales, codes = self.config.first_scales(indices.shape[1]), self.codes()
        parts = indices.split([scale**2 for scale in scales], dim=1)
        found = (F.embedding(part, codes).transpose(1, 2) for part in parts)
        return [part.unflatten(2, (scale, scale)) for part, scale in zip(found, scales)]

    def decode(self, indices: Tensor) -> Tensor:
        """Indices B x L of all or the first scales -> the map of `forward`, B x (S + P) x G x G."""
        grid = self.config.scales[-1]
        return sum(resize(codes, grid) for codes in self.code_maps(indices))

    @torch.no_grad()
    def count(self, indices: Sequence[Tensor]) -> dict[str, Tensor]:
        """Note what a batch chose, over all processes; usage and perplexity of the last steps.

        Returns:
            usage/s: share of the codes that scale s chose in the last MEMORY_STEPS or so;
            perplexity/s: exp of the entropy of its choices, 1..K; usage: of any scale.
        """
        # No bincount: it waits for the device.
        scales, drawn = self.config.scales, torch.zeros_like(self.counts)
        for part in indices:
            row, chosen = scales.index(math.isqrt(part.shape[1])), part.flatten()
            drawn[row].scatter_add_(0, chosen, torch.ones_like(chosen, dtype=drawn.dtype))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(drawn)
        self.counts.mul_(math.exp(-1 / MEMORY_STEPS)).add_(drawn)

        # Chosen once, a code has exp(-1) left after MEMORY_STEPS.
        used = self.counts > math.exp(-1)
        shares = self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1e-9)
        perplexities = (-torch.xlogy(shares, shares).sum(-1)).exp()
        statistics = {"usage": used.any(0).float().mean()}
        for scale, row, perplexity in zip(scales, used, perplexities, strict=True):
            statistics[f"usage/{scale}"] = row.float().mean()
            statistics[f"perplexity/{scale}"] = perplexity
        return statistics


def resize(maps: Tensor, size: int) -> Tensor:
    """B x C x s x s -> B x C x size x size, bicubic; the same size is left alone."""
    if maps.shape[-1] == size:
        return maps
    return F.interpolate(maps, size=(size, size), mode="bicubic", align_corners=False)
