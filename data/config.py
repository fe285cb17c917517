"""Config of what a stage reads: one data set, or several mixed by weight; captions, filters.

    data:                                  data:
      shards: [cc12m/*.tar]                  sources:
                                               cc12m: {shards: [cc12m/*.tar], weight: 2}
                                               journeydb:
                                                 shards: ["https://host/journeydb-{000..999}.tar"]
                                                 filters: {}  # none, whatever data.filters says

On the command line: data.sources.cc12m.weight=3, and weight 0 leaves a source out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from data.captions import CaptionConfig
from data.filters import FilterConfig
from data.samples import check_fields
from data.shards import Source
from data.tar import expand_shards

ONLY_SOURCE = ""  # the name of the source that `shards` makes


@dataclass
class SourceConfig:
    """One data set of a mixture."""

    # tar files, as in ReaderConfig.shards
    shards: list[str] = field(default_factory=list)
    # of the usable samples, the source's share is weight / sum of all weights. 0: the source is not
    # read
    weight: float = 1.0
    # null: as in the section that the source is part of; else as a whole, with defaults for what is
    # not named
    captions: CaptionConfig | None = None
    filters: FilterConfig | None = None

    def __post_init__(self):
        check_fields(
            self,
            shards=(bool(self.shards), "at least one path or pattern"),
            weight=(0 <= self.weight < math.inf, "a finite number >= 0"),
        )


@dataclass
class ReaderConfig:
    """What the readers of images, of stored tokens and of captions share."""

    # tar files: paths, `x-{000..010}.tar`, globs, URLs (see data/storage.py)
    shards: list[str] = field(default_factory=list)
    # in place of shards: several data sets by name, drawn by weight
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # which of a sample's captions is taken
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    # which samples are good enough
    filters: FilterConfig = field(default_factory=FilterConfig)
    # of the last 1000 samples of a reader; more bad ones (unreadable, incomplete) stop the run,
    # filtered ones do not count. 1: never stop
    max_bad_share: float = 0.05
    # samples; each worker shuffles within blocks of this size and holds one block per source in
    # memory, as file bytes (stored tokens: 5 kB each at 77 x 16, 120 kB with text states). 1: in
    # order
    shuffle_buffer: int = 2000
    # worker processes per rank; 0: read in the training process
    num_workers: int = 4

    def __post_init__(self):
        check_fields(
            self,
            max_bad_share=(0 < self.max_bad_share <= 1, "> 0 and <= 1 (1: never stop)"),
            shuffle_buffer=(self.shuffle_buffer >= 0, "samples >= 0"),
            num_workers=(self.num_workers >= 0, "processes >= 0"),
        )

    def check(self) -> None:
        """Refuse a stage's `data` that names no data. Whether the files exist is not looked at.

        Raises:
            ValueError: naming the field.
        """
        if bool(self.shards) == bool(self.sources):
            raise ValueError(
                f"data.shards, data.sources: expected one of them, given {self.shards} and "
                f"{list(self.sources)}"
            )
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ValueError("data.sources: all weights are 0, expected one above it")

    def full_sources(self) -> dict[str, SourceConfig]:
        """All sources that are read, by name, with captions and filters filled in."""
        sources = self.sources or {ONLY_SOURCE: SourceConfig(self.shards)}
        return {
            name: replace(
                source,
                captions=source.captions or self.captions,
                filters=source.filters or self.filters,
            )
            for name, source in sources.items()
            if source.weight
        }

    def has_several_captions(self) -> bool:
        """Whether a sample's caption may be another one in the next epoch."""
        captions = [source.captions for source in self.full_sources().values()]
        return any(
            c.recaption_keys or "json:captions" in c.keys or c.window == "sentences"
            for c in captions
        )

    def all_shards(self) -> list[str]:
        """The patterns of all sources that are read."""
        return [pattern for source in self.full_sources().values() for pattern in source.shards]


def open_sources(
    config: ReaderConfig, decode: Callable, shards: Sequence[str] | None = None
) -> list[Source]:
    """What a config names, decode(SourceConfig, sample, draws) decoding it.

    shards: patterns to read instead, as one source with the section's own captions and filters.

    Raises:
        ValueError: the config, or files that do not exist.
    """
    if shards is not None:
        config = replace(config, shards=list(shards), sources={})
    config.check()
    return [
        Source(name, tuple(expand_shards(source.shards)), partial(decode, source), source.weight)
        for name, source in config.full_sources().items()
    ]
