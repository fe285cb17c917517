"""Tables -> rows: with paths (csv, tsv, jsonl, parquet), or with the images themselves (parquet).

Nothing is guessed: a row with more or fewer fields than the header is an error that names its line,
and so is a quote that does not close, or text in an unknown encoding.

A column of images holds bytes, or a struct with a field "bytes", as the hub's files have it; that
of captions holds text or lists of texts. Few rows are in memory at a time.
"""

import argparse
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TextIO

from data.captions import as_list, find_captions
from data.entries import image_extension
from data.files import load_json, not_decodable
from data.storage import REMOTE_BUFFER, open_file

SEPARATORS = {".csv": ",", ".tsv": "\t"}
# pyarrow's types
TEXT = ("string", "large_string", "string_view")
BYTES = ("binary", "large_binary", "binary_view")
MAX_FIELD_CHARACTERS = 1 << 24  # of a csv; more: a quote that never closes
# by which a column is taken if several are of its type
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
CAPTION_NAMES = ("text", "caption", "captions", "prompt")
IMAGES_AT_ONCE = 16  # rows


# ------------------------------------------------------------------------------------------- paths


def open_table(
    path: str, separator: str | None, quotes: bool, encoding: str | None
) -> tuple[dict[str, str | None], Iterator[dict[str, Any]]]:
    """Columns (of a jsonl: those in its first lines) and rows.

    A column's value is None if it holds text, or may; else its type.
    separator: of its fields, None: by the file's ending. quotes: fields may stand in double quotes.
    encoding: None: UTF-8, -16 or -32.

    Raises:
        ValueError: it is missing, broken or of another kind, or an option that it does not read is
            given; later a row that is broken.
    """
    extension = os.path.splitext(path)[1].lower()
    if separator is None and extension not in (*SEPARATORS, ".parquet", ".jsonl"):
        endings = ", ".join(SEPARATORS)
        raise ValueError(f"table {path}: expected {endings}, .parquet or .jsonl, or a --separator")
    # a parquet file knows its columns and their text, a jsonl its columns
    given = {"--separator": separator, "--no-quotes": not quotes, "--encoding": encoding}
    unread = {".parquet": list(given), ".jsonl": ["--separator", "--no-quotes"]}
    for option in unread.get(extension, []):
        if given[option]:
            raise ValueError(f"table {path}: {option} does not apply to {extension}")
    if extension == ".parquet":
        kinds = _types_of(path)
        text = {name: None if _is_text(kind) else str(kind) for name, kind in kinds.items()}
        return text, _parquet_rows(path)
    if extension == ".jsonl":
        # several, since a row may lack a column
        first = islice(_jsonl_rows(path, encoding), 100)
        return {name: None for row in first for name in row}, _jsonl_rows(path, encoding)
    rows = _csv_rows(path, separator or SEPARATORS[extension], quotes, encoding)
    return dict.fromkeys(next(rows)), rows


def _csv_rows(path: str, separator: str, quotes: bool, encoding: str | None) -> Iterator[Any]:
    """First the list of columns, then a dict per row."""
    # csv's own limit of 131,072 is below what a quoted field may hold
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    with _text_of(path, encoding, newline="") as file:
        line = 1  # where the row begins
        reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        try:
            columns = next(reader, [])
            if twice := [name for name, count in Counter(columns).items() if count > 1]:
                raise ValueError(f"{path} has two columns {twice[0]!r}")
            yield columns
            line = reader.line_num + 1
            # an empty line is no row; any other has a field for each column
            for row in reader:
                if row and len(row) != len(columns):
                    raise ValueError(
                        f"{path} line {line}: {len(row)} fields, expected "
                        f"{len(columns)} ({', '.join(columns)}), separated by {separator!r}: put "
                        "fields that hold it, or a line end, in double quotes, or see --separator"
                    )
                line = reader.line_num + 1
                if row:
                    yield dict(zip(columns, row, strict=True))
        except csv.Error as error:
            cure = "; if quotes are plain text, see --no-quotes" if quotes else ""
            raise ValueError(
                f"{path} line {line}: the row that begins here has a field that does not end: "
                f"{error}{cure}"
            ) from None


def _jsonl_rows(path: str, encoding: str | None) -> Iterator[dict[str, Any]]:
    with _text_of(path, encoding, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = load_json(line, strict=True)
                if not isinstance(row, dict):
                    given = f"expected a JSON object, no field twice, given {line[:60].strip()!r}"
                    raise ValueError(f"{path} line {number}: {given}")
                yield row


@contextmanager
def _text_of(path: str, encoding: str | None, newline: str) -> Iterator[TextIO]:
    """The open table; ValueError, also later, if it is in another encoding, or that is none."""
    if encoding is None:
        with open(path, "rb") as binary:
            encoding = json.detect_encoding(binary.read(4))
    try:
        with open(path, encoding=encoding, newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        cure = ", or name its encoding, for example --encoding cp1252"
        raise ValueError(f"{not_decodable(path, encoding)}{cure}") from None
    # no such encoding, or utf-16 of a file without its mark
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"{path}: --encoding {encoding}: {error}") from None


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(batch_size=1000, columns=_names_without_bytes(parquet)):
            yield from batch.to_pylist()


def separator(text: str) -> str:
    """argparse type: what stands between the fields of a row."""
    character = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(character) != 1 or character in '"\r\n':
        raise argparse.ArgumentTypeError(f"given {text!r}, expected one character, or tab")
    return character


# ------------------------------------------------------------------------------------------ parquet


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile, local or remote, read as far as needed; ValueError names the file."""
    # only those who have such files install it
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    try:
        with open_file(path) as file:
            # with a buffer, a column of a row group is read page by page
            yield pyarrow.parquet.ParquetFile(file, buffer_size=REMOTE_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


def _types_of(path: str) -> dict[str, Any]:
    """pyarrow's type of each column."""
    with open_parquet(path) as parquet:
        return {field.name: field.type for field in parquet.schema_arrow}


def _names_without_bytes(parquet: Any) -> list[str]:
    """Columns that hold no images."""
    return [field.name for field in parquet.schema_arrow if "binary" not in str(field.type)]


def _is_text(kind: Any) -> bool:
    """Whether a type of pyarrow, or that of the items of lists and dictionaries, is text."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return str(kind) in TEXT


class Columns(NamedTuple):
    """Of a parquet file with images; what others it has become metadata."""

    image: str
    caption: str


def find_columns(path: str, image_column: str | None, caption_column: str | None) -> Columns:
    """Image and caption of a file: by these names, else by type, then by usual names.

    Raises:
        ValueError: a column that is missing or could be several, listing what there is.
    """
    kinds = _types_of(path)
    images = [name for name, kind in kinds.items() if str(_bytes_type(kind)) in BYTES]
    texts = [name for name, kind in kinds.items() if _is_text(kind)]
    shown = ", ".join(f"{name} ({str(kind)[:40]})" for name, kind in kinds.items())
    there = f"{path} has the columns {shown or 'none'}"
    image = _choose_column("image_column", images, image_column, IMAGE_NAMES, there)
    caption = _choose_column("caption_column", texts, caption_column, CAPTION_NAMES, there)
    return Columns(image, caption)


def _bytes_type(kind: Any) -> Any:
    """The type itself, or that of the field "bytes" of a struct."""
    index = kind.get_field_index("bytes") if hasattr(kind, "get_field_index") else -1
    return kind.field(index).type if index >= 0 else kind


def _choose_column(
    option: str, candidates: Sequence[str], wanted: str | None, usual: Sequence[str], there: str
) -> str:
    """The wanted column, or the only one of the type, or the only one with a usual name."""
    names = [name for name in candidates if name == wanted]
    if wanted is None:
        names = [name for name in candidates if name.lower() in usual] or list(candidates)
    if len(names) != 1:
        given = f"given {wanted!r}" if wanted else f"could be {' or '.join(names) or 'none'}"
        expected = f"expected one of {', '.join(candidates) or 'none'}"
        raise ValueError(f"{option}: {given}, {expected}; {there}")
    return names[0]


def read_rows(path: str, columns: Columns, prefix: str) -> Iterator[dict[str, Any]]:
    """Each row as a sample for write_shard, its key PREFIX/number; ValueError names the file."""
    # each file: one of another export may have other columns
    find_columns(path, *columns)
    number = 0
    with open_parquet(path) as parquet:
        # all columns, but for further images
        names = [*dict.fromkeys([*columns, *_names_without_bytes(parquet)])]
        for group in range(parquet.num_row_groups):
            # one by one: a batch over several would hold them all
            for batch in parquet.iter_batches(IMAGES_AT_ONCE, row_groups=[group], columns=names):
                for row in batch.to_pylist():
                    yield {"__key__": f"{prefix}/{number:08d}", **row_parts(row, columns)}
                    number += 1


def row_parts(row: dict[str, Any], columns: Columns) -> dict[str, bytes]:
    """{extension: bytes}: the image unless it is null, and the captions with the other columns."""
    image = row.pop(columns.image)
    if isinstance(image, dict):
        image = image["bytes"]
    captions = as_list(row.pop(columns.caption))
    # no caption: nor may another column pass for one
    content = {**row, "captions": captions} if find_captions([captions])[0] else {}
    # str: dates and decimals
    parts = {"json": json.dumps(content, default=str).encode()}
    if image is not None:
        # what is no image is found out when its shard is made
        parts[image_extension(io.BytesIO(image)) or "jpg"] = image
    return parts
