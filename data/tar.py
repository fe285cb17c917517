"""Tar shards (webdataset layout): how they are named, written and read.

A sample is a run of consecutive tar members with one key: `{key}.{ext}`, the key ending at the first dot of the
file name. Raw samples are {"__key__": key, ext: bytes}. Plain local tars are written; whatever data/storage.py opens is
read.

The tars are parsed here and not by `webdataset`, whose readers cannot resume inside an epoch, or by `tarfile`, which
takes a tar cut between two members for a complete one.
"""

import difflib
import glob
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.storage import READ_BUFFER, ShardError, is_pipe, is_remote, open_shard

TAR_BLOCK = 512  # bytes; headers and the padding of members come in these
ADLER_MODULUS = 65521  # of Adler-32, whose low half is 1 + the sum of the bytes


# ---------------------------------------------------------------------------------------------------------- naming


def expand_shards(patterns: Sequence[str], allow_pipe: bool = False) -> list[str]:
    """Paths, `~`, brace patterns (`x-{000..010}.tar`, `{a,b}.tar`) and globs -> paths, sorted inside each pattern.

    URLs and pipes: braces only, and nothing is looked up. ValueError: a pattern that matches nothing or names a
    missing file, a shard that two patterns name, or a `pipe:`, which runs a shell, without allow_pipe.
    """
    if isinstance(patterns, str):
        raise ValueError(f"shards must be a list of patterns, given the single string {patterns!r}")
    if not patterns:
        raise ValueError("shards is empty: expected at least one path or pattern of .tar files")
    check_pipes(patterns, allow_pipe)
    paths, seen = [], {}
    for pattern in patterns:
        for path in sorted(_expand_pattern(str(pattern))):
            name = path if is_remote(path) else os.path.abspath(path)
            if name in seen:
                raise ValueError(
                    f"shard {path} is listed twice: by {seen[name]!r} and by {pattern!r}"
                )
            seen[name] = pattern
            paths.append(path)
    return paths


def check_pipes(patterns: Sequence[str], allow_pipe: bool) -> None:
    """ValueError for a `pipe:` without allow_pipe."""
    for pattern in patterns:
        if is_pipe(str(pattern)) and not allow_pipe:
            raise ValueError(
                f"shards: {str(pattern)!r} runs a shell command; if you trust whoever wrote it, set allow_pipe: true"
            )


def _expand_pattern(pattern: str) -> list[str]:
    if is_remote(pattern):
        return _expand_braces(pattern, is_pipe(pattern))
    paths = []
    for name in _expand_braces(os.path.expanduser(pattern)):
        matches = glob.glob(name) if glob.has_magic(name) and not os.path.exists(name) else [name]
        missing = [path for path in matches if not os.path.isfile(path)]
        if missing or not matches:
            raise ValueError(
                f"shards: {pattern!r} {_explain_missing(missing[0] if missing else name)}"
            )
        paths += matches
    return paths


def _expand_braces(text: str, in_command: bool = False) -> list[str]:
    """`{003..010}` keeps the zero padding of its first number; `{a,b}` lists; nested lists are not supported.

    in_command: braces that are neither stay, they belong to the command, as in `awk '{print}'`.
    """
    match = re.search(
        r"\{(\d+\.\.\d+|[^{}\s;]*,[^{}\s;]*)\}" if in_command else r"\{([^{}]*)\}", text
    )
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
    rests = _expand_braces(text[match.end() :], in_command)
    return [text[: match.start()] + choice + rest for choice in choices for rest in rests]


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
        raise ValueError(
            f"sample key {key!r}: expected a non-empty string without a dot in its last part"
        )
    if key in seen:
        raise ValueError(f"sample key {key!r} occurs twice in one shard")
    seen.add(key)
    parts = [
        (extension, value) for extension, value in sample.items() if not extension.startswith("__")
    ]
    if not parts:
        raise ValueError(f"sample {key!r} has no parts beside its key")
    for extension, value in parts:
        if extension != extension.lower() or "/" in extension or not extension:
            raise ValueError(
                f"sample {key!r}: extension {extension!r} must be lower case, without a slash, not empty"
            )
        data = _to_bytes(value, f"{key}.{extension}")
        info = tarfile.TarInfo(
            f"{key}.{extension}"
        )  # TarInfo's own defaults: mtime 0, owner 0, mode 0644
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
    raise ValueError(
        f"{name}: given {type(value).__name__}, expected bytes, str, np.ndarray, dict or list"
    )


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
    ShardError: the tar breaks off, or cannot be read. The sample before the break is then not given, as it may lack
    members, whether its bytes were to be read or not.
    """
    sample, current, keep = None, None, True
    with open_shard(path) as file:
        for name, start, data, size in _members(file, path, offset):
            slash = name.rfind("/") + 1
            dot = name.find(".", slash)
            if dot <= slash or name.startswith("__", slash):
                continue  # "._x.jpg" of macOS, members without an extension, webdataset's own "__meta__" files
            key = name[:dot]
            if key != current:
                if current is not None:
                    yield sample, start
                keep = ordinal % readers == reader
                sample, current, ordinal = ({"__key__": key} if keep else None), key, ordinal + 1
            offset = data + size
            if keep:
                extension = name[dot + 1 :].lower()
                if extension in sample:
                    message = (
                        f"{path}: two members are named {name} in a row, sample keys must differ"
                    )
                    raise ShardError("unreadable", message)
                sample[extension] = file.read(size)
                if len(sample[extension]) != size:
                    raise ShardError(
                        "truncated",
                        f"{path}: truncated tar, member {name} ends before its {size} bytes",
                    )
        while file.read(READ_BUFFER):
            pass  # a pipe shows only at its end whether its command failed, gzip whether its checksum fits
    if current is not None:
        yield sample, _padded(offset)


def _members(file: BinaryIO, path: str, offset: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, byte where its headers start, byte where its data starts, bytes) of each regular file of a tar.

    The file stands at the data when a member is given.
    """
    start, long_name = offset, None
    while True:
        file.seek(offset)
        header = file.read(TAR_BLOCK)
        if len(header) < TAR_BLOCK:
            raise ShardError(
                "truncated",
                f"{path}: truncated tar, it stops at byte {offset} without an end-of-archive mark",
            )
        if not header[0] and not header.strip(b"\0"):
            return
        size, kind = _member_size(header, path, offset), header[156]
        data, offset = offset + TAR_BLOCK, _padded(offset + TAR_BLOCK + size)
        if kind in b"xL":  # the name of the next member, if it does not fit its own header
            extended = file.read(size)
            if len(extended) != size:
                raise ShardError(
                    "truncated", f"{path}: truncated tar, a header ends before its {size} bytes"
                )
            try:
                long_name = _pax_path(extended) if kind == ord("x") else _text(extended)
            except ValueError:
                raise ShardError(
                    "unreadable", f"{path}: broken pax header at byte {start}"
                ) from None
            continue
        if kind in b"0\0":
            yield long_name or _member_name(header), start, data, size
        start, long_name = offset, None


def _member_size(header: bytes, path: str, offset: int) -> int:
    """Bytes of a member. ShardError: no size, or a checksum that does not fit."""
    field = header[148:156]
    try:
        # The checksum is the sum of all bytes, its own eight counted as spaces. The low half of Adler-32 has that sum
        # modulo a prime, in a tenth of the time of sum().
        total = int(field.strip(b"\0 "), 8) + sum(field) - 8 * ord(" ")
        size = int(header[124:136].strip(b"\0 "), 8)
        if zlib.adler32(header) & 0xFFFF == (total + 1) % ADLER_MODULUS and size >= 0:
            return size
    except ValueError:
        pass
    hint = " (gzip: its name must end in .gz)" if header[:2] == b"\x1f\x8b" else ""
    raise ShardError("unreadable", f"{path}: not a tar header at byte {offset}{hint}")


def _member_name(header: bytes) -> str:
    name = _text(header[:100])
    return (
        f"{_text(header[345:500])}/{name}"
        if header[345] and header[257:263] == b"ustar\0"
        else name
    )


def _pax_path(records: bytes) -> str | None:
    """The path of a pax header, whose records are `{length} {key}={value}` and a line feed; None without one.

    ValueError: no length where one should be.
    """
    while records:
        length = int(records.partition(b" ")[0])
        if length < 1:
            raise ValueError(f"record of {length} bytes")
        key, _, value = records[:length].partition(b" ")[2].partition(b"=")
        if key == b"path":
            return _text(value[:-1])
        records = records[length:]
    return None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(offset: int) -> int:
    return -(-offset // TAR_BLOCK) * TAR_BLOCK
