"""Captions: where a sample holds them, which one is taken, and the part of a batch that text makes.

A caption key is a sample's extension ("txt": the member is the caption) or "json:field" (a field of the sample's JSON
member: a string, or a list of strings, of which one is drawn). Keys are tried in order.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.bad_samples import BadSample
from data.draws import SampleDraws

Tokenize = Callable[
    [list[str]], torch.Tensor
]  # B captions -> B x L int64; picklable, it runs in the workers

# What captioning models begin with; it says nothing about the image
RECAPTION_OPENING = re.compile(r"^The image (depicts|displays|showcases|features|shows)\b\s*")


@dataclass(frozen=True)
class CaptionChoice:
    """Which of a sample's captions is taken.

    recaption_keys: where re-captioned text lies. It is taken with recaption_probability and loses RECAPTION_OPENING;
    where there is none, the ordinary caption is taken.
    """

    keys: tuple[str, ...]
    recaption_keys: tuple[str, ...] = ()
    recaption_probability: float = 0.0

    def __call__(self, sample: Mapping[str, Any], draws: SampleDraws | None) -> str:
        """A caption, cleaned and not empty. BadSample: there is none.

        draws None, as when a data set is read in order: the first one, re-captioned only if all are.
        """
        captions = []
        if self.recaption_keys and self._is_recaptioned(draws):
            texts = captions_of(sample, self.recaption_keys)
            captions = [
                text
                for text in (RECAPTION_OPENING.sub("", text, count=1) for text in texts)
                if text
            ]
        captions = captions or captions_of(sample, self.keys)
        if not captions:
            raise BadSample("caption: missing")
        return (
            captions[int(draws.caption * len(captions))]
            if draws and len(captions) > 1
            else captions[0]
        )

    def _is_recaptioned(self, draws: SampleDraws | None) -> bool:
        return (
            self.recaption_probability == 1
            if draws is None
            else draws.recaption < self.recaption_probability
        )


def captions_of(sample: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The captions under the first of the keys that has any, cleaned and not empty; [] if none has."""
    for key in keys:
        captions = [
            caption for caption in map(clean_caption, _raw_captions(sample, key)) if caption
        ]
        if captions:
            return captions
    return []


def clean_caption(text: str) -> str:
    """Control characters become spaces, each run of whitespace one space, none at the ends."""
    if not text.isprintable():  # the fast path: nearly every caption is
        # half of a surrogate pair, which JSON escapes can spell, is no character: tokenizers fail on it
        text = text.encode("utf-8", "ignore").decode("utf-8").removeprefix("\ufeff")
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def _raw_captions(sample: Mapping[str, Any], key: str) -> list[str]:
    extension, _, field = key.partition(":")
    if not field:
        try:
            return [sample[extension].decode("utf-8")] if extension in sample else []
        except UnicodeDecodeError:
            return []
    value = (metadata_of(sample) or {}).get(field)
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def metadata_of(sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sample's JSON member, {} if it has none; None if that is no JSON object."""
    try:
        value = json.loads(sample["json"]) if "json" in sample else {}
    except (ValueError, RecursionError):  # not UTF-8, not JSON, JSON nested beyond reason
        return None
    return value if isinstance(value, dict) else None


def check_caption_keys(keys: Sequence[str], name: str = "caption_keys") -> None:
    """ValueError for an empty list or a key that can match nothing."""
    if not keys or isinstance(keys, str):
        raise ValueError(f"{name}: given {keys!r}, expected a list such as ['txt', 'json:caption']")
    for key in keys:
        extension, colon, field = key.partition(":")
        if not extension or (colon and (extension != "json" or not field)):
            raise ValueError(
                f"{name}: {key!r} is neither an extension such as 'txt' nor 'json:field'"
            )


def collate_text(samples: Sequence[Mapping[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
    """Samples with "key" and "caption" -> {"key", "caption": lists; "token_ids": B x L int64 if tokenize is given}."""
    batch: dict[str, Any] = {
        name: [sample[name] for sample in samples] for name in ("key", "caption")
    }
    if tokenize is not None:
        batch["token_ids"] = tokenize(batch["caption"])
    return batch
