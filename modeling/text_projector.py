"""The text projector: text states -> distribution of text latents z_T, and the alignment target.

In: text states B x L x T of the frozen tower. Out: posterior of B x K x C latents, where FlowTok's
flow starts (K = L in the paper, Sec. 3.3). Where text has another length than the image's K tokens,
or padding that its tower hides, K learned queries take its place, which know nothing of padding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops.layers.torch import Reduce
from torch import Tensor, nn

from .layers import (
    FROM_TOKENIZER,
    Attention,
    CrossAttention,
    Posterior,
    SourcePass,
    check_heads,
    check_least,
    check_share,
    find_text,
    init_linear_,
    split_moments,
)

WHITENING_FLOOR = 1e-3


@dataclass
class TextProjectorConfig:
    """Sizes of the projector; the defaults are the release's (the paper says: six blocks)."""

    text_tokens: int = field(default=77, metadata=FROM_TOKENIZER)  # L
    text_width: int = field(default=768, metadata=FROM_TOKENIZER)  # T
    width: int = 768  # of the blocks; another value than text_width puts a linear layer first
    depth: int = 6
    num_heads: int = 8
    mlp_width: int = 1024
    dropout: float = 0.1
    token_channels: int = field(default=16, metadata=FROM_TOKENIZER)  # C
    # K learned queries stand for the text, which has more or fewer tokens, or padding; 0: none
    num_queries: int = field(default=0, metadata=FROM_TOKENIZER)
    alignment_width: int = 512  # hidden width of the alignment MLP
    # What z_T is aligned to: an MLP of the text states, or their channels averaged in C groups of
    # neighbours (paper, Sec. 5.3, ablation of the target; no weights).
    alignment_target: Literal["mlp", "average_pool"] = "mlp"

    # Not in the paper, for small scale (docs/recipe.md):
    pre_norm: bool = False  # x + f(ln(x)) instead of the release's ln(x + f(x))
    # A learned position per token, where the text states say too little about theirs.
    learned_positions: bool = False
    # Decorrelate the channels of the text states first, by a linear map measured on the captions.
    # CLIP's states differ between captions mostly along a few directions; without this the others
    # are learned slowly.
    whiten_text: bool = False
    # A fixed affine map from text states to latents is added to the mean; stage 2 fits it
    # (training/ridge.py). It has (L x T) x (L x C) weights: for thousands of captions and small
    # towers.
    linear_skip: bool = False
    # z_T's deviation is this number, not learned: enough noise for several images of a caption,
    # which a learned deviation loses without a KL to hold it up. 0: learned.
    fixed_std: float = 0.0
    # Blocks over the text itself, before learned queries read it: what a word says of another one,
    # as "left of" of the nouns around it, is found there. 0 where there are no queries.
    text_depth: int = 0

    def __post_init__(self):
        width = self.input_shape[1]
        if self.alignment_target == "average_pool" and width % self.token_channels:
            raise ValueError(
                f"alignment_target=average_pool: width {width} of the text is not divisible by "
                f"token_channels {self.token_channels}"
            )
        check_heads(self)
        check_least(self, 0, "fixed_std", "text_depth")
        check_share(self, "dropout")

    @property
    def input_shape(self) -> tuple[int, int]:
        """Tokens x width of what blocks and alignment read: the queries', or the text states'."""
        if self.num_queries:
            return self.num_queries, self.width
        return self.text_tokens, self.text_width


class ProjectorBlock(nn.Module):
    """Post-norm: y = LN(x + drop(attn(x))), LN(y + drop(ffn(y))); or pre-norm. B x L x W.

    Its config is a TextProjectorConfig or a TextDecoderConfig.
    """

    def __init__(self, config):
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: as in Attention."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm_attention(x), mask=mask))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        x = self.norm_attention(x + self.dropout(self.attention(x, mask=mask)))
        return self.norm_mlp(x + self.dropout(self.mlp(x)))


class AlignmentHead(nn.Module):
    """Target A = MLP(T), or pooled T, and the temperature tau (Sec. 3.3)."""

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        hidden = config.alignment_width
        if config.alignment_target == "average_pool":
            self.mlp = Reduce("b l (c part) -> b l c", "mean", c=config.token_channels)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(config.input_shape[1], hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, config.token_channels),
            )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text_states: Tensor) -> Tensor:
        """Text states B x L x T, or the queries' B x K x W -> alignment target B x K x C."""
        return self.mlp(text_states)


class TextProjector(nn.Module):
    """Text states -> text latents z_T, FlowTok's source of the flow (modeling/flow_model.py)."""

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        self.config = config
        if config.text_depth and not config.num_queries:
            raise ValueError(
                f"projector.text_depth={config.text_depth} is for learned queries, but text and "
                f"image have {config.text_tokens} tokens each: expected 0, and more of depth"
            )
        num_tokens, width = config.input_shape
        self.shape = (num_tokens, config.token_channels)  # of z_T
        self.tells_text = True  # where its flow starts says what the text is
        self.is_frozen = False
        self.gives_alignment = True  # False where no loss reads it (modeling/losses.py)

        # In front of the blocks. Queries have whitened and embedded what they read.
        self.whitening = TextWhitening(config.text_width) if config.whiten_text else nn.Identity()
        self.queries = LearnedQueries(config) if config.num_queries else None
        self.embed = nn.Identity()
        if config.width != width:
            self.embed = nn.Linear(width, config.width)
        self.positions = None
        if config.learned_positions:
            self.positions = nn.Parameter(torch.empty(num_tokens, config.width))
            nn.init.normal_(self.positions, std=0.5)

        # Blocks and heads. Post-norm blocks end normalised, pre-norm ones do not.
        self.blocks = nn.ModuleList(ProjectorBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()
        num_moments = 1 if config.fixed_std else 2
        self.to_moments = nn.Linear(config.width, num_moments * config.token_channels)
        self.alignment = AlignmentHead(config)
        inputs = config.text_tokens * config.text_width
        self.linear_skip = LinearSkip(inputs, self.shape) if config.linear_skip else None
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier uniform; beside a linear skip the last layer starts at zero."""
        for module in self.modules():
            init_linear_(module)
        if self.linear_skip is not None:
            nn.init.zeros_(self.to_moments.weight)

    def freeze(self) -> None:
        """Stop training for good: no gradients, eval mode (no dropout)."""
        # The loop puts the whole flow into training mode later: see train.
        self.is_frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TextProjector":
        """Training mode, unless frozen."""
        return super().train(mode and not self.is_frozen)

    def forward(self, text_states: Tensor, sample: bool) -> SourcePass:
        """Training pass, z_T drawn or its mean; one call, so that DDP sees every weight."""
        states = self.gather(text_states)
        features = self.transform(states)
        posterior = self.moments(features, text_states)
        return SourcePass(
            latents=posterior.sample() if sample else posterior.mean,
            features=features,
            mean=posterior.mean,
            logvar=posterior.logvar,
            alignment=self.alignment(states) if self.gives_alignment else None,
            log_temperature=self.alignment.log_temperature,
        )

    def posterior(self, text_states: Tensor) -> Posterior:
        """Text states B x L x T -> distribution of z_T, B x K x C, float32."""
        return self.moments(self.features(text_states), text_states)

    def features(self, text_states: Tensor) -> Tensor:
        """Text states B x L x T -> what the moments are read from, B x K x W."""
        return self.transform(self.gather(text_states))

    def gather(self, text_states: Tensor) -> Tensor:
        """Text states -> what blocks and alignment read: the same, or the queries' B x K x W."""
        found = tuple(text_states.shape[1:])
        expected = (self.config.text_tokens, self.config.text_width)
        if found != expected:
            raise ValueError(f"text states are B x {found}, the projector expects B x {expected}")
        if self.queries is None:
            return text_states
        is_text = find_text(text_states)[:, None, None]  # for all heads and queries
        return self.queries(self.whitening(text_states), is_text)

    def transform(self, x: Tensor) -> Tensor:
        """The blocks, on what `gather` gives: B x K x W."""
        if self.queries is None:
            x = self.embed(self.whitening(x))
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)

    def moments(self, features: Tensor, text_states: Tensor) -> Posterior:
        """Features B x K x W, and the text states for a linear skip -> posterior."""
        # fixed_std takes the place of the log-variance, the linear skip adds to the mean.
        moments = self.to_moments(features)  # B x K x 2C, or C with a fixed deviation
        if self.config.fixed_std:
            logvar = torch.full_like(moments, 2 * math.log(self.config.fixed_std))
            moments = torch.cat([moments, logvar], dim=-1)
        mean, logvar = split_moments(moments)
        if self.linear_skip is not None:
            mean = mean + self.linear_skip(text_states)
        return Posterior(mean, logvar)

    def start(self, text_states: Tensor, noise: Tensor | None) -> Tensor:
        """z_T for sampling, B x L x C: drawn with unit noise of that shape; None: its mean."""
        posterior = self.posterior(text_states)
        return posterior.mean if noise is None else posterior.at(noise)


class NoiseSource(TextProjector):
    """Unit noise: the text is only what the velocity network reads (ordinary flow matching).

    Its weights are a text projector's, so that stage 2 can start them.
    """

    def __init__(self, config: TextProjectorConfig):
        super().__init__(config)
        self.tells_text = False
        # No loss reaches these.
        self.to_moments.requires_grad_(False)
        self.alignment.requires_grad_(False)

    def forward(self, text_states: Tensor, sample: bool) -> SourcePass:
        """Training pass: noise, and the features of the text. sample: has to be true."""
        features = self.features(text_states)
        noise = torch.randn(len(text_states), *self.shape, device=text_states.device)
        return SourcePass(latents=noise, features=features)

    def start(self, text_states: Tensor, noise: Tensor | None) -> Tensor:
        """The noise itself."""
        if noise is None:
            raise ValueError("a flow from noise is sampled with sampling.sample_text_latent=true")
        return noise


# Not in the paper, for small scale and for text of other lengths


class TextWhitening(nn.Module):
    """Text states -> zero mean, unit variance, no correlation, over captions and positions.

    PCA whitening: the identity until `fit`; the measured map is part of the state dict.
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
            # Padding would draw the mean to zero.
            rows = states.flatten(0, 1).double()
            rows = rows[find_text(rows)]
            count += len(rows)
            total = total + rows.sum(0)
            products = products + rows.T @ rows
        mean = total / count

        # Covariance = directions diag(variances) directions^T. Directions below the floor
        # are not amplified further.
        variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        floored = variances.clamp(min=0) + WHITENING_FLOOR * variances.mean()
        self.mean.copy_(mean)
        self.matrix.copy_(directions / floored.sqrt())

    def forward(self, text_states: Tensor) -> Tensor:
        """B x L x T -> B x L x T, float32: the map has large factors."""
        with torch.autocast(text_states.device.type, enabled=False):
            return (text_states.float() - self.mean) @ self.matrix


class LinearSkip(nn.Module):
    """Text states B x L x T -> latents B x K x C: one affine map of all tokens, zero until fitted.

    inputs: L T. shape: (K, C). Float32 in any autocast precision.
    """

    def __init__(self, inputs: int, shape: tuple[int, int]):
        super().__init__()
        # Buffers: part of the state dict, but not trained, or weight decay would undo the map.
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("matrix", torch.zeros(inputs, math.prod(shape)))

    def forward(self, text_states: Tensor) -> Tensor:
        with torch.autocast(text_states.device.type, enabled=False):
            latents = text_states.float().flatten(1) @ self.matrix  # B x KC
            return latents.unflatten(1, self.offset.shape) + self.offset


class LearnedQueries(nn.Module):
    """Text states B x L x T -> B x K x W: K learned queries, and what they find, padding left out.

    Not in the paper, whose text and image both have 77 tokens.
    """

    def __init__(self, config: TextProjectorConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.width))
        text_width = config.width if config.text_depth else config.text_width
        self.norm = nn.LayerNorm(text_width)
        self.attention = CrossAttention(config.width, config.num_heads, text_width)
        nn.init.normal_(self.queries, std=0.5)

        # Over the text
        is_wider = text_width != config.text_width
        self.embed = nn.Linear(config.text_width, text_width) if is_wider else nn.Identity()
        self.blocks = nn.ModuleList(ProjectorBlock(config) for _ in range(config.text_depth))

    def forward(self, text_states: Tensor, mask: Tensor) -> Tensor:
        """mask: B x 1 x 1 x L bool, the states that are no padding."""
        text = self.embed(text_states)
        for block in self.blocks:
            text = block(text, mask)
        queries = self.queries.expand(len(text), -1, -1)  # B x K x W
        return queries + self.attention(queries, self.norm(text), mask)
