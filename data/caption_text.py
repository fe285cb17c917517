"""Captions alone -> batches for the text decoder, from any shards that have captions: of images or of stored tokens.

Images and latents are not decoded. Text states (`text.npy`, see data/token_text.py) are taken along where they are
asked for; whose they are, the caller has to know.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from data.captions import CaptionChoice, Tokenize, collate_text
from data.draws import SampleDraws
from data.filters import SampleFilter
from data.mixture import ReaderConfig, SourceConfig, check_metadata, open_sources
from data.shards import BadSample, ShardStream, build_loader, read_batches


@dataclass
class CaptionTextConfig(ReaderConfig):
    """Shards with captions. Of the filters, those on captions and on the sample's JSON apply."""


def build_caption_loader(
    cfg: CaptionTextConfig,
    tokenize: Tokenize,
    with_states: bool,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> StatefulDataLoader:
    """Endless shuffled batches of one rank; batch_size is per rank. See data.shards for order and resuming.

    "token_ids": B x L int64; "text_states": B x L x W float16 if with_states; "caption", "key": lists of str;
    "skipped": {reason: count} since the last batch of the same worker.
    """
    sources = open_sources(cfg, partial(_decoder, with_states))
    stream = ShardStream(
        sources,
        CaptionCollate(tokenize),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle_buffer=cfg.shuffle_buffer,
        max_bad_share=cfg.max_bad_share,
    )
    return build_loader(stream, cfg.num_workers)


def read_captions(
    cfg: CaptionTextConfig,
    tokenize: Tokenize,
    with_states: bool,
    batch_size: int,
    shards: Sequence[str] | None = None,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass in order, first caption, in this process; batches as above, the last one may be short.

    shards: patterns to read instead of the config's. limit: samples at most.
    """
    sources = open_sources(cfg, partial(_decoder, with_states), shards)
    return read_batches(sources, CaptionCollate(tokenize), batch_size, cfg.max_bad_share, limit)


def _decoder(with_states: bool, source: SourceConfig) -> "CaptionDecode":
    return CaptionDecode(with_states, source.caption_choice(), SampleFilter(source.filters))


@dataclass(frozen=True)
class CaptionDecode:
    """Raw sample -> {"caption", "key"}, and "text_states" L x W float16 with_states."""

    with_states: bool
    captions: CaptionChoice
    filters: SampleFilter

    def __call__(self, sample: dict[str, Any], draws: SampleDraws | None) -> dict[str, Any]:
        caption = self.captions(sample, draws)
        check_metadata(self.filters, sample, caption)
        decoded = {"key": sample["__key__"], "caption": caption}
        return decoded | {"text_states": read_states(sample)} if self.with_states else decoded


def read_states(sample: dict[str, Any]) -> np.ndarray:
    """Text states of a raw sample, L x W float16. BadSample: missing or unreadable."""
    if "text.npy" not in sample:
        raise BadSample("text: missing")
    try:
        states = np.load(io.BytesIO(sample["text.npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise BadSample("text: not an npy file") from None
    if states.dtype != np.float16 or states.ndim != 2:
        raise BadSample("text: not float16 of two axes")
    return states


@dataclass(frozen=True)
class CaptionCollate:
    """Decoded samples -> batch; the tokenizer runs once per batch."""

    tokenize: Tokenize

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate_text(samples, self.tokenize)
        if "text_states" in samples[0]:
            batch["text_states"] = torch.from_numpy(
                np.stack([sample["text_states"] for sample in samples])
            )
        return batch
