"""Tables: csv and tsv with any separator, jsonl, parquet -> columns and rows.

Nothing is guessed: a row with more or fewer fields than the header is an error that names its line,
and so is a quote that does not close, or text in an unknown encoding.
"""

import argparse
import csv
import io
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TextIO

from data.entries import load_json
from data.files import not_decodable, open_text

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT = ("string", "large_string", "string_view")  # pyarrow's types
MAX_FIELD_CHARACTERS = 1 << 24  # of a csv; more: a quote that never closes

# name -> None if it holds text, or may; else its type
Columns = dict[str, str | None]


def open_table(
    path: str, separator: str | None, quotes: bool, encoding: str | None
) -> tuple[Columns, Iterator[dict[str, Any]]]:
    """Columns (of a jsonl: those in its first lines) and rows.

    separator: of its fields, None: by the file's ending. quotes: fields may stand in double quotes.
    encoding: None: UTF-8, -16 or -32.

    Raises:
        ValueError: it is missing, broken or of another kind; later a row that is.
    """
    extension = os.path.splitext(path)[1].lower()
    if separator is None and extension not in (*SEPARATORS, ".parquet", ".jsonl"):
        endings = ", ".join(SEPARATORS)
        raise ValueError(f"table {path}: expected {endings}, .parquet or .jsonl, or a --separator")
    if not os.path.isfile(path):
        raise ValueError(f"table {path} does not exist")
    if extension == ".parquet":
        return _open_parquet(path)
    if extension == ".jsonl":
        first = islice(_jsonl_rows(path, encoding), 100)  # a row may lack a column
        return {name: None for row in first for name in row}, _jsonl_rows(path, encoding)
    rows = _csv_rows(path, separator or SEPARATORS[extension], quotes, encoding)
    return dict.fromkeys(next(rows)), rows


def _csv_rows(path: str, separator: str, quotes: bool, encoding: str | None) -> Iterator[Any]:
    """First the list of columns, then a dict per row."""
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
            if quotes:
                line = _line_of_quote(path, file.encoding, line, separator)
            raise ValueError(
                f"{path} line {line}: the field that begins here does not end: {error}{cure}"
            ) from None


def _line_of_quote(path: str, encoding: str, line: int, separator: str) -> int:
    """Where the field begins at which a row breaks off that begins in `line`."""
    field = rf'("[^"]*(""[^"]*)*"|[^"{re.escape(separator)}\r\n][^{re.escape(separator)}\r\n]*)?'
    with open(path, encoding=encoding, newline="") as file:
        deque(islice(file, line - 1), maxlen=0)
        text = file.read(MAX_FIELD_CHARACTERS)
    whole = re.match(f"({field}{re.escape(separator)})*", text)[0]
    return line + len(re.findall("\r\n?|\n", whole))


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
    """The open table; ValueError, also later, if it is in another encoding."""
    with open_text(path, newline, encoding) as file:
        try:
            yield file
        except UnicodeDecodeError:
            cure = ", or name its encoding, for example --encoding cp1252"
            raise ValueError(f"{not_decodable(path, file.encoding)}{cure}") from None
        except UnicodeError as error:  # --encoding utf-16 of a file without its mark
            raise ValueError(f"{path}: {error}") from None


def import_pyarrow(path: str) -> Any:
    """pyarrow with its parquet, which only those who have such files install.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    return pyarrow


def _open_parquet(path: str) -> tuple[Columns, Iterator[dict[str, Any]]]:
    pyarrow = import_pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    columns = {}
    for column in file.schema_arrow:
        is_text = str(item_type(column.type)) in TEXT
        columns[column.name] = None if is_text else str(column.type)
    # without stored images
    names = [name for name, kind in columns.items() if "binary" not in str(kind)]
    return columns, _parquet_rows(path, file.iter_batches(batch_size=1000, columns=names))


def item_type(kind: Any) -> Any:
    """A type of pyarrow, or that of the items of lists and dictionaries."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind


def _parquet_rows(path: str, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    num_read = 0
    try:
        for batch in batches:
            yield from batch.to_pylist()
            num_read += batch.num_rows
    except (ValueError, OSError) as error:  # a broken page, text that is not UTF-8
        raise ValueError(f"{path} cannot be read after row {num_read}: {error}") from None


def separator(text: str) -> str:
    """argparse type: what stands between the fields of a row."""
    character = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(character) != 1 or character in '"\r\n':
        raise argparse.ArgumentTypeError(f"given {text!r}, expected one character, or tab")
    return character


def encoding(name: str) -> str:
    """argparse type: an encoding of text."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name)
    except LookupError:
        raise argparse.ArgumentTypeError(f"given {name!r}, expected one as cp1252") from None
    return name
