"""The text decoder of image to text: z_T -> CLIP token ids, all positions at once (Sec. 4.1, 5.1).

In: z_T B x L x C. Out: a distribution over token ids for each of the L positions. It is trained
with the projector as an autoencoder of captions, by cross-entropy, then frozen. Only positions up
to and including a caption's end token count: the padding after it is most of a batch (a COCO
caption fills 13 of 77) and always the same, so the loss would be small before a word is right.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import check_heads, check_least, check_share, init_linear_
from .text_projector import ProjectorBlock, TextProjector, TextProjectorConfig

CLIP_VOCABULARY = 49408


@dataclass
class TextDecoderConfig:
    """Sizes of the decoder; the defaults are the projector's (the paper: six blocks, similar)."""

    width: int = 768
    depth: int = 6
    num_heads: int = 8
    mlp_width: int = 1024
    dropout: float = 0.1
    pre_norm: bool = False  # x + f(ln(x)) instead of ln(x + f(x))
    # Ids it can give. Below 49408, all of CLIP's: the most frequent ones of the training captions,
    # which are counted at the start and kept with the weights. The head is most of the work of a
    # narrow decoder.
    vocabulary_size: int = CLIP_VOCABULARY

    def __post_init__(self):
        check_heads(self)
        check_share(self, "dropout")
        size = self.vocabulary_size
        if not 2 <= size <= CLIP_VOCABULARY:
            raise ValueError(f"vocabulary_size must be in 2..{CLIP_VOCABULARY}, got {size}")


@dataclass
class TextDecoderLossConfig:
    """Losses beside the cross-entropy. With a KL a draw of z_T is decoded, else its mean."""

    kl_weight: float = 1e-4
    # Deviation of noise on the z_T that is decoded; not in the paper. A z_T at the end of a flow is
    # never exact, and a frozen projector without a KL has no noise of its own.
    latent_noise: float = 0.0

    def __post_init__(self):
        check_least(self, 0, "kl_weight", "latent_noise")


class TextDecoder(nn.Module):
    """z_T -> logits over its vocabulary; `token_ids` has the CLIP id of each class, ascending."""

    def __init__(self, config: TextDecoderConfig, text_tokens: int, token_channels: int):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(token_channels, config.width)
        self.positions = nn.Parameter(torch.empty(text_tokens, config.width))
        self.blocks = nn.ModuleList(ProjectorBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()
        self.to_logits = nn.Linear(config.width, config.vocabulary_size)
        self.register_buffer("token_ids", torch.arange(config.vocabulary_size))
        for module in self.modules():
            init_linear_(module)
        nn.init.normal_(self.positions, std=0.5)
        nn.init.normal_(self.to_logits.weight, std=0.02)

    @torch.no_grad()
    def fit_vocabulary(self, batches: Iterable[Tensor]) -> int:
        """Choose the most frequent ids of batches of token ids; returns how many did not fit."""
        counts = torch.zeros(CLIP_VOCABULARY, dtype=torch.int64)
        for ids in batches:
            counts += torch.bincount(ids.flatten().cpu(), minlength=CLIP_VOCABULARY)
        # Ties go to the smaller id; where fewer occur than fit, unused ids fill up.
        order = torch.argsort(counts, descending=True, stable=True)
        size = self.config.vocabulary_size
        self.token_ids.copy_(order[:size].sort().values)
        return int((counts[order[size:]] > 0).sum())

    def hidden(self, latents: Tensor) -> Tensor:
        """z_T B x L x C -> B x L x W, in front of the head."""
        x = self.embed(latents) + self.positions  # B x L x W
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)

    def classes_of(self, token_ids: Tensor) -> Tensor:
        """CLIP token ids -> classes, same shape; -1 for an id that is not in the vocabulary."""
        classes = torch.searchsorted(self.token_ids, token_ids).clamp(max=len(self.token_ids) - 1)
        return torch.where(self.token_ids[classes] == token_ids, classes, -1)

    def forward(self, latents: Tensor) -> Tensor:
        """z_T B x L x C -> the likeliest CLIP token ids, B x L."""
        return self.token_ids[self.to_logits(self.hidden(latents)).argmax(-1)]


class DecoderPass(NamedTuple):
    """What the losses of stage text_decoder need; a named tuple, so that DDP sees its tensors."""

    logits: Tensor  # N x V, of the counted positions
    classes: Tensor  # N, -1 for ids that are not in the vocabulary
    mean: Tensor  # B x L x C, of z_T
    logvar: Tensor  # B x L x C


class TextAutoencoder(nn.Module):
    """Projector and text decoder: what stage text_decoder trains, and saves together."""

    def __init__(self, projector: TextProjectorConfig, decoder: TextDecoderConfig):
        super().__init__()
        self.projector = TextProjector(projector)
        # It has no loss here: DDP would wait for its gradients.
        self.projector.alignment.requires_grad_(False)
        self.decoder = TextDecoder(decoder, projector.text_tokens, projector.token_channels)

    def forward(
        self, text_states: Tensor, counted: Tensor, token_ids: Tensor, sample: bool, noise: float
    ) -> DecoderPass:
        """Training pass over the counted positions.

        Args:
            text_states: B x L x T.
            counted: N indices into the B x L positions, see `counted_positions`.
            token_ids: the N ids there.
            sample: decode a draw of z_T instead of its mean.
            noise: deviation of what is added to it.
        """
        posterior = self.projector.posterior(text_states)
        latents = posterior.sample() if sample else posterior.mean  # B x L x C
        if noise:
            latents = latents + noise * torch.randn_like(latents)
        hidden = self.decoder.hidden(latents).flatten(0, 1)[counted]  # N x W
        logits = self.decoder.to_logits(hidden)  # N x V
        classes = self.decoder.classes_of(token_ids)
        return DecoderPass(logits, classes, posterior.mean, posterior.logvar)


def inside_captions(token_ids: Tensor) -> Tensor:
    """Which positions are not padding, B x L -> bool: up to the end token, CLIP's largest id."""
    places = torch.arange(token_ids.shape[1], device=token_ids.device)
    return places <= token_ids.argmax(-1, keepdim=True)


def counted_positions(token_ids: Tensor) -> Tensor:
    """Indices into the flattened B x L positions of those up to and including the end tokens."""
    return inside_captions(token_ids).flatten().nonzero().squeeze(1)


def caption_losses(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy and share of right tokens: logits N x V, classes N."""
    # A token that is not in the vocabulary (-1) teaches nothing and counts as wrong.
    total = F.cross_entropy(logits.float(), classes, ignore_index=-1, reduction="sum")
    return {
        "cross_entropy": total / (classes >= 0).sum().clamp(min=1),
        "token_accuracy": (logits.argmax(-1) == classes).float().mean(),
    }


def correct_tokens(predicted: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(right tokens, counted tokens) of each caption: B x L ids each -> B each."""
    # The start token is left out: it is the same everywhere.
    inside = inside_captions(token_ids)
    inside[:, 0] = False
    return ((predicted == token_ids) & inside).sum(1), inside.sum(1)
