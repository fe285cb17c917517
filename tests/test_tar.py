"""data/tar.py: shard names, the writer, the reader."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import refusal
from sources import with_size
from test_shards import make_shards

from data.storage import ShardError
from data.tar import count_samples, expand_shards, read_shard, write_shard

# names


def test_braces_globs_and_paths_expand_sorted_inside_each_pattern(tmp_path, monkeypatch):
    paths = make_shards(tmp_path, [1] * 12)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards([str(tmp_path / "s-{008..011}.tar")]) == paths[8:]
    assert expand_shards([paths[3], str(tmp_path / "s-00[012].tar")]) == [paths[3], *paths[:3]]
    assert expand_shards([str(tmp_path / "s-{004,001}.tar")]) == [paths[1], paths[4]]
    assert expand_shards(["~/s-000.tar"]) == paths[:1]


def test_urls_expand_by_braces_and_are_not_looked_up():
    expected = [f"https://h/x-{i}.tar?a=*" for i in ("08", "09", "10")]
    assert expand_shards(["https://h/x-{08..10}.tar?a=*"]) == expected


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["s-000.tar", "s-000.tar"], ["s-000.tar"]),
        (["s-001.tar", "*.tar"], ["s-001.tar", "*.tar"]),
        (["s-{000,000}.tar"], ["s-000.tar"]),
        (["http://h/a.tar", "http://h/{a,b}.tar"], ["http://h/a.tar"]),
        (["s-{000..002}.tar"], ["s-{000..002}.tar", "s-002.tar", "s-000.tar"]),
        (["s-{abc}.tar"], ["s-{abc}.tar"]),
        (["x*.tar"], ["x*.tar", "s-000.tar"]),
        (["trian/000.tar"], ["trian", "s-000.tar"]),
        (["."], ["folder"]),
        (["pipe:ls"], ["pipe:ls"]),
        (["s3://bucket/a.tar"], ["s3://bucket/a.tar", "s3fs"]),  # a package that is not installed
        (["nowhere://a.tar"], ["nowhere"]),
    ],
)
def test_patterns_that_name_no_shards_are_refused_with_what_is_there(
    patterns, named, tmp_path, monkeypatch
):
    make_shards(tmp_path, [1, 1])
    monkeypatch.chdir(tmp_path)
    with refusal(*named):
        expand_shards(patterns)


# writing and reading


def test_written_samples_are_read_back_in_order_with_all_parts(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    long_key = "folder/" + "k" * 140 + "é"
    samples = [
        {"__key__": "b", "jpg": b"\xff\x00" * 700, "txt": "ünï", "json": {"a": [1, "é"]}},
        {"__key__": long_key, "latent.npy": array, "txt": b""},
    ]
    assert write_shard(tmp_path / "x.tar", samples) == count_samples(tmp_path / "x.tar") == 2
    first, second = read_shard(tmp_path / "x.tar")
    assert list(first) == ["__key__", "jpg", "txt", "json"]
    assert (first["jpg"], first["txt"]) == (b"\xff\x00" * 700, "ünï".encode())
    assert first["json"] == b'{"a": [1, "\\u00e9"]}'
    assert second["__key__"] == long_key and second["txt"] == b""
    np.testing.assert_array_equal(np.load(io.BytesIO(second["latent.npy"])), array)


def test_a_failed_write_leaves_the_old_shard_and_the_same_samples_give_the_same_bytes(tmp_path):
    (path,) = map(Path, make_shards(tmp_path, [2]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="None"):
        write_shard(path, [{"__key__": "a", "txt": "new"}, {"txt": "no key"}])
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    make_shards(tmp_path, [2])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        ([{"__key__": "a.b", "txt": "x"}], "'a.b'"),
        ([{"__key__": "a", "txt": "x"}, {"__key__": "a", "txt": "y"}], "'a' occurs twice"),
        ([{"__key__": "a"}], "'a'"),
        ([{"__key__": "a", "TXT": "x"}], "'TXT'"),
        ([{"__key__": "a", "x/y": "x"}], "'x/y'"),
        ([{"__key__": "a", "xyz": 3}], "xyz"),
    ],
)
def test_samples_that_no_reader_could_tell_apart_are_refused(tmp_path, samples, named):
    with pytest.raises(ValueError, match=named):
        write_shard(tmp_path / "x.tar", samples)
    assert not list(tmp_path.iterdir())


def broken_tars(folder):
    """(bytes, reason) of tars that break off or cannot be read; two members of two blocks each."""
    make_shards(folder, [2])
    whole = (folder / "s-000.tar").read_bytes()
    for length in (0, 100, 512, 1024, 1600, 2048):  # in a header, in data, between members
        yield whole[:length], "truncated"
    for position in (0, 130, 150, 344, 511):
        yield whole[: 1024 + position] + b"\x01" + whole[1025 + position :], "unreadable"
    header = tarfile.TarInfo("a.txt")
    yield with_size(header.tobuf(), b"-0000000777\0") + bytes(2048), "unreadable"
    header.type, header.size = tarfile.XHDTYPE, 512
    for records in (b"0 path=x\n", b"99 path=x\n", b"path=x\n", b"\xff" * 9):
        yield header.tobuf() + records.ljust(512, b"\0") + bytes(1024), "unreadable"
    yield header.tobuf() * 3000 + bytes(1024), "unreadable"
    yield gzip.compress(whole) + bytes(2000), "unreadable"


def test_a_tar_that_breaks_off_or_cannot_be_read_names_itself_and_why(tmp_path):
    for number, (data, reason) in enumerate(broken_tars(tmp_path)):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(ShardError, match=r"x\.tar") as error:
            list(read_shard(tmp_path / "x.tar"))
        assert error.value.reason == reason, number


def test_a_sample_before_a_break_is_not_given_whether_it_is_wanted_or_not(tmp_path):
    (path,) = make_shards(tmp_path, [3])
    broken = (tmp_path / "s-000.tar").read_bytes()[:2048] + b"x" * 512
    # or a member that comes twice
    names = ("00000.txt", "b.txt", "b.TXT")
    repeated = b"".join(tarfile.TarInfo(name).tobuf() for name in names) + bytes(1024)
    for data, named in ((broken, "s-000.tar"), (repeated, r"s-000\.tar: .*b\.TXT")):
        (tmp_path / "s-000.tar").write_bytes(data)
        samples = read_shard(path)
        assert next(samples)["__key__"] == "00000"
        with pytest.raises(ShardError, match=named):
            next(samples)
        if data is broken:
            with pytest.raises(ShardError):
                count_samples(path)


@pytest.mark.parametrize("compression", [gzip, pytest.importorskip("bz2")])
def test_a_compressed_shard_reads_like_the_plain_one_and_names_itself_when_broken(
    tmp_path, compression
):
    (plain,) = make_shards(tmp_path, [12])
    data = compression.compress((tmp_path / "s-000.tar").read_bytes())
    path = tmp_path / f"s.tar.{'gz' if compression is gzip else 'bz2'}"
    path.write_bytes(data)
    assert list(read_shard(path)) == list(read_shard(plain))
    for broken in (data[: len(data) // 2], data[:60] + b"\xff" * 40 + data[100:], b"nothing"):
        path.write_bytes(broken)
        with pytest.raises(ShardError, match=path.name):
            list(read_shard(path))


def test_webdataset_reads_our_shards_and_we_read_its(tmp_path):
    names = [f"{i:03d}" for i in range(4)]
    samples = [{"__key__": name, "txt": b"text", "latent.npy": name.encode()} for name in names]
    write_shard(tmp_path / "ours.tar", samples)
    theirs = webdataset.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False)
    assert [{name: sample[name] for name in samples[0]} for sample in theirs] == samples
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for sample in samples:
            writer.write(sample)
    # equal as dicts: it sorts the parts
    assert list(read_shard(tmp_path / "theirs.tar")) == samples
