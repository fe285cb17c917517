"""Packing samples into shards: what scripts/make_shards.py does once their order is known.

A task is one shard. Whatever is written appears whole or not at all, and depends on the task only.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.captions import find_captions, metadata_of, values_at
from data.entries import Entry, digest_of, explain, read_entry, read_parts
from data.files import written_whole
from data.filters import FilterConfig
from data.samples import BadSample, members_of
from data.tar import write_shard
from data.transforms import IMAGE_KEYS, decode_image

PROGRESS_FOLDER = "progress"  # in the output folder
UNCHECKED, USABLE, DUPLICATE = 0, 1, 2  # what digest_task has found out about a sample
MAX_SHOWN = 60  # characters of a caption in a message


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


# of what a sample has but does not use: why, and its entry, with a note of what it is
Unused = list[tuple[str, Entry]]


def make_sample(
    entries: Sequence[Entry], config: SampleConfig, is_usable: bool = False
) -> tuple[dict[str, Any], bytes, Unused]:
    """(sample for write_shard, the source's image file, what is not used) of one image's entries.

    Has the captions of all that the filters want, in order, and the image and metadata of the
    first. is_usable: no need to decode the image.

    Raises:
        BadSample: no image, no caption, or filtered.
        ValueError: a required score is missing.
    """
    entry = entries[0]
    if entry.fault is not None:
        raise BadSample(entry.fault)
    # captions and scores first: of a table with scores most images may be dropped unread
    parts, metadata, captions, unused = read_texts(entry, config)
    for other in entries[1:]:
        _, _, more, more_unused = read_texts(other, config)
        captions += more
        unused += more_unused
    captions = list(dict.fromkeys(captions))
    if not captions:
        raise BadSample(unused[0][0])
    if metadata is None and config.filters.needs_metadata:
        raise BadSample("json: unreadable")
    metadata = metadata or {}
    try:
        config.filters.check_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"sample {entry.key} of {entry.path}: {error}") from None
    parts = parts or read_parts(entry)
    source = next((key for key in IMAGE_KEYS if key in parts), None)
    if source is None:
        raise BadSample("image: missing")
    extension, data = source, parts[source]

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
    taken = {source, *IMAGE_KEYS[: IMAGE_KEYS.index(extension) + 1], "txt", "json"}
    others = {name: part for name, part in parts.items() if name not in taken}
    for name in others:
        if name.rpartition(".")[2] in IMAGE_KEYS:
            unused.append(("image: further one", replace(entry, note=members_of(parts))))
    texts = {"txt": captions[0], "json": to_json({**metadata, "captions": captions})}
    return {"__key__": entry.key, extension: data, **texts, **others}, parts[source], unused


def read_texts(
    entry: Entry, config: SampleConfig
) -> tuple[dict[str, bytes], dict[str, Any] | None, list[str], Unused]:
    """(parts that had to be read, metadata, captions that the filters want, what is not used).

    Without a caption, the first of what is not used says why. Metadata: what the source knows of a
    sample beside captions; None: its JSON holds no object.

    Raises:
        BadSample: as read_parts does.
    """
    # captions that are known need no file
    if entry.captions is not None:
        parts, metadata, candidates = {}, entry.metadata, [entry.captions]
    else:
        parts = read_parts(entry)
        metadata = metadata_of(parts)
        candidates = (values_at(parts, key) for key in config.caption_keys)
    captions, reasons = find_captions(candidates)
    if not captions and not reasons:
        reasons = ["json: unreadable" if metadata is None else "caption: missing"]
    unused = [(reason, entry) for reason in reasons]
    wanted = []
    for caption in captions:
        fault = config.filters.caption_fault(caption)
        if fault is None:
            wanted.append(caption)
        else:
            unused.append((fault, replace(entry, note=repr(caption[:MAX_SHOWN]))))
    # other text than captions
    if metadata is None and "json: unreadable" not in reasons:
        unused.append(("json: unreadable", entry))
    for ending, path in entry.sidecars.items():
        if ending not in parts:
            unused.append((f"{ending}: no plain file", replace(entry, note=path)))
    return parts, metadata, wanted, unused


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
    # of each sample, in the order of the shard, its entries in the index: the first one, then those
    # whose captions it gets
    numbers: list[list[int]]
    states: np.ndarray  # UNCHECKED, USABLE or DUPLICATE

    @property
    def tar(self) -> Path:
        return self.output / f"{self.name}.tar"

    @property
    def record(self) -> Path:
        """What a finished shard is made of; written after it.

        {"read", "kept", "bytes", "dropped": {reason: count}, "first": {reason: example}, and, of
        what kept samples do not use, "unused" and "first_unused"}
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
        rows = np.load(rows_path(self.output), mmap_mode="r")
        with open(index_path(self.output), "rb") as index:
            for numbers, state in zip(self.numbers, self.states, strict=True):
                yield [read_entry(index, rows, number) for number in numbers], state

    def is_finished(self) -> bool:
        """Whether its record and its shard are there, the shard with all its bytes."""
        if not self.record.is_file():
            return False
        size = self.tar.stat().st_size if self.tar.is_file() else 0
        return size == json.loads(self.record.read_text())["bytes"]


@dataclass
class Reasons:
    """How often each reason came, and its first case."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, entry: Entry) -> None:
        self.counts[reason] += 1
        if reason not in self.first:
            self.first[reason] = explain(entry, reason)


def write_task(task: Task) -> int:
    """Write a shard, then its record; returns how many samples were read."""
    dropped, unused = Reasons(), Reasons()

    # counted while the shard is written, so that few samples are in memory
    def samples() -> Iterator[dict[str, Any]]:
        for entries, state in task.samples():
            try:
                if state == DUPLICATE:
                    raise BadSample("duplicate")
                sample, _, rest = make_sample(entries, task.config, is_usable=state == USABLE)
            except BadSample as error:
                dropped.add(error.reason, entries[0])
                continue
            for reason, entry in rest:
                unused.add(reason, entry)
            yield sample

    task.tar.parent.mkdir(exist_ok=True)
    kept = write_shard(task.tar, samples())
    if not kept:
        task.tar.unlink()
    # the record last, as a sign that the shard is whole
    record = {
        "read": len(task.numbers),
        "kept": kept,
        "bytes": task.tar.stat().st_size if kept else 0,
        "dropped": dict(sorted(dropped.counts.items())),
        "first": dropped.first,
        "unused": dict(sorted(unused.counts.items())),
        "first_unused": unused.first,
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
                _, data, _ = make_sample(entries, config)
                row[:] = np.frombuffer(digest_of(data), np.uint64)
            except BadSample:
                pass  # counted when the shard is written
        with written_whole(task.digests, str(task.part)) as file:
            np.save(file, digests)
    return len(task.numbers)


def index_path(output: Path) -> Path:
    return output / PROGRESS_FOLDER / "index.jsonl"


def rows_path(output: Path) -> Path:
    """INDEX_ROW of each entry in the index."""
    return index_path(output).with_name("index.npy")
