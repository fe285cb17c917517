"""The text projector: text states to the distribution of text latents z_T, with its alignment head (paper, Sec. 3.3).

In: text states B x L x T of the frozen tower. Out: posterior of B x L x C latents, the source of the flow.
The alignment head maps the same text states to a target A (B x L x C) for the contrastive loss.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.layers import Attention, init_linear_
from modeling.posterior import Posterior, split_moments
from training.ridge import fit_ridge

WHITENING_FLOOR = 1e-3
MEAN_BOUND = 3.0  # of mean_form "bounded", in deviations of z_I


@dataclass
class TextProjectorConfig:
    """Sizes of the projector; the defaults are the release's (the paper says: six blocks)."""

    text_tokens: int = 77  # L
    text_width: int = 768  # T
    width: int = 768  # of the blocks; another value than text_width puts a linear layer first
    depth: int = 6
    num_heads: int = 8
    mlp_width: int = 1024
    dropout: float = 0.1
    pre_norm: bool = False  # x + f(ln(x)) instead of the release's ln(x + f(x))
    # Not in the paper: a learned position for each token, where the text states alone say too little about theirs.
    learned_positions: bool = False
    # Not in the paper: decorrelate the channels of the text states first, by a linear map measured on the captions.
    # CLIP's states differ between captions mostly along a few directions; the others are learned slowly without it.
    whiten_text: bool = False
    # Not in the paper: z_T's mean starts as the kernel ridge regression of this strength (training/ridge.py) from the
    # text states to the image latents, in closed form, and the blocks learn what is to be added. 0: off. It has
    # (L x T) x (L x C) weights: for thousands of captions and small towers.
    linear_start: float = 0.0
    # Not in the paper: z_T's deviation is this number and not learned: noise enough for several images of a caption,
    # which a learned deviation without a KL to hold it up loses. 0: learned.
    fixed_std: float = 0.0
    # Not in the paper: what z_T's mean may be. bounded: 3 tanh(mean / 3), which a fixed_std can't be outgrown by;
    # rms: each token divided by its root mean square, so that z_T can't shrink.
    mean_form: Literal["free", "bounded", "rms"] = "free"
    token_channels: int = 16  # C
    alignment_width: int = 512  # hidden width of the alignment MLP
    # What the text latents are aligned to: an MLP of the text states, or their channels averaged in C groups of
    # neighbours (paper, Sec. 5.3, ablation of the target; no weights).
    alignment_target: Literal["mlp", "average_pool"] = "mlp"

    def __post_init__(self):
        if self.alignment_target == "average_pool" and self.text_width % self.token_channels:
            raise ValueError(
                f"projector.alignment_target=average_pool: text_width {self.text_width} is not divisible by "
                f"token_channels {self.token_channels}"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"projector.width {self.width} is not divisible by num_heads {self.num_heads}"
            )
        for name in ("linear_start", "fixed_std"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"projector.{name} must not be negative, got {getattr(self, name)}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"projector.dropout must be in [0, 1), got {self.dropout}")


class TextWhitening(nn.Module):
    """Text states -> channels of zero mean, unit variance and no correlation, over captions and positions.

    PCA whitening; directions of less than WHITENING_FLOOR of the mean variance are not blown up further. The identity
    until `fit`; the measured map is part of the state dict.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure on batches of text states, each B x L x T."""
        count, total, products = 0, 0.0, 0.0
        for states in batches:
            rows = states.flatten(0, 1).double()
            count, total, products = (
                count + len(rows),
                total + rows.sum(0),
                products + rows.T @ rows,
            )
        mean = total / count
        variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        floored = variances.clamp(min=0) + WHITENING_FLOOR * variances.mean()
        self.mean.copy_(mean)
        self.matrix.copy_(directions / floored.sqrt())

    def forward(self, text_states: Tensor) -> Tensor:
        """B x L x T -> B x L x T, float32: the map has large factors."""
        with torch.autocast(text_states.device.type, enabled=False):
            return (text_states.float() - self.mean) @ self.matrix


class LinearStart(nn.Module):
    """Text states B x L x T -> latents B x L x C, by an affine map of all of them at once; zero until `fit`.

    The measured map is part of the state dict and is not trained: weight decay would undo it.
    """

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        self.strength = config.linear_start
        self.register_buffer("offset", torch.zeros(config.text_tokens, config.token_channels))
        self.register_buffer(
            "matrix", torch.zeros(config.text_tokens * config.text_width, self.offset.numel())
        )

    @torch.no_grad()
    def fit(self, states: Tensor, latents: Tensor) -> None:
        """Regress scaled image latents N x L x C on text states N x L x T."""
        ridge = fit_ridge(states, latents, [self.strength])
        self.matrix.copy_(ridge.states.T @ ridge.coefficients)
        self.offset.copy_(
            ridge.latent_mean - (ridge.state_mean.float() @ self.matrix).view_as(self.offset)
        )

    def forward(self, text_states: Tensor) -> Tensor:
        """float32, whatever the autocast precision."""
        with torch.autocast(text_states.device.type, enabled=False):
            return (text_states.float().flatten(1) @ self.matrix).unflatten(
                1, self.offset.shape
            ) + self.offset


class ProjectorBlock(nn.Module):
    """Post-norm: y = LN(x + drop(attn(x))), LN(y + drop(ffn(y))); or pre-norm. B x L x W."""

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = Attention(config.width, config.num_heads)
        self.norm_attention = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width),
            nn.ReLU(),
            nn.Linear(config.mlp_width, config.width),
        )
        self.norm_mlp = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm_attention(x)))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        x = self.norm_attention(x + self.dropout(self.attention(x)))
        return self.norm_mlp(x + self.dropout(self.mlp(x)))


class ChannelPool(nn.Module):
    """Text states B x L x T -> B x L x C: each channel the mean of T / C neighbouring ones."""

    def __init__(self, token_channels: int):
        super().__init__()
        self.token_channels = token_channels

    def forward(self, text_states: Tensor) -> Tensor:
        return text_states.unflatten(-1, (self.token_channels, -1)).mean(-1)


class AlignmentHead(nn.Module):
    """Target A = MLP(T), or pooled T, of the alignment, and the contrastive temperature tau, from log(1 / 0.07) on."""

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        hidden = config.alignment_width
        if config.alignment_target == "average_pool":
            self.mlp = ChannelPool(config.token_channels)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(config.text_width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, config.token_channels),
            )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text_states: Tensor) -> Tensor:
        """Text states B x L x T -> alignment target B x L x C."""
        return self.mlp(text_states)


class TextProjector(nn.Module):
    """Text states -> posterior of the text latents; holds the alignment head, which only training uses."""

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        self.config = config
        self.whitening = TextWhitening(config.text_width) if config.whiten_text else nn.Identity()
        self.embed = (
            nn.Linear(config.text_width, config.width)
            if config.width != config.text_width
            else nn.Identity()
        )
        self.positions = None
        if config.learned_positions:
            self.positions = nn.Parameter(torch.empty(config.text_tokens, config.width))
            nn.init.normal_(self.positions, std=0.5)
        self.blocks = nn.ModuleList(ProjectorBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()
        self.to_moments = nn.Linear(
            config.width, (1 if config.fixed_std else 2) * config.token_channels
        )
        self.alignment = AlignmentHead(config)
        self.linear_start = LinearStart(config) if config.linear_start else None
        for module in self.modules():
            init_linear_(module)
        if self.linear_start is not None:
            nn.init.zeros_(self.to_moments.weight)  # at first the mean is the linear map's alone

    def posterior(self, text_states: Tensor) -> Posterior:
        """Text states B x L x T -> posterior of B x L x C latents (float32).

        Raises:
            ValueError: if the text states have another shape than the projector was built for.
        """
        expected = (self.config.text_tokens, self.config.text_width)
        if text_states.shape[1:] != expected:
            raise ValueError(
                f"text states are B x {tuple(text_states.shape[1:])}, the projector expects B x {expected}"
            )
        x = self.embed(self.whitening(text_states))  # B x L x W
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        moments = self.to_moments(self.norm_out(x))
        if self.config.fixed_std:
            moments = torch.cat(
                [moments, torch.full_like(moments, 2 * math.log(self.config.fixed_std))], dim=-1
            )
        mean, logvar = split_moments(moments)
        if self.linear_start is not None:
            mean = mean + self.linear_start(text_states)
        if self.config.mean_form == "bounded":
            mean = MEAN_BOUND * torch.tanh(mean / MEAN_BOUND)
        elif self.config.mean_form == "rms":
            mean = F.rms_norm(mean, mean.shape[-1:], eps=1e-6)
        return Posterior(mean, logvar)

    def forward(self, text_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training pass: (mean, logvar, alignment target, log temperature). One call, so that DDP sees every weight."""
        posterior = self.posterior(text_states)
        return *posterior, self.alignment(text_states), self.alignment.log_temperature


def flatten_normalize(x: Tensor) -> Tensor:
    """B x L x C -> B x (L C), rows of length 1, float32."""
    return F.normalize(x.float().flatten(1), dim=-1)
