"""FlowTok's velocity network: a DiT over 1D tokens, conditioned on time and the null indicator only (paper, Sec. 3.3).

In: tokens on the path B x K x C, times B in [0, 1] (t = 0 text, t = 1 image), null indicator B (bool).
Out: velocity B x K x C. Text enters only as the start of the flow: no cross-attention, no concatenation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.activation_checkpointing import Recompute, run_block
from modeling.layers import Attention, init_linear_, sincos_position_table, timestep_sinusoids

TIME_SINUSOIDS = 256
MIN_REST = 0.05  # smallest 1 - t by which a predicted end is divided


@dataclass
class FlowTokConfig:
    """Sizes of the DiT. B 768/12/12, XL 1152/28/16, H 1280/36/20 (width/depth/num_heads)."""

    num_tokens: int = 77  # K
    token_channels: int = 16  # C
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    # Not in the paper. end: the last layer gives the path's end z_1, the velocity is (z_1 - z_t) / (1 - t). both: it
    # gives z_1 and a velocity v, and z_1 - z_t + t v counts: the end's at t = 0, v at t = 1. Effects: docs/recipe.md.
    predicts: Literal["velocity", "end", "both"] = "velocity"
    two_way: bool = False  # also from image to text, told by an embedding: for flow.direction=joint

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"flowtok.width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with shift and scale G x W over tokens G x N x W."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class TimeEmbedding(nn.Module):
    """t in [0, 1], B -> B x W: 256 sinusoids of t itself, linear, SiLU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoids(t, TIME_SINUSOIDS))


class FlowTokBlock(nn.Module):
    """adaLN-Zero block: x += gate * attn(modulated ln(x)); x += gate * mlp(modulated ln(x)). B x K x W."""

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        width, hidden = config.width, int(config.mlp_ratio * config.width)
        self.modulation = nn.Linear(width, 6 * width)
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, config.num_heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`condition` is SiLU(c), B x W."""
        return self.transform(x, self.modulation(condition), x.shape[1])

    def transform(self, x: Tensor, modulation: Tensor, num_tokens: int) -> Tensor:
        """The block with known modulations, G x 6 W: one for each sample, or for a group of samples that share theirs.

        x is G x (B / G * K) x W, of K = num_tokens tokens a sample; attention stays inside a sample.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(
            6, dim=-1
        )  # G x W each
        inner = modulate(self.norm_attention(x), shift_a, scale_a).view(-1, num_tokens, x.shape[-1])
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attention(inner).view(x.shape))
        return torch.addcmul(
            x, gate_m.unsqueeze(1), self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))
        )


class FlowTok(nn.Module):
    """The velocity network v(z_t, t, null)."""

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        self.config = config
        self.recompute: Recompute = (
            "none"  # activation checkpointing; training sets it, the weights don't depend on it
        )
        self.embed_tokens = nn.Linear(config.token_channels, config.width)
        positions = sincos_position_table(config.num_tokens, config.width)
        self.register_buffer("positions", positions, persistent=False)
        self.embed_time = TimeEmbedding(config.width)
        self.embed_null = nn.Embedding(
            2, config.width
        )  # row 1: the indicator is on, the flow is unconditional
        self.embed_direction = (
            nn.Embedding(2, config.width) if config.two_way else None
        )  # row 1: from image to text
        self.blocks = nn.ModuleList(FlowTokBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(config.width, 2 * config.width)
        outputs = 2 if config.predicts == "both" else 1
        self.to_velocity = nn.Linear(config.width, outputs * config.token_channels)
        self.init_weights()

    def forward(
        self, tokens: Tensor, t: Tensor, null: Tensor, to_text: Tensor | None = None
    ) -> Tensor:
        """Tokens B x K x C, t B float in [0, 1], null B bool -> velocity B x K x C.

        to_text: B bool, only of a two-way network: the samples that flow from image to text; None: none.
        """
        x = self.embed_tokens(tokens) + self.positions  # B x K x W
        condition = self.condition(t, null, to_text)
        for block in self.blocks:
            x = run_block(block, self.recompute, x, condition)
        return self.velocity_at(
            tokens, t.view(-1, 1, 1), self.project_out(x, self.modulation_out(condition))
        )

    def condition(self, t: Tensor, null: Tensor, to_text: Tensor | None = None) -> Tensor:
        """SiLU(c), B x W: all that the blocks know beside the tokens."""
        condition = self.embed_time(t) + self.embed_null(null.long())
        if self.embed_direction is not None:
            to_text = torch.zeros_like(null) if to_text is None else to_text
            condition = condition + self.embed_direction(to_text.long())
        return F.silu(condition)

    def project_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Last norm and linear: x G x N x W, modulation G x 2 W -> G x N x C (2 C where both are predicted)."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.to_velocity(modulate(self.norm_out(x), shift, scale))

    def velocity_at(self, tokens: Tensor, t: Tensor | float, output: Tensor) -> Tensor:
        """The velocity at tokens B x K x C and t (B x 1 x 1 or one number), from what project_out gives."""
        if self.config.predicts == "velocity":
            return output
        if self.config.predicts == "both":
            end, velocity = output.chunk(2, dim=-1)
            return end - tokens + t * velocity
        rest = (1 - t).clamp(min=MIN_REST) if isinstance(t, Tensor) else max(1 - t, MIN_REST)
        return (output - tokens) / rest

    def init_weights(self) -> None:
        """Xavier uniform; normal 0.02 for the indicator; every modulation and the last layer start at zero."""
        for module in self.modules():
            init_linear_(module)
        nn.init.normal_(self.embed_null.weight, std=0.02)
        if self.embed_direction is not None:
            nn.init.zeros_(
                self.embed_direction.weight
            )  # weights of one direction (init_from) work on as they are
        for module in [
            *(block.modulation for block in self.blocks),
            self.modulation_out,
            self.to_velocity,
        ]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class TimeTable:
    """FlowTok at a few known times, for sampling: the modulations of all times and branches are computed once.

    They depend on time and indicator alone, so that samples share them; a third of the weights is read once for all
    steps instead of once a step. Same results as the network's own forward, up to rounding.
    """

    @torch.no_grad()
    def __init__(self, network: FlowTok, times: list[float], to_text: bool = False):
        self.network, self.rows = network, {time: row for row, time in enumerate(times)}
        t = torch.tensor(times, dtype=torch.float32, device=network.positions.device)
        null = torch.tensor([False, True], device=t.device)
        t, null = t.repeat_interleave(2), null.repeat(len(times))
        condition = network.condition(t, null, torch.full_like(null, to_text))  # 2 T x W
        layers = [*(block.modulation for block in network.blocks), network.modulation_out]
        self.modulations = [
            layer(condition).unflatten(0, (-1, 2)) for layer in layers
        ]  # T x 2 x 6 W; the last 2 W

    def __call__(self, x: Tensor, time: float, null: tuple[bool, ...]) -> Tensor:
        """Velocity of each branch at the same points (modeling/flow.py, BranchesFn): B x K x C -> G B x K x C.

        Raises:
            KeyError: `time` is not one of those given at the start.
        """
        network, row, num_tokens = self.network, self.rows[time], x.shape[1]
        branches = slice(int(null[0]), int(null[-1]) + 1)
        embedded = (network.embed_tokens(x) + network.positions).flatten(0, 1)
        hidden = embedded.expand(len(null), -1, -1)  # G x B K x W
        for block, modulation in zip(network.blocks, self.modulations):
            hidden = block.transform(hidden, modulation[row, branches], num_tokens)
        output = network.project_out(hidden, self.modulations[-1][row, branches])  # G x B K x C
        velocity = network.velocity_at(x, time, output.unflatten(1, x.shape[:2]))
        return velocity.flatten(0, 1)
