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
from data.files import check_writable, load_json, written_whole
from data.filters import FilterConfig
from data.samples import BadSample, members_of
from data.tar import refuse_foreign_shards, write_shard
from data.transforms import IMAGE_KEYS, decode_image

# in the output folder
PROGRESS_FOLDER = "progress"
INDEX = f"{PROGRESS_FOLDER}/index.jsonl"  # of the source's entries
ROWS = f"{PROGRESS_FOLDER}/index.npy"  # INDEX_ROW of each entry in the index
COPIES = f"{PROGRESS_FOLDER}/copies"  # of remote or parquet files, until all shards are there
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
    entries: Sequence[Entry], config: SampleConfig, decode: bool = True
) -> tuple[dict[str, Any], Unused]:
    """(sample for write_shard, its image first; what is not used) of one image's entries.

    Has the captions of all that the filters want, in order, and the image and metadata of the
    first. decode False: the image is the source's file, and whether it can be read is not tried.

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
    # rows that repeat a caption would make it more likely to be drawn
    captions = list(dict.fromkeys(captions))
    if not captions:
        raise BadSample(unused[0][0])
    if metadata is None and config.filters.needs_metadata:
        raise BadSample("json: unreadable")
    metadata = metadata or {}
    # a required score that is missing is no fault of one sample: the run ends
    try:
        config.filters.check_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"sample {entry.key} of {entry.path}: {error}") from None
    parts = parts or read_parts(entry)
    source = next((key for key in IMAGE_KEYS if key in parts), None)
    if source is None:
        raise BadSample("image: missing")

    # then the image itself
    extension = source
    data = parts[source]
    if decode:
        image = decode_image(data, config.background)
        config.filters.check_size(*image.size)
        if config.resize and min(image.size) > config.resize:
            sizes = {"original_width": image.width, "original_height": image.height}
            image = shrink(image, config.resize)
            metadata = {**sizes, **metadata, "width": image.width, "height": image.height}
            extension = "jpg"
            data = to_jpeg(image, config.quality)

    # what else a source tar has under the key is kept, further images too: readers take the first
    taken = {source, *IMAGE_KEYS[: IMAGE_KEYS.index(extension) + 1], "txt", "json"}
    others = {name: part for name, part in parts.items() if name not in taken}
    for name in others:
        if name.rpartition(".")[2] in IMAGE_KEYS:
            unused.append(("image: further one", replace(entry, note=members_of(parts))))
    texts = {"txt": captions[0], "json": to_json({**metadata, "captions": captions})}
    return {"__key__": entry.key, extension: data, **texts, **others}, unused


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
        parts = {}
        metadata = entry.metadata
        candidates = [entry.captions]
    else:
        parts = read_parts(entry)
        metadata = metadata_of(parts)
        candidates = (values_at(parts, key) for key in config.caption_keys)
    captions, reasons = find_captions(candidates)
    if not captions and not reasons and metadata is not None:
        reasons = ["caption: missing"]
    unused = [(reason, entry) for reason in reasons]
    wanted = []
    for caption in captions:
        fault = config.filters.caption_fault(caption)
        if fault is None:
            wanted.append(caption)
        else:
            unused.append((fault, replace(entry, note=repr(caption[:MAX_SHOWN]))))
    # other text than captions
    if metadata is None:
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
    # captions stay readable where people look into a tar
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
    numbers: list[list[int]] = field(default_factory=list)
    is_duplicate: Sequence[bool] = ()  # whether an earlier sample has the same image file

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

    def samples(self) -> Iterator[list[Entry]]:
        """The entries of each."""
        rows = np.load(self.output / ROWS, mmap_mode="r")
        with open(self.output / INDEX, "rb") as index:
            for numbers in self.numbers:
                yield [read_entry(index, rows, number) for number in numbers]

    def is_finished(self) -> bool:
        """Whether its record and its shard are there, the shard with all its bytes."""
        if not self.record.is_file():
            return False
        size = self.tar.stat().st_size if self.tar.is_file() else 0
        return size == json.loads(self.record.read_text())["bytes"]


def write_task(task: Task) -> int:
    """Write a shard, then its record; returns how many samples were read."""
    counts = {"dropped": Counter(), "unused": Counter()}
    firsts = {"dropped": {}, "unused": {}}

    def count(kind: str, reason: str, entry: Entry) -> None:
        counts[kind][reason] += 1
        if reason not in firsts[kind]:
            firsts[kind][reason] = explain(entry, reason)

    # counted while the shard is written, so that few samples are in memory
    def samples() -> Iterator[dict[str, Any]]:
        for entries, is_duplicate in zip(task.samples(), task.is_duplicate, strict=True):
            try:
                if is_duplicate:
                    raise BadSample("duplicate")
                sample, unused = make_sample(entries, task.config)
            except BadSample as error:
                count("dropped", error.reason, entries[0])
                continue
            for reason, entry in unused:
                count("unused", reason, entry)
            yield sample

    # a shard without a sample is none: readers would count it as broken
    task.tar.parent.mkdir(exist_ok=True)
    kept = write_shard(task.tar, samples())
    num_bytes = task.tar.stat().st_size
    if not kept:
        task.tar.unlink()
        num_bytes = 0
    # the record last, as a sign that the shard is whole
    record = {"read": len(task.numbers), "kept": kept, "bytes": num_bytes, **counts}
    record |= {"first": firsts["dropped"], "first_unused": firsts["unused"]}
    with written_whole(task.record, str(task.part)) as file:
        file.write(json.dumps(record).encode())
    return len(task.numbers)


def digest_task(task: Task) -> int:
    """Store a digest of each image file that the texts keep, unless another part has by now."""
    # not decoded: equal files are equally readable, so one of them is tried, when it is written
    if not task.digests.is_file():
        digests = np.zeros((len(task.numbers), 2), np.uint64)
        for row, entries in zip(digests, task.samples(), strict=True):
            try:
                sample, _ = make_sample(entries, task.config, decode=False)
                image = next(data for name, data in sample.items() if name != "__key__")
                row[:] = np.frombuffer(digest_of(image), np.uint64)
            except BadSample:
                pass  # counted when the shard is written
        with written_whole(task.digests, str(task.part)) as file:
            np.save(file, digests)
    return len(task.numbers)


# --------------------------------------------------------------------------- data sets of a program

MANIFEST = "manifest.json"  # beside the shards: {"plan": what the data set is made of, ...}


def check_data_set(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder that holds another data set than the plan's, or cannot be written."""
    path = folder / MANIFEST
    check_writable(path)
    refuse_foreign_shards(folder, MANIFEST)
    found = load_json(path.read_bytes()) if path.is_file() else {"plan": plan}
    # a manifest.json of another program may hold anything
    if not isinstance(found, dict) or found.get("plan") != plan:
        raise ValueError(f"{folder} holds another data set (see {path}): delete it")
