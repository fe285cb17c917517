"""Parquet files with the images in a column -> samples (tables of paths: data/tables.py).

The image column holds bytes, or a struct with a field "bytes", as the hub's files have it; the
caption column holds text or lists of texts. Few rows are in memory at a time.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from PIL import Image

from data.captions import as_list, clean_caption, strings
from data.entries import format_extension
from data.storage import REMOTE_BUFFER, open_file
from data.tables import TEXT, import_pyarrow, item_type
from data.transforms import FORMATS

# by which a column is taken if several are of its type
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
CAPTION_NAMES = ("text", "caption", "captions", "prompt")
BYTES = ("binary", "large_binary", "binary_view")
ROWS_AT_ONCE = 16


class Columns(NamedTuple):
    """Of a parquet file; what others it has become metadata."""

    image: str
    caption: str


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile, local or remote, that reads no more than it is asked for.

    Raises:
        ValueError: it cannot be read, also later while reading.
    """
    pyarrow = import_pyarrow(path)
    try:
        with open_file(path) as file:
            # with a buffer, a column of a row group is read page by page
            yield pyarrow.parquet.ParquetFile(file, buffer_size=REMOTE_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


# --------------------------------------------------------------------------------------------- rows


def read_rows(path: str, columns: Columns, prefix: str) -> Iterator[dict[str, Any]]:
    """Each row as a sample for write_shard, with the key PREFIX/number.

    Raises:
        ValueError: the file cannot be read, or has not these columns.
    """
    find_columns(path, *columns)
    number = 0
    with open_parquet(path) as parquet:
        # all columns, but for further images
        others = [f.name for f in parquet.schema_arrow if "binary" not in str(f.type)]
        names = [*dict.fromkeys([*columns, *others])]
        for group in range(parquet.num_row_groups):
            # one by one: a batch over several would hold them all
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names):
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
    has_text = any(map(clean_caption, strings(captions)))
    content = {**row, "captions": captions} if has_text else {}
    parts = {"json": json.dumps(content, default=str).encode()}  # str: dates and decimals
    if image is not None:
        parts[image_ending(image)] = image
    return parts


def image_ending(data: bytes) -> str:
    """The extension that an image's content asks for; jpg of what is no image, which is found out
    when its shard is made.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return format_extension(image.format)
    except Exception:  # Pillow raises a dozen types
        return "jpg"


# ------------------------------------------------------------------------------------------ columns


def find_columns(path: str, image_column: str | None, caption_column: str | None) -> Columns:
    """Image and caption of a file: by these names, else by type, then by usual names.

    Raises:
        ValueError: a column that is missing or could be several, listing what there is.
    """
    with open_parquet(path) as parquet:
        kinds = {field.name: field.type for field in parquet.schema_arrow}
    images = [name for name, kind in kinds.items() if str(bytes_type(kind)) in BYTES]
    texts = [name for name, kind in kinds.items() if str(item_type(kind)) in TEXT]
    shown = ", ".join(f"{name} ({str(kind)[:40]})" for name, kind in kinds.items())
    there = f"{path} has the columns {shown or 'none'}"
    image = choose_column("image_column", images, image_column, IMAGE_NAMES, there)
    caption = choose_column("caption_column", texts, caption_column, CAPTION_NAMES, there)
    return Columns(image, caption)


def bytes_type(kind: Any) -> Any:
    """The type itself, or that of the field "bytes" of a struct."""
    index = kind.get_field_index("bytes") if hasattr(kind, "get_field_index") else -1
    return kind.field(index).type if index >= 0 else kind


def choose_column(
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
