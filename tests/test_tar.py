"""data/tar.py: shard names, the writer, the reader."""

import gzip
import io
import tarfile

import numpy as np
import pytest

from data.storage import ShardError
from data.tar import count_samples, expand_shards, read_shard, write_shard


def make_shards(folder, sizes):
    """One shard per size, samples numbered through. Returns the paths."""
    paths, number = [], 0
    for index, size in enumerate(sizes):
        paths.append(str(folder / f"s-{index:03d}.tar"))
        write_shard(
            paths[-1],
            [{"__key__": f"{i:05d}", "txt": f"sample {i}"} for i in range(number, number + size)],
        )
        number += size
    return paths


def test_samples_are_counted(tmp_path):
    first, second = make_shards(tmp_path, [3, 1])
    assert (count_samples(first), count_samples(second)) == (3, 1)


# names


def test_braces_globs_and_paths_expand_sorted_inside_each_pattern(tmp_path):
    paths = make_shards(tmp_path, [1] * 12)
    assert expand_shards([str(tmp_path / "s-{008..011}.tar")]) == paths[8:]
    assert expand_shards([paths[3], str(tmp_path / "s-00[012].tar")]) == [paths[3], *paths[:3]]
    assert expand_shards([str(tmp_path / "s-{004,001}.tar")]) == [paths[1], paths[4]]


def test_home_folder_expands(tmp_path, monkeypatch):
    paths = make_shards(tmp_path, [1])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards(["~/s-000.tar"]) == paths


def test_a_shard_listed_twice_is_refused(tmp_path):
    paths = make_shards(tmp_path, [1, 1])
    for patterns in (
        [paths[0], paths[0]],
        [paths[1], str(tmp_path / "*.tar")],
        [str(tmp_path / "s-{000,000}.tar")],
    ):
        with pytest.raises(ValueError, match="listed twice"):
            expand_shards(patterns)


def test_a_missing_shard_names_pattern_folder_and_nearest_files(tmp_path):
    make_shards(tmp_path, [1, 1])
    with pytest.raises(ValueError, match=r"s-\{000\.\.002\}.tar.*s-002.tar.*does not exist.*s-00"):
        expand_shards([str(tmp_path / "s-{000..002}.tar")])
    with pytest.raises(ValueError, match=r"x\*.tar.*matches no file.*nearest there: s-00"):
        expand_shards([str(tmp_path / "x*.tar")])
    with pytest.raises(
        ValueError, match=rf"trian does not exist either, the nearest that does is {tmp_path}"
    ):
        expand_shards([str(tmp_path / "trian" / "000.tar")])
    with pytest.raises(ValueError, match="names the folder"):
        expand_shards([str(tmp_path)])


def test_urls_and_pipes_expand_by_braces_and_are_not_looked_up():
    assert expand_shards(["https://h/x-{08..10}.tar?a=*"]) == [
        f"https://h/x-{i}.tar?a=*" for i in ("08", "09", "10")
    ]
    command = "pipe:aws s3 cp s3://b/{a,b}-{0..1}.tar - | awk '{print $1, $2}'"
    expected = [
        f"pipe:aws s3 cp s3://b/{x}-{i}.tar - | awk '{{print $1, $2}}'"
        for x in "ab"
        for i in range(2)
    ]
    assert expand_shards([command], allow_pipe=True) == expected
    with pytest.raises(ValueError, match="listed twice"):
        expand_shards(["http://h/a.tar", "http://h/{a,b}.tar"])


def test_a_pipe_is_refused_unless_allowed_and_other_stores_with_advice():
    with pytest.raises(ValueError, match="'pipe:ls' runs a shell command.*allow_pipe: true"):
        expand_shards(["pipe:ls"])
    for pattern in ("s3://bucket/a.tar", "gs://bucket/a.tar"):
        with pytest.raises(
            ValueError, match=r"neither a file, http\(s\) nor a pipe.*pipe:aws s3 cp"
        ):
            expand_shards([pattern], allow_pipe=True)


def test_empty_lists_strings_and_odd_braces_are_refused(tmp_path):
    for patterns, message in (
        ([], "empty"),
        ("a.tar", "single string"),
        (["{abc}.tar"], "neither a range"),
    ):
        with pytest.raises(ValueError, match=message):
            expand_shards(patterns)


# writing and reading


def test_written_samples_are_read_back_in_order_with_all_parts(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    long_key = "folder/" + "k" * 140 + "é"
    samples = [
        {"__key__": "b", "jpg": b"\xff\x00" * 700, "txt": "ünï", "json": {"a": [1, "é"]}},
        {"__key__": long_key, "latent.npy": array, "txt": b""},
    ]
    assert write_shard(tmp_path / "x.tar", samples) == 2
    first, second = read_shard(tmp_path / "x.tar")
    assert first == {
        "__key__": "b",
        "jpg": b"\xff\x00" * 700,
        "txt": "ünï".encode(),
        "json": '{"a": [1, "é"]}'.encode(),
    }
    assert second["__key__"] == long_key and second["txt"] == b""
    np.testing.assert_array_equal(np.load(io.BytesIO(second["latent.npy"])), array)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, ({"__key__": str(i), "txt": "t"} for i in range(5)))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_failed_write_leaves_the_old_shard_and_nothing_else(tmp_path):
    def failing():
        yield {"__key__": "a", "txt": "new"}
        raise RuntimeError("source broke")

    (path,) = make_shards(tmp_path, [2])
    before = (tmp_path / "s-000.tar").read_bytes()
    with pytest.raises(RuntimeError, match="source broke"):
        write_shard(path, failing())
    assert [file.name for file in tmp_path.iterdir()] == ["s-000.tar"]
    assert (tmp_path / "s-000.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"__key__": "a.b", "txt": "x"}], "without a dot"),
        ([{"txt": "x"}], "sample key None"),
        ([{"__key__": "a", "txt": "x"}, {"__key__": "a", "txt": "y"}], "occurs twice"),
        ([{"__key__": "a"}], "no parts"),
        ([{"__key__": "a", "TXT": "x"}], "lower case"),
        ([{"__key__": "a", "txt": 3}], "given int"),
    ],
)
def test_samples_that_no_reader_could_tell_apart_are_refused(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "x.tar", samples)
    assert not list(tmp_path.iterdir())


def test_a_tar_cut_anywhere_names_its_file(tmp_path):
    (path,) = make_shards(tmp_path, [3])
    whole = (tmp_path / "s-000.tar").read_bytes()
    for length in (0, 100, 512, 515, 1024, 1600, 3072):  # in a header, in data, between two members
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.tar.*truncated"):
            list(read_shard(tmp_path / "cut.tar"))


def test_a_compressed_shard_reads_like_the_plain_one_and_names_itself_when_cut(tmp_path):
    (plain,) = make_shards(tmp_path, [12])
    data = gzip.compress((tmp_path / "s-000.tar").read_bytes())
    (tmp_path / "s-000.tar.gz").write_bytes(data)
    assert list(read_shard(tmp_path / "s-000.tar.gz")) == list(read_shard(plain))
    for broken in (data[: len(data) // 2], data[:60] + b"\xff" * 40 + data[100:], b"no gzip"):
        (tmp_path / "cut.tar.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"cut.tar.gz: .*"):
            list(read_shard(tmp_path / "cut.tar.gz"))


def test_files_that_are_no_tars_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"z" * 2000)
    with pytest.raises(ValueError, match="x.tar: not a tar header at byte 0 .*gzip"):
        list(read_shard(tmp_path / "x.tar"))


def test_a_changed_header_is_refused_wherever_the_change_lies(tmp_path):
    make_shards(tmp_path, [2])
    whole = (tmp_path / "s-000.tar").read_bytes()
    for position in (0, 50, 130, 150, 160, 344, 511):
        broken = bytearray(whole)
        broken[1024 + position] ^= 1
        (tmp_path / "x.tar").write_bytes(broken)
        with pytest.raises(ShardError, match="x.tar: not a tar header at byte 1024"):
            list(read_shard(tmp_path / "x.tar"))


@pytest.mark.parametrize("records", [b"0 path=x\n", b"-3 path=x\n", b"path=x\n", b"\xff" * 9])
def test_a_broken_pax_header_is_refused(tmp_path, records):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    (tmp_path / "x.tar").write_bytes(info.tobuf() + records.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(ShardError, match="broken pax header at byte 0"):
        list(read_shard(tmp_path / "x.tar"))


def test_a_negative_size_is_refused(tmp_path):
    header = bytearray(tarfile.TarInfo("a.txt").tobuf())
    header[124:136] = b"-0000000777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(header + bytes(2048))
    with pytest.raises(ShardError, match="not a tar header at byte 0"):
        list(read_shard(tmp_path / "x.tar"))


def test_two_members_of_one_name_in_a_row_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.txt", "b.txt", "b.TXT"):
            tar.addfile(tarfile.TarInfo(name))
    samples = read_shard(tmp_path / "x.tar")
    assert next(samples) == {"__key__": "a", "txt": b""}
    with pytest.raises(ShardError, match="x.tar: two members are named b.TXT in a row"):
        next(samples)


def test_folders_and_foreign_members_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/._a.jpg", "README", "d/a.JPG", "d/a.txt", "d/" + "n" * 200 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    expected = [
        {"__key__": "d/a", "jpg": b"abc", "txt": b"abc"},
        {"__key__": "d/" + "n" * 200, "jpg": b"abc"},
    ]
    assert list(read_shard(tmp_path / "x.tar")) == expected


def test_webdataset_reads_our_shards_and_we_read_its(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    samples = [
        {"__key__": f"{i:03d}", "txt": f"text {i}".encode(), "latent.npy": b"x" * i}
        for i in range(4)
    ]
    write_shard(tmp_path / "ours.tar", samples)
    theirs = webdataset.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False)
    assert [{name: sample[name] for name in samples[0]} for sample in theirs] == samples
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for sample in samples:
            writer.write(sample)
    parts = [
        sorted(sample.items()) for sample in samples
    ]  # it writes the parts in alphabetical order
    assert [sorted(sample.items()) for sample in read_shard(tmp_path / "theirs.tar")] == parts
