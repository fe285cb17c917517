"""Where shards lie: each kind is opened as a file of plain tar bytes that is read forwards.

    /data/x-000.tar, x-000.tar.gz             local; .gz is unpacked while reading
    https://host/x-000.tar (.gz too)          streamed; a lost connection is taken up again where it broke
    pipe:aws s3 cp s3://bucket/x-000.tar -    standard output of a shell command, which fails by a status other than 0

A jump forwards is a range request where the server knows them; otherwise, and in pipes and .gz, all that lies between
is read. Nothing is kept on disk.
"""

import gzip
import io
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from typing import BinaryIO
from urllib.parse import urlsplit

READ_BUFFER = (
    1 << 20
)  # bytes; small members are served from one read, shorter jumps in a stream are read over
PIPE = "pipe:"
HTTP_TIMEOUT_S = 30.0  # without a byte
HTTP_TRIES = 5  # in a row without a byte
HTTP_BACKOFF_S = 1.0  # before the second try, doubled for each further one
HTTP_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class ShardError(ValueError):
    """A shard whose rest cannot be read. `reason`: "truncated" or "unreadable"."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def is_pipe(path: str) -> bool:
    """`pipe:COMMAND`, which runs a shell."""
    return path.startswith(PIPE)


def is_remote(path: str) -> bool:
    """A URL or a pipe: its existence cannot be looked up like a file's.

    ValueError: a scheme that we do not speak.
    """
    if is_pipe(path):
        return True
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", path, re.IGNORECASE)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise ValueError(
            f"shards: {path!r} is neither a file, http(s) nor a pipe; stores are read by their own command, for "
            "example 'pipe:aws s3 cp s3://bucket/x-{000..010}.tar -' with allow_pipe: true"
        )
    return scheme is not None


def is_compressed(path: str) -> bool:
    """Whether open_shard unpacks it; a pipe's command does that itself."""
    if is_pipe(path):
        return False
    return (urlsplit(path).path if is_remote(path) else path).endswith(".gz")


def check_first_remote(paths: Sequence[str]) -> None:
    """Read a byte of the first remote path: a wrong host, key or command then fails before the training starts.

    ShardError: it cannot be read.
    """
    for path in paths:
        if is_remote(path):
            with open_shard(path) as file:
                file.read(1)
            return


@contextmanager
def open_shard(path: str) -> Iterator[BinaryIO]:
    """A shard as a binary file with read and forward seek. ShardError, also later while reading: it cannot be read."""
    try:
        with _open_stored(path) as stored:
            if is_compressed(path):
                with gzip.GzipFile(fileobj=stored) as file:
                    yield file
            else:
                yield stored
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "truncated" if isinstance(error, EOFError) else "unreadable"
        raise ShardError(reason, f"{path}: truncated or broken gzip: {error}") from None
    except OSError as error:
        raise ShardError("unreadable", f"{path}: {error.strerror or error}") from None


def _open_stored(path: str) -> BinaryIO:
    if is_pipe(path):
        return io.BufferedReader(PipeFile(path.removeprefix(PIPE)), READ_BUFFER)
    if is_remote(path):
        return io.BufferedReader(HttpFile(path), READ_BUFFER)
    return open(path, "rb", buffering=READ_BUFFER)


class _ForwardFile(io.RawIOBase):
    """A raw file whose seek only notes where the next read starts."""

    def __init__(self):
        self._wanted = 0  # byte at which the next read starts
        self._position = 0  # byte at which the stream behind it stands

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._wanted

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a stream is not known")
        self._wanted = offset + (self._wanted if whence == io.SEEK_CUR else 0)
        return self._wanted

    def _read_over(self, stream: BinaryIO) -> None:
        """Read and forget what lies before the next read, or all there is."""
        while self._position < self._wanted:
            skipped = len(stream.read(min(self._wanted - self._position, READ_BUFFER)))
            if not skipped:
                return
            self._position += skipped

    def _read_into(self, stream: BinaryIO, buffer) -> int:
        """Bytes read at the wanted byte; 0 at the end of the stream."""
        self._read_over(stream)
        count = stream.readinto(buffer) if self._position == self._wanted else 0
        self._position += count
        self._wanted += count
        return count


class HttpFile(_ForwardFile):
    """A file on a web server. OSError: refused, or not a byte in HTTP_TRIES tries."""

    def __init__(self, url: str):
        super().__init__()
        self._url = url
        self._response: HTTPResponse | None = None
        self._size: int | None = None  # bytes, where the server says so
        self._has_ranges = True  # until it answers otherwise

    def readinto(self, buffer) -> int:
        for attempt in range(HTTP_TRIES):
            if attempt:
                time.sleep(HTTP_BACKOFF_S * 2 ** (attempt - 1))
            try:
                return self._try_read(buffer)
            except (OSError, HTTPException) as error:  # time-outs, resets, wrong lengths
                self._drop()
                failure = error
                if isinstance(error, urllib.error.HTTPError) and error.code not in HTTP_TRY_AGAIN:
                    break
        raise OSError(f"{str(failure) or type(failure).__name__} (try {attempt + 1})")

    def close(self) -> None:
        self._drop()
        super().close()

    def _try_read(self, buffer) -> int:
        if self._size is not None and self._wanted >= self._size:
            return 0
        jump = self._wanted - self._position
        if self._response is None or jump < 0 or (jump > READ_BUFFER and self._has_ranges):
            self._connect()
        count = self._read_into(self._response, buffer)
        if not count and self._size is not None and self._position < self._size:
            raise ConnectionError(f"connection lost at byte {self._position} of {self._size}")
        return count

    def _connect(self) -> None:
        """Ask for everything from the wanted byte on; a server without ranges sends the whole file instead."""
        self._drop()
        headers = {"User-Agent": "flowtok"}
        if self._wanted and self._has_ranges:
            headers["Range"] = f"bytes={self._wanted}-"
        request = urllib.request.Request(self._url, headers=headers)
        self._response = urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S)
        if self._response.status == 206:
            part = self._response.headers.get("Content-Range", "")
            if not (match := re.fullmatch(rf"bytes {self._wanted}-\d+/(\d+|\*)", part)):
                raise ConnectionError(f"asked for the bytes from {self._wanted} on, given {part!r}")
            self._position, length = self._wanted, match[1]
        else:
            self._has_ranges = self._has_ranges and "Range" not in headers
            self._position, length = 0, self._response.headers.get("Content-Length", "*")
        self._size = None if length == "*" else int(length)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class PipeFile(_ForwardFile):
    """Standard output of a shell command. OSError at its end: it exited non-zero. Closing it ends the command."""

    def __init__(self, command: str):
        super().__init__()
        self._command = command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,  # a group of its own, that can be ended with all its children
        )

    def readinto(self, buffer) -> int:
        if self._wanted < self._position:
            raise io.UnsupportedOperation("a pipe is only read forwards")
        count = self._read_into(self._process.stdout, buffer)
        if not count and (status := self._process.wait()):
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            raise OSError(
                f"the command exited with status {status}{f': {lines[-1]}' if lines else ''}"
            )
        return count

    def close(self) -> None:
        if not self.closed:
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process.stdout.close()
            self._errors.close()
        super().close()
