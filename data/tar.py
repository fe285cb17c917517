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

# what tarfile raises on hostile bytes; what a storage raises is none of them
PARSER_ERRORS = (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError)
NUM_NAMES = 5  # of files that a message lists

# ------------------------------------------------------------------------------------------- naming


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Paths, `~`, braces (`x-{000..010}.tar`, `{a,b}.tar`), globs -> paths, sorted in each pattern.

    A folder that is there is taken as it is, also with [ ] { } in its name. URLs have braces only,
    and nothing is looked up.

    Raises:
        ValueError: a pattern that matches no file, or a shard that two patterns name.
    """
    paths: dict[str, str] = {}  # by its absolute form
    for pattern in patterns:
        for path in sorted(_expand_pattern(str(pattern))):
            name = path if is_remote(path) else os.path.abspath(path)
            # twice in an epoch would be a weight that nobody set
            if name in paths:
                raise ValueError(f"shard {path} is listed twice, the second time by {pattern!r}")
            paths[name] = path
    return list(paths.values())


def _expand_pattern(pattern: str) -> Iterator[str]:
    folder, rest = split_pattern(os.path.expanduser(pattern))
    # braces first: of what they give, each has to exist, while a glob gives what exists
    for name in braceexpand(rest, escape=False):
        if is_remote(folder + name):
            yield folder + name
            continue
        has_magic = glob.has_magic(name) and not os.path.exists(folder + name)
        matches = glob.glob(name, root_dir=folder or None) if has_magic else []
        for path in [folder + match for match in matches or [name]]:
            if os.path.isdir(path):
                raise ValueError(
                    f"shards: {pattern!r} names the folder {path}, expected {path}/*.tar"
                )
            if not os.path.isfile(path):
                fault = "matches no file" if has_magic else f"needs {path}, which does not exist"
                raise ValueError(f"shards: {pattern!r} {fault}; {nearest_names(path)}")
            yield path


def split_pattern(
    pattern: str, is_folder: Callable[[str], bool] = os.path.isdir
) -> tuple[str, str]:
    """(folder as far as it is there, with its slash; the rest, which is a pattern)."""
    if os.path.exists(pattern):
        return pattern, ""
    ends = [match.end() for match in re.finditer("/", pattern) if is_folder(pattern[: match.end()])]
    end = max(ends, default=0)
    return pattern[:end], pattern[end:]


def shard_name(path: str) -> str:
    """The file name of a path or URL, without what follows after "?"."""
    return os.path.basename(path.partition("?")[0] if is_remote(path) else path)


def nearest_names(path: str) -> str:
    """What there is where a path leads to nothing: names like its own, else the first ones."""
    wanted = Path(path).absolute()
    while not wanted.parent.is_dir():
        wanted = wanted.parent
    names = sorted(os.listdir(wanted.parent))
    near = names_like(str(wanted))
    # of some names only: comparing a million takes half a minute
    near = near or difflib.get_close_matches(wanted.name, names[:1000], n=NUM_NAMES, cutoff=0.4)
    return f"in {wanted.parent} are {', '.join(near or names[:NUM_NAMES]) or 'none'}"


def names_like(path: str) -> list[str]:
    """Other files in the folder of one, with its name up to the first dot, in whatever case."""
    folder, name = os.path.split(path)

    def stem_of(file: str) -> str:
        return one_form(file).partition(".")[0].casefold()

    stem = stem_of(name)
    others = [file for file in os.listdir(folder or ".") if file != name and stem_of(file) == stem]
    return sorted(others)[:NUM_NAMES]


def one_form(name: str) -> str:
    """The same for names of one file: macOS writes accents as characters of their own, and tar may
    put ./ in front.
    """
    name = name.removeprefix("./")
    return name if name.isascii() else unicodedata.normalize("NFC", name)


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
            key = sample.get("__key__")
            parts = {name: value for name, value in sample.items() if not name.startswith("__")}
            # what would make it another sample, or a part of its neighbour, when it is read
            if not isinstance(key, str) or not re.fullmatch(r"(.*/)?[^./]+", key):
                raise ValueError(f"sample key {key!r}: expected text, no dot in its last part")
            if key in seen:
                raise ValueError(f"{path}: sample key {key!r} occurs twice")
            if not parts or any(re.search("^$|[A-Z/]", name) for name in parts):
                raise ValueError(
                    f"sample {key!r}: expected lower-case extensions without /, given {list(parts)}"
                )
            seen.add(key)
            for extension, value in parts.items():
                # one by one: of a whole sample, webdataset sorts the members
                tar.write({"__key__": key, extension: value})
    return len(seen)


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
        return sum(1 for _ in scan_tar(file, str(path), readers=0))


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
    bytes unread; readers 0: each does. path: for messages. strays: gets (name, why) of every member
    whose bytes no sample has; a tar of nothing else is then no error.

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
        fault = ""
        if stem.startswith("__"):  # webdataset's own __meta__.json
            fault = "begins with __"
        elif not stem:  # macOS's ._x.jpg
            fault = "hidden"
        elif not extension:
            fault = "no ending"
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
            sample = {"__key__": key} if readers and ordinal % readers == reader else None
            ordinal += 1
        end = next_header
        # its bytes, if the sample is this reader's; a link has none, but its sample counts
        if sample is not None and is_plain:
            extension = extension.lower()
            if extension in sample:
                text = f"two members are named {member.name} in a row, sample keys must differ"
                raise ShardError("unreadable", f"{path}: {text}")
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
