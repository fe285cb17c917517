"""Files: written whole (aside, synced, renamed), and text files read whatever their encoding.

A killed process leaves the old file or the new one.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

# --------------------------------------------------------------------------------------- text files


def decode_text(data: bytes, errors: str = "strict") -> str:
    """UTF-8, or UTF-16 or -32 by its byte order mark or its zeros; errors: of what is none of them.

    Raises:
        UnicodeDecodeError: it is in another encoding.
    """
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        return data.decode("utf-8", errors)


def load_json(data: str | bytes, strict: bool = False) -> Any:
    """Parsed JSON, NaN and infinite numbers as None; None if it is none, or nested too deeply.

    strict: also None if an object names a field twice, of which JSON's readers keep the last.
    """

    def finite(number: str) -> float | None:
        return float(number) if math.isfinite(float(number)) else None

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError("a field occurs twice")
        return fields

    if isinstance(data, bytes):
        data = decode_text(data, "surrogateescape")
    hook = without_repeats if strict else None
    try:
        return json.loads(data, parse_constant=finite, parse_float=finite, object_pairs_hook=hook)
    except (ValueError, RecursionError):
        return None


def read_text_file(path: str | Path) -> str:
    """A text file, its lines ending in \n.

    Raises:
        ValueError: it cannot be read, is in another encoding or no text; names it.
    """
    try:
        text = decode_text(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(not_decodable(path, error.encoding)) from None
    if "\0" in text:
        raise ValueError(f"{path} is no text: it holds zeros")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def not_decodable(path: str | Path, encoding: str) -> str:
    """What an error says of a text file that is in another encoding: its first such line."""
    # what cannot be decoded is missing in one, and a mark in the other; a mark that the text itself
    # has is in both
    with (
        open(path, encoding=encoding, errors="ignore") as cut,
        open(path, encoding=encoding, errors="replace") as marked,
    ):
        pairs = zip_longest(cut, marked, fillvalue="")
        number, line = next(
            (number, line) for number, (rest, line) in enumerate(pairs, start=1) if rest != line
        )
    place = line.find("\N{REPLACEMENT CHARACTER}")
    given = line[max(place - 20, 0) : place + 20].strip()
    return f"{path} line {number} is not {encoding.upper()}: {given!r}; save the file as UTF-8"


def user_path(text: str) -> Path:
    """argparse type: a path, with the home folder for ~ also where the shell leaves it."""
    return Path(text).expanduser()


def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """argparse type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        if not least <= int(text) <= most:
            expected = f"at least {least}" if most == math.inf else f"{least}..{most}"
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return int(text)

    parse.__name__ = "integer"  # argparse names it where the text is no integer
    return parse


# ------------------------------------------------------------------------------------------ writing


@contextmanager
def errors_naming(path: str | Path) -> Iterator[None]:
    """Errors of a full or broken disk name the file; the system does so only on opening it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def written_whole(path: str | Path, writer: str = "") -> Iterator[BinaryIO]:
    """A file to write to, which gets its name once the block ends without an error.

    writer: tells the unfinished files of processes apart that may write the same file at once.

    Raises:
        OSError: naming the file.
    """
    partial = Path(f"{path}{writer and f'.{writer}'}.tmp")
    try:
        with errors_naming(path), open(partial, "wb") as file:
            yield file
            # before the rename: after a power cut the new name could else hold nothing
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A new folder to write into, which gets its name once the block ends without an error."""
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            flush(entry)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_folder(path: Path) -> None:
    """Refuse a folder that holds something; ValueError names it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: name a new folder")


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        ValueError: it is a folder, or no file can be made where it is to be.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    # by doing it: permission bits say nothing of a read-only mount, or to root; nothing is left
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {folder}: {error.strerror}") from error


def write_json(values: Any, path: Path) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole; its folder is made. Processes may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, str(os.getpid())) as file:
        file.write(data)
