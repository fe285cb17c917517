"""Captions: where a sample holds its caption, and the part of a batch that text makes.

A caption key is a sample's extension ("txt": the member is the caption) or "json:field" (a string field of the
sample's JSON member). Keys are tried in order.
"""

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from data.shards import BadSample

Tokenize = Callable[[list[str]], torch.Tensor]  # B captions -> B x L int64; picklable, it runs in the workers


def caption_of(sample: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first non-empty caption among `keys`, cleaned; BadSample("caption: missing") if there is none."""
    for key in keys:
        caption = clean_caption(_raw_caption(sample, key))
        if caption:
            return caption
    raise BadSample("caption: missing")


def clean_caption(text: str) -> str:
    """Control characters become spaces, each run of whitespace one space, none at the ends."""
    if not text.isprintable():  # the fast path: nearly every caption is
        # half of a surrogate pair, which JSON escapes can spell, is no character: tokenizers fail on it
        text = text.encode("utf-8", "ignore").decode("utf-8").removeprefix("\ufeff")
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def _raw_caption(sample: Mapping[str, Any], key: str) -> str:
    extension, _, field = key.partition(":")
    try:
        text = sample.get(extension, b"").decode("utf-8")
        if not field:
            return text
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, JSON nested beyond reason
        return ""
    caption = value.get(field) if isinstance(value, dict) else None
    return caption if isinstance(caption, str) else ""


def check_caption_keys(keys: Sequence[str]) -> None:
    """ValueError for an empty list or a key that can match nothing."""
    if not keys or isinstance(keys, str):
        raise ValueError(f"caption_keys: given {keys!r}, expected a list such as ['txt', 'json:caption']")
    for key in keys:
        extension, colon, field = key.partition(":")
        if not extension or (colon and (extension != "json" or not field)):
            raise ValueError(f"caption_keys: {key!r} is neither an extension such as 'txt' nor 'json:field'")


def collate_text(samples: Sequence[Mapping[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
    """Samples with "key" and "caption" -> {"key", "caption": lists; "token_ids": B x L int64 if tokenize is given}."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in ("key", "caption")}
    if tokenize is not None:
        batch["token_ids"] = tokenize(batch["caption"])
    return batch
