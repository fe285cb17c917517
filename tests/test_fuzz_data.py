"""Hostile shards: each ends in an error of ours or right batches; no other exception, no hang,
nothing executed.
"""

import gzip
import pickle
import struct
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import torch
from conftest import shape_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sources import Evil, encode, npy, tar_of, with_size

from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, token_reader
from data.tar import write_shard

K, C, PIXELS = 16, 4, 32
# the same examples each time; no deadline: other work on the machine must not matter
MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
FEW = settings(MANY, max_examples=100)


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
    st.sampled_from([npy(np.array([Evil()], dtype=object)), pickle.dumps(Evil())]),
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
    parts = {"latent.npy": latent, "text.npy": states}
    hostile = {name: data for name, data in parts.items() if data is not None}
    good = {"__key__": "0", "latent.npy": GOOD_LATENT, "txt": "a"}
    read_tokens(shard_of([{**good, "__key__": "1", **hostile}, good]))
