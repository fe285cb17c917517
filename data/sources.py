"""Where samples come from: folders, tables, COCO, MJHQ-30K, tars -> entries, in an order that depends on them alone.

A source is a generator of data.entries.Entry; its first entry comes after all that can be checked at once. A new kind
of source is one more generator here, and its sub-command in scripts/make_shards.py.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.entries import Entry, clean_key, list_samples, load_json, strings
from data.image_text import IMAGE_KEYS
from data.tar import expand_shards

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".jsonl")
MAX_FIELD_CHARACTERS = 1 << 24  # of a csv; more means a quote that never closes


def folder_entries(folder: str) -> Iterator[Entry]:
    """Images of a folder and its sub-folders, by name; captions are in same-named .txt or .json files. No hidden files.

    ValueError: not a folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")
    others, found = Counter(), False
    for name in _files(folder):
        stem, extension = os.path.splitext(name)
        if extension[1:].lower() in IMAGE_KEYS:
            found = True
            yield Entry(clean_key(stem), os.path.join(folder, name))
        else:
            others[extension] += 1
    if not found:
        there = ", ".join(
            f"{extension or 'no extension'} ({count})" for extension, count in others.most_common(5)
        )
        raise ValueError(
            f"{folder} holds no image ({', '.join(IMAGE_KEYS)}); files there: {there or 'none'}"
        )


def _files(root: str) -> Iterator[str]:
    """Paths below root, relative to it, sorted folder by folder; links to folders are followed once."""
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


def table_entries(
    tables: Sequence[str], images: str | None, path_column: str, caption_column: str
) -> Iterator[Entry]:
    """Rows of csv, tsv, parquet or jsonl files; the other columns become metadata.

    images: folder that relative paths start from, default: that of the table. A caption may be a list of captions.
    ValueError: a file that is missing, of another kind or broken, a column that is not there, no row at all.
    """
    found = False
    for table in tables:
        root = os.path.dirname(table) if images is None else images
        columns, rows = _open_table(table)
        missing = [name for name in (path_column, caption_column) if name not in columns]
        if missing:
            raise ValueError(
                f"{table} has no column {' and no column '.join(missing)}; it has {', '.join(columns) or 'none'}"
            )
        for row in rows:
            path, captions = row.pop(path_column, None), row.pop(caption_column, None)
            path = path if isinstance(path, str) else ""
            found = True
            inside = path.removeprefix(
                os.path.join(os.path.abspath(root), "")
            )  # an absolute path leaves the key short
            # without a path: the root itself, which is no file
            yield Entry(
                _path_key(inside),
                os.path.join(root, path),
                captions=strings(captions),
                metadata=row,
            )
    if not found:
        raise ValueError(f"{', '.join(tables)}: no row")


def _open_table(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Column names (of a jsonl: those in its first lines) and rows."""
    extension = os.path.splitext(path)[1].lower()
    if extension not in TABLE_EXTENSIONS:
        raise ValueError(
            f"table {path}: expected a file with one of the extensions {', '.join(TABLE_EXTENSIONS)}"
        )
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
                    raise ValueError(
                        f"{path} line {number}: expected a JSON object, given {line[:60].strip()!r}"
                    )
                yield row


def _open_parquet(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    columns = [
        column.name for column in file.schema_arrow if "binary" not in str(column.type)
    ]  # no stored images
    batches = file.iter_batches(batch_size=1000, columns=columns)
    return columns, (row for batch in batches for row in batch.to_pylist())


def coco_entries(annotations: str, images: str) -> Iterator[Entry]:
    """captions_*.json of COCO: every image in the file's order with all its captions. images: folder of the files."""
    content = _load_object(annotations, "images", "annotations")
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation.get("image_id"), []).extend(
            strings(annotation.get("caption"))
        )
    for image in content["images"]:
        path = str(image.get("file_name", ""))
        of_image = captions.get(image.get("id"), [])
        yield Entry(_path_key(path), os.path.join(images, path), captions=of_image, metadata=image)


def karpathy_entries(
    split_file: str, images: str, split: str, with_restval: bool
) -> Iterator[Entry]:
    """Karpathy's split json (dataset_coco.json, also those of Flickr): one split with all captions of each image.

    images: folder that holds train2014 and val2014. with_restval: the 30,504 validation images in neither val nor test
    count as "train", as captioning papers do (113,287 images). ValueError: a split that the file does not have.
    """
    content = _load_object(split_file, "images")
    splits = sorted({str(image.get("split")) for image in content["images"]})
    if split not in splits:
        raise ValueError(
            f"split: given {split!r}, expected one of {', '.join(splits)} (those in {split_file})"
        )
    chosen = {split, "restval"} if split == "train" and with_restval else {split}
    for image in content["images"]:
        if image.get("split") in chosen:
            path = os.path.join(str(image.get("filepath", "")), str(image.get("filename", "")))
            sentences = [sentence.get("raw") for sentence in image.get("sentences", [])]
            metadata = {
                name: value for name, value in image.items() if name not in ("sentences", "sentids")
            }
            yield Entry(
                _path_key(path),
                os.path.join(images, path),
                captions=strings(sentences),
                metadata=metadata,
            )


def mjhq_entries(meta_data: str, images: str) -> Iterator[Entry]:
    """MJHQ-30K: {id: {"category", "prompt"}} and images/{category}/{id}.jpg."""
    for name, record in _load_object(meta_data).items():
        if not isinstance(record, dict) or not {"category", "prompt"} <= record.keys():
            raise ValueError(
                f'{meta_data}: {name!r} is {str(record)[:60]}, expected {{"category": ..., "prompt": ...}}'
            )
        path = os.path.join(str(record["category"]), f"{name}.jpg")
        metadata = {"id": name, **{key: value for key, value in record.items() if key != "prompt"}}
        yield Entry(
            _path_key(path),
            os.path.join(images, path),
            captions=strings(record["prompt"]),
            metadata=metadata,
        )


def tar_entries(
    patterns: Sequence[str], run: Callable[[Callable, list[str]], Iterable[Any]] = map
) -> Iterator[Entry]:
    """Samples of webdataset tars, in order. run: `map`, or one that does the same in several processes, in order.

    ValueError: a tar that is missing, cut off or no tar.
    """
    remote = [pattern for pattern in patterns if re.match("pipe:|[a-z0-9]+://", pattern)]
    if remote:
        raise ValueError(f"shards: {remote[0]!r} is not a local file; download the tars first")
    paths = expand_shards(patterns)
    found = False
    for path, samples in zip(paths, run(list_samples, paths), strict=True):
        for key, begin, end in samples:
            found = True
            yield Entry(clean_key(key), path, span=(begin, end))
    if not found:
        raise ValueError(f"{len(paths)} tars from {paths[0]} on: no sample")


def _load_object(path: str, *lists: str) -> dict[str, Any]:
    """A JSON file that holds an object with these lists of objects. ValueError: anything else."""
    try:
        content = load_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path}: expected a JSON object" + (f" with {', '.join(lists)}" if lists else "")
        )
    for name in lists:
        values = content.get(name)
        if (
            not isinstance(values, list)
            or not values
            or not all(isinstance(value, dict) for value in values)
        ):
            raise ValueError(
                f"{path}: expected a list of objects under {name!r}; it has {', '.join(content)}"
            )
    return content


def _path_key(path: str) -> str:
    stem, extension = os.path.splitext(path)
    return clean_key(stem if extension[1:].lower() in IMAGE_KEYS else path)
