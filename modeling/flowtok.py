"""FlowTok's velocity network: a DiT over 1D tokens (paper, Sec. 3.3).

In: tokens on the path B x K x C, times B in [0, 1] (t = 0 text, t = 1 image), null indicator B
(bool). Out: velocity B x K x C. It is conditioned on time and indicator only: text enters as the
start of the flow, there is no cross-attention and no concatenation.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.activation_checkpointing import ActivationCheckpointing, run_block
from modeling.layers import (
    FROM_TOKENIZER,
    Attention,
    init_linear_,
    sincos_position_table,
    timestep_sinusoids,
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

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with shift and scale G x W over tokens G x N x W."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class TimeEmbedding(nn.Module):
    """t in [0, 1], B -> B x W: 256 sinusoids, linear, SiLU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        # t itself, as the release has it; DiT's times go up to 1000.
        return self.mlp(timestep_sinusoids(t, TIME_SINUSOIDS))


class FlowTokBlock(nn.Module):
    """adaLN-Zero: x += gate * attn(mod(ln(x))); x += gate * mlp(mod(ln(x))); B x K x W."""

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        width, hidden = config.width, 4 * config.width
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
        """The block with known modulations, G x 6 W: per sample, or shared by groups of samples.

        x is G x (B / G * K) x W, K = num_tokens tokens a sample; attention stays in a sample.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)  # G x W
        inner = modulate(self.norm_attention(x), shift_a, scale_a)
        attended = self.attention(inner.view(-1, num_tokens, x.shape[-1])).view(x.shape)
        x = torch.addcmul(x, gate_a.unsqueeze(1), attended)
        inner = modulate(self.norm_mlp(x), shift_m, scale_m)
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(inner))


class FlowTok(nn.Module):
    """The velocity network v(z_t, t, null)."""

    def __init__(self, config: FlowTokConfig):
        super().__init__()
        self.config = config
        self.shape = (config.num_tokens, config.token_channels)  # K x C
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.embed_tokens = nn.Linear(config.token_channels, config.width)
        positions = sincos_position_table(config.num_tokens, config.width)
        self.register_buffer("positions", positions, persistent=False)
        self.embed_time = TimeEmbedding(config.width)
        self.embed_null = nn.Embedding(2, config.width)  # row 1: indicator on, unconditional
        self.blocks = nn.ModuleList(FlowTokBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(config.width, 2 * config.width)
        self.to_velocity = nn.Linear(config.width, config.token_channels)
        self.init_weights()

    def forward(self, tokens: Tensor, t: Tensor, null: Tensor, context: None = None) -> Tensor:
        """Tokens B x K x C, t B float in [0, 1], null B bool -> velocity B x K x C.

        context: what other velocity networks may read (modeling/flow_model.py); None here.
        """
        x = self.embed_tokens(tokens) + self.positions  # B x K x W
        condition = self.condition(t, null)  # B x W
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing, x, condition)
        return self.project_out(x, self.modulation_out(condition))  # B x K x C

    def at_times(self, times: list[float], context: None = None) -> "TimeTable":
        """The network for sampling, at times that are known beforehand."""
        return TimeTable(self, times)

    def condition(self, t: Tensor, null: Tensor) -> Tensor:
        """SiLU(c), B x W: all that the blocks know besides the tokens."""
        return F.silu(self.embed_time(t) + self.embed_null(null.long()))

    def project_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Last norm and linear: x G x N x W, modulation G x 2 W -> G x N x C."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.to_velocity(modulate(self.norm_out(x), shift, scale))

    def init_weights(self) -> None:
        """Xavier uniform; normal 0.02 for the indicator; modulations and last layer at zero."""
        for module in self.modules():
            init_linear_(module)
        nn.init.normal_(self.embed_null.weight, std=0.02)

        # adaLN-Zero: every block starts as the identity, and the velocity as zero.
        modulations = [block.modulation for block in self.blocks]
        for module in [*modulations, self.modulation_out, self.to_velocity]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class TimeTable:
    """FlowTok at a few known times, for sampling: as the network's own forward, up to rounding."""

    # Modulations depend on time and indicator only: computed once, they are shared by all samples,
    # and a third of the weights is read once for all steps instead of once a step.
    @torch.no_grad()
    def __init__(self, network: FlowTok, times: list[float]):
        self.network = network
        self.rows = {time: row for row, time in enumerate(times)}
        t = torch.tensor(times, dtype=torch.float32, device=network.positions.device)
        t = t.repeat_interleave(2)  # each time conditional, then unconditional
        null = torch.tensor([False, True], device=t.device).repeat(len(times))
        condition = network.condition(t, null)  # 2 T x W, for T times
        layers = [*(block.modulation for block in network.blocks), network.modulation_out]
        # T x 2 x 6 W for each block, T x 2 x 2 W for the last norm
        self.modulations = [layer(condition).unflatten(0, (-1, 2)) for layer in layers]

    def __call__(self, x: Tensor, time: float, null: tuple[bool, ...]) -> Tensor:
        """Velocity of each branch at the same points (flow.VelocityBranches), G B x K x C."""
        network, row = self.network, self.rows[time]
        branches = slice(int(null[0]), int(null[-1]) + 1)

        # All samples of a branch share its modulation: one long sequence, except for attention.
        embedded = (network.embed_tokens(x) + network.positions).flatten(0, 1)  # B K x W
        hidden = embedded.expand(len(null), -1, -1)  # G x B K x W
        for block, modulation in zip(network.blocks, self.modulations):
            hidden = block.transform(hidden, modulation[row, branches], num_tokens=x.shape[1])
        velocity = network.project_out(hidden, self.modulations[-1][row, branches])  # G x B K x C
        return velocity.unflatten(1, x.shape[:2]).flatten(0, 1)
