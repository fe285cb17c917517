"""Hostile shards: each ends in an error of ours or right batches; no other exception, no hang,
nothing executed. Made-up folders, tables and tars: no sample is lost without being counted.
"""

import csv
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import tempfile
import unicodedata
from collections import Counter
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shape_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sources import (
    captions_of,
    encode,
    fails,
    noise,
    run,
    samples_of,
    summary_of,
    write_files,
)

from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, token_reader
from data.shards import NoUsableSample
from data.tar import write_shard

K, C, PIXELS = 16, 4, 32
# the same examples each time; no deadline: other work on the machine must not matter
MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
FEW = settings(MANY, max_examples=100)


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return (open, ("pwned", "w"))


def npy(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def png(size=(PIXELS, PIXELS), shown_size=None):
    """A PNG, whose header may claim another size."""
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format="PNG")
    data = bytearray(file.getvalue())
    if shown_size:
        data[16:24] = struct.pack(">II", *shown_size)
    return bytes(data)


def tar_of(members):
    """Bytes of a tar of (name, kind of member, bytes)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../../etc/passwd"
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def with_size(data, size):
    """The first header says another size, with a checksum that fits."""
    header = bytearray(data[:512])
    header[124:136] = f"{size:011o} ".encode()[:12] if size >= 0 else b"-0000000001 "
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:]


@st.composite
def spoiled(draw, data):
    """A file of which something is lost, changed or added."""
    data = bytearray(draw(st.sampled_from([data, bytes(len(data)), gzip.compress(data)])))
    for place in draw(st.lists(st.integers(0, len(data) * 8 - 1), max_size=20)):
        data[place // 8] ^= 1 << place % 8
    kept = bytes(data[: draw(st.integers(0, len(data)))])
    return draw(st.sampled_from([bytes(data), kept, kept + bytes(data)]))


TEXTS = st.text(max_size=40) | st.sampled_from(
    ["", "\0", "\x1b[2J", "\udcff\udc80", "\ud800", "\ufeff", "a" * 100_000, "$(touch pwned)"]
)
NAMES = st.sampled_from(
    [
        "../../evil",
        "/etc/evil",
        "a/../../b",
        "..",
        "a" * 5000,
        "a\x1b[2Jb",
        "a\nb",
        "\udcff",
        "-rf",
        "",
    ]
) | st.text(max_size=20)
KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 5
    + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"z"]
)
IMAGES = st.sampled_from(
    [
        png(),
        png(shown_size=(60_000, 60_000)),
        png(shown_size=(0, 5)),
        png((4000, 1)),
        b"",
        b"GIF89a" + b"\xff" * 100,
        b"\xff\xd8\xff" + b"\0" * 50,
        pickle.dumps(Evil()),
    ]
) | spoiled(png())
DOCUMENTS = st.sampled_from(
    [b"[" * 100_000, b"{}", b"null", b'{"caption": 3}', b'{"caption": ["a", null]}', b"\xff"]
)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "png": IMAGES,
        "jpg": IMAGES,
        "txt": TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
        "json": DOCUMENTS,
        "pkl": st.just(pickle.dumps(Evil())),
    },
)
HEADERS = st.sampled_from(
    [
        "__import__('os').system('touch pwned')",
        "{'descr': open('pwned', 'w')}",
        "{" * 5000,
        "9" * 9000,
        "{'descr': '<f2', 'fortran_order': False, 'shape': (2**99999,)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 16, 4)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (9999999999999,)}",
        "{'descr': '|O8', 'fortran_order': False, 'shape': (1,)}",
    ]
).map(lambda text: b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode())
SHAPES = st.lists(st.integers(0, 20), max_size=4).map(tuple)
ARRAYS = st.builds(np.full, SHAPES, st.sampled_from([0.0, np.nan, np.inf])).flatmap(
    lambda array: st.sampled_from([np.float16, np.float32, ">f2"]).map(array.astype)
)
GOOD_LATENT = npy(np.zeros((2, K, C), np.float16))
LATENTS = st.one_of(
    spoiled(GOOD_LATENT),
    HEADERS,
    ARRAYS.map(npy),
    st.sampled_from([npy(np.array([Evil()], dtype=object), True), pickle.dumps(Evil())]),
    st.just(b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{}"),
)


def read(data, name, reader_of, is_right):
    """Read a shard of these bytes, in a folder of its own, where nothing may appear beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        try:
            batches = list(reader_of([f"{folder}/{name}"]).once(4))
        except (ValueError, OSError) as error:
            assert str(error)
        else:
            assert all(map(is_right, batches))
        assert [path.name for path in Path(folder).iterdir()] == [name]
    assert not Path("pwned").exists()


def read_images(data, name="x.tar"):
    def is_right(batch):
        captions = "".join(batch["caption"])
        has_control = any(unicodedata.category(c) == "Cc" for c in captions)
        shape = (len(batch["key"]), 3, PIXELS, PIXELS)
        return batch["image"].shape == shape and all(batch["caption"]) and not has_control

    read(data, name, lambda shards: image_reader(ImageTextConfig(shards), PIXELS, None), is_right)


def read_tokens(data):
    def is_right(batch):
        parts = [batch["latent_mean"], batch["latent_logvar"]]
        shape = (len(batch["key"]), K, C)
        return all(part.shape == shape and torch.isfinite(part).all() for part in parts)

    read(data, "x.tar", lambda shards: token_reader(TokenTextConfig(shards), K, C, None), is_right)


def shard_of(samples):
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "x.tar", samples)
        return (Path(folder) / "x.tar").read_bytes()


GOOD = shard_of([shape_sample(number) for number in range(8)])


@MANY
@given(name=NAMES, kind=KINDS, parts=PARTS)
def test_hostile_members_of_image_shards(name, kind, parts):
    members = [(f"{name}.{extension}", kind, data) for extension, data in parts.items()]
    if kind != tarfile.REGTYPE:
        members = [(name, kind, b"") for name, kind, _ in members]
    good = [("0.png", tarfile.REGTYPE, png()), ("0.txt", tarfile.REGTYPE, b"a red square")]
    read_images(tar_of([*members, *good, *members]))


@MANY
@given(data=spoiled(GOOD), is_packed=st.booleans())
def test_spoiled_image_shards(data, is_packed):
    read_images(data, "x.tar.gz" if is_packed else "x.tar")


@FEW
@given(size=st.sampled_from([-1, 1 << 32, 8**11 - 1]) | st.integers(-1, 20_000))
def test_image_shards_whose_first_member_claims_another_size(size):
    read_images(with_size(GOOD, size))


def test_a_small_file_that_unpacks_to_a_large_one():
    read_images(gzip.compress(bytes(50_000_000)), "x.tar.gz")
    read_images(gzip.compress(gzip.compress(GOOD)), "x.tar.gz")


@MANY
@given(latent=LATENTS, states=st.none() | LATENTS)
def test_hostile_arrays_in_token_shards(latent, states):
    parts = {"latent.npy": latent, "text.npy": states}
    hostile = {name: data for name, data in parts.items() if data is not None}
    good = {"__key__": "0", "latent.npy": GOOD_LATENT, "txt": "a"}
    read_tokens(shard_of([{**good, "__key__": "1", **hostile}, good]))


# ----------------------------------------------------------- counted, against an independent count


def made(files, *command):
    """(summary, {key: captions}) of shards made of files; None where there is no sample at all."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        write_files(root / "in", files)
        words = [f"{root}/in/{word}" if word.startswith("FILE ") else word for word in command]
        words = [word.replace("FILE ", "") for word in words]
        with suppress(SystemExit):  # none is kept, or there is none
            run(*words, "--output", root / "out", "--samples-per-shard", 3)
        if not (root / "out").exists():
            return None
        kept = {sample["__key__"]: captions_of(sample) for sample in samples_of(root / "out")}
        summary = summary_of(root / "out")
        assert summary["read"] == summary["kept"] + sum(summary["dropped"].values())
        assert summary["kept"] == len(kept) and summary["first"].keys() == summary["dropped"].keys()
        assert summary["first_unused"].keys() == summary["unused"].keys()
        return summary, kept


SHORTEST = st.sampled_from(["0", "6"])  # characters of a caption
FILTER = "filter: min_caption_characters"


def split_wanted(captions, shortest):
    """(captions that stay, how many others there are)."""
    texts = [text for caption in captions if (text := " ".join(caption.split()))]
    wanted = [text for text in texts if len(text) >= int(shortest)]
    return wanted, len(texts) - len(wanted)


ICON = encode(noise(8, 16, 16), format="ICO", sizes=[(16, 16)])
PICTURES = (7, ICON)
FIELD = '{"caption": ["and more", "words"]}'
CONTENTS = {
    (".jpg", ".PNG", "", ".md", ".heic"): st.sampled_from([7, 7, ICON, "words"]),
    (".txt", ".TXT"): st.sampled_from(["words", "more words", "more words", "", 7]),
    (".json",): st.sampled_from([FIELD, FIELD, "words", "{", "", 7]),
}
FILES = st.lists(
    st.builds(
        lambda place, stem, parts: {f"{place}{stem}{ending}": parts[ending] for ending in parts},
        st.sampled_from(["", "", "x/", "x/y/", ".z/", "x/.z/"]),
        st.sampled_from(["a", "b.c", "ü", ".d"]),
        st.fixed_dictionaries(
            {}, optional={ending: one for endings, one in CONTENTS.items() for ending in endings}
        ),
    ),
    min_size=1,
    max_size=4,
).map(lambda groups: {name: content for group in groups for name, content in group.items()})


@FEW
@given(files=FILES, shortest=SHORTEST)
def test_every_file_of_a_folder_is_an_image_a_sidecar_or_counted(files, shortest):
    # a hidden folder counts once; text belongs to the files of its name, of two the last
    hidden = {name.partition(".z/")[0] for name in files if ".z/" in name}
    counted, groups = Counter({"hidden": len(hidden)}), {}
    for name in sorted(name for name in files if ".z/" not in name):
        stem, ending = os.path.splitext(name)
        texts, others = groups.setdefault(stem, ({}, []))
        if ending.lower() in (".txt", ".json"):
            texts.setdefault(ending.lower(), []).append(files[name])
        else:
            others.append(name)
    images, kept, unused = 0, {}, Counter()
    for stem, (texts, others) in groups.items():
        is_hidden = os.path.basename(stem).startswith(".")
        for ending, contents in texts.items():
            counted["hidden" if is_hidden else ending] += len(contents) - bool(others)
        # its captions, and what is wrong with them
        text, field = (texts.get(ending, [None])[-1] for ending in (".txt", ".json"))
        captions = [] if text in (*PICTURES, None, "") else [text]
        if not captions and field == FIELD:
            captions = ["and more", "words"]
        wanted, num_short = split_wanted(captions, shortest)
        faults = Counter({FILTER: num_short, "caption: not UTF-8": int(text in PICTURES)})
        faults["json: unreadable"] = int(field not in (FIELD, None))
        faults["caption: missing"] = int(text == "")
        for name in others:
            ending = os.path.splitext(name)[1]
            if is_hidden:
                counted["hidden"] += 1
            elif ending in (".jpg", ".PNG") or files[name] in PICTURES:
                images += 1
                if wanted and files[name] in PICTURES:
                    kept[name] = wanted
                    unused += faults
            else:
                counted[ending or "no ending"] += 1
    outcome = made(files, "folder", "FILE ", "--min-caption-characters", shortest)
    if not images:
        assert outcome is None
        return
    summary, found = outcome
    assert summary["read"] == images + counted.total()
    dropped = {f"no image: {ending}": number for ending, number in (+counted).items()}
    assert {k: v for k, v in summary["dropped"].items() if k.startswith("no image")} == dropped
    assert sorted(found.values()) == sorted(kept.values()) and summary["unused"] == unused


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a.jpg", "./a.jpg", "b.jpg", "text.jpg", "gone.jpg", ""]),
        st.sampled_from(["one", "two, three", 'say "four"', "five\nsix", " ", ""]),
    ),
    min_size=1,
    max_size=9,
)
ENDINGS = st.sampled_from(["csv", "tsv", "jsonl"])


def table_of(rows, ending):
    """Text of a table of (path, caption)."""
    names, text = ("path", "caption"), io.StringIO(newline="")
    table = csv.writer(text, delimiter="\t" if ending == "tsv" else ",")
    table.writerows([names, *rows])
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" for line in lines) if ending == "jsonl" else text.getvalue()


@FEW
@given(rows=ROWS, ending=ENDINGS, shortest=SHORTEST)
def test_every_row_of_a_table_is_of_an_image_or_counted(rows, ending, shortest):
    files = {"a.jpg": 1, "b.jpg": 2, "text.jpg": "no image", f"t.{ending}": table_of(rows, ending)}
    options = ["--min-caption-characters", shortest]
    summary, kept = made(files, "table", f"FILE t.{ending}", *options)

    captions = {}
    for path, caption in rows:
        captions.setdefault(path.removeprefix("./"), []).append(caption)
    without_path = len(captions.pop("", []))
    assert summary["read"] == len(captions) + without_path
    expected, unused = {}, Counter()
    for key, texts in {path[0]: captions.get(path, []) for path in ("a.jpg", "b.jpg")}.items():
        wanted, short = split_wanted(texts, shortest)
        if wanted:
            expected[key] = list(dict.fromkeys(wanted))
            empty = sum(not text.strip() for text in texts)
            unused += Counter({FILTER: short, "caption: missing": empty})
    assert kept == expected and summary["unused"] == unused


def test_a_table_that_cannot_be_read_to_its_end_is_refused_with_the_line(capsys):
    """Where the quote stands, or what is in another encoding; nothing is written."""

    @FEW
    @given(
        before=ROWS,
        after=ROWS,
        ending=ENDINGS,
        fault=st.sampled_from(
            [
                ("cp1252", "strict", "é"),
                ("utf-8", "surrogatepass", "\ud800"),
                ("utf-16", "surrogatepass", "\ud800"),
                ("utf-8", "strict", '"'),
            ]
        ),
    )
    def check(before, after, ending, fault):
        encoding, errors, letter = fault
        is_quote = letter == '"' and ending != "jsonl"
        if letter == '"' and not is_quote:
            return
        head, tail = table_of(before, ending), table_of([("a.jpg", "@"), *after], ending)
        tail = tail[tail.index("\n") + 1 :] if ending != "jsonl" else tail
        # the quote may stand in a row that has another quoted field before
        if is_quote:
            tail = tail.replace("a.jpg", '"a\n.jpg"', 1)
        content = head + tail.replace("@", f"{letter}open", 1)
        line = 1 + len(re.findall("\r\n|\n", content[: len(head) + tail.index("@")]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"t.{ending}")
            path.write_bytes(content.encode(encoding, errors))
            message = fails(capsys, "table", path, "--output", Path(folder, "out"))
            assert os.listdir(folder) == [path.name]
        cure = "--no-quotes" if is_quote else "--encoding"
        assert f"t.{ending} line {line} " in message.replace(":", " ") and cure in message

    check()


CELLS = st.tuples(
    st.sampled_from([None, b"no image", encode(noise(1)), ICON]),
    st.none()
    | st.lists(st.sampled_from(["one", "two three", " ", "", None]), min_size=1, max_size=4),
)


@settings(FEW, max_examples=30)
@given(files=st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_every_row_of_parquet_with_images_is_a_sample_or_counted(files):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = {}
    for number, rows in enumerate(files):
        images = pyarrow.array([image for image, _ in rows], pyarrow.binary())
        texts = pyarrow.array([texts for _, texts in rows], pyarrow.list_(pyarrow.string()))
        buffer = io.BytesIO()
        table = pyarrow.table({"image": images, "captions": texts})
        parquet.write_table(table, buffer, row_group_size=2)
        contents[f"{number}.parquet"] = buffer.getvalue()
    summary, kept = made(contents, "hub", "FILE ", "--min-caption-characters", "6")

    rows = [row for file in files for row in file]
    assert summary["read"] == len(rows)
    expected, unused = [], Counter()
    for image, texts in rows:
        wanted = [text for text in texts or [] if text == "two three"]
        if image in (None, b"no image") or not wanted:
            continue
        expected.append(wanted[:1])
        unused["caption: missing"] += sum(not (text or "").strip() for text in texts)
        unused[FILTER] += texts.count("one")
    assert sorted(kept.values()) == expected and summary["unused"] == +unused


# runs of members with one key, or with none
PARTS_OF_A_KEY = [
    *([("jpg", 7), ("txt", "words")] * 2),
    *[("png", 7), ("v1.jpg", 7), ("json", "{}"), ("json", "{"), ("", "")],
    *[("txt", Path("b.txt")), ("jpg", Path("a.jpg"))],
]
STRAYS = ["none", "d/none", "__a.jpg", ".a.jpg", "d/._a.jpg"]
MEMBERS = st.lists(
    st.one_of(
        st.builds(
            lambda key, parts: [(f"{key}.{ending}", content) for ending, content in parts],
            st.sampled_from(["a", "b", "u\u0308", "ü"]),
            st.lists(st.sampled_from(PARTS_OF_A_KEY), max_size=5),
        ),
        st.sampled_from(STRAYS).map(lambda name: [(name, "")]),
    ),
    min_size=1,
    max_size=6,
).map(lambda runs: [member for run in runs for member in run])


@FEW
@given(members=MEMBERS)
def test_every_member_of_a_tar_is_of_a_sample_or_counted_also_by_the_reader(members):
    outcome = made({"x.tar": members}, "shards", "FILE x.tar")
    # a member has a key, or is counted; a link is counted in any case
    named, reasons = [], Counter()
    for name, content in members:
        base = unicodedata.normalize("NFC", name).rpartition("/")[2]
        is_link = isinstance(content, Path)
        if base[0] == ".":
            reasons["hidden"] += 1
        elif base[:2] == "__":
            reasons["begins with __"] += 1
        elif not base.partition(".")[2]:
            reasons["no ending"] += 1
        else:
            reasons["no plain file"] += is_link
            named.append((*base.split(".", 1), content))
    groups = [list(group) for _, group in groupby(named, key=lambda part: part[0])]
    if not groups:
        assert outcome is None
        return
    summary, _ = outcome
    assert summary["read"] == len(groups) + reasons.total()
    found = {k[11:]: n for k, n in summary["dropped"].items() if k.startswith("no sample: ")}
    assert found == +reasons
    ends = [[end for _, end, what in group if not isinstance(what, Path)] for group in groups]
    whole = [len({*names}) == len(names) for names in ends]
    assert summary["dropped"].get("sample: a member occurs twice", 0) == whole.count(False)
    kept = [
        group
        for group, names, is_whole in zip(groups, ends, whole, strict=True)
        if is_whole and "txt" in names and {"jpg", "png"} & {*names}
    ]
    assert summary["kept"] == len(kept)
    unused = Counter()
    for group in kept:
        files = {end: what for _, end, what in group if not isinstance(what, Path)}
        unused["json: unreadable"] += files.get("json") == "{"
        pictures = sum(end in ("jpg", "png", "v1.jpg") for end in files)
        unused["image: further one"] += pictures - 1
    assert summary["unused"] == +unused

    if not all(whole):  # of such a shard the reader does not give the rest
        return
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), {"x.tar": members})
        read, skipped = 0, Counter()
        config = ImageTextConfig([f"{folder}/x.tar"], max_bad_share=1.0)
        with suppress(NoUsableSample):
            for batch in image_reader(config, PIXELS, None).once(4):
                read += len(batch["key"])
                skipped.update(batch["skipped"])
    assert read == summary["kept"]
    assert not read or read + skipped.total() == len(groups)
