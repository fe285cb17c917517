"""data/hub.py, and images of data/tables.py: every layout, from a store in place of the hub."""

import io
import json
import shutil
from collections import namedtuple

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from sources import (
    captions_of,
    encode,
    fails,
    image_of,
    noise,
    outcome,
    run,
    samples_of,
    summary_of,
    write_files,
)
from test_make_shards_runs import kill_at, needs_proc

from data import storage, tables
from data.packing import COPIES
from data.tables import Columns, find_columns, read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FRAMES = [noise(50), noise(51)]
GIF = encode(FRAMES[0], format="GIF", save_all=True, append_images=FRAMES[1:])
ID = "owner/set"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder in which hf:// looks for datasets/OWNER/NAME."""

    class Hub(DirFileSystem):
        protocol = "hf"
        cachable = False

        def __init__(self, **options):
            super().__init__(path=str(tmp_path / "hub"), fs=LocalFileSystem())

    monkeypatch.setitem(_registry, "hf", Hub)
    return tmp_path / "hub" / "datasets" / ID


def write_rows(path, layout, rows):
    """A parquet file of 3 rows a group; rows: (image bytes, caption), of which each may be None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [image for image, _ in rows]
    captions = [caption for _, caption in rows]
    binary, string = pyarrow.binary(), pyarrow.string()
    if layout == "binary":
        columns = {"jpg": pyarrow.array(images, binary), "prompt": pyarrow.array(captions, string)}
    else:
        struct = pyarrow.struct({"bytes": binary, "path": string})
        files = [image and {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
        columns = {"image": pyarrow.array(files, struct), "text": pyarrow.array(captions, string)}
    if layout == "list":
        captions = [caption and [caption, f"again {caption}", None] for caption in captions]
        columns["captions"] = pyarrow.array(captions, pyarrow.list_(string))
        del columns["text"]
    columns["score"] = pyarrow.array([float(i) for i in range(len(rows))])
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def nine_rows():
    pictures = [(encode(noise(i)), f"picture {i}") for i in range(5)]
    strange = [(None, "no image"), (encode(noise(9)), None), (GIF, "moving"), (b"text", "no image")]
    return [*pictures, *strange]


# ----------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("layout", ["struct", "binary", "list"])
def test_every_layout_of_parquet_gives_its_shards_counts_and_reasons(layout, root, tmp_path):
    write_rows(root / "data" / "train-00000-of-00002.parquet", layout, nine_rows())
    write_rows(root / "data" / "train-00001-of-00002.parquet", layout, nine_rows()[:2])
    write_rows(root / "data" / "test-00000-of-00001.parquet", layout, nine_rows())
    write_files(root, {"README.md": "", ".cache/train.parquet": "not read"})
    run("hub", ID, "--no-shuffle", "--output", tmp_path / "out", "--samples-per-shard", 4)

    summary = summary_of(tmp_path / "out")
    unreadable = "image: unreadable (UnidentifiedImageError)"
    assert summary["dropped"] == {"caption: missing": 1, "image: missing": 1, unreadable: 1}
    assert (summary["read"], summary["kept"]) == (11, 8)
    assert list(summary["shards"].values()) == [4, 2, 2]
    written = samples_of(tmp_path / "out")
    rows = [*nine_rows()[:5], nine_rows()[7], *nine_rows()[:2]]
    for sample, (image, caption) in zip(written, rows, strict=True):
        again = [f"again {caption}"] if layout == "list" else []
        assert image_of(sample) == image and captions_of(sample) == [caption, *again]
    assert written[5]["gif"] == GIF and json.loads(written[5]["json"])["score"] == 7
    keys = [sample["__key__"] for sample in written]
    assert keys[0] == "data/train-00000-of-00002/00000000" and len({*keys}) == 8


def test_a_local_folder_and_several_processes_give_what_the_hub_gives(root, tmp_path):
    for i in range(3):
        write_rows(root / f"part-{i}.parquet", "struct", nine_rows())
    run("hub", ID, "--output", tmp_path / "hub_out")
    run("hub", root, "--output", tmp_path / "folder_out", workers=2)
    assert samples_of(tmp_path / "hub_out") == samples_of(tmp_path / "folder_out")


def test_a_file_is_read_row_group_by_row_group_and_once(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    rows = [(encode(noise(i, 400, 400), quality=95), f"{i}") for i in range(9)]
    write_rows(path, "struct", rows)
    num_bytes = []

    class CountingFile(io.FileIO):
        def readinto(self, buffer):
            num_bytes.append(super().readinto(buffer))
            return num_bytes[-1]

    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    monkeypatch.setattr(storage, "RemoteFile", CountingFile)
    monkeypatch.setattr(tables, "REMOTE_BUFFER", 1 << 14)
    size = path.stat().st_size
    samples = read_rows(str(path), Columns("image", "text"), "x")
    first = next(samples)
    assert first["jpg"] == rows[0][0] and sum(num_bytes) < size / 2
    assert len(list(samples)) == 8 and sum(num_bytes) < 1.2 * size


IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
STRING, LIST = pyarrow.string(), pyarrow.list_(pyarrow.string())


@pytest.mark.parametrize(
    ("types", "wanted", "found"),
    [
        ({"image": IMAGE, "thumb": IMAGE, "url": STRING, "caption": LIST}, {}, "image caption"),
        ({"a": IMAGE, "b": LIST}, {}, "a b"),
        ({"JPG": pyarrow.large_binary(), "x": STRING, "Text": STRING}, {}, "JPG Text"),
        ({"image": IMAGE, "text": STRING, "prompt": LIST}, {"caption": "prompt"}, "image prompt"),
        ({"image": IMAGE, "text": STRING, "prompt": LIST}, {}, "caption_column: .*text or prompt"),
        ({"a": IMAGE, "b": IMAGE, "text": STRING}, {}, "image_column: .*a or b"),
        ({"image": STRING, "text": STRING}, {}, r"image_column: .*none.*image \(string\)"),
        ({"image": IMAGE, "text": STRING}, {"image": "text"}, "image_column: .*'text'.*image"),
    ],
)
def test_columns_are_found_by_type_and_name_else_those_there_are_are_listed(
    types, wanted, found, tmp_path
):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.schema(types).empty_table(), path)
    names = str(path), wanted.get("image"), wanted.get("caption")
    if "_column" in found:
        with pytest.raises(ValueError, match=found):
            find_columns(*names)
    else:
        assert find_columns(*names) == tuple(found.split())


# -------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("is_local", [True, False])
def test_tars_are_read_as_they_are(is_local, root, tmp_path):
    """Captions in a .txt, or in the json under another name."""
    for split, first in (("train", 0), ("validation", 20)):
        names = range(first, first + 6)
        prompts = [(f"{i}.json", json.dumps({"prompt": f"prompt {i}"})) for i in names]
        pictures, texts = [(f"{i}.jpg", i) for i in names], [(f"{i}.txt", f"{i}") for i in names]
        members = [member for each in zip(prompts, pictures, texts) for member in each]
        write_files(
            root, {f"cc-{split}-0000.tar": members[:9], f"cc-{split}-0001.tar": members[9:]}
        )
    name, captions = root if is_local else ID, {"txt": "7", "json:prompt": "prompt 7"}
    for key in captions:
        output = tmp_path / key
        run("hub", name, "--caption-keys", key, "--output", output, "--split", "train")
        prefix = "prompt " if key == "json:prompt" else ""
        expected = sorted(f"{prefix}{i}" for i in range(6))
        assert sorted(captions_of(sample)[0] for sample in samples_of(output)) == expected
        assert not (output / COPIES).exists()
    assert len(list(root.iterdir())) == 4  # a local tar is no copy


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("files", "options", "named"),
    [
        (
            {"a.zip": "", "b.zip": ""},
            "",
            "owner/set: expected parquet files or tars, found .zip",
        ),
        ({"test-0.parquet": "", "train.tar": ""}, "--split val", "split: given 'val'"),
        ({"a.parquet": "", "b.tar": ""}, "", "both parquet files and tars"),
        ({"a_train.tar": "", "b.tar": "", "test.tar": ""}, "", "has 1 files of no split"),
        ({"a.parquet": ""}, "--files *.tar", "files: given '*.tar'"),
        ({"a.parquet": "no parquet"}, "", "a.parquet"),
        ({"a.parquet": ""}, "--caption-keys txt", "caption_keys"),
        ({"a.tar": ["1.jpg", "1.txt"]}, "--caption-column text", "caption_column"),
    ],
)
def test_what_cannot_be_read_is_one_error_and_leaves_nothing(
    files, options, named, root, tmp_path, capsys
):
    write_files(root, files)
    assert named in fails(capsys, "hub", ID, *options.split(), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_copies_is_an_early_error(root, tmp_path, capsys, monkeypatch):
    write_files(root, {"a.tar": ["1.jpg", "1.txt"]})
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "0.0 GB free" in fails(capsys, "hub", ID, "--output", tmp_path / "out")


def test_the_revision_is_part_of_the_address(root, tmp_path, capsys):
    write_rows(root.with_name("set@v1%2F2") / "x.parquet", "struct", nine_rows())
    run("hub", ID, "--revision", "v1/2", "--output", tmp_path / "out")
    assert summary_of(tmp_path / "out")["kept"] == 6
    write_rows(root / "x.parquet", "struct", nine_rows())
    failed = fails(capsys, "hub", root, "--revision", "v1", "--output", tmp_path / "other")
    assert "revision" in failed


# ------------------------------------------------------------------------- stopped, in parts, again


@pytest.fixture
def busy(root, tmp_path):
    """Arguments of a run over 4 files, and what it gives."""
    for i in range(4):
        write_rows(root / f"{i}.parquet", "struct", nine_rows())
    command = ["hub", ID, "--samples-per-shard", 5, "--drop-duplicates", "--output"]
    run(*command, tmp_path / "undisturbed")
    return [*command, tmp_path / "out"], outcome(tmp_path / "undisturbed")


@needs_proc
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(busy, tmp_path):
    """SIGKILL once so many copies, files of the index, digests, shards and records are there."""
    command, expected = busy
    kills = kill_at(command, tmp_path / "out", (0, 1, 2, 4, 5, 8, 11, 15, 19))
    assert kills >= 5
    run(*command, workers=2)
    assert outcome(tmp_path / "out") == expected
    assert not (tmp_path / "out" / COPIES).exists()


def test_parts_share_the_copies_and_a_lost_shard_is_made_again(busy, tmp_path):
    command, expected = busy
    for part in (1, 0, 2):
        run(*command, "--num-shards", 3, "--shard-index", part)
    assert outcome(tmp_path / "out") == expected
    (tmp_path / "out" / "000001.tar").unlink()
    run(*command)
    assert outcome(tmp_path / "out") == expected
    assert not (tmp_path / "out" / COPIES).exists()
