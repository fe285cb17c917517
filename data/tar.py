"""Tar shards (webdataset layout): how they are named, written and read.

A sample is a run of consecutive tar members with one key: `{key}.{ext}`, the key ending at the first dot of the
file name. Raw samples are {"__key__": key, ext: bytes}. Plain tars, and `.gz` read only.

The tars are parsed here and not by `webdataset`, whose readers cannot resume inside an epoch, or by `tarfile`, which
takes a tar cut between two members for a complete one.
"""

import difflib
import glob
import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TAR_BLOCK = 512  # bytes; headers and the padding of members come in these
READ_BUFFER = 1 << 20  # bytes; small members are served from one read


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
    for sample, _ in scan_shard(str(path), offset=0, ordinal=0, reader=0, readers=1):
        yield sample


def count_samples(path: str | Path) -> int:
    """Samples in one tar; reads headers only."""
    return sum(1 for _ in scan_shard(str(path), offset=0, ordinal=0, reader=-1, readers=1))


def scan_shard(
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
