"""Packing samples into shards, in several processes: what scripts/make_shards.py does once it knows the order.

A task is one shard. Whatever is written appears whole or not at all, and depends on the task alone.
"""

import hashlib
import json
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from multiprocessing import Pipe, Process, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.entries import Entry, read_captions, read_entry, read_metadata, read_parts
from data.filters import SampleFilter
from data.image_text import IMAGE_KEYS
from data.shards import BadSample
from data.tar import write_shard
from data.transforms import decode_image

PROGRESS_FOLDER = "progress"  # in the output folder
UNCHECKED, USABLE, DUPLICATE = 0, 1, 2  # what digest_task has found out about a sample
POLL_SECONDS = 0.5  # of the progress bar


# ------------------------------------------------------------------------------------------------------- one sample


@dataclass(frozen=True)
class SampleConfig:
    """What happens to one sample."""

    caption_keys: tuple[str, ...]
    sample_filter: SampleFilter
    # pixels; shorter side of larger images afterwards. 0: keep the file as it is
    resize: int
    # of JPEG, 1..100
    quality: int
    # RGB, 0..255, behind transparent pixels when resizing
    background: tuple[int, int, int]


def make_sample(
    entry: Entry, config: SampleConfig, is_usable: bool = False
) -> tuple[dict[str, Any], bytes]:
    """(sample for write_shard, the source's image file). is_usable: known from before, an image need not be decoded.

    BadSample: no image, no caption, or filtered. ValueError: a score is missing that must not be.
    """
    parts = {} if entry.captions is not None else read_parts(entry)
    metadata = read_metadata(entry, parts)
    captions = read_captions(entry, parts, metadata, config.caption_keys)
    try:
        config.sample_filter.check_metadata(captions[0], metadata)
    except ValueError as error:
        raise ValueError(f"sample {entry.key} of {entry.path}: {error}") from None
    parts = parts or read_parts(
        entry
    )  # not before: of a table with scores most images may be dropped unread
    extension = next((key for key in IMAGE_KEYS if key in parts), None)
    if extension is None:
        raise BadSample("image: missing")
    original = data = parts[extension]
    if config.resize or not is_usable:
        image = decode_image(data, config.background)
        config.sample_filter.check_size(*image.size)
        if config.resize and min(image.size) > config.resize:
            small = shrink(image, config.resize)
            sizes = {"original_width": image.width, "original_height": image.height} | metadata
            metadata = sizes | {"width": small.width, "height": small.height}
            extension, data = "jpg", to_jpeg(small, config.quality)
    others = {
        name: part for name, part in parts.items() if name not in (*IMAGE_KEYS, "txt", "json", "")
    }
    content = to_json({**metadata, "captions": captions})
    return {
        "__key__": entry.key,
        extension: data,
        "txt": captions[0],
        "json": content,
        **others,
    }, original


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, bicubic with antialiasing as the readers resize."""
    shorter = min(image.size)
    width, height = (max(1, round(side * size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def to_json(content: dict[str, Any]) -> bytes:
    """UTF-8; what is no character (half of a surrogate pair, bytes of another encoding) becomes "?"."""
    try:
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    except RecursionError:
        raise BadSample("json: nested too deeply") from None


# -------------------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class Task:
    """The samples of one shard: a job for a worker."""

    shard: int
    output: Path
    part: int  # of the Slurm array; distinguishes unfinished files of parts that work side by side
    config: SampleConfig
    numbers: np.ndarray  # of the entries, in the order of the shard
    rows: np.ndarray  # theirs in the index
    states: np.ndarray  # UNCHECKED, USABLE or DUPLICATE

    @property
    def tar(self) -> Path:
        return self.output / f"{self.shard:06d}.tar"

    @property
    def record(self) -> Path:
        """What is to be known about the finished shard: {"read", "kept", "dropped"}; written after it."""
        return self.output / PROGRESS_FOLDER / f"{self.shard:06d}.json"

    @property
    def digests(self) -> Path:
        """One row of 16 bytes per sample, zeros for what is dropped: see find_duplicates."""
        return self.output / PROGRESS_FOLDER / f"{self.shard:06d}.digests.npy"

    def entries(self) -> Iterator[tuple[Entry, int]]:
        with open(index_path(self.output), "rb") as index:
            for number, row, state in zip(self.numbers, self.rows, self.states, strict=True):
                yield read_entry(index, int(number), row), state

    def is_finished(self) -> bool:
        return self.record.is_file() and (
            self.tar.is_file() or not json.loads(self.record.read_text())["kept"]
        )


def write_task(task: Task, tick: Callable[[int], Any]) -> None:
    """Write a shard, then its record."""
    dropped: Counter[str] = Counter()

    def samples() -> Iterator[dict[str, Any]]:
        for entry, state in task.entries():
            try:
                if state == DUPLICATE:
                    raise BadSample("duplicate")
                yield make_sample(entry, task.config, is_usable=state == USABLE)[0]
            except BadSample as error:
                dropped[error.reason] += 1
            tick(1)

    kept = write_shard(task.tar, samples())
    if not kept:
        task.tar.unlink()
    record = {"read": len(task.numbers), "kept": kept, "dropped": dict(sorted(dropped.items()))}
    write_file(task.record, json.dumps(record).encode(), task.part)


def digest_task(task: Task, tick: Callable[[int], Any]) -> None:
    """Store a digest of each image file that would be kept, unless another part of the array has done it by now."""
    if task.digests.is_file():
        tick(len(task.numbers))
        return
    digests, config = np.zeros((len(task.numbers), 2), np.uint64), replace(task.config, resize=0)
    for i, (entry, _) in enumerate(task.entries()):
        try:
            _, data = make_sample(entry, config)
            digests[i] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)
        except BadSample:
            pass  # counted when the shard is written
        tick(1)
    write_array(task.digests, digests, task.part)


def write_file(path: Path, data: bytes, part: int) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{part}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_array(path: Path, array: np.ndarray, part: int) -> None:
    buffer = BytesIO()
    np.save(buffer, array)
    write_file(path, buffer.getvalue(), part)


def index_path(output: Path) -> Path:
    return output / PROGRESS_FOLDER / "index.jsonl"


# ------------------------------------------------------------------------------------------------- several processes


def run_tasks(
    work: Callable, tasks: Iterator[Task], num_samples: int, workers: int, title: str
) -> None:
    """work(task, tick) for all tasks, with a progress bar; num_samples: theirs together."""
    with progress_bar(title, total=num_samples) as progress:
        if workers == 1:
            for task in tasks:
                work(task, progress.update)
            return
        counts = RawArray(
            "q", workers
        )  # samples done; a lock could be held by a worker that is killed
        functions = [partial(_work_and_count, work, counts, slot) for slot in range(workers)]
        for _ in map_in_processes(
            functions, tasks, lambda: progress.update(sum(counts) - progress.n)
        ):
            pass


def _work_and_count(work: Callable, counts: Any, slot: int, task: Task) -> None:
    def tick(num_samples: int) -> None:
        counts[slot] += num_samples

    work(task, tick)


def progress_bar(title: str, **options: Any) -> tqdm:
    """Rate and time left, on stderr; seldom where that is a file, in which every line stays."""
    tqdm.monitor_interval = 0  # no thread of its own: processes are forked
    return tqdm(
        desc=title, unit=" samples", mininterval=0.1 if sys.stderr.isatty() else 30, **options
    )


def map_in_processes(
    functions: Sequence[Callable[[Any], Any]],
    items: Iterable[Any],
    look: Callable[[], Any] = lambda: None,
) -> Iterator[Any]:
    """function(item) of each item, in order; one function for each process. look() is called every POLL_SECONDS.

    Every process has a pipe of its own, and they share no lock and no queue: one that is killed, whatever it was
    doing, holds nobody up. After an error the others finish what they have begun.

    Raises:
        ChildProcessError: a process was killed.
    """
    with _processes(functions) as pipes:
        numbered, busy, done, num_given_back = enumerate(items), {}, {}, 0
        while True:
            for pipe, (number, item) in zip([pipe for pipe in pipes if pipe not in busy], numbered):
                with _noticing_death():
                    pipe.send(item)
                busy[pipe] = number
            if not busy:
                return
            for pipe in wait(list(busy), POLL_SECONDS):
                with _noticing_death():
                    result, error = pipe.recv()
                if error is not None:
                    raise error
                done[busy.pop(pipe)] = result
            look()
            while num_given_back in done:
                yield done.pop(num_given_back)
                num_given_back += 1


@contextmanager
def _noticing_death() -> Iterator[None]:
    """Around the use of a pipe."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise ChildProcessError("a worker was killed") from error


@contextmanager
def _processes(functions: Sequence[Callable[[Any], Any]]) -> Iterator[list[Connection]]:
    """Pipes to processes that end with this one, also if it is killed."""
    pipes, processes = [], []
    try:
        for function in functions:
            own, other = Pipe()
            pipes.append(own)
            processes.append(Process(target=_serve, args=(function, other, list(pipes))))
            processes[-1].start()
            other.close()  # so that the pipe ends with the process
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _serve(
    function: Callable[[Any], Any], pipe: Connection, inherited: Sequence[Connection]
) -> None:
    """In a process: answer each item with (result, error), until the pipe ends."""
    for other_end in inherited:
        other_end.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(
        EOFError, ConnectionError, KeyboardInterrupt
    ):  # Ctrl-C reaches the parent, too, which says so
        while True:
            pipe.send(_result_or_error(function, pipe.recv()))


def _result_or_error(function: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    try:
        return function(item), None
    except Exception as error:
        if not isinstance(error, ValueError):  # those are for users; a pipe carries no traceback
            traceback.print_exc()
        return None, error


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)  # a run that is started meanwhile writes the same files
