"""Captions: where a sample holds them, which one is taken, and the part of a batch that text makes.

A caption key is a sample's extension ("txt": the member is the caption) or "json:field" (a field of
the sample's JSON member: a string, or a list of strings). Keys are tried in order.

A caption that is longer than the text tower's context is cut by its tokenizer, and what is cut is
lost; with window "sentences" each epoch reads another part of it.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch

from data.files import decode_text, load_json
from data.samples import BadSample, SampleDraws, check_fields


class Tokenize(Protocol):
    """What is read of a text tower's tokenizer. Picklable: it runs in the workers."""

    context_length: int  # L

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """B captions -> B x L int64, cut and padded."""

    def num_tokens(self, caption: str) -> int:
        """Tokens of the uncut caption; more than context_length means that it is cut."""


# What captioning models begin with; it says nothing about the image
RECAPTION_OPENING = re.compile(r"^The image (depicts|displays|showcases|features|shows)\b\s*")
# after a full stop and the quotes or brackets that it closes; in Chinese and Japanese without space
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\)\]\u201d\u2019]*\s+|(?<=[\u3002\uff01\uff1f])\s*")
# how bytes that are not UTF-8 were decoded ("surrogateescape")
ESCAPED_BYTES = re.compile("[\udc80-\udcff]")


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
    # what is read of a caption that is longer than the text tower's context. start: its first
    # tokens; sentences: a run of whole sentences that fits, drawn anew each epoch
    window: Literal["start", "sentences"] = "start"

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

        # re-captioned text, if its turn is drawn; in order only if its turn always comes
        if self.recaption_keys:
            draw = draws.recaption if draws is not None else 1 - 1e-9
            if draw < self.recaption_probability:
                texts = captions_of(sample, self.recaption_keys)
                texts = (RECAPTION_OPENING.sub("", text, 1) for text in texts)
                captions = wanted(filter(None, texts))
        # else, or where there is none, the ordinary captions
        captions = captions or wanted(captions_of(sample, self.keys))
        if not captions:
            raise BadSample(unwanted[0] if unwanted else "caption: missing")
        if draws is None or len(captions) == 1:
            return captions[0]
        return captions[int(draws.caption * len(captions))]


def check_caption_keys(keys: Sequence[str], name: str) -> None:
    """Refuse an empty list and a key that can match nothing; ValueError begins with `name`."""
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
    return find_captions(values_at(sample, key) for key in keys)[0]


def values_at(sample: Mapping[str, Any], key: str) -> list[Any]:
    """What lies under a caption key, also what is no caption; bytes that are no text, escaped."""
    extension, _, field_name = key.partition(":")
    if field_name:
        return as_list((metadata_of(sample) or {}).get(field_name))
    return [decode_text(sample[extension], "surrogateescape")] if extension in sample else []


def find_captions(candidates: Iterable[Sequence[Any]]) -> tuple[list[str], list[str]]:
    """(captions of the first candidate that has any, cleaned; why other values are none)."""
    captions, reasons = [], []
    for values in candidates:
        for value in values:
            if not isinstance(value, str | None):
                reasons.append("caption: no text")
            elif value and ESCAPED_BYTES.search(value):
                reasons.append("caption: not UTF-8")
            elif text := clean_caption(value or ""):
                captions.append(text)
            else:
                reasons.append("caption: missing")
        if captions:
            break
    return captions, reasons


def clean_caption(text: str) -> str:
    """Control characters become spaces, each run of whitespace one space, none at the ends."""
    # nearly every caption is printable: no letter of it has to be looked at
    if not text.isprintable():
        # half of a surrogate pair, which JSON escapes can spell, is no character: tokenizers fail
        # on it
        text = text.encode("utf-8", "ignore").decode("utf-8").removeprefix("\ufeff")
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def strings(value: Any) -> list[str]:
    """The captions in a JSON value: a string, or a list with strings."""
    return [text for text in as_list(value) if isinstance(text, str)]


def as_list(value: Any) -> list[Any]:
    """The values of a JSON field that may hold one or a list; none if it is absent or null."""
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def metadata_of(sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sample's JSON member, {} if it has none; None if that is no JSON object."""
    value = load_json(sample["json"]) if "json" in sample else {}
    return value if isinstance(value, dict) else None


# ------------------------------------------------------------------------------ the tower's context


def is_cut(caption: str, tokenize: Tokenize) -> bool:
    """Whether the text tower does not read all of a caption."""
    length = tokenize.context_length
    # no token is less than a byte: most captions need not be tokenized for this; 2: start and end
    return len(caption.encode()) + 2 > length and tokenize.num_tokens(caption) > length


def sentences_that_fit(caption: str, draw: float, tokenize: Tokenize) -> str:
    """A caption, or the part of a longer one that a draw 0..1 chooses: whole sentences that fit.

    The parts to choose from are all runs of sentences that no further sentence would fit into, so
    that each sentence is in one. One that is longer than the context is a run of its own, and cut.
    """
    if not is_cut(caption, tokenize):
        return caption
    ends = {match.end() for match in SENTENCE_END.finditer(caption)}
    bounds = sorted({0, len(caption)} | ends)
    # of sentences that are next to each other, the tokens add up
    num_around = tokenize.num_tokens("")
    sizes = [tokenize.num_tokens(caption[a:b]) - num_around for a, b in pairwise(bounds)]
    room = tokenize.context_length - num_around
    # a run that ends where the one before it does would be a part of that one
    runs: list[tuple[int, int]] = []
    for first in range(len(sizes)):
        end = first + 1
        while end < len(sizes) and sum(sizes[first : end + 1]) <= room:
            end += 1
        if not runs or end > runs[-1][1]:
            runs.append((first, end))
    first, end = runs[int(draw * len(runs))]
    return caption[bounds[first] : bounds[end]].strip()


def collate_text(samples: Sequence[Mapping[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
    """Lists of the samples' "key" and "caption"; with a tokenizer also what the tower reads.

    That is "token_ids", B x L int64, and "captions_cut", the share 0..1 of captions that it cuts;
    "caption" is then the part that fits, of samples with a "window" (a draw, see take_caption).
    """
    batch: dict[str, Any] = {
        name: [sample[name] for sample in samples] for name in ("key", "caption")
    }
    if tokenize is not None:
        for index, sample in enumerate(samples):
            if "window" in sample:
                text = sentences_that_fit(sample["caption"], sample["window"], tokenize)
                batch["caption"][index] = text
        batch["token_ids"] = tokenize(batch["caption"])
        num_cut = sum(is_cut(caption, tokenize) for caption in batch["caption"])
        batch["captions_cut"] = torch.tensor(num_cut / len(samples))
    return batch
