"""Shards as they should not be: each sample is read, or counted by a reason that names the first
one's members; hostile bytes end in an error of ours, nothing is executed, nothing hangs.
"""

import gzip
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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sources import Evil, encode, npy, tar_of, with_size

from data.config import open_sources
from data.images import EncodingReader, ImageTextConfig, encoding_sources, image_reader
from data.readers import TokenTextConfig, token_reader
from data.samples import SampleCounter
from data.shards import NoUsableSample, read_batches
from data.tar import write_shard
from data.transforms import IMAGE_KEYS

K, C, PIXELS = 16, 4, 32
# the same examples each time; no deadline: other work on the machine must not matter
MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
FEW = settings(MANY, max_examples=80)
JPEG = encode(Image.new("RGB", (20, 20), "red"))


# every sample is read or counted


def write_members(folder, members):
    (folder / "0.tar").write_bytes(tar_of(members))
    return str(folder / "0.tar")


def count_samples(path):
    """(kept, {reason: skipped}, {reason: first}) of one pass over a shard; encoding's, too."""
    config = ImageTextConfig([path], max_bad_share=1.0, num_workers=0)
    reader = image_reader(config, 16, None)
    counter, kept, told = SampleCounter(1.0, "test"), 0, Counter()
    with suppress(NoUsableSample):
        sources = open_sources(config, reader.decode)
        for batch in read_batches(sources, reader.collate, 3, counter):
            kept += len(batch["key"])
            told.update(batch["skipped"])
    skipped = counter.skipped
    assert not kept or told == skipped
    *batches, end = EncodingReader(encoding_sources(config, 16, 1), None, 3, 1.0)
    assert sum(len(batch["key"]) for batch in batches) == end["end"].num_images == kept
    assert end["end"].skipped == skipped and end["end"].first == counter.first
    return kept, skipped, counter.first


def test_an_image_is_read_whatever_its_extension(tmp_path):
    names = [*IMAGE_KEYS, "JPG", "Jpeg", "PNG"]
    members = [(f"{i:03d}.{name}", JPEG) for i, name in enumerate(names)]
    members += [(f"{i:03d}.txt", b"x") for i in range(len(names))]
    path = write_members(tmp_path, sorted(members))
    assert count_samples(path) == (len(names), {}, {})
    # of phones, for which a package may be there or not
    path = write_members(tmp_path, [("a.HEIC", b"ftypheic"), ("a.txt", b"x")])
    (reason,) = count_samples(path)[1]
    assert reason.startswith("image: ") and ("heic" in IMAGE_KEYS) != ("pillow-heif" in reason)


# members ("@": a hard link) -> how many are skipped for a reason, and the first one
DOT = ": keys end at the first dot"
AGAIN = ": the key came before, so the tar is not sorted"
CASES = {
    "p.v1.0.jpg p.v1.0.txt": {"caption": (1, f"p (members v1.0.jpg v1.0.txt{DOT})")},
    "a.input.jpg a.txt": {"image": (1, f"a (members input.jpg txt{DOT})")},
    "a.jpg b.jpg a.txt b.txt": {
        "caption": (2, "a (members jpg)"),
        "image": (2, f"a (members txt{AGAIN})"),
    },
    "b.txt b.jpg a.txt b.txt": {"image": (2, "a (members txt)")},
    "a.jpg@ a.txt@ b.txt": {"caption": (1, "a (members none)"), "image": (1, "b (members txt)")},
}


@pytest.mark.parametrize("members", CASES)
def test_a_reason_names_its_first_case_and_what_lay_there(tmp_path, members):
    data = {"jpg": JPEG, "txt": b"x"}
    parts = []
    for name in members.split():
        kind = tarfile.LNKTYPE if name[-1] == "@" else tarfile.REGTYPE
        parts.append((name.strip("@"), data.get(name.rpartition(".")[2], b""), kind))
    _, skipped, first = count_samples(write_members(tmp_path, parts))
    reasons = {f"{name}: missing": case for name, case in CASES[members].items()}
    assert {reason: (skipped[reason], first[reason]) for reason in skipped} == reasons


def test_a_shard_without_a_sample_is_a_bad_one_that_says_what_is_in_it(tmp_path):
    path = write_members(tmp_path, [("folder/photo1", b""), ("photo2", b""), ("._a.jpg", b"")])
    _, skipped, first = count_samples(path)
    assert skipped == {"shard: no sample": 1}
    assert re.match(r".*0\.tar: no sample: members folder/photo1 photo2", *first.values())
    # empty: what encoding writes, too
    assert count_samples(write_members(tmp_path, [])) == (0, {}, {})


STEMS = ["a", "b", "d/a", "né", unicodedata.normalize("NFD", "né"), ".", "._a"]
ENDINGS = [".jpg", ".JPG", ".png", ".txt", ".txt", ".json", ".v1.jpg", "", ".latent.npy"]
NAMES = st.builds("{}{}".format, st.sampled_from(STEMS), st.sampled_from(ENDINGS))
CONTENTS = st.sampled_from([JPEG, JPEG, b"a text", b"{}", b"", b"\xff\xfe"])
KINDS = st.sampled_from([tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])


@FEW
@given(members=st.lists(st.tuples(NAMES, CONTENTS, KINDS), max_size=12))
@example(members=[])
def test_every_sample_of_a_tar_is_read_or_counted_by_reason(members):
    with tempfile.TemporaryDirectory() as folder:
        kept, skipped, _ = count_samples(write_members(Path(folder), members))
    # an independent count: runs of one key, up to one that has a member twice
    files = [(Path(name), kind) for name, _, kind in members if kind != tarfile.DIRTYPE]
    named = [file for file in files if re.match(r"[^.]+\.", file[0].name)]

    def key_of(file):
        stem = unicodedata.normalize("NFC", file[0].name).partition(".")[0]
        return file[0].parent / stem

    expected = int(bool(files) and not named)
    for _, run in groupby(named, key_of):
        expected += 1
        plain = [path.name.lower() for path, kind in run if kind == tarfile.REGTYPE]
        endings = [name.partition(".")[2] for name in plain]
        if len(set(endings)) < len(endings):
            break
    assert kept + skipped.total() == expected


# hostile bytes


def png(size=(PIXELS, PIXELS), shown_size=None):
    """A PNG, whose header may claim another size."""
    data = bytearray(encode(Image.new("RGB", size, "red"), "PNG"))
    if shown_size:
        data[16:24] = struct.pack(">II", *shown_size)
    return bytes(data)


@st.composite
def spoiled(draw, data):
    """A file of which something is lost, changed or added."""
    data = bytearray(draw(st.sampled_from([data, bytes(len(data)), gzip.compress(data)])))
    for place in draw(st.lists(st.integers(0, len(data) * 8 - 1), max_size=20)):
        data[place // 8] ^= 1 << place % 8
    kept = bytes(data[: draw(st.integers(0, len(data)))])
    return draw(st.sampled_from([bytes(data), kept, kept + bytes(data)]))


def npy_of(header):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


ODD_TEXTS = ["", "\0", "\x1b[2J", "\udcff\udc80", "\ud800", "\ufeff", "a" * 100_000]
TEXTS = st.text(max_size=40) | st.sampled_from([*ODD_TEXTS, "$(touch pwned)"])
ODD_NAMES = ["../../evil", "/etc/evil", "a/../../b", "..", "a" * 5000, "a\nb", "\udcff", "-rf", ""]
ODD_KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"z"]
)
ODD_IMAGES = [png(), png(shown_size=(60_000, 60_000)), png(shown_size=(0, 5)), png((4000, 1)), b""]
ODD_IMAGES += [b"GIF89a" + b"\xff" * 100, b"\xff\xd8\xff" + bytes(50), pickle.dumps(Evil())]
IMAGES = st.sampled_from(ODD_IMAGES) | spoiled(png())
DOCUMENTS = [
    b"[" * 100_000,
    b"{}",
    b"null",
    b'{"caption": 3}',
    b'{"caption": ["a", null]}',
    b"\xff",
]
PARTS = {
    "png": IMAGES,
    "jpg": IMAGES,
    "txt": TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    "json": st.sampled_from(DOCUMENTS),
    "pkl": st.just(pickle.dumps(Evil())),
}
HEADERS = ["__import__('os').system('touch pwned')", "{'descr': open('pwned', 'w')}", "{" * 5000]
HEADERS += [
    f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"
    for kind, shape in (("<f2", "(2**99999,)"), ("<f2", "(-1, 16, 4)"), ("<f2", f"({9**13},)"))
]
ARRAYS = st.builds(
    np.full, st.lists(st.integers(0, 20), max_size=4), st.sampled_from([0.0, np.nan, np.inf])
).flatmap(lambda array: st.sampled_from([np.float16, np.float32, ">f2"]).map(array.astype))
GOOD_LATENT = npy(np.zeros((2, K, C), np.float16))
PICKLES = [npy(np.array([Evil()], dtype=object)), pickle.dumps(Evil())]
LATENTS = st.one_of(
    spoiled(GOOD_LATENT),
    st.sampled_from([*map(npy_of, HEADERS), *PICKLES]),
    ARRAYS.map(npy),
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


def shard_of(samples):
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "x.tar", samples)
        return (Path(folder) / "x.tar").read_bytes()


GOOD = shard_of([shape_sample(number) for number in range(8)])


@MANY
@given(
    name=st.sampled_from(ODD_NAMES) | st.text(max_size=20),
    kind=ODD_KINDS,
    parts=st.fixed_dictionaries({}, optional=PARTS),
)
def test_hostile_members_of_image_shards(name, kind, parts):
    members = [(f"{name}.{extension}", data) for extension, data in parts.items()]
    if kind != tarfile.REGTYPE:
        members = [(name, b"", kind) for name, _ in members]
    good = [("0.png", png()), ("0.txt", b"a red square")]
    read_images(tar_of([*members, *good, *members]))


@MANY
@given(data=spoiled(GOOD), is_packed=st.booleans())
def test_spoiled_image_shards(data, is_packed):
    read_images(data, "x.tar.gz" if is_packed else "x.tar")


@FEW
@given(size=st.sampled_from([-1, 1 << 32, 8**11 - 1]) | st.integers(-1, 20_000))
def test_image_shards_whose_first_member_claims_another_size(size):
    field = f"{size:011o} " if size >= 0 else "-0000000001 "
    read_images(with_size(GOOD, field.encode()) + GOOD[512:])


def test_a_small_file_that_unpacks_to_a_large_one():
    read_images(gzip.compress(bytes(50_000_000)), "x.tar.gz")
    read_images(gzip.compress(gzip.compress(GOOD)), "x.tar.gz")


@MANY
@given(latent=LATENTS, states=st.none() | LATENTS)
def test_hostile_arrays_in_token_shards(latent, states):
    def is_right(batch):
        parts = [batch["latent_mean"], batch["latent_logvar"]]
        shape = (len(batch["key"]), K, C)
        return all(part.shape == shape and torch.isfinite(part).all() for part in parts)

    def reader_of(shards):
        return token_reader(TokenTextConfig(shards), K, C, None)

    parts = {"latent.npy": latent, "text.npy": states}
    hostile = {name: data for name, data in parts.items() if data is not None}
    good = {"__key__": "0", "latent.npy": GOOD_LATENT, "txt": "a"}
    read(shard_of([{**good, "__key__": "1", **hostile}, good]), "x.tar", reader_of, is_right)
