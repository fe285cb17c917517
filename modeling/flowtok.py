"""FlowTok's velocity network: a DiT over 1D tokens (paper, Sec. 3.3).

In: tokens on the path B x K x C, times B in [0, 1], null indicator B (bool). Out: velocity
B x K x C. It is conditioned on time and indicator only: text enters as the start of the flow. To
compare with the usual way, it can read features of the text besides (`condition`), as many as the
tokens.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activation_checkpointing import ActivationCheckpointing, run_block
from .flow import VelocityBranches
from .layers import (
    FROM_PROJECTOR,
    FROM_TOKENIZER,
    Attention,
    CrossAttention,
    check_least,
    init_linear_,
    sincos_position_table,
)

TIME_SINUSOIDS = 256


@dataclass
class FlowTokConfig:
    """Sizes of the DiT. B 768/12/12, XL 1152/28/16, H 1280/36/20 (width/depth/num_heads)."""

    num_tokens: int = field(default=77, metadata=FROM_TOKENIZER)  # K
    token_channels: int = field(default=16, metadata=FROM_TOKENIZER)  # C
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    # How the text is read besides: not at all (paper), added to the tokens, each feature at its
    # place, by cross-attention in each block, or as tokens beside those on the path.
    condition: Literal["none", "addition", "cross_attention", "concatenation"] = "none"
    context_tokens: int = field(default=0, metadata=FROM_PROJECTOR)  # L of the text's features
    context_width: int = field(default=0, metadata=FROM_PROJECTOR)  # and their W

    def __post_init__(self):
        check_least(self, 1, "width", "num_heads")
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with shift and scale G x 1 x 1 x W over tokens G x S x N x W."""
    return torch.addcmul(shift, x, 1 + scale)


def by_group(modulation: Tensor, number: int) -> tuple[Tensor, ...]:
    """Modulations G x (number W) -> each G x 1 x 1 x W, for the tokens of a group's samples."""
    return modulation[:, None, None].chunk(number, dim=-1)


class TimeEmbedding(nn.Module):
    """t in [0, 1], B -> B x W: 256 sinusoids, cosines first, linear, SiLU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        # Of t itself, as the release has it; DiT's times go up to 1000.
        half = TIME_SINUSOIDS // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000.0) * steps / half)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class TextContext(nn.Module):
    """Features of the text, B x L x W of the projector -> context B x L x W of the DiT."""

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        self.embed = nn.Linear(config.context_width, config.width)
        self.positions = nn.Parameter(torch.empty(config.context_tokens, config.width))
        self.null = nn.Parameter(torch.empty(config.width))  # in place of each unconditional token
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.null, std=0.02)

    def forward(self, features: Tensor, null: Tensor) -> Tensor:
        """null: B bool, the samples that do not see their text."""
        context = torch.where(null.view(-1, 1, 1), self.null, self.embed(features))
        return context + self.positions


class FlowTokBlock(nn.Module):
    """adaLN-Zero: x += gate * attn(mod(ln(x))); x += gate * mlp(mod(ln(x))); B x K x W.

    With cross-attention, x += cross(ln(x), context) lies between the two.
    """

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        width, hidden = config.width, 4 * config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, config.num_heads)
        self.cross_attention = None
        if config.condition == "cross_attention":
            self.norm_cross = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.cross_attention = CrossAttention(width, config.num_heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        """`condition` is SiLU(c), B x W; context: B x L x W with cross-attention, else None."""
        return self.transform(x[:, None], self.modulation(condition), context)[:, 0]

    def transform(self, x: Tensor, modulation: Tensor, context: Tensor | None) -> Tensor:
        """The block with known modulations, G x 6 W, each of a group of S samples.

        Tokens x G x S x N x W, context G S x L x W.
        """
        # Matrix products get G S x N x W: with a dimension more, torch would not fuse their biases.
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = by_group(modulation, 6)
        inner = modulate(self.norm_attention(x), shift_a, scale_a).flatten(0, 1)
        x = torch.addcmul(x, gate_a, self.attention(inner).view(x.shape))
        if self.cross_attention is not None:
            inner = self.norm_cross(x).flatten(0, 1)
            x = x + self.cross_attention(inner, context).view(x.shape)
        inner = modulate(self.norm_mlp(x), shift_m, scale_m).flatten(0, 1)
        return torch.addcmul(x, gate_m, self.mlp(inner).view(x.shape))


class FlowTok(nn.Module):
    """The velocity network v(z_t, t, null); with intervals, u(z_t, t, h, null) (mean_flow.py)."""

    def __init__(self, config: FlowTokConfig, takes_interval: bool = False):
        super().__init__()
        self.config = config
        self.shape = (config.num_tokens, config.token_channels)  # K x C
        self.reads_text = config.condition != "none"
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.embed_tokens = nn.Linear(config.token_channels, config.width)
        positions = sincos_position_table(config.num_tokens, config.width)
        self.register_buffer("positions", positions, persistent=False)
        self.embed_time = TimeEmbedding(config.width)
        self.embed_null = nn.Embedding(2, config.width)  # row 1: indicator on, unconditional
        self.embed_context = TextContext(config) if self.reads_text else None
        self.blocks = nn.ModuleList(FlowTokBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(config.width, 2 * config.width)
        self.to_velocity = nn.Linear(config.width, config.token_channels)
        self.embed_interval = TimeEmbedding(config.width) if takes_interval else None
        self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        null: Tensor,
        context: Tensor | None = None,
        interval: Tensor | None = None,
    ) -> Tensor:
        """Tokens B x K x C, t B float in [0, 1], null B bool -> velocity B x K x C.

        context: features of the text, B x L x W of the projector; not read without a condition.
        interval: B, the length of what the velocity is averaged over, where the network takes it.
        """
        x = self.embed_tokens(tokens) + self.positions  # B x K x W
        condition = self.condition(t, null, interval)  # B x W
        context = self.embed_context(context, null) if self.reads_text else None  # B x L x W
        x, context = self.join(x, context)
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing, x, condition, context)
        # Concatenated text ends here. Each sample is a group with modulations of its own.
        x = x[:, None, : tokens.shape[1]]
        return self.project_out(x, self.modulation_out(condition))  # B x K x C

    def join(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(tokens of the blocks, context of their cross-attention), each ... x N x W or None."""
        if self.config.condition == "addition":
            return x + context, None
        if self.config.condition == "concatenation":
            return torch.cat([x, context], dim=-2), None
        return x, context

    @torch.no_grad()
    def at_times(
        self, times: list[float], context: Tensor | None = None, interval: float | None = None
    ) -> VelocityBranches:
        """The network for sampling: as its forward at a few times and one context, to rounding."""
        # Modulations depend on time and indicator only: computed once, they are shared by all
        # samples, and a third of the weights is read once for all steps instead of once a step.
        rows = {time: row for row, time in enumerate(times)}
        device = self.positions.device
        # Each time conditional, then unconditional
        t = torch.tensor(times, dtype=torch.float32, device=device).repeat_interleave(2)
        null = torch.tensor([False, True], device=device).repeat(len(times))
        h = None if interval is None else torch.full_like(t, interval)
        condition = self.condition(t, null, h)  # 2 T x W, for T times
        layers = [*(block.modulation for block in self.blocks), self.modulation_out]
        # T x 2 x 6 W for each block, T x 2 x 2 W for the last norm
        modulations = [layer(condition).unflatten(0, (-1, 2)) for layer in layers]
        contexts = None
        if self.reads_text:
            null = torch.zeros(len(context), dtype=torch.bool, device=device)
            contexts = [self.embed_context(context, null), self.embed_context(context, ~null)]
            contexts = torch.stack(contexts)  # 2 x B x L x W

        def velocity(x: Tensor, time: float, null: tuple[bool, ...]) -> Tensor:
            branches = slice(int(null[0]), int(null[-1]) + 1)
            own = [modulation[rows[time], branches] for modulation in modulations]
            return self.follow(x, own, None if contexts is None else contexts[branches])

        return velocity

    def follow(self, x: Tensor, modulations: list[Tensor], context: Tensor | None) -> Tensor:
        """Velocity of G branches at the same points x B x K x C: G B x K x C.

        modulations: G x 6 W of each block, G x 2 W of the last norm. context: G x B x L x W.
        """
        # A group is a branch with all samples.
        hidden = self.embed_tokens(x) + self.positions  # B x K x W
        hidden = hidden.expand(len(modulations[0]), -1, -1, -1)  # G x B x K x W
        hidden, context = self.join(hidden, context)
        context = None if context is None else context.flatten(0, 1)  # G B x L x W
        for block, modulation in zip(self.blocks, modulations):
            hidden = block.transform(hidden, modulation, context)
        return self.project_out(hidden[:, :, : x.shape[1]], modulations[-1])

    def condition(self, t: Tensor, null: Tensor, interval: Tensor | None = None) -> Tensor:
        """SiLU(c), B x W: all that the blocks know besides the tokens."""
        # One vector for all: the release adds the indicator where DiT adds the class.
        condition = self.embed_time(t) + self.embed_null(null.long())
        if self.embed_interval is not None:
            condition = condition + self.embed_interval(interval)
        return F.silu(condition)

    def project_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Last norm and linear: x G x S x K x W, modulation G x 2 W -> G S x K x C."""
        shift, scale = by_group(modulation, 2)
        return self.to_velocity(modulate(self.norm_out(x), shift, scale).flatten(0, 1))

    def init_weights(self) -> None:
        """Xavier uniform; normal 0.02 for the indicator; modulations and last layer at zero."""
        for module in self.modules():
            init_linear_(module)
        nn.init.normal_(self.embed_null.weight, std=0.02)

        # adaLN-Zero: every block starts as the identity, and the velocity as zero.
        modulations = [block.modulation for block in self.blocks]
        crosses = [block.cross_attention.out for block in self.blocks if block.cross_attention]
        for module in [*modulations, *crosses, self.modulation_out, self.to_velocity]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

        # At the start, or from the weights of a velocity flow, the interval changes nothing.
        if self.embed_interval is not None:
            nn.init.zeros_(self.embed_interval.mlp[-1].weight)
