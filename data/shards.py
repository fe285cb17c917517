"""An endless, resumable stream of batches from tar shards: who reads which sample, in which order.

Who reads what: readers = processes x dataloader workers. With at least as many shards as readers,
reader r takes shards r, r + readers, ... of the epoch's order; with fewer, every reader walks all
shards and keeps sample j of the epoch when j % readers == r. Either way each sample is read once
per epoch over all readers. Of several sources, each has its own epochs; a reader draws by weight
which one gives its next usable sample.

Determinism: what a reader reads in an epoch, in which order, is a pure function of (seed, epoch),
of the shards and of rank, num_processes, num_workers and shuffle_buffer; what is drawn for a sample
(data.samples) only of (seed, epoch, key); which source comes next of (seed, reader, number of the
sample) and of the weights. Nothing depends on time, on speed, or on a global generator.

Position: samples are shuffled inside blocks. A state holds, for each source, the number of samples
consumed in the epoch and where in the tars the current block starts, so that a resume re-reads at
most one block of each source and decodes nothing that it skips. A shard that breaks off takes one
place in the order for all that it did not give, so that positions stay exact if it fails again.
"""

import itertools
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from data.samples import BadSample, SampleCounter, SampleDraws, members_of
from data.storage import ShardError, is_remote, open_shard
from data.tar import one_form, scan_tar
from data.workers import share_batch, start_worker, with_short_errors

PREFETCH_BATCHES = 2  # batches that each worker keeps ready
DRAWS_PER_BLOCK = 1024  # of sources, made at once
AGAIN = "__again__"  # in a raw sample whose key came before in its shard
LOST_EPOCHS = 10  # in a row in which a reader can read none of its shards; in each it has others
DATA_SETTINGS = ("seed", "num_sources", "num_shards", "shard_names_crc32")

# (raw sample, its random numbers; None: read in order, nothing drawn) -> decoded; may raise
# BadSample
Decode = Callable[[dict[str, Any], SampleDraws | None], dict[str, Any]]
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
# a sample as its tar has it, or why all that a shard did not give is missing
Raw = dict[str, Any] | ShardError


@dataclass(frozen=True)
class Source:
    """One data set: its shards, how samples are decoded, its share (over the sum of weights)."""

    name: str
    shards: tuple[str, ...]
    decode: Decode
    weight: float = 1.0


class NoUsableSample(ValueError):
    """Shards were read to their end and gave nothing."""


class Position(NamedTuple):
    """Where a reader stands in a source, and where the block starts that it is in."""

    epoch: int = 0
    consumed: int = 0  # samples of this reader, in the shuffled order, bad ones included
    shard: int = 0  # index in the reader's shards of the epoch
    offset: int = 0  # byte in that shard
    ordinal: int = 0  # samples that lie before it in the epoch, other readers' included


# ------------------------------------------------------------------------------------------- stream


@dataclass(eq=False)
class ShardStream(IterableDataset):
    """An endless, seeded, resumable stream of batches: what one rank reads, split among workers.

    sources: a sample for which `decode` raises BadSample is skipped and counted.
    collate: decoded samples -> batch, to which the stream adds SampleCounter.tell of this reader.
    shuffle_buffer: raw samples per block, which each worker holds in memory and permutes; up to 1
        is in order.

    Batches continue across epochs, so all have batch_size samples. ValueError while iterating: an
    epoch of a source in which this reader finds no usable sample, or too many bad ones.
    """

    sources: Sequence[Source]
    collate: Collate
    batch_size: int
    seed: int
    rank: int
    num_processes: int
    shuffle_buffer: int
    max_bad_share: float

    def __post_init__(self):
        assert self.batch_size > 0 and 0 <= self.rank < self.num_processes
        self.start_over([0] * len(self.sources))

    def start_over(self, epochs: Sequence[int]) -> None:
        """Begin the sources at these epochs, with every iter() that continues no saved position."""
        self._first = [Position(epoch=epoch) for epoch in epochs]
        self._drawn, self._positions = 0, self._first  # after the last batch handed out
        self._resumed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # not a generator itself: the state before the first batch must already be the right one
        if not self._resumed:
            self._drawn, self._positions = 0, self._first
        self._resumed = False
        return self._batches(self._drawn, self._positions)

    def settings(self, num_workers: int) -> dict[str, Any]:
        """What decides the order, except weights: another mixture continues where each source is.

        The shards' names count, not their folder: the data may be moved.
        """
        names = [os.path.basename(path) for source in self.sources for path in source.shards]
        return {
            "seed": self.seed,
            "num_sources": len(self.sources),
            "num_shards": len(names),
            "shard_names_crc32": zlib.crc32("\n".join(names).encode("utf-8", "surrogateescape")),
            "rank": self.rank,
            "num_processes": self.num_processes,
            "num_workers": num_workers,
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        positions = [position._asdict() for position in self._positions]
        return {"drawn": self._drawn, "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there at the next iter(). The settings have to be those of then: ShardLoader."""
        self._drawn = state["drawn"]
        self._positions = [Position(**position) for position in state["positions"]]
        self._resumed = True

    def _batches(self, drawn: int, positions: list[Position]) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        reader, readers = self.rank * num_workers + worker, self.num_processes * num_workers
        counter = SampleCounter(self.max_bad_share, f"reader {reader} of {readers}")
        # one endless reader of each source, of which the draws take the next sample
        samples = []
        for index, (source, position) in enumerate(zip(self.sources, positions, strict=True)):
            of_source = SourceReader(
                source, self.seed, index, reader, readers, self.shuffle_buffer, counter
            )
            samples.append(of_source.samples(position))
        # the position moves with the batch that is handed out, not with what is read for the next
        batch, positions = [], list(positions)
        for index in self._draw_sources(drawn, reader):
            sample, positions[index] = next(samples[index])
            batch.append(sample)
            if len(batch) == self.batch_size:
                drawn += len(batch)
                self._drawn, self._positions = drawn, list(positions)
                yield self.collate(batch) | counter.tell()
                batch = []

    def _draw_sources(self, drawn: int, reader: int) -> Iterator[int]:
        """Index of the source of this reader's samples number `drawn`, `drawn` + 1, ..."""
        if len(self.sources) == 1:
            yield from itertools.repeat(0)
        weights = np.array([source.weight for source in self.sources], dtype=np.float64)
        bounds = weights.cumsum()[:-1] / weights.sum()
        for block in itertools.count(drawn // DRAWS_PER_BLOCK):
            # the 2 keeps these seeds apart from those of shards and blocks
            numbers = np.random.default_rng((self.seed, block, reader, 2)).random(DRAWS_PER_BLOCK)
            indices = np.searchsorted(bounds, numbers, side="right")
            yield from indices[drawn % DRAWS_PER_BLOCK :].tolist()
            drawn = 0


@dataclass(frozen=True)
class SourceReader:
    """What one reader reads of one source. index: the source's number in the mixture."""

    source: Source
    seed: int
    index: int
    reader: int
    readers: int
    shuffle_buffer: int
    counter: SampleCounter

    def samples(self, start: Position) -> Iterator[tuple[dict[str, Any], Position]]:
        """(decoded sample, position after it), endless."""
        lost_epochs = 0
        while True:
            # a position is taken after a usable sample, so > 0 means that there was one
            usable = start.consumed
            epoch, kinds = start.epoch, set()
            for raw, position in self._read_epoch(start):
                kinds.add(type(raw))
                sample = _decoded(raw, self.source, self.counter, (self.seed, epoch))
                if sample is not None:
                    usable += 1
                    yield sample, position
            # an epoch of lost shards is forgiven: in the next one this reader has others
            lost_epochs = lost_epochs + 1 if kinds == {ShardError} else 0
            if not usable and lost_epochs in (0, LOST_EPOCHS):
                raise ValueError(
                    f"reader {self.reader} of {self.readers} found no usable sample in epoch "
                    f"{epoch}: {len(self.source.shards)} shards from {self.source.shards[0]} on, "
                    f"{self.counter.describe()}; there must be at least one sample for each of the "
                    "num_processes x num_workers readers"
                )
            start = Position(epoch=epoch + 1)

    def _read_epoch(self, position: Position) -> Iterator[tuple[Raw, Position]]:
        """(raw sample, position after it) to the end of the epoch, shuffled in blocks."""
        epoch, consumed, *start = position
        seed = self.seed
        if self.index:  # the order is another in each source, though some may be made alike
            seed = int(np.random.SeedSequence((seed, self.index, 3)).generate_state(1)[0])
        # whole shards if there are enough, else every readers-th sample of all
        order = np.random.default_rng((seed, epoch)).permutation(len(self.source.shards))
        part = (self.reader, self.readers)
        if len(order) >= self.readers:
            order, part = order[self.reader :: self.readers], (0, 1)
        raws = _read_shards([self.source.shards[index] for index in order], *part, *start)

        block_size = max(self.shuffle_buffer, 1)
        while block := list(itertools.islice(raws, block_size)):
            samples, after = [sample for sample, _ in block], block[-1][1]
            del block  # it would hold the bytes of what is freed below
            order = range(len(samples))
            if block_size > 1:
                # the 1 keeps these seeds apart from the shards' (trailing zeros do not count there)
                key = (seed, epoch, consumed // block_size, self.reader, 1)
                order = np.random.default_rng(key).permutation(len(samples)).tolist()
            # a resume starts inside its first block
            for i in range(consumed % block_size, len(samples)):
                sample = samples[order[i]]
                samples[order[i]] = None  # frees the bytes as the block empties
                consumed += 1
                yield sample, Position(epoch, consumed, *(start if i + 1 < len(samples) else after))
            start = after


def _read_shards(
    paths: Sequence[str],
    reader: int = 0,
    readers: int = 1,
    first: int = 0,
    offset: int = 0,
    ordinal: int = 0,
) -> Iterator[tuple[Raw, tuple[int, int, int]]]:
    """(raw sample, (shard, offset, ordinal) after it) of one reader, from such a place on.

    What cannot be read of a shard is one sample, a ShardError.
    """
    for index in range(first, len(paths)):
        path = paths[index]
        keys = set()
        try:
            with open_shard(path) as file:
                for key, sample, end in scan_tar(file, path, offset, ordinal, reader, readers):
                    ordinal += 1
                    if sample is not None:
                        # by hash: a shard may have millions of long keys
                        known = hash(one_form(key))
                        if known in keys:
                            sample[AGAIN] = b""
                        keys.add(known)
                        yield sample, (index, end, ordinal)
        except ShardError as error:
            is_mine = ordinal % readers == reader
            ordinal += 1
            if is_mine:
                yield error.with_traceback(None), (index + 1, 0, ordinal)
        offset = 0


def _decoded(
    raw: Raw, source: Source, counter: SampleCounter, seeds: tuple[int, int] | None = None
) -> dict[str, Any] | None:
    """The decoded sample, or None for one that is skipped; counted either way.

    seeds: (seed, epoch) of what is drawn for it; None: nothing is.
    """
    if isinstance(raw, ShardError):
        counter.skip(str(raw), f"shard: {raw.reason}")
        return None
    key = raw["__key__"]
    try:
        sample = source.decode(raw, SampleDraws(*seeds, key) if seeds else None)
    except BadSample as error:
        found = members_of(raw)
        if AGAIN in raw:
            found += ": the key came before, so the tar is not sorted"
        counter.skip(f"{source.name}: {key}" if source.name else key, error.reason, found)
        return None
    counter.usable()
    return sample


# ----------------------------------------------------------------------------------------- in order


def read_batches(
    sources: Sequence[Source],
    collate: Collate,
    batch_size: int,
    counter: SampleCounter,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass over all shards in order, in this process, with nothing drawn: `decode` gets None.

    At most `limit` usable samples; batches are those of ShardStream, the last one may be short.

    Raises:
        NoUsableSample: none at all.
        ValueError: too many bad ones.
    """
    # samples in the order of the sources, their shards and the tars
    batch, count = [], 0
    raws = ((source, raw) for source in sources for raw, _ in _read_shards(source.shards))
    for source, raw in raws if limit != 0 else ():
        # bad samples do not count towards the limit
        sample = _decoded(raw, source, counter)
        if sample is None:
            continue
        # only now, so that the last batch also counts the bad samples after it
        if len(batch) == batch_size:
            yield collate(batch) | counter.tell()
            batch = []
        batch.append(sample)
        count += 1
        if count == limit:
            break  # here, so that no further shard is opened
    # the end: nothing at all, or a short batch
    if count == 0 and limit != 0:
        shards = [path for source in sources for path in source.shards]
        text = f"no usable sample in {len(shards)} shards from {shards[0]} on, {counter.describe()}"
        raise NoUsableSample(text)
    if batch:
        yield collate(batch) | counter.tell()


# ------------------------------------------------------------------------------------------- loader


class ShardLoader(StatefulDataLoader):
    """StatefulDataLoader that refuses a state of other settings and has short errors."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return with_short_errors(super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "settings": self.dataset.settings(self.num_workers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_settings(state)
        super().load_state_dict(state)

    def start_next_epoch(self, states: Sequence[dict[str, Any]]) -> list[int]:
        """Begin each source at the epoch after the last one that these loaders' states have begun.

        For another number of readers or another batch size, which would cut an epoch in other
        parts: the rest of the epoch is left out, and no sample is seen twice in one. Returns the
        epochs.

        Raises:
            ValueError: states of other data.
        """
        firsts = [0] * len(self.dataset.sources)
        for state in states:
            self._check_settings(state, DATA_SETTINGS)
            for positions in _positions_in(state):
                begun = [position["epoch"] + 1 for position in positions]
                firsts = list(map(max, firsts, begun))
        self.dataset.start_over(firsts)
        return firsts

    def _check_settings(self, state: Mapping[str, Any], names: Sequence[str] | None = None) -> None:
        """Refuse a position in a stream of other settings; names: of those that count, None: all.

        Raises:
            ValueError: naming each setting that differs.
        """
        then, now = state.get("settings", {}), self.dataset.settings(self.num_workers)
        names = [name for name in names or now if then.get(name) != now[name]]
        if names:
            changes = "; ".join(f"{name} was {then.get(name)}, is {now[name]}" for name in names)
            raise ValueError(f"the saved data position does not fit this run: {changes}")


def _positions_in(state: Any) -> Iterator[list[dict[str, int]]]:
    """The positions of each stream in a loader's state, which nests them by worker."""
    if isinstance(state, dict):
        if "positions" in state:
            yield state["positions"]
        for value in state.values():
            yield from _positions_in(value)


def build_loader(stream: ShardStream, num_workers: int, pin_memory: bool = False) -> ShardLoader:
    """The stream behind worker processes (0: in this process), one torch thread each.

    One iter() serves the whole run; a second one starts again at epoch 0, or at a state that was
    loaded in between. state_dict() is the position after the last batch handed out, whatever the
    workers have prefetched; a small dict of numbers, per rank. Do not pass the loader to
    accelerator.prepare: the stream splits by rank itself.

    Raises:
        ValueError: the first URL of a source cannot be read.
    """
    for source in stream.sources:  # a wrong host, key or name fails before any worker starts
        for url in [path for path in source.shards if is_remote(path)][:1]:
            with open_shard(url) as file:
                file.read(1)
    with warnings.catch_warnings():
        # torchdata 0.11 on newer torch
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return ShardLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=share_batch,
            worker_init_fn=start_worker,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH_BATCHES if num_workers > 0 else None,
            generator=torch.Generator(),  # its own: iter() then takes no number from the global one
        )
