"""Entries: samples that are known but not yet read; their index on disk, and how one is read.

A source (data/sources.py) gives entries. `build_index` writes them to a file, with an array's row
for each: a worker reads any of them by its number, and nobody holds a data set's captions in
memory. Entries of one image (rows of a table) are one sample, which has the captions of all.
`read_parts` then reads an entry; `explain` says what lies where something is missing.
"""

import hashlib
import io
import json
import os
import re
import stat
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from PIL import Image

from data.files import errors_naming, load_json
from data.samples import BadSample, members_of
from data.storage import ShardError, open_shard
from data.tar import names_like, nearest_names, one_form, scan_tar
from data.transforms import FORMATS, HEIF_KEYS, IMAGE_KEYS, WITHOUT_SIGNATURE, decode_image

# bytes of an entry's line, the first entry of the same image, whether its key came before, whether
# it is no sample
INDEX_ROW = np.dtype(
    [("begin", "<i8"), ("end", "<i8"), ("image", "<i8"), ("repeated", "?"), ("faulty", "?")]
)
# else the format's name
FORMAT_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}
# what only TIFFs have whose first picture is a preview: camera raws
DNG_VERSION, NEW_SUBFILE_TYPE = 50706, 254


@dataclass(frozen=True)
class Entry:
    """One sample before it is read."""

    key: str
    # of the image, or of the tar that holds the sample
    path: str
    # first byte and end of the sample in its tar; None: path is an image
    span: tuple[int, int] | None = None
    # as the source has them, also what is no text. None: they are to be found in the tar, or in
    # `sidecars`
    captions: list[Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    # files with the rest of the sample, by extension
    sidecars: dict[str, str] = field(default_factory=dict)
    # why it is no sample, where the source knows
    fault: str | None = None
    # what the source knows about it that would explain a fault
    note: str = ""


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


# -------------------------------------------------------------------------------------------- index


def build_index(entries: Iterable[Entry], file: BinaryIO) -> np.ndarray:
    """Write one JSON line per entry; returns N rows of INDEX_ROW. Memory: 41 bytes per entry."""
    ends, faulty = array("q", [0]), bytearray()
    keys, images = bytearray(), bytearray()  # digests
    for number, entry in enumerate(entries):
        # default: dates and decimals of parquet
        line = json.dumps(vars(entry), default=str).encode() + b"\n"
        ends.append(ends[-1] + file.write(line))
        faulty.append(entry.fault is not None)
        # what is no sample has neither an image nor a key that another could have; keys are equal
        # where those who read the shards take them for one
        key = image = f"\0{number}"
        if entry.fault is None:
            key, image = one_form(entry.key), f"{os.path.abspath(entry.path)} {entry.span}"
        keys += digest_of(key.encode())
        images += digest_of(image.encode("utf-8", "surrogatepass"))
    rows = np.zeros(len(faulty), INDEX_ROW)
    rows["begin"], rows["end"] = ends[:-1], ends[1:]
    rows["image"] = first_equals(np.frombuffer(images, np.uint64))
    rows["repeated"] = first_equals(np.frombuffer(keys, np.uint64)) != np.arange(len(rows))
    rows["faulty"] = np.frombuffer(faulty, bool)
    return rows


def digest_of(data: bytes) -> bytes:
    """16 bytes that stand for the data."""
    return hashlib.blake2b(data, digest_size=16).digest()


def first_equals(digests: np.ndarray) -> np.ndarray:
    """For each of N digests, 2N uint64, the number of the first one that equals it: N int64."""
    _, firsts, numbers = np.unique(
        np.ascontiguousarray(digests).view("S16").ravel(), return_index=True, return_inverse=True
    )
    return firsts[numbers]


def read_entry(index: BinaryIO, rows: np.ndarray, number: int) -> Entry:
    """Entry `number` of an open index; a key that an earlier entry has ends in "+number"."""
    row = rows[number]
    index.seek(row["begin"])
    entry = Entry(**load_json(index.read(row["end"] - row["begin"])))
    return replace(entry, key=f"{entry.key}+{number}") if row["repeated"] else entry


# ------------------------------------------------------------------------------------------ samples


def read_parts(entry: Entry) -> dict[str, bytes]:
    """{extension: bytes} of one sample.

    Raises:
        BadSample: the image file is missing or no image, or a tar member occurs twice.
        OSError: naming a file that cannot be read.
    """
    if entry.span is not None:
        return _read_span(entry.path, *entry.span)
    if file_stamp(entry.path) is None:
        raise BadSample("image: missing")
    extension = os.path.splitext(entry.path)[1][1:].lower()
    if extension not in IMAGE_KEYS:
        extension = image_extension(entry.path)
    if extension is None:
        raise BadSample(no_image(entry.path))
    parts = {}
    for name, path in {extension: entry.path, **entry.sidecars}.items():
        # a sidecar may be a pipe, a folder or a link to nowhere
        if file_stamp(path) is not None:
            with errors_naming(path):
                parts[name] = Path(path).read_bytes()
    return parts


def file_stamp(path: str) -> list[int] | None:
    """Size in bytes and time of change in ns of a file; None: there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero or half a character in its name
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


def image_extension(file: str | BinaryIO) -> str | None:
    """The extension that an image's content asks for; None: no image that is read.

    Nor are camera raws, of which Pillow would show the preview, or what may begin like an image,
    but does not decode. file: a path, or the content. jpg of formats whose own name readers do not
    know.
    """
    if isinstance(file, str) and file_stamp(file) is None:
        return None
    try:
        with Image.open(file, formats=FORMATS) as image:
            name, tags = image.format, getattr(image, "tag_v2", {})
            if name in WITHOUT_SIGNATURE:
                image.fp.seek(0)
                decode_image(image.fp.read())
    except Exception:  # also what Pillow raises on what is no image: a dozen types
        return None
    if DNG_VERSION in tags or tags.get(NEW_SUBFILE_TYPE) == 1:
        return None
    extension = FORMAT_EXTENSIONS.get(name, name.lower())
    return extension if extension in IMAGE_KEYS else "jpg"


def no_image(path: str) -> str:
    """The reason why a file is no sample: by its ending, for there may be many."""
    ending = os.path.splitext(path)[1].lower()
    is_usual = ending[1:].isalnum() and len(ending) <= 10
    return f"no image: {ending if is_usual else 'unusual ending' if ending else 'no ending'}"


# -------------------------------------------------------------------------------------- explanation


def explain(entry: Entry, reason: str) -> str:
    """A sample that is dropped, by name, with what lies there in place of what it lacks."""
    path, name, found = entry.path, os.path.basename(entry.path), ""
    if entry.span is not None:
        name = f"{name}: {entry.key}"
        if "missing" in reason or reason.startswith("json"):
            found = members_of(_read_span(path, *entry.span))
    elif "://" in path:
        name, found = re.search(r"\w*://.*", path)[0], "a URL, expected a file"
    elif os.path.isdir(path):
        name, found = path, "a folder, expected a file"
    elif file_stamp(path) is None:
        there = "backslashes, expected /" if "\\" in path else nearest_names(path)
        name, found = path, f"no such file: {there}"
    elif reason.startswith("caption") and entry.captions is not None:
        found = f"its captions are {str(entry.captions)[:60]}"
    elif reason.startswith(("caption", "json")):
        found = f"beside it {', '.join(names_like(path)) or 'nothing'}"
    elif reason.startswith(("image: unreadable", "no image")):
        with suppress(OSError), open(path, "rb") as file:
            found = f"begins with {file.read(12)!r}"
        if os.path.splitext(path)[1][1:].lower() in HEIF_KEYS:
            found = "HEIC needs the package pillow-heif"
    return ": ".join(filter(None, (name, found, entry.note)))


# -------------------------------------------------------------------------------------- inside tars


def list_samples(path: str) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """(key, first byte, end) of each sample of a tar, (name, why) of each member that no sample
    has; reads headers only.

    Raises:
        ShardError: truncated, or no tar.
    """
    samples, strays, begin = [], [], 0
    with open_shard(path) as file:
        for key, _, end in scan_tar(file, path, readers=0, strays=strays):
            samples.append((key, begin, end))
            begin = end
    return samples, strays


def _read_span(path: str, begin: int, end: int) -> dict[str, bytes]:
    file = _opened(path, os.getpid(), os.stat(path).st_mtime_ns)
    file.seek(begin)
    data = file.read(end - begin)
    with_end_mark = io.BytesIO(data + bytes(1024))
    try:
        _, parts, _ = next(scan_tar(with_end_mark, path))
    except ShardError:  # list_samples has read the rest
        raise BadSample("sample: a member occurs twice") from None
    del parts["__key__"]
    return parts


@lru_cache(maxsize=1)
def _opened(path: str, process: int, changed: int) -> BinaryIO:
    """A tar to seek in, kept open: one that is compressed is always unpacked from its start.

    process: its id; a file that a parent has opened would move under its children. changed: when
    the tar was.
    """
    return fsspec.filesystem("file").open(path, compression="infer")
