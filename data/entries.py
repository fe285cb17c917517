"""Entries: samples that are known but not read. An index of them on disk, and how one is read.

A source (data/sources.py) gives entries; `build_index` puts them into a file with a row of an array for each, so that a
worker reads any of them by its number and nobody holds the captions of a data set in memory. `read_parts`,
`read_metadata` and `read_captions` then read one sample.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data.captions import clean_caption
from data.image_text import IMAGE_KEYS
from data.shards import BadSample
from data.tar import scan_shard
from data.transforms import FORMATS

INDEX_ROW = np.dtype(
    [("begin", "<i8"), ("end", "<i8"), ("repeated", "?")]
)  # bytes of the line; its key came before
ESCAPED_BYTES = re.compile(
    "[\udc80-\udcff]"
)  # how bytes that are not UTF-8 were decoded ("surrogateescape")
FORMAT_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "JPEG2000": "jp2",
    "TIFF": "tif",
}  # else the format's name


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
    """A name from the data as a key: folders stay; no dots, no "..", not absolute, nothing unprintable.

    Nor "+", by which `read_entry` marks a key that occurs again, nor "__" at a start, which readers skip.
    """
    parts = []
    for part in name.replace("\\", "/").split("/"):
        if part not in ("", ".", ".."):
            part = "".join(
                "_" if character in ".+" or not character.isprintable() else character
                for character in part
            )
            parts.append(re.sub("^__+", "_", part))
    return "/".join(parts) or "_"


def load_json(data: str | bytes) -> Any:
    """Parsed JSON, in which NaN and infinite numbers are None; None if it is no JSON, or nested beyond reason."""
    text = (
        data
        if isinstance(data, str)
        else data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    )
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def strings(value: Any) -> list[str]:
    """The captions in a JSON value: a string, or a list with strings."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


# ------------------------------------------------------------------------------------------------------------- index


def build_index(entries: Iterable[Entry], path: Path) -> np.ndarray:
    """Write one JSON line per entry to `path`; returns N rows of INDEX_ROW. Memory: 16 bytes per entry."""
    ends, keys = array("q", [0]), array("Q")
    with open(path, "wb") as file:
        for entry in entries:
            line = (
                json.dumps(vars(entry), default=str).encode() + b"\n"
            )  # default: dates and decimals of parquet
            ends.append(ends[-1] + file.write(line))
            keys.append(
                int.from_bytes(
                    hashlib.blake2b(entry.key.encode(), digest_size=8).digest(), "little"
                )
            )
        file.flush()
        os.fsync(file.fileno())
    rows = np.zeros(len(keys), INDEX_ROW)
    rows["begin"], rows["end"], rows["repeated"] = ends[:-1], ends[1:], True
    rows["repeated"][np.unique(np.frombuffer(keys, np.uint64), return_index=True)[1]] = False
    return rows


def read_entry(index: BinaryIO, number: int, row: np.void) -> Entry:
    """Entry `number` of an open index; a key that an earlier entry has ends in "+number"."""
    index.seek(row["begin"])
    entry = Entry(**load_json(index.read(row["end"] - row["begin"])))
    return replace(entry, key=f"{entry.key}+{number}") if row["repeated"] else entry


# ----------------------------------------------------------------------------------------------------------- samples


def read_parts(entry: Entry) -> dict[str, bytes]:
    """{extension: bytes} of one sample. BadSample: the image file is missing, or a tar member occurs twice."""
    if entry.span is not None:
        return _read_span(entry.path, *entry.span)
    if not os.path.isfile(entry.path):
        raise BadSample("image: missing")
    stem, extension = os.path.splitext(entry.path)
    data = Path(entry.path).read_bytes()
    extension = extension[1:].lower()
    parts = {extension if extension in IMAGE_KEYS else _format_extension(data): data}
    if entry.captions is None:
        beside = {name: Path(f"{stem}.{name}") for name in ("txt", "json")}
        parts |= {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
    return parts


def _format_extension(data: bytes) -> str:
    """What an image file without a usable extension is; readers go by its content anyway."""
    try:
        name = Image.open(io.BytesIO(data), formats=FORMATS).format
    except Exception:  # not an image: found out, and counted, by who decodes it
        name = "JPEG"
    extension = FORMAT_EXTENSIONS.get(name, name.lower())
    return extension if extension in IMAGE_KEYS else "jpg"


def read_metadata(entry: Entry, parts: Mapping[str, bytes]) -> dict[str, Any]:
    """What the source knows of a sample beside its captions; {} for a JSON that is none."""
    if entry.captions is not None:
        return entry.metadata
    content = load_json(parts["json"]) if "json" in parts else None
    return content if isinstance(content, dict) else {}


def read_captions(
    entry: Entry, parts: Mapping[str, bytes], metadata: Mapping[str, Any], keys: Sequence[str]
) -> list[str]:
    """All captions, cleaned, of the first of `keys` (as data.captions has them) that gives any. At least one.

    BadSample: none, or only such that are not UTF-8.
    """
    candidates = [entry.captions]
    if entry.captions is None:
        candidates = [_captions_at(key, parts, metadata) for key in keys]
    reason = "caption: missing"
    for texts in candidates:
        whole = [text for text in texts if not ESCAPED_BYTES.search(text)]
        captions = [caption for caption in map(clean_caption, whole) if caption]
        if captions:
            return captions
        if len(whole) < len(texts):
            reason = "caption: not UTF-8"
    raise BadSample(reason)


def _captions_at(key: str, parts: Mapping[str, bytes], metadata: Mapping[str, Any]) -> list[str]:
    extension, _, name = key.partition(":")
    if name:
        return strings(metadata.get(name))
    return [parts[extension].decode("utf-8", "surrogateescape")] if extension in parts else []


# ------------------------------------------------------------------------------------------------------ inside tars


def list_samples(path: str) -> list[tuple[str, int, int]]:
    """(key, first byte, end) of each sample of a tar; reads headers only."""
    try:
        ends = [end for _, end in scan_shard(path, 0, 0, reader=-1, readers=1)]
    except ValueError as error:
        raise ValueError(
            str(error)
        ) from None  # of its own kind it would not survive the way out of a worker
    begins, samples = [0, *ends[:-1]] if ends else [], []
    with _opened(path) as file:
        for begin, end in zip(begins, ends, strict=True):
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                key, _, _ = next(_members(tar))
            samples.append((key, begin, end))
    return samples


def _read_span(path: str, begin: int, end: int) -> dict[str, bytes]:
    with _opened(path) as file:
        file.seek(begin)
        data = file.read(end - begin)
    parts = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
        for _, extension, member in _members(tar):
            if extension in parts:
                raise BadSample("sample: a member occurs twice")
            parts[extension] = tar.extractfile(member).read()
    return parts


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of the files that belong to samples, by the rules of data.tar."""
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if (
            member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            and stem
            and dot
            and not base.startswith("__")
        ):
            yield (f"{folder}/{stem}" if folder else stem), extension.lower(), member


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A tar to seek in. Gzip can only be unpacked from its start, so that the last one used is kept open."""
    if path.endswith(".gz"):
        yield _unpacking(path, os.getpid())
    else:
        with open(path, "rb", buffering=0) as file:
            yield file


@lru_cache(maxsize=1)
def _unpacking(path: str, process: int) -> BinaryIO:
    """process: its id; a file that a parent has opened would move under its children."""
    return gzip.open(path)
