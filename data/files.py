"""Writing files whole: aside, synced, renamed. A killed process leaves the old file or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
