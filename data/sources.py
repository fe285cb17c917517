"""Where samples come from: folders, tables, COCO, MJHQ-30K, tars -> entries, in their own order.

A source is a generator of data.entries.Entry. To add one, write its function here, which takes the
command line's options, and put it into LOCAL_SOURCES with its arguments: that makes it a
sub-command of scripts/make_shards.py. All that can be checked at once is checked before its first
entry.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from data.captions import as_list
from data.entries import (
    Entry,
    clean_key,
    file_stamp,
    image_extension,
    list_samples,
    no_image,
)
from data.files import load_json, read_text_file, user_path
from data.storage import is_remote
from data.tables import open_table, separator
from data.tar import expand_shards, one_form
from data.transforms import IMAGE_KEYS
from data.workers import map_in_processes

# and whatever has ".tar." in its name
TAR_ENDINGS = (".tar", ".tgz", ".tbz", ".tbz2", ".txz")


# ----------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class SourceKind:
    """A sub-command: its help, its arguments, its generator."""

    text: str
    arguments: dict[str, dict[str, Any]]  # flag -> options of argparse's add_argument
    entries: Callable[[argparse.Namespace], Iterator[Entry]]
    # the files that it is read from, except the images that entries name
    files: Callable[[argparse.Namespace], Iterable[str]] = lambda options: [options.file]


LOCAL_SOURCES: dict[str, SourceKind] = {}  # by the name of the sub-command


def folder_path(text: str) -> str:
    """argparse type: a folder that exists."""
    folder = file_path(text)
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return folder


def file_path(text: str) -> str:
    """argparse type: a path without ~ and without detours."""
    return os.path.normpath(user_path(text))


DEFAULT_KEYS = ("json:captions", "txt", "json:caption")
CAPTION_KEYS = {
    "--caption-keys": {
        "nargs": "+",
        "default": list(DEFAULT_KEYS),
        "metavar": "KEY",
        "help": "where captions lie, tried in order: an extension, or json:FIELD (text or a list)",
    }
}
FILE = {"file": {"type": file_path, "metavar": "FILE"}}
IMAGES = {
    "--images": {"type": folder_path, "help": "where paths start; default: the folder of FILE"}
}


# ------------------------------------------------------------------------------------------ folders


def folder_entries(
    folder: str, caption_keys: Sequence[str] = DEFAULT_KEYS, output: str = ""
) -> Iterator[Entry]:
    """Files of a folder and its sub-folders, by name; captions lie beside the images.

    An image is what has an image's ending, or decodes. Every other file is an entry with a fault.
    The sidecars of a file, which are no entries, have its name and the ending of a caption key,
    .txt or .json. Of a hidden folder nothing is read; it counts as a file.

    Raises:
        ValueError: no image in it.
    """
    endings = {"txt", "json", *(key.partition(":")[0] for key in caption_keys)}
    others = Counter()
    has_image = False
    for place, names in _folders(folder, output):
        # which files are texts, and which names they could belong to
        parts = {name: _split(name) for name in names}
        texts = {part: name for name, part in parts.items() if part[1] in endings}
        owners = {stem for stem, ending in parts.values() if ending not in endings}
        # every file is an image, the text of one, or counted by its fault
        for name, (stem, ending) in parts.items():
            if stem in owners and texts.get((stem, ending)) == name:
                continue  # of the file of that name, whatever becomes of it
            path = os.path.join(place, name)
            key = clean_key(os.path.splitext(os.path.relpath(path, folder))[0])
            if name.startswith("."):
                fault = "no image: hidden"
            elif ending in endings or not (ending in IMAGE_KEYS or image_extension(path)):
                fault = no_image(name)
            else:
                has_image = True
                beside = {e: texts[stem, e] for e in sorted(endings) if (stem, e) in texts}
                sidecars = {e: os.path.join(place, text) for e, text in beside.items()}
                yield Entry(key, path, sidecars=sidecars)
                continue
            others[fault.removeprefix("no image: ")] += 1
            yield Entry(key, path, fault=fault)
    if not has_image:
        there = ", ".join(f"{name} ({count})" for name, count in others.most_common(5)) or "none"
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_KEYS)}); files there: {there}")


def _split(name: str) -> tuple[str, str]:
    """What images and their sidecars have in common, and the ending."""
    stem, ending = os.path.splitext(one_form(name))
    return stem, ending[1:].lower()


def _folders(root: str, output: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, file names), sorted, from root on; links are followed once, `output` is left out.

    Hidden folders come last, as file names, unless a link with another name has led to them.
    """
    # by where links lead: they may form circles
    visited = {os.path.realpath(output)} if output else set()
    hidden = []
    if os.path.realpath(root) in visited:
        raise ValueError(f"output: {output} is the source's own folder, name another")

    # os.walk would go on without a word
    def fail(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        hidden += [os.path.join(folder, name) for name in sorted(folders) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(names)
    for folder in hidden:
        if os.path.realpath(folder) not in visited:
            yield os.path.dirname(folder), [os.path.basename(folder)]


def _files(options: argparse.Namespace) -> Iterator[str]:
    """Paths of all files that are not hidden."""
    for place, names in _folders(options.folder, options.output):
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


LOCAL_SOURCES["folder"] = SourceKind(
    "images with same-named .txt or .json captions, also in sub-folders",
    {"folder": {"type": folder_path}} | CAPTION_KEYS,
    lambda options: folder_entries(options.folder, options.caption_keys, options.output),
    files=_files,
)


# ------------------------------------------------------------------------------------------- tables


def table_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """Rows of tables; the columns beside path and caption become metadata.

    Relative paths start from `images`, default: the table's folder. A caption may be a list of
    captions.

    Raises:
        ValueError: a table that is missing, broken or of another kind, a column that is not there
            or not of text, a row with other columns, no row at all.
    """
    found = False
    for table in options.tables:
        columns, rows = open_table(table, options.separator, options.quotes, options.encoding)
        for name in (options.path_column, options.caption_column):
            if name not in columns:
                there = ", ".join(map(repr, columns)) or "none"
                raise ValueError(f"{table} has no column {name!r}; it has {there}")
            if (kind := columns[name]) is not None:
                raise ValueError(f"{table}: column {name!r} is of type {kind}, expected text")
        # what is left of a row once path and captions are taken is its metadata
        for row in rows:
            found = True
            path = row.pop(options.path_column, None)
            path = path if isinstance(path, str) else ""
            captions = as_list(row.pop(options.caption_column, None))
            yield _entry(table, options.images, path, captions, row)
    if not found:
        raise ValueError(f"{', '.join(options.tables)}: no row")


LOCAL_SOURCES["table"] = SourceKind(
    "csv, tsv, parquet or jsonl files with a path and a caption in each row",
    {
        "tables": {"type": file_path, "nargs": "+", "metavar": "FILE"},
        "--path-column": {"default": "path", "help": "of the image file"},
        "--caption-column": {"default": "caption", "help": "text; in jsonl, parquet also a list"},
        "--separator": {
            "type": separator,
            "help": "between fields, a character or tab; default: by the file's ending",
        },
        "--quotes": {
            "action": argparse.BooleanOptionalAction,
            "default": True,
            "help": "fields may be in double quotes; --no-quotes: quotes are text (CC3M)",
        },
        "--encoding": {
            "help": "of the text, as cp1252; default: UTF-8, -16 or -32, by its first bytes",
        },
    }
    | IMAGES,
    table_entries,
    files=lambda options: options.tables,
)


# ---------------------------------------------------------------------------------- known data sets


def coco_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """captions_*.json of COCO: every image in the file's order with all its captions.

    Captions of an image that is not in the list are an entry with a fault.

    Raises:
        ValueError: another form, or two image files of one id.
    """
    file = options.file
    content = _load_object(file, "images", "annotations")
    captions: dict[Any, list[Any]] = {}
    for annotation in content["annotations"]:
        of_image = captions.setdefault(_hashable(annotation.get("image_id")), [])
        # None is counted as a caption that is missing
        of_image += as_list(annotation.get("caption")) or [None]
    paths: dict[Any, str] = {}
    for image in content["images"]:
        number = _hashable(image.get("id"))
        path = str(image.get("file_name", ""))
        if path != paths.setdefault(number, path):
            both = f"{paths[number]!r} and {path!r}"
            raise ValueError(f"{file}: the images {both} have the same id {number!r}")
    # only now: to look for the files of all images may take minutes
    for image in content["images"]:
        number = _hashable(image.get("id"))
        yield _entry(file, options.images, paths[number], captions.get(number, []), image)
    # nothing that the file says is lost without being counted
    for number in captions:
        if number not in paths:
            note = f"annotations of the image {number!r}, which is not in images"
            yield Entry(clean_key(str(number)), file, fault="image: missing", note=note)


LOCAL_SOURCES["coco"] = SourceKind(
    "captions_*.json of COCO, with all captions of an image", FILE | IMAGES, coco_entries
)


def _hashable(number: Any) -> Any:
    """An id as JSON has it, which may be anything."""
    return number if isinstance(number, str | int | float) else repr(number)


def karpathy_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """One of Karpathy's splits (dataset_coco.json, also of Flickr), all captions of each image.

    images: folder that holds train2014 and val2014.

    Raises:
        ValueError: a split that the file does not have.
    """
    file = options.file
    split = options.split
    content = _load_object(file, "images")
    splits = sorted({str(image.get("split")) for image in content["images"]})
    if split not in splits:
        raise ValueError(f"split: given {split!r}, expected one of {', '.join(splits)} (in {file})")
    # restval: the validation images of 2014 that the papers train on, 30,504
    chosen = {split, "restval"} if split == "train" and options.restval else {split}
    for image in content["images"]:
        if image.get("split") in chosen:
            path = os.path.join(str(image.get("filepath", "")), str(image.get("filename", "")))
            sentences = as_list(image.pop("sentences", None))
            captions = [each.get("raw") if isinstance(each, dict) else each for each in sentences]
            image.pop("sentids", None)
            yield _entry(file, options.images, path, captions, image)


LOCAL_SOURCES["karpathy"] = SourceKind(
    "dataset_coco.json, Karpathy's split of COCO 2014 (or of Flickr), with all captions",
    FILE
    | IMAGES
    | {
        "--split": {"required": True, "help": "train, val or test"},
        "--restval": {
            "action": argparse.BooleanOptionalAction,
            "default": True,
            "help": "train includes restval, as in papers (113,287 images; 82,783 without)",
        },
    },
    karpathy_entries,
)


def mjhq_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """MJHQ-30K: {id: {"category", "prompt"}} and images/{category}/{id}.jpg."""
    file = options.file
    for name, record in _load_object(file).items():
        if not isinstance(record, dict) or not {"category", "prompt"} <= record.keys():
            expected = '{"category": ..., "prompt": ...}'
            raise ValueError(f"{file}: {name!r} is {str(record)[:60]}, expected {expected}")
        path = os.path.join(str(record["category"]), f"{name}.jpg")
        captions = as_list(record.pop("prompt"))
        yield _entry(file, options.images, path, captions, {"id": name, **record})


LOCAL_SOURCES["mjhq"] = SourceKind(
    "meta_data.json of MJHQ-30K; images are CATEGORY/ID.jpg", FILE | IMAGES, mjhq_entries
)


def _entry(
    file: str, images: str | None, path: str, captions: list[Any], metadata: dict[str, Any]
) -> Entry:
    """An image that a file names; images: the folder where paths start, None: that of the file."""
    root = os.path.dirname(file) if images is None else images
    # an absolute path leaves the key short
    key = path_key(path.removeprefix(os.path.join(os.path.abspath(root), "")))
    place = os.path.join(root, path)
    if not path:
        note = f"no path in its row of {file}"
        return Entry(key, place, captions=captions, fault="image: missing", note=note)
    # the same name on disk may be in another Unicode form
    if not path.isascii() and file_stamp(place) is None:
        forms = [os.path.join(root, normalize(form, path)) for form in ("NFC", "NFD")]
        place = next((other for other in forms if file_stamp(other)), place)
    return Entry(key, place, captions=captions, metadata=metadata)


def path_key(path: str) -> str:
    """The key of an image file: its path without the extension."""
    stem, extension = os.path.splitext(path)
    return clean_key(stem if extension[1:].lower() in IMAGE_KEYS else path)


def _load_object(path: str, *lists: str) -> dict[str, Any]:
    """A JSON file that holds an object with these lists of objects; ValueError: anything else."""
    content = load_json(read_text_file(path), strict=True)
    if not isinstance(content, dict) or not content:
        wanted = ", ".join(lists) or "entries"
        raise ValueError(f"{path}: expected a JSON object with {wanted}, in it no field twice")
    for name in lists:
        values = content.get(name)
        if not (values and isinstance(values, list) and all(isinstance(v, dict) for v in values)):
            there = ", ".join(content)
            raise ValueError(f"{path}: expected a list of objects under {name!r}; it has {there}")
    return content


# --------------------------------------------------------------------------------------------- tars


def tar_entries(patterns: Sequence[str], workers: int = 1) -> Iterator[Entry]:
    """Samples of webdataset tars, in order; after those of a tar, the members that belong to none.

    Raises:
        ValueError: a tar that is missing, cut off or no tar, no sample at all.
    """
    for pattern in filter(is_remote, patterns):
        raise ValueError(f"shards: {pattern!r} is not a local file; download the tars first")
    paths = expand_shards(patterns)
    # a table or a picture would be "truncated" to a reader of tars
    for path in paths:
        if not is_tar_name(path):
            raise ValueError(f"{path}: expected a tar (.tar, .tar.gz, .tgz, ...)")
    found = False
    others = []
    lists = map_in_processes(list_samples, paths, workers)
    for path, (samples, strays) in zip(paths, lists, strict=True):
        # members of one key that do not follow each other are several samples, each incomplete
        counts = Counter(one_form(key) for key, _, _ in samples)
        for key, begin, end in samples:
            found = True
            again = counts[one_form(key)] > 1
            note = "its key occurs again, the tar is not sorted" if again else ""
            yield Entry(clean_key(key), path, span=(begin, end), note=note)
        for name, reason in strays:
            others = [*others, name][:3]
            yield Entry(clean_key(name), path, fault=f"no sample: {reason}", note=f"member {name}")
    if not found:
        there = f"members {' '.join(others) or 'none'}, expected KEY.EXTENSION"
        raise ValueError(f"{len(paths)} tars from {paths[0]} on: no sample: {there}")


TARS = {"nargs": "+", "metavar": "TAR", "help": "path, glob or x-{000..127}.tar; .gz is slow"}
LOCAL_SOURCES["shards"] = SourceKind(
    "tars in webdataset's layout, as img2dataset writes them, to filter and shuffle",
    {"patterns": TARS} | CAPTION_KEYS,
    lambda options: tar_entries(options.patterns, options.workers),
    files=lambda options: expand_shards(options.patterns),
)


def is_tar_name(path: str) -> bool:
    """Whether a file says that it is a tar, plain or compressed."""
    name = os.path.basename(path).lower()
    return name.endswith(TAR_ENDINGS) or ".tar." in name
