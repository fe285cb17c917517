"""Tar shards (webdataset layout): how they are named, written and read.

A sample is a run of consecutive tar members with one key: `{key}.{ext}`, the key ending at the
first dot of the file name. Raw samples are {"__key__": key, ext: bytes}. Plain local tars are
written, by `webdataset`; whatever data/storage.py opens is read, by `tarfile`, from any sample on:
webdataset's readers only start at the beginning.
"""

import difflib
import glob
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand
from webdataset import TarWriter

from data.files import written_whole
from data.storage import READ_BUFFER, ShardError, is_remote, open_shard

NOBODY = -1  # in place of a reader's number: no sample is its own, only headers are read
# what tarfile raises on hostile bytes; what a storage raises is none of them
PARSER_ERRORS = (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError)

# ------------------------------------------------------------------------------------------- naming


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Paths, `~`, braces (`x-{000..010}.tar`, `{a,b}.tar`), globs -> paths, sorted in each pattern.

    A folder that is there is taken as it is, also with [ ] { } in its name. URLs have braces only,
    and nothing is looked up.

    Raises:
        ValueError: a pattern that matches no file, or a shard that two patterns name.
    """
    if isinstance(patterns, str):
        raise ValueError(f"shards must be a list of patterns, given the single string {patterns!r}")
    if not patterns:
        raise ValueError("shards is empty: expected at least one path or pattern of .tar files")
    paths, owners = [], {}
    for pattern in patterns:
        for path in sorted(_expand_pattern(str(pattern))):
            name = path if is_remote(path) else os.path.abspath(path)
            if name in owners:
                raise ValueError(
                    f"shard {path} is listed twice: by {owners[name]!r} and by {pattern!r}"
                )
            owners[name] = pattern
            paths.append(path)
    return paths


def _expand_pattern(pattern: str) -> Iterator[str]:
    folder, rest = split_pattern(os.path.expanduser(pattern))
    for name in braceexpand(rest, escape=False):
        if is_remote(folder + name):
            yield folder + name
            continue
        has_magic = glob.has_magic(name) and not os.path.exists(folder + name)
        matches = glob.glob(name, root_dir=folder or None) if has_magic else []
        for path in [folder + match for match in matches or [name]]:
            if not os.path.isfile(path):
                raise ValueError(f"shards: {pattern!r} {_explain_missing(path)}")
            yield path


def split_pattern(
    pattern: str, is_folder: Callable[[str], bool] = os.path.isdir
) -> tuple[str, str]:
    """(folder as far as it is there, with its slash; the rest, which is a pattern)."""
    if os.path.exists(pattern):
        return pattern, ""
    ends = [index + 1 for index, letter in enumerate(pattern) if letter == "/"]
    end = next((end for end in reversed(ends) if is_folder(pattern[:end])), 0)
    return pattern[:end], pattern[end:]


def shard_name(path: str) -> str:
    """The file name of a path or URL, without what follows after "?"."""
    return os.path.basename(path.partition("?")[0] if is_remote(path) else path)


def _explain_missing(path: str) -> str:
    """What is there instead of `path`: the nearest names in the nearest folder that exists."""
    if os.path.isdir(path):
        return f"names the folder {path}: expected files, for example {os.path.join(path, '*.tar')}"
    wanted = Path(path).absolute()
    while not wanted.parent.is_dir():
        wanted = wanted.parent
    names = sorted(os.listdir(wanted.parent))
    near = difflib.get_close_matches(wanted.name, names, n=3, cutoff=0.4) or names[:3]
    verb = "matches no file" if glob.has_magic(path) else f"needs {path}, which does not exist"
    return f"{verb}; nearest in {wanted.parent}: {', '.join(near) or 'nothing'}"


# ------------------------------------------------------------------------------------------ writing


def refuse_foreign_shards(folder: Path, mark: str) -> None:
    """Refuse a folder with shards, but without the file that their program leaves beside its own.

    Raises:
        ValueError: naming both.
    """
    if any(folder.glob("*.tar")) and not (folder / mark).is_file():
        raise ValueError(
            f"{folder} holds tars of another program ({mark} is missing): name another folder"
        )


def write_shard(path: str | Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write samples {"__key__": key, ext: value} to one tar, in order; returns how many.

    A value is bytes, str (stored as UTF-8), np.ndarray (as .npy) or, under "json", what JSON can
    hold. The same samples give the same bytes (times and owners are 0). The file appears whole or
    not at all.

    Raises:
        ValueError: a bad key or extension, or a key that occurs twice.
    """
    seen: set[str] = set()
    with (
        written_whole(path) as file,
        TarWriter(file, user="", group="", mode=0o644, mtime=0) as tar,
    ):
        for sample in samples:
            parts, key = _parts(sample), sample["__key__"]
            if key in seen:
                raise ValueError(f"{path}: sample key {key!r} occurs twice")
            seen.add(key)
            for extension, value in parts.items():
                # one by one: of a whole sample, webdataset sorts the members
                tar.write({"__key__": key, extension: value})
    return len(seen)


def _parts(sample: Mapping[str, Any]) -> dict[str, Any]:
    """{extension: value} of a sample that readers can tell apart from its neighbours."""
    key = sample.get("__key__")
    if not isinstance(key, str) or not re.fullmatch(r"(.*/)?[^./]+", key):
        raise ValueError(f"sample key {key!r}: expected a string without a dot in its last part")
    parts = {name: value for name, value in sample.items() if not name.startswith("__")}
    if not parts:
        raise ValueError(f"sample {key!r} has no parts beside its key")
    for extension in parts:
        if extension != extension.lower() or "/" in extension or not extension:
            raise ValueError(
                f"sample {key!r}: extension {extension!r}: expected lower case, no slash"
            )
    return parts


# ------------------------------------------------------------------------------------------ reading


def read_shard(path: str | Path) -> Iterator[dict[str, Any]]:
    """Raw samples of one tar in order.

    Raises:
        ShardError: truncated or not a tar, or two members with one name.
    """
    with open_shard(str(path)) as file:
        for _, sample, _ in scan_tar(file, str(path)):
            yield sample


def count_samples(path: str | Path) -> int:
    """Samples in one tar; reads headers only."""
    with open_shard(str(path)) as file:
        return sum(1 for _ in scan_tar(file, str(path), reader=NOBODY))


def scan_tar(
    file: BinaryIO,
    path: str,
    offset: int = 0,
    ordinal: int = 0,
    reader: int = 0,
    readers: int = 1,
    strays: list[tuple[str, str]] | None = None,
) -> Iterator[tuple[str, dict[str, Any] | None, int]]:
    """(key, sample, byte offset of the next one) of an open tar from byte `offset` on.

    The samples count up from `ordinal`; one with ordinal % readers != reader comes as None, its
    bytes unread. path: for messages. strays: gets (name, why) of every member whose bytes no sample
    has; a tar of nothing else is then no error.

    Raises:
        ShardError: the tar breaks off, cannot be read, or has members but no sample. The sample
            before a break is not given, as it may lack members, whether its bytes were to be read
            or not.
    """
    key, sample, end = None, None, offset
    others = []  # names that belong to no sample
    for member, next_header in _members(file, path, offset):
        if member.type == tarfile.DIRTYPE:
            continue
        # what belongs to a sample: the key is the path up to the name's first dot
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        fault = _stray(stem, extension)
        if strays is not None and (fault or not is_plain):
            strays.append((member.name, fault or "no plain file"))
        if fault:
            others = others[:2] + [member.name]
            continue
        # the first member of another sample ends the one before
        member_key = folder + slash + stem
        if member_key != key and (key is None or one_form(member_key) != one_form(key)):
            if key is not None:
                yield key, sample, member.offset
            key = member_key
            sample = {"__key__": key} if ordinal % readers == reader else None
            ordinal += 1
        end = next_header
        # its bytes, if the sample is this reader's; a link has none, but its sample counts
        if sample is not None and is_plain:
            extension = extension.lower()
            if extension in sample:
                text = (
                    f"{path}: two members are named {member.name} in a row, sample keys must differ"
                )
                raise ShardError("unreadable", text)
            sample[extension] = file.read(member.size)
            if len(sample[extension]) != member.size:
                raise ShardError("truncated", f"{path}: {member.name} ends before its last byte")
    while file.read(READ_BUFFER):
        pass  # a compressed shard shows at its end whether its checksum fits
    if key is not None:
        yield key, sample, end
    elif others and offset == 0 and strays is None:
        text = f"{path}: no sample: members {' '.join(others[:3])}, expected KEY.EXTENSION"
        raise ShardError("no sample", text)


def _stray(stem: str, extension: str) -> str | None:
    """Why a name belongs to no sample: macOS's "._x.jpg", webdataset's own "__meta__.json", "x"."""
    if stem.startswith("__"):
        return "begins with __"
    if not stem:
        return "hidden"
    return None if extension else "no ending"


def one_form(name: str) -> str:
    """The same for names of one file: macOS writes accents as characters of their own, and tar may
    put ./ in front.
    """
    name = name.removeprefix("./")
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _members(file: BinaryIO, path: str, offset: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(member, byte of the next header) from byte `offset` on; the file stands at its data."""
    file.seek(offset)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8")
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.size < 0:
                raise tarfile.ReadError("a negative size")
            yield member, tar.offset
        # tarfile takes a tar that breaks off for a complete one, which ends in headers of zeros
        offset = tar.offset
        file.seek(offset)
        end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError("neither a header nor an end-of-archive mark")
    except PARSER_ERRORS as error:
        reason = "unreadable" if file.read(1) else "truncated"
        raise ShardError(reason, f"{path}: {reason} tar from byte {offset} on: {error}") from None
