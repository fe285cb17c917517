"""Config of what a stage reads: one data set, or several that are mixed by weight; captions, filters, workers.

    data:                                  data:
      shards: [cc12m/*.tar]                  sources:
                                               cc12m: {shards: [cc12m/*.tar], weight: 2}
                                               journeydb:
                                                 shards: ["https://host/journeydb-{000..999}.tar"]
                                                 filters: {}      # synthetic: none, whatever data.filters says

On the command line: data.sources.cc12m.weight=3, and weight 0 leaves a source out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.bad_samples import BadSample
from data.captions import CaptionChoice, check_caption_keys, metadata_of
from data.filters import FilterConfig, SampleFilter
from data.shards import Decode, Source
from data.tar import check_pipes, expand_shards

ONLY_SOURCE = ""  # the name of the source that `shards` makes
NO_FILTERS = FilterConfig()
SHARED = ("caption_keys", "recaption_keys", "recaption_probability", "filters")


@dataclass
class SourceConfig:
    """One data set of a mixture. null: as in the section that the source is part of."""

    # as there
    shards: list[str] = field(default_factory=list)
    # of the usable samples, the source's share is weight / sum of all weights. 0: the source is not read
    weight: float = 1.0
    caption_keys: list[str] | None = None
    recaption_keys: list[str] | None = None
    recaption_probability: float | None = None
    # as a whole: a filter that is not named here is off, also if the section has it
    filters: FilterConfig | None = None

    def caption_choice(self) -> CaptionChoice:
        """Only once nothing is null, see ReaderConfig.full_sources."""
        return CaptionChoice(
            tuple(self.caption_keys), tuple(self.recaption_keys), self.recaption_probability
        )


@dataclass
class ReaderConfig:
    """What the readers of images and of stored tokens share."""

    # tar files: paths, `x-{000..010}.tar`, globs, http(s) URLs, `pipe:COMMAND` (needs allow_pipe)
    shards: list[str] = field(default_factory=list)
    # in place of shards: several data sets by name, drawn by weight
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # where the caption lies, tried in order: an extension, or json:field (a string, or a list: one is drawn)
    caption_keys: list[str] = field(default_factory=lambda: ["txt", "json:caption"])
    # where re-captioned text lies, likewise (FlowTok's release: recap_txt); empty: it is not used
    recaption_keys: list[str] = field(default_factory=list)
    # of taking it where there is one
    recaption_probability: float = 0.95
    # which samples are good enough
    filters: FilterConfig = field(default_factory=FilterConfig)
    # whether `pipe:` shards may run their shell commands: only if you trust whoever wrote them
    allow_pipe: bool = False
    # of the last 1000 samples of a reader; more bad ones (unreadable, incomplete) stop the run, filtered ones do not
    # count. 1: never stop
    max_bad_share: float = 0.05
    # samples; each worker shuffles within blocks of so many and holds one block per source in memory, as file bytes
    # (stored tokens: 5 kB each at 77 x 16, 120 kB with text states). 1: in order
    shuffle_buffer: int = 2000
    # worker processes per rank; 0: read in the training process
    num_workers: int = 4

    def validate(self) -> None:
        """ValueError naming the field, the value and what is expected. Whether the files exist is not looked at."""
        if self.shards and self.sources:
            raise ValueError("shards, sources: given both, expected one of them")
        expected = {
            "shards": (
                bool(self.shards or self.sources),
                "at least one path or pattern, or sources",
            ),
            "max_bad_share": (0 < self.max_bad_share <= 1, "> 0 and <= 1 (1: never stop)"),
            "shuffle_buffer": (self.shuffle_buffer >= 0, "samples >= 0"),
            "num_workers": (self.num_workers >= 0, "processes >= 0"),
        }
        check_fields(self, expected)
        for name, source in self.full_sources().items():
            try:
                _check_source(source, self.allow_pipe)
            except ValueError as error:
                raise ValueError(
                    f"sources.{name}.{error}" if self.sources else str(error)
                ) from None
        if not any(source.weight for source in self.full_sources().values()):
            raise ValueError("sources: all weights are 0, expected one above it")

    def full_sources(self) -> dict[str, SourceConfig]:
        """All sources by name, what is null in them filled in."""
        shared = self.shared()
        if not self.sources:
            return {ONLY_SOURCE: SourceConfig(shards=self.shards, **shared)}
        return {
            name: replace(
                source,
                **{key: value for key, value in shared.items() if getattr(source, key) is None},
            )
            for name, source in self.sources.items()
        }

    def shared(self) -> dict[str, Any]:
        """What a source has from here unless it says otherwise."""
        return {name: getattr(self, name) for name in SHARED}

    def all_shards(self) -> list[str]:
        """The patterns of all sources that are read."""
        return [
            pattern
            for source in self.full_sources().values()
            if source.weight
            for pattern in source.shards
        ]


def check_fields(config: object, expected: dict[str, tuple[bool, str]]) -> None:
    """ValueError for the first field that does not hold. expected: {field: (whether it holds, what is expected)}."""
    for name, (holds, meaning) in expected.items():
        if not holds:
            raise ValueError(f"{name}: given {getattr(config, name)!r}, expected {meaning}")


def _check_source(source: SourceConfig, allow_pipe: bool) -> None:
    expected = {
        "shards": (bool(source.shards), "at least one path or pattern"),
        "weight": (0 <= source.weight < math.inf, "a finite number >= 0"),
        "recaption_probability": (0 <= source.recaption_probability <= 1, "0..1"),
    }
    check_fields(source, expected)
    check_pipes(source.shards, allow_pipe)
    check_caption_keys(source.caption_keys)
    if source.recaption_keys:
        check_caption_keys(source.recaption_keys, "recaption_keys")
    try:
        source.filters.validate()
    except ValueError as error:
        raise ValueError(f"filters.{error}") from None


def open_sources(
    config: ReaderConfig,
    decoder: Callable[[SourceConfig], Decode],
    patterns: Sequence[str] | None = None,
) -> list[Source]:
    """What a config names, decoder(source) decoding each source's samples; sources of weight 0 are left out.

    patterns: shards to read instead, as one source with the section's own captions and filters.
    ValueError: the config, or files that do not exist.
    """
    config.validate()
    named = config.full_sources()
    if patterns is not None:
        named = {ONLY_SOURCE: SourceConfig(shards=list(patterns), **config.shared())}
    return [
        Source(
            name,
            tuple(expand_shards(source.shards, config.allow_pipe)),
            decoder(source),
            source.weight,
        )
        for name, source in named.items()
        if source.weight
    ]


def check_metadata(filters: SampleFilter, sample: Mapping[str, Any], caption: str) -> None:
    """What the filters say before an image is decoded. BadSample: dropped, or its JSON is needed and cannot be read."""
    if filters.config == NO_FILTERS:
        return
    metadata = metadata_of(sample) if filters.needs_metadata else {}
    if metadata is None:
        raise BadSample("json: unreadable")
    filters.check_metadata(caption, metadata)
