"""Text to image by predicting the indices of a dual tokenizer, one scale after the other.

TokenFlow (CVPR 2025, arXiv 2412.03069) on VAR's next-scale prediction (arXiv 2404.02905). The
sequence is [text states; start; inputs of scale 2; inputs of scale 3; ...]. The token of a scale at
a cell is predicted at an input in its own place, which holds what the smaller scales say of the
cell; the one token of scale 1 at `start`. Text is causal, a scale sees itself and the smaller ones.
Differs from the paper: text states of a frozen tower are the prefix, and the network is trained
from scratch; there a language model reads and predicts words, too. Nothing follows the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .activation_checkpointing import ActivationCheckpointing, run_block
from .dual_quantizer import QuantizerConfig, resize
from .layers import (
    FROM_TEXT_ENCODER,
    FROM_TOKENIZER,
    Attention,
    SwiGLU,
    check_heads,
    check_least,
    check_share,
    find_text,
    init_linear_,
    position_angles,
    rotate_pairs,
    rotation_tables,
)
from .pipeline import Generator, Precision, Sampling, autocast, unit_noise
from .text_projector import LinearSkip

LOG_SHARPNESS = 3.0  # at the start, of the logits of a linear skip


@dataclass
class NextScaleConfig:
    """Size of the network; the defaults have about the weights of FlowTok-B."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    null_probability: float = 0.1  # share of captions that are dropped in training, for guidance
    text_tokens: int = field(default=77, metadata=FROM_TEXT_ENCODER)  # L
    text_width: int = field(default=768, metadata=FROM_TEXT_ENCODER)  # T
    # Zeros among the text states are padding, which nothing looks at
    text_is_masked: bool = field(default=False, metadata=FROM_TEXT_ENCODER)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig, metadata=FROM_TOKENIZER)
    # Not in the paper, for small scale: a fixed affine map from the text to the tokens, fitted by
    # ridge regression, stands beside; what is left of it at a place is an input, and each logit
    # starts at its cosine to the code. (L x T) x (G^2 x (S + P)) weights.
    linear_skip: bool = field(default=False, metadata={"derived": "linear_start"})

    @property
    def input_channels(self) -> int:
        """Of an input of the image."""
        return self.quantizer.channels * (1 + self.linear_skip)

    def __post_init__(self):
        check_heads(self, channels=2)
        check_share(self, "null_probability")
        if self.quantizer.scales[0] != 1:
            raise ValueError(f"the tokenizer's scales begin with {self.quantizer.scales[0]}, not 1")


# What the network gets


def known_inputs(config: NextScaleConfig, maps: Sequence[Tensor], refined: bool = False) -> Tensor:
    """The inputs of all scales but the first of which the maps tell: B x (sum of s^2) x C'.

    Args:
        maps: codes B x C x s x s of the first scales. They tell of one scale more.
        refined: of no scale more; the last one's input is then the sum with its own codes in it, in
            place of the smaller ones' sum, for another pass over what was drawn.
    """
    grid = config.quantizer.scales[-1]
    scales = config.quantizer.scales[1 : len(maps) + (not refined)]
    # Scale by scale, which is not quite the tokenizer's sum, where each is enlarged to the grid.
    total, inputs = maps[0], []
    for index, scale in enumerate(scales, start=1):
        total = resize(total, scale)
        inputs.append(total)
        if index < len(maps):
            total = total + maps[index]
    if refined:
        inputs[-1] = total

    # The skip is compared with the tokenizer's own sums: they stand beside.
    if config.linear_skip:
        sums = accumulate(resize(codes, grid) for codes in maps)
        pooled = [F.interpolate(x, size=(s, s), mode="area") for x, s in zip(sums, scales)]
        inputs = [torch.cat(pair, dim=1) for pair in zip(inputs, pooled)]
    none = maps[0].new_zeros(len(maps[0]), 0, config.input_channels)  # of one scale
    return torch.cat([none, *(x.flatten(2).transpose(1, 2) for x in inputs)], dim=1)


def block_causal_mask(is_text: Tensor, scale_of: Tensor) -> Tensor:
    """Who looks at whom: B x N x N bool, query by key, N = L + n.

    Args:
        is_text: B x L bool, which states of the text are no padding.
        scale_of: n, ascending: which scale each token of the image is of.
    """
    # The text counts token by token; each scale is one step.
    length = is_text.shape[1]
    steps = torch.cat([torch.arange(length, device=scale_of.device), length + scale_of])
    seen = F.pad(is_text, (0, len(scale_of)), value=True)  # B x N
    return (steps[:, None] >= steps) & seen[:, None] & seen[:, :, None]


class NextScaleBlock(nn.Module):
    """x += attn(ln(x)); x += swiglu(ln(x)); B x N x W, queries and keys normalised."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm_query = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.norm_key = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """rope: cosines and sines, N x D each. mask: B x 1 x N x N bool."""
        q, k, v = self.attention.split(self.norm_attention(x), rope=None)  # B x N x H x D
        q = rotate_pairs(self.norm_query(q).to(v.dtype), *rope)
        k = rotate_pairs(self.norm_key(k).to(v.dtype), *rope)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attention.out(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm_mlp(x))


class NextScale(nn.Module):
    """Text states and what is known of the image -> logits of the indices of each scale."""

    def __init__(self, config: NextScaleConfig):
        super().__init__()
        self.config = config
        width, sizes = config.width, config.quantizer
        if config.linear_skip:
            length = config.text_tokens * config.text_width
            self.skip = LinearSkip(length, (sizes.scales[-1] ** 2, sizes.channels))
            self.register_buffer("codes", torch.zeros(sizes.num_codes, sizes.channels))
            self.log_sharpness = nn.Parameter(torch.full((len(sizes.scales),), LOG_SHARPNESS))
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.embed_text = nn.Linear(config.text_width, width)
        self.null_text = nn.Parameter(torch.empty(config.text_tokens, width))
        self.start = nn.Parameter(torch.empty(width))
        self.projector = nn.Sequential(
            nn.Linear(config.input_channels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.levels = nn.Parameter(torch.empty(len(sizes.scales) + 1, width))
        self.positions = nn.Parameter(torch.empty(sizes.num_tokens, width))
        self.blocks = nn.ModuleList(
            NextScaleBlock(width, config.num_heads) for _ in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, sizes.num_codes)
        length = config.text_tokens + sizes.num_tokens
        cosines, sines = rotation_tables(position_angles(length, width // config.num_heads))
        self.register_buffer("rope_cos", cosines.float(), persistent=False)
        self.register_buffer("rope_sin", sines.float(), persistent=False)
        # Which scale, from 0, each token of the image is of
        numbers = [number for number, s in enumerate(sizes.scales) for _ in range(s**2)]
        self.register_buffer("scale_of", torch.tensor(numbers), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers Xavier uniform, tables as in the original; all logits start equal."""
        for module in self.modules():
            init_linear_(module)
        for parameter in (self.null_text, self.start, self.levels, self.positions):
            std = (3 * self.config.width) ** -0.5
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.to_logits.weight)

    def embed_image(self, features: Tensor) -> Tensor:
        """start, and features B x (n - 1) x C of the scales from the second on: B x n x W."""
        image = self.projector(features)
        start = self.start.expand(len(image), 1, -1)
        scale_of = self.scale_of[: image.shape[1] + 1]
        # Row 1 of the levels is no scale's, as in the original.
        levels = self.levels[scale_of + (scale_of > 0)]
        return torch.cat([start, image], dim=1) + levels + self.positions[: len(scale_of)]

    def forward(self, features: Tensor, text_states: Tensor, dropped: Tensor) -> Tensor:
        """Logits B x n x K of the n tokens of the first scales.

        Args:
            features: of known_inputs, B x (n - 1) x C.
            text_states: B x L x T.
            dropped: B bool, whose text is not to be read.
        """
        # Under autocast the embedded states have another dtype than what stands for no caption.
        text = torch.where(
            dropped[:, None, None], self.null_text.float(), self.embed_text(text_states).float()
        )

        # With a skip the second half of the inputs are sums; what they lack of it is read instead.
        left = None
        if self.config.linear_skip:
            features, sums = features.chunk(2, dim=-1)
            left = self.what_is_left(sums, text_states, dropped)
            features = torch.cat([features, left[:, 1:].to(features.dtype)], dim=-1)
        image = self.embed_image(features)
        x = torch.cat([text.to(image.dtype), image], dim=1)

        # Padding looks at itself, or its rows of the softmax would be empty.
        is_text = torch.ones(1, text.shape[1], dtype=torch.bool, device=x.device)
        if self.config.text_is_masked:
            is_text = find_text(text_states) | dropped[:, None]
        mask = block_causal_mask(is_text, self.scale_of[: image.shape[1]])
        mask = mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=x.device)
        rope = (self.rope_cos[: x.shape[1]], self.rope_sin[: x.shape[1]])
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing, x, rope, mask[:, None])
        logits = self.to_logits(self.norm_out(x[:, text.shape[1] :]))
        if left is None:
            return logits

        # Alone, the skip chooses the codes that the quantiser would choose for its tokens.
        cosines = self.config.quantizer.normalise(left) @ self.codes.T
        scales = self.config.quantizer.first_scales(image.shape[1])
        sharpness = torch.cat([x.expand(s**2) for x, s in zip(self.log_sharpness.exp(), scales)])
        return logits + sharpness[:, None] * cosines

    def what_is_left(self, sums: Tensor, text_states: Tensor, dropped: Tensor) -> Tensor:
        """The skip's tokens less the smaller scales' sums at each place, B x n x C; dropped: 0."""
        scales = self.config.quantizer.first_scales(sums.shape[1] + 1)
        grid = self.config.quantizer.scales[-1]
        whole = self.skip(text_states).transpose(1, 2).unflatten(2, (grid, grid))
        pooled = [F.interpolate(whole, size=(s, s), mode="area").flatten(2) for s in scales]
        left = torch.cat(pooled, dim=2).transpose(1, 2) - F.pad(sums.float(), (0, 0, 1, 0))
        return left.masked_fill(dropped[:, None, None], 0)


# Drawing


@dataclass
class NextScaleSampling(Sampling):
    """How indices are drawn. Each scale but the first is drawn in several passes, ever narrower."""

    guidance: float = 7.5  # at the last scale; it grows from 0 at the first. 0: none, half the work
    top_k: list[int] = field(default_factory=lambda: [1200, 100, 1])  # of each pass; 0: all
    top_p: list[float] = field(default_factory=lambda: [0.8, 0.8, 0.0])  # of each pass; 0: all
    precision: Precision = "fp32"  # autocast of the network and the decoder

    sample_text_latent = True  # images of a prompt differ

    def __post_init__(self):
        if len(self.top_k) != len(self.top_p) or not self.top_k:
            raise ValueError(f"top_k {self.top_k} and top_p {self.top_p} must be as many passes")
        if min(self.top_k) < 0 or not all(0 <= p <= 1 for p in self.top_p):
            raise ValueError(
                f"top_k must be at least 0 and top_p in [0, 1]: {self.top_k}, {self.top_p}"
            )
        check_least(self, 0, "guidance")

    @property
    def steps(self) -> int:
        """Passes over a scale."""
        return len(self.top_k)

    def check_network(self, network: NextScaleConfig) -> None:
        """Refuse guidance away from captions that a network was never without."""
        if self.guidance and not network.null_probability:
            raise ValueError(
                f"guidance {self.guidance:g} needs a network that has learned to go without a "
                "caption; next_scale.null_probability=0 teaches none: use guidance 0"
            )


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits ... x K, -inf where they can't be drawn: top-k first, then top-p; 0 turns one off."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p:
        rising, order = logits.sort(dim=-1)
        removed = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1] = False  # never the largest
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits


def draw_indices(logits: Tensor, noise: Tensor) -> Tensor:
    """One index of each row: logits B x n x K, unit normal noise B x n -> B x n."""
    # The inverse of the distribution function, at noise that is uniform then.
    heights = logits.float().softmax(-1).cumsum(-1)
    points = torch.special.ndtr(noise).clamp(max=1 - 1e-6)[..., None] * heights[..., -1:]
    found = torch.searchsorted(heights, points, right=True)[..., 0]
    return found.clamp(max=logits.shape[-1] - 1)


@dataclass
class NextScaleGenerator(Generator):
    """Of a run of this stage. Its latents are the tokenizer's tokens, sums of codes."""

    model: NextScale

    @torch.no_grad()
    def make_latents(
        self, text_states: Tensor, config: NextScaleSampling, seed: int, indices: list[int]
    ) -> Tensor:
        config.check_network(self.model.config)
        shape = (config.steps, self.model.config.quantizer.num_tokens)
        drawn = self.draw(text_states, config, unit_noise(shape, seed, indices).to(self.device))
        return self.tokenizer.quantizer.decode(drawn).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def quantise(self, codes: Tensor) -> Tensor:
        """Any tokens B x G^2 x (S + P) -> sums of codes."""
        grid = self.tokenizer.config.grid_size
        quantised = self.tokenizer.quantizer(codes.transpose(1, 2).unflatten(2, (grid, grid)))
        return quantised.codes.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def draw(self, states: Tensor, config: NextScaleSampling, noise: Tensor) -> Tensor:
        """Text states B x L x T, noise B x passes x n -> indices B x n of all scales."""
        quantizer = self.tokenizer.quantizer
        scales = quantizer.config.scales
        found = torch.zeros(len(states), 0, dtype=torch.long, device=states.device)
        for number, scale in enumerate(scales):
            known = found
            for step in range(config.steps if number else 1):
                # A pass after the first sees what the one before it has drawn.
                features = states.new_zeros(len(states), 0, self.model.config.input_channels)
                if number:
                    maps = quantizer.code_maps(found)
                    features = known_inputs(self.model.config, maps, refined=step > 0)
                # Guidance grows with the scale, as in VAR's own code.
                share = number / (len(scales) - 1) if len(scales) > 1 else 1.0
                with autocast(states.device, config.precision):
                    logits = self.logits(features, states, config.guidance * share)
                own = keep_likely(logits[:, -(scale**2) :], config.top_k[step], config.top_p[step])
                places = slice(known.shape[1], known.shape[1] + scale**2)
                found = torch.cat([known, draw_indices(own, noise[:, step, places])], dim=1)
        return found

    def logits(self, features: Tensor, states: Tensor, guidance: float) -> Tensor:
        """(1 + t) conditional - t unconditional logits, B x n x K, float32."""
        dropped = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        if not guidance:
            return self.model(features, states, dropped).float()
        both = torch.cat([dropped, ~dropped])
        twice = (torch.cat([part, part]) for part in (features, states))
        with_text, without = self.model(*twice, both).float().chunk(2)
        return (1 + guidance) * with_text - guidance * without
