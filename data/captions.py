"""Captions: where a sample holds them, which one is taken, and the part of a batch that text makes.

A caption key is a sample's extension ("txt": the member is the caption) or "json:field" (a field of
the sample's JSON member: a string, or a list of strings). Keys are tried in order.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data.files import decode_text
from data.samples import BadSample, SampleDraws, check_fields

# B captions -> B x L int64; picklable, it runs in the workers
Tokenize = Callable[[list[str]], torch.Tensor]

# What captioning models begin with; it says nothing about the image
RECAPTION_OPENING = re.compile(r"^The image (depicts|displays|showcases|features|shows)\b\s*")


@dataclass
class CaptionConfig:
    """Which of a sample's captions is taken."""

    # where captions lie, tried in order: an extension, or json:field (a string, or a list: one is
    # drawn each epoch)
    keys: list[str] = field(default_factory=lambda: ["txt", "json:caption"])
    # where re-captioned text lies, likewise (FlowTok's release: recap_txt); empty: it is not used
    recaption_keys: list[str] = field(default_factory=list)
    # of taking it where there is one; it loses its opening "The image shows"
    recaption_probability: float = 0.95

    def __post_init__(self):
        check_caption_keys(self.keys, "keys")
        if self.recaption_keys:
            check_caption_keys(self.recaption_keys, "recaption_keys")
        is_probability = 0 <= self.recaption_probability <= 1
        check_fields(self, recaption_probability=(is_probability, "0..1"))

    def choose(
        self,
        sample: Mapping[str, Any],
        draws: SampleDraws | None,
        fault: Callable[[str], str | None] = lambda caption: None,
    ) -> str:
        """A caption, cleaned and not empty.

        draws None, as when a data set is read in order: the first one, re-captioned only if all
        are. fault: why a caption is not wanted, None if it is (FilterConfig.caption_fault).

        Raises:
            BadSample: there is none, or none that is wanted.
        """
        captions, unwanted = [], []

        def wanted(texts: Iterable[str]) -> list[str]:
            faults = [(text, fault(text)) for text in texts]
            unwanted.extend(reason for _, reason in faults if reason)
            return [text for text, reason in faults if not reason]

        if self.recaption_keys:
            draw = draws.recaption if draws is not None else 1 - 1e-9
            if draw < self.recaption_probability:
                texts = captions_of(sample, self.recaption_keys)
                texts = (RECAPTION_OPENING.sub("", text, 1) for text in texts)
                captions = wanted(filter(None, texts))
        captions = captions or wanted(captions_of(sample, self.keys))
        if not captions:
            raise BadSample(unwanted[0] if unwanted else "caption: missing")
        if draws is None or len(captions) == 1:
            return captions[0]
        return captions[int(draws.caption * len(captions))]


def check_caption_keys(keys: Sequence[str], name: str) -> None:
    """Refuse an empty list and a key that can match nothing.

    Raises:
        ValueError: it begins with `name`.
    """
    if not keys or isinstance(keys, str):
        raise ValueError(f"{name}: given {keys!r}, expected a list such as ['txt', 'json:caption']")
    for key in keys:
        extension, colon, field_name = key.partition(":")
        if not extension or (colon and (extension != "json" or not field_name)):
            raise ValueError(
                f"{name}: given {key!r}, expected an extension like 'txt', or 'json:field'"
            )


def captions_of(sample: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The captions under the first of the keys that has any, cleaned; [] if none has."""
    for key in keys:
        captions = list(filter(None, map(clean_caption, _raw_captions(sample, key))))
        if captions:
            return captions
    return []


def clean_caption(text: str) -> str:
    """Control characters become spaces, each run of whitespace one space, none at the ends."""
    if not text.isprintable():  # the fast path: nearly every caption is
        # half of a surrogate pair, which JSON escapes can spell, is no character: tokenizers fail
        # on it
        text = text.encode("utf-8", "ignore").decode("utf-8").removeprefix("\ufeff")
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def _raw_captions(sample: Mapping[str, Any], key: str) -> list[str]:
    extension, _, field_name = key.partition(":")
    if field_name:
        return strings((metadata_of(sample) or {}).get(field_name))
    try:
        return [decode_text(sample[extension])] if extension in sample else []
    except UnicodeDecodeError:
        return []


def strings(value: Any) -> list[str]:
    """The captions in a JSON value: a string, or a list with strings."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def metadata_of(sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sample's JSON member, {} if it has none; None if that is no JSON object."""
    try:
        value = json.loads(sample["json"]) if "json" in sample else {}
    except (ValueError, RecursionError):  # not UTF-8, not JSON, JSON nested beyond reason
        return None
    return value if isinstance(value, dict) else None


def collate_text(samples: Sequence[Mapping[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
    """Lists of the samples' "key" and "caption"; "token_ids" B x L int64 if tokenize is given."""
    batch: dict[str, Any] = {
        name: [sample[name] for sample in samples] for name in ("key", "caption")
    }
    if tokenize is not None:
        batch["token_ids"] = tokenize(batch["caption"])
    return batch
