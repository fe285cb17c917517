"""Every sample of a tar is read, or counted by a reason that names the first one's members."""

import re
import tarfile
import tempfile
import unicodedata
from collections import Counter
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sources import encode, tar_of

from data.config import open_sources
from data.images import EncodingReader, ImageTextConfig, encoding_sources, image_reader
from data.samples import SampleCounter
from data.shards import NoUsableSample, read_batches
from data.transforms import IMAGE_KEYS

JPEG = encode(Image.new("RGB", (20, 20), "red"))


def config_of(path):
    return ImageTextConfig([path], max_bad_share=1.0, num_workers=0)


def read(path):
    """The one batch of a shard."""
    (batch,) = image_reader(config_of(path), 16, None).once(100)
    return batch


def write_members(folder, members):
    (folder / "0.tar").write_bytes(tar_of(members))
    return str(folder / "0.tar")


def count_samples(path):
    """(kept, {reason: skipped}, {reason: first}) of one pass over a shard; encoding's, too."""
    config = config_of(path)
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
    texts = [(f"{i:03d}.txt", b"x") for i in range(len(names))]
    path = write_members(tmp_path, sorted([*members, *texts]))
    batch = read(path)
    assert len(batch["key"]) == len(names) and not batch["skipped"]
    # of phones, for which a package may be there or not
    path = write_members(tmp_path, [("a.HEIC", b"ftypheic"), ("a.txt", b"x")])
    reason = "unreadable" if "heic" in IMAGE_KEYS else "HEIC needs the package pillow-heif: 1"
    with pytest.raises(ValueError, match=f"image: {reason}"):
        read(path)


# members ("@": a hard link) -> how many are skipped for a reason, and the first one
DOT = ": keys end at the first dot"
AGAIN = ": the key came before, so the tar is not sorted"
CASES = {
    "p.v1.0.jpg p.v1.0.txt": {"caption": (1, f"p (members v1.0.jpg v1.0.txt{DOT})")},
    "a.input.jpg a.txt": {"image": (1, f"a (members input.jpg txt{DOT})")},
    "a.jpg a.jpg.txt": {"caption": (1, f"a (members jpg jpg.txt{DOT})")},
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
    with pytest.raises(ValueError, match=r"no sample: 1, first .*0\.tar: .* folder/photo1 photo2"):
        read(path)
    with pytest.raises(ValueError, match="skipped nothing"):  # empty: what encoding writes, too
        read(write_members(tmp_path, []))


NAMES = st.builds(
    "{}{}".format,
    st.sampled_from(["a", "b", "d/a", "né", unicodedata.normalize("NFD", "né"), ".", "._a"]),
    st.sampled_from(
        [".jpg", ".JPG", ".png", ".txt", ".txt", ".json", ".v1.jpg", "", ".latent.npy"]
    ),
)
CONTENTS = st.sampled_from([JPEG, JPEG, b"a text", b"{}", b"", b"\xff\xfe"])
KINDS = st.sampled_from([tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
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
        names = [
            path.name.lower().partition(".")[2] for path, kind in run if kind == tarfile.REGTYPE
        ]
        if len(set(names)) < len(names):
            break
    assert kept + skipped.total() == expected
