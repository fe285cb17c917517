"""Where shards lie: any place that fsspec knows, opened as files of plain tar bytes.

    /data/x-000.tar, x-000.tar.gz    local; what is compressed is unpacked while reading
    https://host/x-000.tar.gz        a web server
    s3://, gs://, hf://, ...         where s3fs, gcsfs, huggingface_hub, ... are installed

Nothing is kept on disk.
"""

import io
import lzma
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
from fsspec.compression import compr
from fsspec.utils import get_protocol, infer_compression

READ_BUFFER = 1 << 20  # bytes; small members of a local shard are served from one read
REMOTE_BUFFER = 1 << 22  # bytes of a request; a jump within them needs no other one
TRIES = 5  # in a row without a byte
BACKOFF_SECONDS = 1.0  # before the second try, doubled for each further one
TRY_AGAIN = {408, 425, 429}  # HTTP statuses below 500 that a later try may change
PARALLEL_REQUESTS = 16
# what stores say of a file: what follows from its content, the surest first; when it was written
CONTENT_FIELDS = ("md5Hash", "blob_id", "ETag", "etag")
TIME_FIELDS = ("Last-Modified", "LastModified", "updated")
# of a file, evenly spaced, that its state is of: all of it up to 2 MiB
PARTS, PART_BYTES = 16, 1 << 17
TIMEOUT_SECONDS = 30.0  # of a web server, without a byte


class ShardError(ValueError):
    """A shard whose rest cannot be read; of a reason ("truncated", "unreadable") and a message."""

    reason = property(lambda self: self.args[0])

    def __str__(self) -> str:
        return self.args[-1]


def is_remote(path: str) -> bool:
    """Whether a path is a URL, whose existence is not looked up as a file's is.

    Raises:
        ValueError: of a kind that fsspec does not know, or whose package is not installed.
    """
    if "://" not in path:
        return False
    try:
        fsspec.get_filesystem_class(get_protocol(path))
    except (ImportError, ValueError) as error:
        raise ValueError(f"shards: {path!r} cannot be opened: {error}") from None
    return True


@contextmanager
def open_shard(path: str) -> Iterator[BinaryIO]:
    """A shard as a binary file with read and forward seek.

    Raises:
        ShardError: it cannot be read, also later while reading.
    """
    remote = is_remote(path)
    compression = infer_compression(urlsplit(path).path if remote else path)
    unpack = compr[compression] if compression else nullcontext
    # also what breaks later, while the caller reads: each library has its own errors
    buffer_size = REMOTE_BUFFER if remote else READ_BUFFER
    try:
        with open_file(path, buffer_size) as stored, unpack(stored) as file:
            yield file
    except EOFError as error:
        raise ShardError("truncated", f"{path}: truncated {compression}: {error}") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError("unreadable", f"{path}: {reason}") from None


def open_file(path: str, buffer_size: int = io.DEFAULT_BUFFER_SIZE) -> BinaryIO:
    """A file as it is stored, to read and seek in; its own OSErrors.

    buffer_size: bytes; a small one for who jumps about and asks for as much as is needed.
    """
    raw = RemoteFile(path) if is_remote(path) else io.FileIO(path)
    return io.BufferedReader(raw, buffer_size)


def shard_states(paths: Sequence[str]) -> list[str]:
    """What is another text once a shard is made anew, as far as it is cheap to know; "" if nothing.

    Of a file its size and the CRC-32 of PARTS of it, of a URL what its store says (one request
    each), whatever its folder. If that does not tell all, a time follows after ";".
    """
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(_shard_state, paths))


def _shard_state(path: str) -> str:
    try:
        return _url_state(path) if is_remote(path) else _file_state(path)
    except Exception:  # each file system has its own; who reads the shard says what is wrong
        return ""


def _url_state(url: str) -> str:
    store, name = open_store(url)
    info = store.info(name)
    state = f"size {info['size']}" if info.get("size") else ""
    for field in (*CONTENT_FIELDS, *TIME_FIELDS):
        if info.get(field):
            return f"{state}{', ' if field in CONTENT_FIELDS else '; '}{field} {info[field]}"
    return state


def _file_state(path: str) -> str:
    crc = 0
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        last = max(status.st_size - PART_BYTES, 0)
        for start in sorted({last * part // (PARTS - 1) for part in range(PARTS)}):
            file.seek(start)
            crc = zlib.crc32(file.read(PART_BYTES), crc)
    state = f"{status.st_size} bytes, CRC-32 {crc:08x}"
    if status.st_size > PARTS * PART_BYTES:
        # a change between the parts escapes, but for its time
        changed = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat()
        state = f"{state} of parts; {changed}"
    return state


def is_other(before: str, now: str) -> bool:
    """Whether two states are certainly of different shards: another time alone does not say so."""
    before, now = before.partition(";")[0], now.partition(";")[0]
    return "" not in (before, now) and before != now


def open_store(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the name that the file has there."""
    options = {}
    # aiohttp's own limit is five minutes for a whole request, however fast
    if path.startswith("http"):
        import aiohttp  # only those that read from servers wait for it

        timeout = aiohttp.ClientTimeout(sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
        # proxies as other programs find them; URLs as they are written, for they may be signed
        client = {"timeout": timeout, "trust_env": True}
        options = {"client_kwargs": client, "encoded": True}
    return fsspec.url_to_fs(path, **options)


class RemoteFile(io.RawIOBase):
    """A file of fsspec. A read that fails is tried again from the byte where the last one ended.

    Reads raise OSError if the file is not there, is refused, or gives no byte in TRIES tries.
    """

    def __init__(self, path: str):
        self._fs, self._path = open_store(path)
        self._file = self._size = None
        self._position = 0  # byte at which the next read starts
        self._request = REMOTE_BUFFER  # bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            self._try(self._open)
            offset += self._size
        elif whence == io.SEEK_CUR:
            offset += self._position
        self._position = offset
        return offset

    def readinto(self, buffer) -> int:
        data = self._try(lambda: self._read(min(len(buffer), self._request)))
        self._request = min(self._request * 2, REMOTE_BUFFER)
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _try(self, action: Callable[[], Any]) -> Any:
        """What the action gives, as soon as it does."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                return action()
            except Exception as error:  # each file system has its own
                failure = error.__cause__ or error  # fsspec takes a busy server for a missing file
                if not _may_pass(failure):
                    break
                # shorter requests make progress where connections always break early
                self._request = max(self._request // 8, 1024)
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise OSError(f"{reason} (try {attempt + 1})")

    def _open(self) -> None:
        if self._file is None:
            self._file = self._fs.open(self._path, block_size=REMOTE_BUFFER, cache_type="none")
            self._size = self._file.size
        if self._size is None:  # a server that does not say
            self._take_whole()

    def _read(self, size: int) -> bytes:
        self._open()
        size = min(size, self._size - self._position)
        if size <= 0:
            return b""
        # each time from the position: after an error nobody knows where the file stands
        self._file.seek(self._position)
        try:
            data = self._file.read(size)
        except ValueError:  # fsspec's word for a server without ranges
            self._take_whole()
            return self._read(size)
        if len(data) != size:
            raise ConnectionError(f"asked for {size} bytes, given {len(data)}")
        return data

    def _take_whole(self) -> None:
        """Hold all of the file in memory, where no part of it can be asked for."""
        data = self._fs.cat_file(self._path)
        self._file = io.BytesIO(data)
        self._size = len(data)


def _may_pass(error: Exception) -> bool:
    """Whether a later try may succeed."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in TRY_AGAIN
    return not isinstance(error, FileNotFoundError | PermissionError | ImportError)
