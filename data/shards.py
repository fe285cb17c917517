"""Tar shards (webdataset layout): naming, writing, reading, and an endless resumable stream of batches.

A sample is a run of consecutive tar members with one key: `{key}.{ext}`, the key ending at the first dot of the
file name. Raw samples are {"__key__": key, ext: bytes}.

Who reads what: readers = world_size x dataloader workers. With at least as many shards as readers, reader r takes
shards r, r + readers, ... of the epoch's order; with fewer, every reader walks all shards and keeps sample j of the
epoch when j % readers == r. Either way each sample is read once per epoch over all readers.

Position: samples are shuffled inside blocks. A state holds the number of samples consumed in the epoch and where in
the tars the current block starts, so that a resume re-reads at most one block and decodes nothing that it skips.
The tars are parsed here and not by `webdataset`, whose readers cannot resume inside an epoch, or by `tarfile`, which
takes a tar cut between two members for a complete one.
"""

import difflib
import glob
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

TAR_BLOCK = 512  # bytes; headers and the padding of members come in these
READ_BUFFER = 1 << 20  # bytes; small members are served from one read
PREFETCH_BATCHES = 2  # batches that each worker keeps ready


class BadSample(Exception):
    """A sample that cannot be used. `reason` is counted by the stream, so it names a class of faults, not a sample."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------- naming


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Paths, `~`, brace patterns (`x-{000..010}.tar`, `{a,b}.tar`) and globs -> paths, sorted inside each pattern.

    ValueError: a pattern that matches nothing or names a missing file, or a file that two patterns name.
    """
    if isinstance(patterns, str):
        raise ValueError(f"shards must be a list of patterns, given the single string {patterns!r}")
    if not patterns:
        raise ValueError("shards is empty: expected at least one path or pattern of .tar files")
    paths, seen = [], {}
    for pattern in patterns:
        for path in sorted(_expand_pattern(str(pattern))):
            if os.path.abspath(path) in seen:
                raise ValueError(f"shard {path} is listed twice: by {seen[os.path.abspath(path)]!r} and by {pattern!r}")
            seen[os.path.abspath(path)] = pattern
            paths.append(path)
    return paths


def _expand_pattern(pattern: str) -> list[str]:
    paths = []
    for name in _expand_braces(os.path.expanduser(pattern)):
        matches = glob.glob(name) if glob.has_magic(name) and not os.path.exists(name) else [name]
        missing = [path for path in matches if not os.path.isfile(path)]
        if missing or not matches:
            raise ValueError(f"shards: {pattern!r} {_explain_missing(missing[0] if missing else name)}")
        paths += matches
    return paths


def _expand_braces(text: str) -> list[str]:
    """`{003..010}` keeps the zero padding of its first number; `{a,b}` lists; nested lists are not supported."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    inner = match.group(1)
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = numbers.groups()
        step = 1 if int(last) >= int(first) else -1
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + step, step)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise ValueError(
            f"shards: braces {{{inner}}} in {text!r} are neither a range like {{000..010}} nor a list {{a,b}}"
        )
    return [text[: match.start()] + choice + rest for choice in choices for rest in _expand_braces(text[match.end() :])]


def _explain_missing(path: str) -> str:
    """What is there instead of `path`: the nearest names in its folder, or the nearest folder that exists."""
    if os.path.isdir(path):
        return f"names the folder {path}: expected files, for example {os.path.join(path, '*.tar')}"
    folder = Path(path).absolute().parent
    wanted, existing = Path(path).name, folder
    while not existing.is_dir():
        wanted, existing = existing.name, existing.parent
    names = sorted(os.listdir(existing))
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:3]
    nearest = f"nearest there: {', '.join(near)}" if near else "it is empty"
    verb = "matches no file" if glob.has_magic(path) else f"needs {path}, which does not exist"
    if existing == folder:
        return f"{verb}; folder {folder}, {nearest}"
    return f"{verb}; folder {folder} does not exist either, the nearest that does is {existing}, {nearest}"


# --------------------------------------------------------------------------------------------------------- writing


def write_shard(path: str | Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write samples {"__key__": key, ext: value} to one tar, members in the given order; returns the sample count.

    A value is bytes, str (stored as UTF-8), np.ndarray (as .npy) or a dict or list (as JSON). The same samples give
    the same bytes (times and owners are 0). The file appears whole or not at all: it is written to `path`.tmp, synced
    and renamed. ValueError: a bad key or extension, a key that occurs twice, a value of another type.
    """
    temporary = Path(f"{path}.tmp")
    seen: set[str] = set()
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for sample in samples:
                    _add_sample(tar, sample, seen)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(seen)


def _add_sample(tar: tarfile.TarFile, sample: Mapping[str, Any], seen: set[str]) -> None:
    key = sample.get("__key__")
    if not isinstance(key, str) or not re.fullmatch(r"(.*/)?[^./]+", key):
        raise ValueError(f"sample key {key!r}: expected a non-empty string without a dot in its last part")
    if key in seen:
        raise ValueError(f"sample key {key!r} occurs twice in one shard")
    seen.add(key)
    parts = [(extension, value) for extension, value in sample.items() if not extension.startswith("__")]
    if not parts:
        raise ValueError(f"sample {key!r} has no parts beside its key")
    for extension, value in parts:
        if extension != extension.lower() or "/" in extension or not extension:
            raise ValueError(f"sample {key!r}: extension {extension!r} must be lower case, without a slash, not empty")
        data = _to_bytes(value, f"{key}.{extension}")
        info = tarfile.TarInfo(f"{key}.{extension}")  # TarInfo's own defaults: mtime 0, owner 0, mode 0644
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _to_bytes(value: Any, name: str) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return buffer.getvalue()
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False).encode("utf-8")
    raise ValueError(f"{name}: given {type(value).__name__}, expected bytes, str, np.ndarray, dict or list")


# --------------------------------------------------------------------------------------------------------- reading


def read_shard(path: str | Path) -> Iterator[dict[str, Any]]:
    """Raw samples of one tar in order. ValueError: truncated or not a tar, or two members with one name."""
    for sample, _ in _scan_shard(str(path), offset=0, ordinal=0, reader=0, readers=1):
        yield sample


def _scan_shard(
    path: str, offset: int, ordinal: int, reader: int, readers: int
) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """(sample, byte offset of the next one) for every sample from byte `offset` on.

    The samples count up from `ordinal`; one with ordinal % readers != reader comes as None, its bytes unread.
    """
    sample, current, keep = None, None, True
    with _open_shard(path) as file:
        for name, start, data, size in _members(file, path, offset):
            folder, _, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot or base.startswith("__"):
                continue  # "._x.jpg" of macOS, members without an extension, webdataset's own "__meta__" files
            key = f"{folder}/{stem}" if folder else stem
            if key != current:
                if current is not None:
                    yield sample, start
                keep = ordinal % readers == reader
                sample, current, ordinal = ({"__key__": key} if keep else None), key, ordinal + 1
            offset = data + size
            if keep:
                extension = extension.lower()
                if extension in sample:
                    raise ValueError(f"{path}: two members are named {name} in a row, sample keys must differ")
                file.seek(data)
                sample[extension] = file.read(size)
                if len(sample[extension]) != size:
                    raise ValueError(f"{path}: truncated tar, member {name} ends before its {size} bytes")
    if current is not None:
        yield sample, _padded(offset)


@contextmanager
def _open_shard(path: str) -> Iterator[BinaryIO]:
    """A tar as a seekable file of plain bytes; `.gz` is unpacked while reading, so a resume inside costs that again."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb", buffering=READ_BUFFER) as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: truncated or broken gzip: {error}") from None


def _members(file: BinaryIO, path: str, offset: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, byte where its headers start, byte where its data starts, bytes) of each regular file of a tar."""
    start, long_name = offset, None
    while True:
        file.seek(offset)
        header = file.read(TAR_BLOCK)
        if len(header) < TAR_BLOCK:
            raise ValueError(f"{path}: truncated tar, it stops at byte {offset} without an end-of-archive mark")
        if not header.strip(b"\0"):
            return
        size, kind = _member_size(header, path, offset), header[156:157]
        data, offset = offset + TAR_BLOCK, _padded(offset + TAR_BLOCK + size)
        if kind in (b"x", b"L"):  # the name of the next member, if it does not fit its own header
            extended = file.read(size)
            if len(extended) != size:
                raise ValueError(f"{path}: truncated tar, a header ends before its {size} bytes")
            long_name = _pax_path(extended) if kind == b"x" else _text(extended)
            continue
        if kind in (b"0", b"\0"):
            yield long_name or _member_name(header), start, data, size
        start, long_name = offset, None


def _member_size(header: bytes, path: str, offset: int) -> int:
    try:
        # the checksum counts its own eight bytes as spaces
        if int(header[148:156].strip(b"\0 "), 8) == sum(header) - sum(header[148:156]) + 8 * 32:
            return int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        pass
    hint = " (gzip: its name must end in .gz)" if header[:2] == b"\x1f\x8b" else ""
    raise ValueError(f"{path}: not a tar header at byte {offset}{hint}")


def _member_name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax_path(records: bytes) -> str | None:
    """The path of a pax header, whose records are `{length} {key}={value}` and a line feed; None without one."""
    while records:
        length = int(records.partition(b" ")[0])
        key, _, value = records[:length].partition(b" ")[2].partition(b"=")
        if key == b"path":
            return _text(value[:-1])
        records = records[length:]
    return None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(offset: int) -> int:
    return -(-offset // TAR_BLOCK) * TAR_BLOCK


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
            for sample, end in _scan_shard(self.shards[mine[index]], offset, ordinal, *share):
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
