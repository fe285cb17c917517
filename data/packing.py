"""Packing samples into shards: what scripts/make_shards.py does once their order is known.

A task is one shard. Whatever is written appears whole or not at all, and depends on the task only.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.entries import (
    Entry,
    digest_of,
    explain,
    read_captions,
    read_entry,
    read_metadata,
    read_parts,
)
from data.files import written_whole
from data.filters import FilterConfig
from data.samples import BadSample
from data.tar import write_shard
from data.transforms import IMAGE_KEYS, decode_image

PROGRESS_FOLDER = "progress"  # in the output folder
UNCHECKED, USABLE, DUPLICATE = 0, 1, 2  # what digest_task has found out about a sample


# --------------------------------------------------------------------------------------- one sample


@dataclass(frozen=True)
class SampleConfig:
    """What happens to one sample."""

    caption_keys: tuple[str, ...]
    filters: FilterConfig
    # pixels; shorter side of larger images afterwards. 0: keep the file as it is
    resize: int
    # of JPEG, 1..100
    quality: int
    # RGB, 0..255, behind transparent pixels when resizing
    background: tuple[int, int, int]


def make_sample(
    entries: Sequence[Entry], config: SampleConfig, is_usable: bool = False
) -> tuple[dict[str, Any], bytes]:
    """(sample for write_shard, the source's image file) of the entries of one image.

    Has the captions of all, in order, and the image and metadata of the first. is_usable: no need
    to decode the image.

    Raises:
        BadSample: no image, no caption, or filtered.
        ValueError: a required score is missing.
    """
    entry = entries[0]
    if entry.fault is not None:
        raise BadSample(entry.fault)
    # captions and scores first: of a table with scores most images may be dropped unread
    parts = text_parts(entry)
    metadata = read_metadata(entry, parts)
    captions = gather_captions(entries, parts, metadata, config.caption_keys)
    try:
        config.filters.check_metadata(captions[0], metadata)
    except ValueError as error:
        raise ValueError(f"sample {entry.key} of {entry.path}: {error}") from None
    parts = parts or read_parts(entry)
    extension = next((key for key in IMAGE_KEYS if key in parts), None)
    if extension is None:
        raise BadSample("image: missing")
    original = data = parts[extension]

    # then the image itself
    if config.resize or not is_usable:
        image = decode_image(data, config.background)
        config.filters.check_size(*image.size)
        if config.resize and min(image.size) > config.resize:
            small = shrink(image, config.resize)
            sizes = {"original_width": image.width, "original_height": image.height} | metadata
            metadata = sizes | {"width": small.width, "height": small.height}
            extension, data = "jpg", to_jpeg(small, config.quality)

    # what else a source tar has under the key is kept, further images too: readers take the first
    taken = {*IMAGE_KEYS[: IMAGE_KEYS.index(extension) + 1], "txt", "json", ""}
    others = {name: part for name, part in parts.items() if name not in taken}
    texts = {"txt": captions[0], "json": to_json({**metadata, "captions": captions})}
    return {"__key__": entry.key, extension: data, **texts, **others}, original


def text_parts(entry: Entry) -> dict[str, bytes]:
    """What holds the captions of an entry, {} if they are known."""
    return {} if entry.captions is not None else read_parts(entry)


def gather_captions(
    entries: Sequence[Entry],
    parts: dict[str, bytes],
    metadata: dict[str, Any],
    keys: Sequence[str],
) -> list[str]:
    """The captions of all entries, each once; parts, metadata: of the first.

    Raises:
        BadSample: none has any; says why the first has none.
    """
    captions, fault = [], None
    for number, entry in enumerate(entries):
        try:
            if number:
                parts = text_parts(entry)
                metadata = read_metadata(entry, parts)
            texts = read_captions(entry, parts, metadata, keys)
            captions += [text for text in texts if text not in captions]
        except BadSample as error:
            fault = fault or error
    if not captions:
        raise fault
    return captions


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, bicubic with antialiasing as the readers resize."""
    shorter = min(image.size)
    width, height = (max(1, round(side * size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def to_json(content: dict[str, Any]) -> bytes:
    """UTF-8; what is no character (half of a pair, bytes of another encoding) becomes "?"."""
    try:
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    except RecursionError:
        raise BadSample("json: nested too deeply") from None


# ---------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class Task:
    """The samples of one shard: a job for a worker."""

    name: str  # of the shard, as 000000 or holdout/000000
    output: Path
    part: int  # of the Slurm array; distinguishes unfinished files of parts that work side by side
    config: SampleConfig
    numbers: np.ndarray  # of each sample's first entry, in the order of the shard
    rows: np.ndarray  # theirs in the index
    num_others: np.ndarray  # further entries of each sample, whose captions it gets
    others: np.ndarray  # theirs in the index, sample by sample
    states: np.ndarray  # UNCHECKED, USABLE or DUPLICATE

    @property
    def tar(self) -> Path:
        return self.output / f"{self.name}.tar"

    @property
    def record(self) -> Path:
        """What a finished shard is made of; written after it.

        {"read", "kept", "bytes", "dropped": {reason: count}, "first": {reason: example}}
        """
        return self._progress(".json")

    @property
    def digests(self) -> Path:
        """One row of 16 bytes per sample, zeros for what is dropped."""
        return self._progress(".digests.npy")

    def _progress(self, ending: str) -> Path:
        return self.output / PROGRESS_FOLDER / (self.name.replace("/", "_") + ending)

    def samples(self) -> Iterator[tuple[list[Entry], int]]:
        """(entries, state) of each."""
        with open(index_path(self.output), "rb") as index:
            others = iter(self.others)
            samples = zip(self.numbers, self.rows, self.num_others, self.states, strict=True)
            for number, row, count, state in samples:
                first = read_entry(index, number, row)
                rest = [read_entry(index, 0, other) for other in islice(others, count)]
                yield [first, *rest], state

    def is_finished(self) -> bool:
        """Whether its record and its shard are there, the shard with all its bytes."""
        if not self.record.is_file():
            return False
        size = self.tar.stat().st_size if self.tar.is_file() else 0
        return size == json.loads(self.record.read_text())["bytes"]


def write_task(task: Task) -> int:
    """Write a shard, then its record; returns how many samples were read."""
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}

    def samples() -> Iterator[dict[str, Any]]:
        for entries, state in task.samples():
            try:
                if state == DUPLICATE:
                    raise BadSample("duplicate")
                yield make_sample(entries, task.config, is_usable=state == USABLE)[0]
            except BadSample as error:
                dropped[error.reason] += 1
                if error.reason not in first:
                    first[error.reason] = explain(entries[0], error.reason)

    task.tar.parent.mkdir(exist_ok=True)
    kept = write_shard(task.tar, samples())
    if not kept:
        task.tar.unlink()
    record = {
        "read": len(task.numbers),
        "kept": kept,
        "bytes": task.tar.stat().st_size if kept else 0,
        "dropped": dict(sorted(dropped.items())),
        "first": first,
    }
    with written_whole(task.record, str(task.part)) as file:
        file.write(json.dumps(record).encode())
    return len(task.numbers)


def digest_task(task: Task) -> int:
    """Store a digest of each image file that would be kept, unless another part has by now."""
    if not task.digests.is_file():
        digests = np.zeros((len(task.numbers), 2), np.uint64)
        config = replace(task.config, resize=0)
        for row, (entries, _) in zip(digests, task.samples(), strict=True):
            try:
                _, data = make_sample(entries, config)
                row[:] = np.frombuffer(digest_of(data), np.uint64)
            except BadSample:
                pass  # counted when the shard is written
        with written_whole(task.digests, str(task.part)) as file:
            np.save(file, digests)
    return len(task.numbers)


def index_path(output: Path) -> Path:
    return output / PROGRESS_FOLDER / "index.jsonl"
