"""An endless, resumable stream of batches from tar shards: who reads which sample, in which order, from where on.

Who reads what: readers = world_size x dataloader workers. With at least as many shards as readers, reader r takes
shards r, r + readers, ... of the epoch's order; with fewer, every reader walks all shards and keeps sample j of the
epoch when j % readers == r. Either way each sample is read once per epoch over all readers.

Position: samples are shuffled inside blocks. A state holds the number of samples consumed in the epoch and where in
the tars the current block starts, so that a resume re-reads at most one block and decodes nothing that it skips.
"""

import itertools
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from data.tar import read_shard, scan_shard

PREFETCH_BATCHES = 2  # batches that each worker keeps ready


class BadSample(Exception):
    """A sample that cannot be used. `reason` is counted by the stream, so it names a class of faults, not a sample."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True, slots=True)
class Position:
    """Where a reader stands: after `consumed` of its samples of `epoch`; the rest says where its block starts."""

    epoch: int = 0
    consumed: int = 0  # samples of this reader, in the shuffled order, bad ones included
    shard: int = 0  # index in the reader's shards of the epoch
    offset: int = 0  # byte in that shard
    ordinal: int = 0  # samples that lie before it in the epoch, other readers' included


class ShardStream(IterableDataset):
    """An endless, seeded, resumable stream of batches; what one rank reads, split among its dataloader workers.

    decode(raw sample, generator) -> dict: raises BadSample for a sample that cannot be used, which is then skipped and
        counted. The generator depends on (seed, epoch, key) only: a sample's crop is the same whoever reads it.
    collate(list of decoded samples) -> batch dict. To it the stream adds "skipped": {reason: count} since the last
        batch of this reader.
    shuffle_buffer: raw samples per block, which is held in memory by each worker and permuted; up to 1 is in order.

    Batches go on across epochs, so all have batch_size samples. ValueError while iterating: an epoch in which this
    reader finds no usable sample.
    """

    def __init__(
        self,
        shards: list[str],
        decode: Callable[[dict[str, Any], np.random.Generator], dict[str, Any] | None],
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle_buffer: int,
    ):
        if not shards:
            raise ValueError("a stream needs at least one shard")
        if batch_size < 1 or seed < 0:
            raise ValueError(f"expected batch_size >= 1 and seed >= 0, given {batch_size} and {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, given rank {rank} of {world_size}")
        self.shards, self.decode, self.collate = list(shards), decode, collate
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.rank, self.world_size = rank, world_size
        self._position, self._resumed = Position(), False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # not a generator itself: the state asked for before the first batch must already be the right one
        self._position, self._resumed = (self._position if self._resumed else Position()), False
        return self._batches(self._position)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, and the settings under which it means anything."""
        return {**asdict(self._position), **self.settings(max(self._workers(), 1)), "reader": self._reader()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there at the next iter(). ValueError: a state that was saved under other settings."""
        check_settings(state, {**self.settings(max(self._workers(), 1)), "reader": self._reader()})
        self._position = Position(**{name: state[name] for name in Position.__dataclass_fields__})
        self._resumed = True

    def settings(self, num_workers: int) -> dict[str, Any]:
        """What decides the order. The shards' names count, not their folder: the data may be moved."""
        names = "\n".join(os.path.basename(path) for path in self.shards)
        return {
            "seed": self.seed,
            "num_shards": len(self.shards),
            "shard_names_crc32": zlib.crc32(names.encode("utf-8", "surrogateescape")),
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": num_workers,
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
        }

    def _workers(self) -> int:
        info = get_worker_info()
        return info.num_workers if info else 0

    def _reader(self) -> int:
        info = get_worker_info()
        return self.rank * info.num_workers + info.id if info else self.rank

    def _batches(self, start: Position) -> Iterator[dict[str, Any]]:
        batch, skipped = [], Counter()
        for sample, position in self._decoded(start, skipped):
            batch.append(sample)
            if len(batch) == self.batch_size:
                self._position = position
                yield {**self.collate(batch), "skipped": dict(skipped)}
                batch = []
                skipped.clear()

    def _decoded(self, start: Position, skipped: Counter) -> Iterator[tuple[dict[str, Any], Position]]:
        reader, readers = self._reader(), self.world_size * max(self._workers(), 1)
        while True:
            usable = start.consumed  # a position is taken after a usable sample, so > 0 means that there was one
            epoch = start.epoch
            for raw, position in self._read_epoch(start, reader, readers):
                # Philox is keyed directly: a generator per sample without hashing a seed
                key = (self.seed, epoch << 32 | zlib.crc32(raw["__key__"].encode("utf-8", "surrogateescape")))
                sample = _try_decode(self.decode, raw, np.random.Generator(np.random.Philox(key=key)), skipped)
                if sample is not None:
                    usable += 1
                    yield sample, position
            if not usable:
                raise ValueError(
                    f"reader {reader} of {readers} found no usable sample in epoch {epoch}: "
                    f"{len(self.shards)} shards from {self.shards[0]} on, skipped {dict(skipped) or 'none'}; "
                    f"there must be at least one sample for each of the world_size x num_workers readers"
                )
            start = Position(epoch=epoch + 1)

    def _read_epoch(self, position: Position, reader: int, readers: int) -> Iterator[tuple[dict[str, Any], Position]]:
        """(raw sample, position after it) from `position` to the end of its epoch, shuffled in blocks."""
        epoch, consumed = position.epoch, position.consumed
        block_size = max(self.shuffle_buffer, 1)
        start = (position.shard, position.offset, position.ordinal)
        source = self._read_shards(epoch, start, reader, readers)
        while block := list(itertools.islice(source, block_size)):
            samples, after = [sample for sample, _ in block], block[-1][1]
            order = range(len(samples))
            if block_size > 1:  # the 1 keeps these seeds apart from the shards' (trailing zeros do not count there)
                seed = (self.seed, epoch, consumed // block_size, reader, 1)
                order = np.random.default_rng(seed).permutation(len(samples)).tolist()
            del block
            for i in range(consumed % block_size, len(samples)):
                sample, samples[order[i]] = samples[order[i]], None  # frees the bytes as the block empties
                consumed += 1
                yield sample, Position(epoch, consumed, *(start if i + 1 < len(samples) else after))
            start = after

    def _read_shards(
        self, epoch: int, start: tuple[int, int, int], reader: int, readers: int
    ) -> Iterator[tuple[dict[str, Any], tuple[int, int, int]]]:
        """(raw sample, (shard, offset, ordinal) after it) of one reader, in the order of its tars."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        whole_shards = len(order) >= readers
        mine = order[reader::readers] if whole_shards else order
        first, offset, ordinal = start
        share = (0, 1) if whole_shards else (reader, readers)
        for index in range(first, len(mine)):
            for sample, end in scan_shard(self.shards[mine[index]], offset, ordinal, *share):
                ordinal += 1
                if sample is not None:
                    yield sample, (index, end, ordinal)
            offset = 0


def _try_decode(decode: Callable, raw: dict[str, Any], rng: np.random.Generator, skipped: Counter) -> dict | None:
    """decode(raw, rng), or None and a count in `skipped`. A decode that returns None has dropped the sample itself."""
    try:
        sample = decode(raw, rng)
    except BadSample as error:
        skipped[error.reason] += 1
        return None
    if sample is None:
        skipped["dropped"] += 1
    return sample


def check_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError naming every setting in which a saved position differs from the stream that is to continue it."""
    given = {name: state.get(name) for name in settings}
    changed = [f"{name} was {given[name]}, is {settings[name]}" for name in settings if given[name] != settings[name]]
    if changed:
        raise ValueError(f"the saved data position does not fit this run: {'; '.join(changed)}")


def read_batches(
    shards: Sequence[str], decode: Callable, collate: Callable, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """One pass over the shards in order, in this process; at most `limit` usable samples, the last batch may be short.

    Batches are those of ShardStream. ValueError: no usable sample at all.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, given {batch_size}")
    batch, skipped, count = [], Counter(), 0
    rng = np.random.default_rng(0)
    for raw in itertools.chain.from_iterable(map(read_shard, shards)):
        if limit is not None and count >= limit:
            break
        sample = _try_decode(decode, raw, rng, skipped)
        if sample is None:
            continue
        if len(batch) == batch_size:  # only now, so that the last batch also counts the bad samples after it
            yield {**collate(batch), "skipped": dict(skipped)}
            batch = []
            skipped.clear()
        batch.append(sample)
        count += 1
    if count == 0 and limit != 0:
        raise ValueError(
            f"no usable sample in {len(shards)} shards from {shards[0]} on, skipped {dict(skipped) or 'none'}"
        )
    if batch:
        yield {**collate(batch), "skipped": dict(skipped)}


# ---------------------------------------------------------------------------------------------------------- loader


class ShardLoader(StatefulDataLoader):
    """StatefulDataLoader that refuses a state of other settings at once and not from inside a worker."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "settings": self.dataset.settings(self.num_workers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_settings(state.get("settings", {}), self.dataset.settings(self.num_workers))
        super().load_state_dict(state)


def build_loader(stream: ShardStream, num_workers: int, pin_memory: bool = False) -> StatefulDataLoader:
    """The stream behind worker processes (0: in this process), one torch thread each (torchdata sets that).

    One iter() serves the whole run; a second one starts again at epoch 0, or at a state that was loaded in between.
    state_dict() is the position after the last batch handed out, whatever the workers have prefetched; a small dict
    of numbers, per rank. Do not pass the loader to accelerator.prepare: the stream splits by rank itself.
    """
    if num_workers < 0:
        raise ValueError(f"expected num_workers >= 0, given {num_workers}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on newer torch
        return ShardLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH_BATCHES if num_workers > 0 else None,
            generator=torch.Generator(),  # its own: iter() then takes no number from the global one
        )


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
