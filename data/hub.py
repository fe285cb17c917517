"""Data sets by their id on the hub, or in a folder or store that has the same files: a source.

There, images lie in parquet files (a column of bytes, or of bytes and path) or in tars of
webdataset's layout. What is not a local tar is first copied, file by file, into tars in
OUTPUT/progress/copies: parquet is read in small batches of rows, its image bytes stay as they are.
From the copies on, all is as for local tars, so shuffling, held-out samples and filters do not read
the network again. The copies are removed once all shards are there.
"""

import argparse
import fnmatch
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from data.entries import Entry, clean_key, digest_of
from data.files import written_whole
from data.packing import COPIES
from data.sources import (
    CAPTION_KEYS,
    DEFAULT_KEYS,
    SourceKind,
    file_path,
    is_tar_name,
    tar_entries,
)
from data.storage import (
    CONTENT_FIELDS,
    REMOTE_BUFFER,
    TIME_FIELDS,
    is_remote,
    open_file,
    open_store,
)
from data.tables import Columns, find_columns, read_rows
from data.tar import write_shard
from data.workers import map_in_processes

STATE_FIELDS = ("size", *CONTENT_FIELDS, *TIME_FIELDS, "mtime")  # what a store says of a file
# words in file names; without any of them, all files are of the split "train"
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
NUM_NAMES = 8  # that an error lists


@dataclass(frozen=True)
class HubFile:
    """A file of a data set."""

    path: str
    name: str  # below the data set's root
    size: int  # bytes
    state: str  # another text once it has changed


# ------------------------------------------------------------------------------------------- source


def dataset_name(text: str) -> str:
    """argparse type: an id of the hub, a folder that exists, or a URL."""
    if "://" in text:
        return text.rstrip("/")
    folder = file_path(text)
    if os.path.isdir(folder):
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is neither a folder nor an id like OWNER/NAME")
    return text


def hub_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """Rows of parquet files or samples of tars, in the order of the files' names.

    Raises:
        ValueError: a data set, split or column that is not there or could be several, a file that
            cannot be read, a disk without room for the copies.
    """
    dataset = options.dataset
    output = Path(options.output)
    found = choose_files(options)
    columns = None
    if is_parquet(found[0].name):
        if tuple(options.caption_keys) != DEFAULT_KEYS:
            raise ValueError(f"caption_keys: {dataset} has parquet files: see --caption-column")
        columns = find_columns(found[0].path, options.image_column, options.caption_column)
    elif options.image_column or options.caption_column:
        raise ValueError(f"image_column, caption_column: {dataset} has tars: see --caption-keys")

    # what has to be copied; each part of a Slurm array begins at another file
    tars = [tar_of(file, columns, output) for file in found]
    missing = [pair for pair in zip(found, tars, strict=True) if not pair[1].exists()]
    begin = options.shard_index * len(missing) // options.num_shards
    make_copies([*missing[begin:], *missing[:begin]], columns, options)
    yield from tar_entries([str(tar) for tar in tars], options.workers)


HUB = SourceKind(
    "a data set by its id on the hub: parquet with images in a column, or webdataset tars",
    {
        "dataset": {
            "type": dataset_name,
            "metavar": "ID",
            "help": "OWNER/NAME, or a folder or a URL (s3://, ...) that has such files",
        },
        "--split": {"default": "train", "help": "a word in the names of its files or folders"},
        "--revision": {"help": "branch, tag or commit; refs/convert/parquet: as the hub converts"},
        "--files": {"metavar": "GLOB", "help": "which of its files, in place of --split: 'big/*'"},
        "--image-column": {"metavar": "NAME", "help": "of parquet; default: by type and name"},
        "--caption-column": {"metavar": "NAME", "help": "of parquet: text, or a list of texts"},
    }
    | CAPTION_KEYS,
    hub_entries,
    # remote files may change once they are copied
    lambda options: (
        [file.path for file in choose_files(options)] if os.path.isdir(options.dataset) else []
    ),
)


# -------------------------------------------------------------------------------------------- files


def list_files(dataset: str, revision: str | None) -> list[HubFile]:
    """All files of a data set that are not hidden, by name; ValueError: there is no way to it."""
    root = dataset
    if not os.path.isdir(dataset) and "://" not in dataset:
        root = f"hf://datasets/{dataset}"
        if revision:
            root += f"@{quote(revision, safe='/' if revision.startswith('refs/') else '')}"
    elif revision:
        raise ValueError(f"revision: given {revision!r}, but {dataset} is no id of the hub")
    # each file system has errors of its own
    try:
        store, folder = open_store(root)
        found = store.find(folder, detail=True)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{root} cannot be listed: {reason}") from None
    files = []
    for path, info in sorted(found.items()):
        name = path.removeprefix(folder).lstrip("/")
        # .cache and .git hold copies of the files
        if not any(part.startswith(".") for part in name.split("/")):
            state = " ".join(str(info.get(field)) for field in STATE_FIELDS)
            files.append(HubFile(f"{root}/{name}", name, info["size"] or 0, state))
    return files


def choose_files(options: argparse.Namespace) -> list[HubFile]:
    """The data set's parquet files or tars, those of a split, or those that fit a pattern.

    Raises:
        ValueError: as by list_files; none, or files of both kinds.
    """
    dataset = options.dataset
    files = list_files(dataset, options.revision)
    usable = [file for file in files if is_parquet(file.name) or is_tar_name(file.name)]
    if not usable:
        endings = Counter(os.path.splitext(file.name)[1] or file.name for file in files)
        there = ", ".join(f"{name} ({count})" for name, count in endings.most_common(NUM_NAMES))
        raise ValueError(f"{dataset}: expected parquet files or tars, found {there or 'no file'}")
    fault = "has no such file"
    if options.files is not None:
        given = f"files: given {options.files!r}"
        chosen = [file for file in usable if fnmatch.fnmatchcase(file.name, options.files)]
    else:
        given = f"split: given {options.split!r}"
        split = options.split.lower()
        # a split is a word in a name; without any such word, all files are for training
        words = [{*re.split(r"[\W_]+", file.name.lower())} for file in usable]
        chosen = [file for file, own in zip(usable, words, strict=True) if split in own]
        without = sum(own.isdisjoint({split, *SPLITS}) for own in words)
        if split == "train" and without == len(usable):
            chosen = usable
        elif chosen and without:
            chosen = []
            fault = f"has {without} files of no split"
    # one kind of options would be ignored: columns, or caption keys
    if len({is_parquet(file.name) for file in chosen}) > 1:
        chosen = []
        fault = "has both parquet files and tars"
    if not chosen:
        names = ", ".join(file.name for file in usable[:NUM_NAMES])
        raise ValueError(f"{given}: {dataset} {fault}; choose by --files among {names} ...")
    return chosen


def is_parquet(name: str) -> bool:
    """Whether a file is named like a parquet file."""
    return name.lower().endswith(".parquet")


# ------------------------------------------------------------------------------------------- copies


def tar_of(file: HubFile, columns: Columns | None, output: Path) -> Path:
    """Where a file is copied to; a local tar stays where it is. columns: None: it is a tar."""
    if columns is None and not is_remote(file.path):
        return Path(file.path)
    # another name for another state of the file, or for other columns: old copies are not taken
    name = os.path.basename(file.name) + ("" if columns is None else ".tar")
    digest = digest_of(repr((file, columns)).encode("utf-8", "surrogateescape")).hex()[:12]
    return output / COPIES / f"{digest}-{name}"


def make_copies(
    missing: Sequence[tuple[HubFile, Path]], columns: Columns | None, options: argparse.Namespace
) -> None:
    """Copy in several processes, with a progress bar; ValueError: there is no room for them."""
    output = Path(options.output)
    total = sum(file.size for file, _ in missing)
    free = shutil.disk_usage(output).free
    if total > free:
        raise ValueError(
            f"output: {output} has {free / 1e9:.1f} GB free, expected {total / 1e9:.1f} GB for a "
            "copy of the data set, and as much again for its shards"
        )
    if missing:
        (output / COPIES).mkdir(parents=True, exist_ok=True)
        with tqdm(desc="copying", total=total, unit="B", unit_scale=True) as progress:
            copy = partial(make_copy, columns, options.shard_index)
            for size in map_in_processes(copy, missing, min(options.workers, len(missing))):
                progress.update(size)


def make_copy(columns: Columns | None, part: int, job: tuple[HubFile, Path]) -> int:
    """Write the tar of a file whole, unless another part has by now; returns the file's bytes."""
    file, target = job
    if not target.exists():
        # parts of a Slurm array that work side by side each have an unfinished tar
        own = target.with_name(f"{part}-{target.name}")
        if columns is None:
            with open_file(file.path) as tar, written_whole(own) as copy:
                shutil.copyfileobj(tar, copy, REMOTE_BUFFER)
        else:
            # rows have no names of their own
            prefix = clean_key(os.path.splitext(file.name)[0])
            write_shard(own, read_rows(file.path, columns, prefix))
        os.replace(own, target)
    return file.size
