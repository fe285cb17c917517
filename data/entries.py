"""Entries: samples that are known but not read. An index of them on disk, and how one is read.

A source (data/sources.py) gives entries; `build_index` puts them into a file with a row of an array
for each, so that a worker reads any of them by its number and nobody holds the captions of a data
set in memory. `read_parts` and `read_text` then read one sample.
"""

import hashlib
import io
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from fsspec.utils import infer_compression
from PIL import Image

from data.captions import clean_caption, strings
from data.samples import BadSample
from data.storage import ShardError, open_shard
from data.tar import scan_file
from data.transforms import FORMATS, IMAGE_KEYS

# bytes of an entry's line, and whether its key came before
INDEX_ROW = np.dtype([("begin", "<i8"), ("end", "<i8"), ("repeated", "?")])
# how bytes that are not UTF-8 were decoded ("surrogateescape")
ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
# else the format's name
FORMAT_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}


@dataclass(frozen=True)
class Entry:
    """One sample before it is read."""

    key: str
    # of the image, or of the tar that holds the sample
    path: str
    # first byte and end of the sample in its tar; None: path is an image
    span: tuple[int, int] | None = None
    # None: they are to be found in the tar, or in files beside the image
    captions: list[str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def clean_key(name: str) -> str:
    """A name from the data as a key: folders stay; no dots, not absolute, nothing unprintable.

    Nor "+", by which `read_entry` marks a key that occurs again, nor "__" at a start, which readers
    skip.
    """
    parts = []
    for part in name.replace("\\", "/").split("/"):
        if part not in ("", ".", ".."):
            clean = "".join("_" if c in ".+" or not c.isprintable() else c for c in part)
            parts.append(re.sub("^__+", "_", clean))
    return "/".join(parts) or "_"


def load_json(data: str | bytes) -> Any:
    """Parsed JSON, NaN and infinite numbers as None; None if it is none, or nested too deeply."""
    if isinstance(data, bytes):
        data = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        return json.loads(data, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


# -------------------------------------------------------------------------------------------- index


def build_index(entries: Iterable[Entry], file: BinaryIO) -> np.ndarray:
    """Write one JSON line per entry; returns N rows of INDEX_ROW. Memory: 16 bytes per entry."""
    ends, keys = array("q", [0]), array("Q")
    for entry in entries:
        # default: dates and decimals of parquet
        line = json.dumps(vars(entry), default=str).encode() + b"\n"
        ends.append(ends[-1] + file.write(line))
        digest = hashlib.blake2b(entry.key.encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
    rows = np.zeros(len(keys), INDEX_ROW)
    rows["begin"], rows["end"], rows["repeated"] = ends[:-1], ends[1:], True
    _, firsts = np.unique(np.frombuffer(keys, np.uint64), return_index=True)
    rows["repeated"][firsts] = False
    return rows


def read_entry(index: BinaryIO, number: int, row: np.void) -> Entry:
    """Entry `number` of an open index; a key that an earlier entry has ends in "+number"."""
    index.seek(row["begin"])
    entry = Entry(**load_json(index.read(row["end"] - row["begin"])))
    return replace(entry, key=f"{entry.key}+{number}") if row["repeated"] else entry


# ------------------------------------------------------------------------------------------ samples


def read_parts(entry: Entry) -> dict[str, bytes]:
    """{extension: bytes} of one sample.

    Raises:
        BadSample: the image file is missing, or a tar member occurs twice.
    """
    if entry.span is not None:
        return _read_span(entry.path, *entry.span)
    if not os.path.isfile(entry.path):
        raise BadSample("image: missing")
    stem, extension = os.path.splitext(entry.path)
    data = Path(entry.path).read_bytes()
    extension = extension[1:].lower()
    parts = {extension if extension in IMAGE_KEYS else _format_extension(data): data}
    if entry.captions is None:
        for name in ("txt", "json"):
            if (path := Path(f"{stem}.{name}")).is_file():
                parts[name] = path.read_bytes()
    return parts


def _format_extension(data: bytes) -> str:
    """What an image file without a usable extension is; readers go by its content anyway."""
    try:
        name = Image.open(io.BytesIO(data), formats=FORMATS).format
    except Exception:  # not an image: found out, and counted, by who decodes it
        name = "JPEG"
    extension = FORMAT_EXTENSIONS.get(name, name.lower())
    return extension if extension in IMAGE_KEYS else "jpg"


def read_text(
    entry: Entry, parts: Mapping[str, bytes], keys: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """(captions, metadata) of a sample; captions of the first of `keys` that has any, cleaned.

    Metadata is what the source knows beside them, {} for a JSON that is none.

    Raises:
        BadSample: no caption, or none that is UTF-8.
    """
    metadata, candidates = entry.metadata, [entry.captions]
    if entry.captions is None:
        content = load_json(parts["json"]) if "json" in parts else None
        metadata = content if isinstance(content, dict) else {}
        candidates = [_texts_at(key, parts, metadata) for key in keys]
    reason = "caption: missing"
    for texts in candidates:
        whole = [text for text in texts if not ESCAPED_BYTES.search(text)]
        captions = list(filter(None, map(clean_caption, whole)))
        if captions:
            return captions, metadata
        if len(whole) < len(texts):
            reason = "caption: not UTF-8"
    raise BadSample(reason)


def _texts_at(key: str, parts: Mapping[str, bytes], metadata: Mapping[str, Any]) -> list[str]:
    extension, _, name = key.partition(":")
    if name:
        return strings(metadata.get(name))
    return [parts[extension].decode("utf-8", "surrogateescape")] if extension in parts else []


# -------------------------------------------------------------------------------------- inside tars


def list_samples(path: str) -> list[tuple[str, int, int]]:
    """(key, first byte, end) of each sample of a tar; reads headers only.

    Raises:
        ValueError: truncated, or no tar.
    """
    samples, begin = [], 0
    try:
        with open_shard(path) as file:
            for key, _, end in scan_file(file, path, 0, 0, reader=-1, readers=1):
                samples.append((key, begin, end))
                begin = end
    except ShardError as error:
        # of its own kind it would not survive the way out of a worker
        raise ValueError(str(error)) from None
    return samples


def _read_span(path: str, begin: int, end: int) -> dict[str, bytes]:
    with _opened(path) as file:
        file.seek(begin)
        data = file.read(end - begin)
    with_end_mark = io.BytesIO(data + bytes(1024))
    try:
        _, parts, _ = next(scan_file(with_end_mark, path, 0, 0, reader=0, readers=1))
    except ShardError:  # list_samples has read the rest
        raise BadSample("sample: a member occurs twice") from None
    del parts["__key__"]
    return parts


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A tar to seek in. One that is unpacked, always from its start, is kept open."""
    if infer_compression(path):
        yield _unpacking(path, os.getpid())
    else:
        with open(path, "rb", buffering=0) as file:
            yield file


@lru_cache(maxsize=1)
def _unpacking(path: str, process: int) -> BinaryIO:
    """process: its id; a file that a parent has opened would move under its children."""
    return fsspec.open(path, compression="infer").open()
