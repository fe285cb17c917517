"""Writing files whole: aside, synced, renamed. A killed process leaves the old file or the new one."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def written_whole(path: str | Path, writer: str = "") -> Iterator[BinaryIO]:
    """A file to write to, which gets its name once the block ends without an error.

    writer: tells the unfinished files of processes apart that may write the same file at once.
    """
    partial = Path(f"{path}{writer and f'.{writer}'}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold; nothing is left there.

    Raises:
        ValueError: it is a folder, or no file can be made where it is to be.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
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
