"""The frozen text encoder: captions to text states; CLIP's text tower (paper, Sec. 3.2, 4.1).

In: token ids B x L from its tokenizer, which cuts and pads. Out: text states B x L x T, for CLIP
the last hidden states after the final LayerNorm, causal mask kept, no projection. All other parts
know a text encoder by the protocol `TextEncoder` only; `load_text_encoder` says which one a config
means. Those of the package transformers: modeling/transformers_text.py.

Precision: the weights stay float32. Under a run's bf16 autocast the matrix products are bf16,
LayerNorms and the sum over the blocks float32; a tower cast to bf16 would lose the latter and save
only the cast of its weights.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from .clip_weights import (
    ClipWeights,
    clip_tokenizer,
    has_quick_gelu,
    load_clip,
    open_clip,
)
from .layers import check_least, fingerprint


@dataclass
class TextEncoderConfig(ClipWeights):
    """Which text tower. The release's is the default: 77 tokens, width 768."""

    # Of open_clip, or of the package transformers (T5, CLIP, SigLIP), whose `model` is a folder or
    # a name on the hub
    family: Literal["open_clip", "transformers"] = "open_clip"
    # Of transformers: tokens to which captions are cut and padded; 0: as many as the tower has
    # places for, 77 for T5, which has no limit
    context_length: int = 0
    key: ClassVar[str] = "text_encoder"
    title: ClassVar[str] = "the text tower"

    def __post_init__(self):
        check_least(self, 0, "context_length")
        if self.family == "open_clip" and self.context_length:
            raise ValueError("context_length is set, but only family=transformers reads it")


class Tokenizer(Protocol):
    """Captions -> token ids B x L. Picklable: data workers have a copy."""

    context_length: int  # L

    def __call__(self, captions: list[str]) -> Tensor:
        """Ids of each caption, cut and padded to L."""

    def num_tokens(self, caption: str) -> int:
        """Tokens of the uncut caption; more than context_length means it is cut."""

    def decode(self, token_ids: Tensor) -> str:
        """The text that a row of ids stands for."""


class TextEncoder(Protocol):
    """A frozen module that turns token ids into text states.

    The states have no mask beside them: an encoder that masks padding finds it in the ids, and
    gives zeros there, so that stored states say it, too.
    """

    tokenize: Tokenizer
    shape: tuple[int, int]  # L x T of the text states
    identity: str  # fingerprint; another one is another encoder
    masks_padding: bool  # whether padding is hidden, and has zeros for states

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Token ids B x L -> text states B x L x T (float32, or the autocast precision)."""


class ClipTokenizer:
    """CLIP's BPE: ids cut to the context length with the end token kept, padded with 0."""

    def __init__(self, context_length: int):
        self.context_length = context_length
        self._tokenizer = open_clip.SimpleTokenizer(context_length=context_length)

    def __call__(self, captions: list[str]) -> Tensor:
        return self._tokenizer(captions)

    def num_tokens(self, caption: str) -> int:
        return len(self._tokenizer.encode(caption)) + 2  # start and end

    def decode(self, token_ids: Tensor) -> str:
        tokenizer = self._tokenizer
        ids = [i for i in token_ids.tolist() if i != tokenizer.sot_token_id]
        if tokenizer.eot_token_id in ids:
            # Padding follows the end token; a 0 before it is an exclamation mark.
            ids = ids[: ids.index(tokenizer.eot_token_id)]
        else:
            # Predicted ids may lack the end token.
            ids = [i for i in ids if i != 0]
        return tokenizer.decode(ids).strip()


class TextTokenizer(ClipTokenizer):
    """That of a model of open_clip, at the model's context length."""

    def __init__(self, config: TextEncoderConfig):
        self.config = config
        self._tokenizer = clip_tokenizer(config)
        # What follows counts and cuts by CLIP's start and end tokens.
        if not hasattr(self._tokenizer, "sot_token_id"):
            raise ValueError(f"text_encoder.model {config.model} has no CLIP tokenizer")
        self.context_length: int = self._tokenizer.context_length


class ClipTextEncoder(nn.Module):
    """The text half of an open_clip model, frozen and in eval mode: a TextEncoder."""

    masks_padding = False

    def __init__(self, clip: nn.Module, tokenize: Tokenizer | None = None):
        super().__init__()
        # CustomTextCLIP keeps the tower in .text, CLIP in itself.
        tower = getattr(clip, "text", clip)
        if not hasattr(tower, "token_embedding"):
            raise ValueError(f"{type(tower).__name__} is no CLIP text tower: no token embedding")
        self.tokenize = tokenize
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        # Frozen for good: the stages store states and compare fingerprints of them.
        self.requires_grad_(False).eval()

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.positional_embedding.shape)

    @cached_property
    def identity(self) -> str:
        # The weights do not show the activation.
        return fingerprint(self, b"quick_gelu" if has_quick_gelu(self.transformer) else b"")

    def train(self, mode: bool = True) -> "ClipTextEncoder":
        """Stay in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.token_embedding(token_ids) + self.positional_embedding  # B x L x T
        x = self.transformer(x, attn_mask=self.attn_mask)
        return self.ln_final(x)


def load_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Load the frozen text encoder, in float32; ValueError as load_clip or load_tower."""
    if config.family == "transformers":
        from .transformers_text import load_tower  # it imports this file

        return load_tower(config)
    # Another tokenizer than CLIP's is refused before weights are downloaded.
    tokenize = TextTokenizer(config)
    return ClipTextEncoder(load_clip(config), tokenize)
