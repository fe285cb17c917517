"""Where samples come from: folders, tables, COCO, MJHQ-30K, tars -> entries, in their own order.

A source is a generator of data.entries.Entry, registered with its command-line arguments: a new one
is one more function here, and a sub-command of scripts/make_shards.py by that. Its parameters are
the arguments' names, and `workers`, the number of processes, if it wants to know it. Its first
entry comes after everything that can be checked at once.
"""

import argparse
import csv
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.captions import strings
from data.entries import Entry, clean_key, list_samples, load_json
from data.processes import map_in_processes
from data.storage import is_remote
from data.tar import expand_shards
from data.transforms import IMAGE_KEYS

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".jsonl")
MAX_FIELD_CHARACTERS = 1 << 24  # of a csv; more means a quote that never closes


# ----------------------------------------------------------------------------------------- registry


Arguments = dict[str, dict[str, Any]]  # flag -> options of argparse's add_argument
SOURCES: dict[str, tuple[str, Arguments, Callable[..., Iterator[Entry]]]] = {}


def source(name: str, text: str, arguments: Arguments) -> Callable[[Callable], Callable]:
    """Register a generator of entries under the name of its sub-command."""

    def register(entries: Callable[..., Iterator[Entry]]) -> Callable[..., Iterator[Entry]]:
        SOURCES[name] = (text, arguments, entries)
        return entries

    return register


def find_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """The entries of a command line."""
    entries = SOURCES[options.source][2]
    names = inspect.signature(entries).parameters
    return entries(**{name: getattr(options, name) for name in names})


def folder_path(text: str) -> str:
    """argparse type: a folder that exists."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return os.path.normpath(text)


CAPTION_KEYS = {
    "--caption-keys": {
        "nargs": "+",
        "default": ["json:captions", "txt", "json:caption"],
        "metavar": "KEY",
        "help": "where captions lie, tried in order: an extension, or json:FIELD (text or a list)",
    }
}
FILE = {"file": {"type": os.path.normpath, "metavar": "FILE"}}
IMAGES = {
    "--images": {"type": folder_path, "help": "where paths start; default: the folder of FILE"}
}


# ------------------------------------------------------------------------------------------ folders


@source(
    "folder",
    "images with same-named .txt or .json captions, also in sub-folders",
    {"folder": {"type": folder_path}} | CAPTION_KEYS,
)
def folder_entries(folder: str) -> Iterator[Entry]:
    """Images of a folder and its sub-folders, by name, no hidden ones; captions lie beside them.

    Raises:
        ValueError: no image in it.
    """
    others, found = Counter(), False
    for name in _files(folder):
        stem, extension = os.path.splitext(name)
        if extension[1:].lower() in IMAGE_KEYS:
            found = True
            yield Entry(clean_key(stem), os.path.join(folder, name))
        else:
            others[extension or "no extension"] += 1
    if not found:
        there = ", ".join(f"{name} ({count})" for name, count in others.most_common(5)) or "none"
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_KEYS)}); files there: {there}")


def _files(root: str) -> Iterator[str]:
    """Paths below root, relative to it, sorted folder by folder; links are followed once."""
    visited = set()

    def fail(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


# ------------------------------------------------------------------------------------------- tables


@source(
    "table",
    "csv, tsv, parquet or jsonl files with a path and a caption in each row",
    {
        "tables": {"type": os.path.normpath, "nargs": "+", "metavar": "FILE"},
        "--path-column": {"default": "path", "help": "of the image file"},
        "--caption-column": {"default": "caption", "help": "a text; jsonl, parquet: or a list"},
    }
    | IMAGES,
)
def table_entries(
    tables: Sequence[str], images: str | None, path_column: str, caption_column: str
) -> Iterator[Entry]:
    """Rows of tables; the columns beside path and caption become metadata.

    images: folder that relative paths start from, default: that of the table. A caption may be a
    list of captions.

    Raises:
        ValueError: a table that is missing, broken or of another kind, a column that is not there,
            no row at all.
    """
    found = False
    for table in tables:
        root = os.path.dirname(table) if images is None else images
        columns, rows = _open_table(table)
        missing = [name for name in (path_column, caption_column) if name not in columns]
        if missing:
            there = ", ".join(columns) or "none"
            raise ValueError(
                f"{table} has no column {' and no column '.join(missing)}; it has {there}"
            )
        # what is left of a row is its metadata
        for row in rows:
            found = True
            path = row.pop(path_column, None)
            captions = strings(row.pop(caption_column, None))
            # without a path: the root itself, which is no file
            path = path if isinstance(path, str) else ""
            # an absolute path leaves the key short
            inside = path.removeprefix(os.path.join(os.path.abspath(root), ""))
            yield Entry(path_key(inside), os.path.join(root, path), captions=captions, metadata=row)
    if not found:
        raise ValueError(f"{', '.join(tables)}: no row")


def _open_table(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Column names (of a jsonl: those in its first lines) and rows."""
    extension = os.path.splitext(path)[1].lower()
    if extension not in TABLE_EXTENSIONS:
        raise ValueError(f"table {path}: expected one of {', '.join(TABLE_EXTENSIONS)}")
    if not os.path.isfile(path):
        raise ValueError(f"table {path} does not exist")
    if extension == ".parquet":
        return _open_parquet(path)
    if extension == ".jsonl":
        first = islice(_jsonl_rows(path), 100)  # a row may lack a column
        return list({name: None for row in first for name in row}), _jsonl_rows(path)
    rows = _csv_rows(path, "\t" if extension == ".tsv" else ",")
    return next(rows), rows


def _csv_rows(path: str, delimiter: str) -> Iterator[Any]:
    """First the list of columns, then a dict per row. Short rows lack their last columns."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            columns = next(reader, [])
            yield columns
            for row in reader:
                if row:
                    yield dict(zip(columns, row, strict=False))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def _jsonl_rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = load_json(line)
                if not isinstance(row, dict):
                    given = line[:60].strip()
                    raise ValueError(
                        f"{path} line {number}: expected a JSON object, given {given!r}"
                    )
                yield row


def _open_parquet(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    # no stored images
    columns = [column.name for column in file.schema_arrow if "binary" not in str(column.type)]
    batches = file.iter_batches(batch_size=1000, columns=columns)
    return columns, (row for batch in batches for row in batch.to_pylist())


# ---------------------------------------------------------------------------------- known data sets


@source("coco", "captions_*.json of COCO, with all captions of an image", FILE | IMAGES)
def coco_entries(file: str, images: str | None) -> Iterator[Entry]:
    """captions_*.json of COCO: every image in the file's order with all its captions."""
    content = _load_object(file, "images", "annotations")
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        of_image = captions.setdefault(annotation.get("image_id"), [])
        of_image += strings(annotation.get("caption"))
    for image in content["images"]:
        path = str(image.get("file_name", ""))
        yield _entry(file, images, path, captions.get(image.get("id"), []), image)


@source(
    "karpathy",
    "dataset_coco.json, Karpathy's split of COCO 2014 (or of Flickr), with all captions",
    FILE
    | IMAGES
    | {
        "--split": {"required": True, "help": "train, val or test"},
        "--restval": {
            "action": argparse.BooleanOptionalAction,
            "default": True,
            "help": "train includes restval, as in papers: 113,287 images; without it 82,783",
        },
    },
)
def karpathy_entries(file: str, images: str | None, split: str, restval: bool) -> Iterator[Entry]:
    """One of Karpathy's splits (dataset_coco.json, also of Flickr), all captions of each image.

    images: folder that holds train2014 and val2014. restval: the 30,504 validation images in
    neither val nor test count as "train".

    Raises:
        ValueError: a split that the file does not have.
    """
    content = _load_object(file, "images")
    splits = sorted({str(image.get("split")) for image in content["images"]})
    if split not in splits:
        raise ValueError(f"split: given {split!r}, expected one of {', '.join(splits)} (in {file})")
    chosen = {split, "restval"} if split == "train" and restval else {split}
    for image in content["images"]:
        if image.get("split") in chosen:
            path = os.path.join(str(image.get("filepath", "")), str(image.get("filename", "")))
            captions = strings([sentence.get("raw") for sentence in image.pop("sentences", [])])
            image.pop("sentids", None)
            yield _entry(file, images, path, captions, image)


@source("mjhq", "meta_data.json of MJHQ-30K; images are CATEGORY/ID.jpg", FILE | IMAGES)
def mjhq_entries(file: str, images: str | None) -> Iterator[Entry]:
    """MJHQ-30K: {id: {"category", "prompt"}} and images/{category}/{id}.jpg."""
    for name, record in _load_object(file).items():
        if not isinstance(record, dict) or not {"category", "prompt"} <= record.keys():
            expected = '{"category": ..., "prompt": ...}'
            raise ValueError(f"{file}: {name!r} is {str(record)[:60]}, expected {expected}")
        path = os.path.join(str(record["category"]), f"{name}.jpg")
        captions = strings(record.pop("prompt"))
        yield _entry(file, images, path, captions, {"id": name, **record})


def _entry(
    file: str, images: str | None, path: str, captions: list[str], metadata: dict[str, Any]
) -> Entry:
    """An image that a file names; images: the folder where paths start, None: that of the file."""
    root = os.path.dirname(file) if images is None else images
    return Entry(path_key(path), os.path.join(root, path), captions=captions, metadata=metadata)


def path_key(path: str) -> str:
    """The key of an image file: its path without the extension."""
    stem, extension = os.path.splitext(path)
    return clean_key(stem if extension[1:].lower() in IMAGE_KEYS else path)


def _load_object(path: str, *lists: str) -> dict[str, Any]:
    """A JSON file that holds an object with these lists of objects.

    Raises:
        ValueError: anything else.
    """
    try:
        content = load_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a JSON object with {', '.join(lists) or 'entries'}")
    for name in lists:
        values = content.get(name)
        if (
            not isinstance(values, list)
            or not values
            or not all(isinstance(v, dict) for v in values)
        ):
            there = ", ".join(content)
            raise ValueError(f"{path}: expected a list of objects under {name!r}; it has {there}")
    return content


# --------------------------------------------------------------------------------------------- tars


@source(
    "shards",
    "tars in webdataset's layout, as img2dataset writes them, to filter and shuffle",
    {
        "patterns": {
            "nargs": "+",
            "metavar": "TAR",
            "help": "path, glob or x-{000..127}.tar; .gz is slow",
        }
    }
    | CAPTION_KEYS,
)
def tar_entries(patterns: Sequence[str], workers: int = 1) -> Iterator[Entry]:
    """Samples of webdataset tars, in order.

    Raises:
        ValueError: a tar that is missing, cut off or no tar.
    """
    for pattern in patterns:
        if is_remote(pattern):
            raise ValueError(f"shards: {pattern!r} is not a local file; download the tars first")
    paths = expand_shards(patterns)
    found = False
    for path, samples in zip(paths, map_in_processes(list_samples, paths, workers), strict=True):
        for key, begin, end in samples:
            found = True
            yield Entry(clean_key(key), path, span=(begin, end))
    if not found:
        raise ValueError(f"{len(paths)} tars from {paths[0]} on: no sample")
