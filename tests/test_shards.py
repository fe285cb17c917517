"""data/shards.py: shard names, the writer, the reader, and the order and position of the stream."""

import gzip
import io
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from data.shards import BadSample, ShardStream, build_loader, expand_shards, read_batches, read_shard, write_shard

torch.set_num_threads(1)


def decode(sample, rng):
    """Key and one random number; a sample without a text is bad."""
    if "txt" not in sample:
        raise BadSample("text: missing")
    return {"key": sample["__key__"], "draw": rng.random()}


def collate(samples):
    info = torch.utils.data.get_worker_info()
    return {
        "key": [sample["key"] for sample in samples],
        "draw": torch.tensor([sample["draw"] for sample in samples], dtype=torch.float64),
        "worker": info.id if info else 0,
        "threads": torch.get_num_threads(),
    }


def make_shards(folder, sizes, bad=()):
    """One shard per size, samples numbered through; those in `bad` have no text. Returns the paths."""
    paths, number = [], 0
    for index, size in enumerate(sizes):
        keys = range(number, number + size)
        samples = [{"__key__": f"{i:05d}", ("cls" if i in bad else "txt"): f"sample {i}"} for i in keys]
        paths.append(str(folder / f"s-{index:03d}.tar"))
        write_shard(paths[-1], samples)
        number += size
    return paths


def make_stream(paths, batch_size=1, seed=0, rank=0, world_size=1, shuffle_buffer=7):
    return ShardStream(paths, decode, collate, batch_size, seed, rank, world_size, shuffle_buffer)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def epoch_of_reader(stream, epochs=1):
    """Keys that a stream of batch size 1 yields in each of its first epochs."""
    keys, batches = [[] for _ in range(epochs)], iter(stream)
    while True:
        batch = next(batches)
        epoch = stream.state_dict()["epoch"]
        if epoch == epochs:
            return keys
        keys[epoch] += batch["key"]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a["key"] == b["key"] and a["skipped"] == b["skipped"] and torch.equal(a["draw"], b["draw"])


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
    for patterns in ([paths[0], paths[0]], [paths[1], str(tmp_path / "*.tar")], [str(tmp_path / "s-{000,000}.tar")]):
        with pytest.raises(ValueError, match="listed twice"):
            expand_shards(patterns)


def test_a_missing_shard_names_pattern_folder_and_nearest_files(tmp_path):
    make_shards(tmp_path, [1, 1])
    with pytest.raises(ValueError, match=r"s-\{000\.\.002\}.tar.*s-002.tar.*does not exist.*s-00"):
        expand_shards([str(tmp_path / "s-{000..002}.tar")])
    with pytest.raises(ValueError, match=r"x\*.tar.*matches no file.*nearest there: s-00"):
        expand_shards([str(tmp_path / "x*.tar")])
    with pytest.raises(ValueError, match=rf"trian does not exist either, the nearest that does is {tmp_path}"):
        expand_shards([str(tmp_path / "trian" / "000.tar")])
    with pytest.raises(ValueError, match="names the folder"):
        expand_shards([str(tmp_path)])


def test_empty_lists_strings_and_odd_braces_are_refused(tmp_path):
    for patterns, message in (([], "empty"), ("a.tar", "single string"), (["{abc}.tar"], "neither a range")):
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


def test_a_compressed_shard_reads_and_resumes_like_the_plain_one_and_names_itself_when_cut(tmp_path):
    (plain,) = make_shards(tmp_path, [12])
    data = gzip.compress((tmp_path / "s-000.tar").read_bytes())
    (tmp_path / "s-000.tar.gz").write_bytes(data)
    assert list(read_shard(tmp_path / "s-000.tar.gz")) == list(read_shard(plain))
    stream = make_stream([plain + ".gz"], shuffle_buffer=5)
    expected = take(iter(make_stream([plain], shuffle_buffer=5)), 11)
    same(take(iter(stream), 7), expected[:7])
    resumed = make_stream([plain + ".gz"], shuffle_buffer=5)
    resumed.load_state_dict(stream.state_dict())
    same(take(iter(resumed), 4), expected[7:])
    for broken in (data[: len(data) // 2], data[:60] + b"\xff" * 40 + data[100:], b"no gzip"):
        (tmp_path / "cut.tar.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"cut.tar.gz: .*"):
            list(read_shard(tmp_path / "cut.tar.gz"))


def test_files_that_are_no_tars_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"z" * 2000)
    with pytest.raises(ValueError, match="x.tar: not a tar header at byte 0 .*gzip"):
        list(read_shard(tmp_path / "x.tar"))


def test_folders_and_foreign_members_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/._a.jpg", "README", "d/a.JPG", "d/a.txt", "d/" + "n" * 200 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    expected = [{"__key__": "d/a", "jpg": b"abc", "txt": b"abc"}, {"__key__": "d/" + "n" * 200, "jpg": b"abc"}]
    assert list(read_shard(tmp_path / "x.tar")) == expected


def test_webdataset_reads_our_shards_and_we_read_its(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    samples = [{"__key__": f"{i:03d}", "txt": f"text {i}".encode(), "latent.npy": b"x" * i} for i in range(4)]
    write_shard(tmp_path / "ours.tar", samples)
    theirs = webdataset.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False)
    assert [{name: sample[name] for name in samples[0]} for sample in theirs] == samples
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for sample in samples:
            writer.write(sample)
    parts = [sorted(sample.items()) for sample in samples]  # it writes the parts in alphabetical order
    assert [sorted(sample.items()) for sample in read_shard(tmp_path / "theirs.tar")] == parts


# who reads what, in which order


@pytest.mark.parametrize("sizes", [[5] * 8, [20] * 2, [40]], ids=["more_shards", "fewer_shards", "one_shard"])
def test_each_sample_once_per_epoch_over_two_ranks_and_two_workers(tmp_path, sizes):
    paths = make_shards(tmp_path, sizes)
    epochs = [Counter(), Counter()]
    for rank in range(2):
        loader = build_loader(make_stream(paths, rank=rank, world_size=2), num_workers=2)
        batches = take(iter(loader), 40)  # two epochs of two readers with ten samples each
        assert {batch["threads"] for batch in batches} == {1}
        for worker in range(2):
            mine = [batch["key"][0] for batch in batches if batch["worker"] == worker]
            assert len(mine) == 20
            epochs[0].update(mine[:10])
            epochs[1].update(mine[10:])
    everything = Counter(f"{i:05d}" for i in range(40))
    assert epochs[0] == everything and epochs[1] == everything


@pytest.mark.parametrize("sizes", [[1, 9, 3, 12, 2], [8, 1]], ids=["more_shards", "fewer_shards"])
@pytest.mark.parametrize("shuffle_buffer", [0, 4, 100])
def test_uneven_shards_still_give_each_sample_once_per_epoch(tmp_path, sizes, shuffle_buffer):
    paths = make_shards(tmp_path, sizes)
    readers = [make_stream(paths, rank=r, world_size=3, shuffle_buffer=shuffle_buffer) for r in range(3)]
    per_reader = [epoch_of_reader(reader, epochs=3) for reader in readers]
    for epoch in range(3):
        keys = [key for keys in per_reader for key in keys[epoch]]
        assert sorted(keys) == [f"{i:05d}" for i in range(sum(sizes))]


def test_the_order_changes_with_epoch_and_seed_and_is_the_same_for_the_same_seed(tmp_path):
    paths = make_shards(tmp_path, [10] * 3)
    first, second = epoch_of_reader(make_stream(paths), epochs=2)
    assert first != second and sorted(first) == sorted(second)
    assert epoch_of_reader(make_stream(paths), epochs=2) == [first, second]
    assert epoch_of_reader(make_stream(paths, seed=1))[0] != first


def test_a_shuffle_buffer_of_one_keeps_the_order_inside_a_shard(tmp_path):
    (keys,) = epoch_of_reader(make_stream(make_shards(tmp_path, [10, 10]), shuffle_buffer=1))
    assert sorted([keys[:10], keys[10:]]) == [[f"{i:05d}" for i in range(10)], [f"{i:05d}" for i in range(10, 20)]]


def test_the_draws_of_a_sample_depend_on_its_epoch_and_not_on_who_reads_it(tmp_path):
    paths = make_shards(tmp_path, [6] * 4)

    def draws(epochs, **options):
        stream = make_stream(paths, **options)
        batches = iter(stream)
        pairs = ((batch, stream.state_dict()["epoch"]) for batch in batches)
        found = {}
        for batch, epoch in pairs:
            if epoch == epochs:
                return found
            found[epoch, batch["key"][0]] = batch["draw"].item()

    alone, halves = draws(2), [draws(2, rank=r, world_size=2, shuffle_buffer=3) for r in range(2)]
    assert halves[0] | halves[1] == alone
    assert len(set(alone.values())) == 48


def test_every_batch_is_full_across_epochs(tmp_path):
    batches = take(iter(make_stream(make_shards(tmp_path, [5, 6]), batch_size=4)), 11)
    assert {len(batch["key"]) for batch in batches} == {4}
    assert Counter(key for batch in batches for key in batch["key"]) == {f"{i:05d}": 4 for i in range(11)}


# resuming


def test_resuming_after_any_batch_continues_exactly(tmp_path):
    paths = make_shards(tmp_path, [5, 9, 8], bad={3, 4, 11})  # blocks of 7, epochs of 22, batches of 3
    whole = make_stream(paths, batch_size=3)
    batches, states = iter(whole), [whole.state_dict()]
    expected = []
    for _ in range(24):
        expected.append(next(batches))
        states.append(whole.state_dict())
    assert states[-1]["epoch"] == 3
    for k in range(20):
        resumed = make_stream(paths, batch_size=3)
        resumed.load_state_dict(states[k])
        same(take(iter(resumed), 4), expected[k : k + 4])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("sizes", [[5, 9, 8], [22]], ids=["more_shards", "fewer_shards"])
def test_a_loader_resumes_exactly_inside_blocks_and_across_blocks_and_epochs(tmp_path, num_workers, sizes):
    paths = make_shards(tmp_path, sizes, bad={3, 11})

    def loader():
        return build_loader(make_stream(paths, batch_size=3), num_workers)

    whole, states = loader(), {}
    batches = iter(whole)
    expected = []
    for step in range(24):
        if step in (0, 1, 2, 7, 14):
            states[step] = pickle.loads(pickle.dumps(whole.state_dict()))
        expected.append(next(batches))
    for step, state in states.items():
        resumed = loader()
        resumed.load_state_dict(state)
        same(take(iter(resumed), 8), expected[step : step + 8])
        same([next(iter(resumed))], expected[:1])  # a second iter() is a fresh start


def test_a_resumed_run_can_be_resumed_again(tmp_path):
    paths = make_shards(tmp_path, [5, 9, 8])
    expected = take(iter(build_loader(make_stream(paths, batch_size=3), 2)), 9)
    got, state = [], None
    for _ in range(3):
        loader = build_loader(make_stream(paths, batch_size=3), 2)
        if state is not None:
            loader.load_state_dict(state)
        got += take(iter(loader), 3)
        state = loader.state_dict()
    same(got, expected)


def test_resuming_decodes_nothing_that_it_skips_and_reads_no_shard_before_its_block(tmp_path):
    paths = make_shards(tmp_path, [10] * 4)
    stream = make_stream(paths, batch_size=2, shuffle_buffer=10)
    batches = iter(stream)
    order = [key for batch in take(batches, 13) for key in batch["key"]]  # 26 samples: in the third shard
    state, expected = stream.state_dict(), next(batches)
    (tmp_path / f"s-{int(order[0]) // 10:03d}.tar").unlink()
    decoded = []

    def counting(sample, rng):
        decoded.append(sample["__key__"])
        return decode(sample, rng)

    resumed = ShardStream(paths, counting, collate, 2, 0, 0, 1, 10)
    resumed.load_state_dict(state)
    same([next(iter(resumed))], [expected])
    assert decoded == expected["key"]


def test_moved_shards_resume_and_other_settings_are_refused(tmp_path):
    paths = make_shards(tmp_path, [5, 9])
    stream = make_stream(paths, batch_size=3)
    expected = take(iter(stream), 1) and stream.state_dict()
    moved = [str((tmp_path / "moved").joinpath(name.rpartition("/")[2])) for name in paths]
    make_stream(moved, batch_size=3).load_state_dict(expected)
    for options, name in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 4}, "batch_size was 3, is 4"),
        ({"shuffle_buffer": 8}, "shuffle_buffer was 7, is 8"),
        ({"rank": 1, "world_size": 2}, "world_size was 1, is 2"),
    ):
        with pytest.raises(ValueError, match=name):
            make_stream(paths, **{"batch_size": 3, **options}).load_state_dict(expected)
    with pytest.raises(ValueError, match="num_shards was 2, is 1"):
        make_stream(paths[:1], batch_size=3).load_state_dict(expected)


def test_a_loader_refuses_the_state_of_another_number_of_workers(tmp_path):
    paths = make_shards(tmp_path, [8])
    state = build_loader(make_stream(paths), 0).state_dict()
    with pytest.raises(ValueError, match="num_workers was 0, is 2"):
        build_loader(make_stream(paths), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="does not fit"):
        build_loader(make_stream(paths), 2).load_state_dict({"something": "else"})


def test_a_loader_leaves_the_global_generator_alone(tmp_path):
    stream = make_stream(make_shards(tmp_path, [8]))
    before = torch.get_rng_state()
    next(iter(build_loader(stream, 0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_can_be_pickled(tmp_path):
    paths = make_shards(tmp_path, [8])
    same(take(iter(pickle.loads(pickle.dumps(make_stream(paths)))), 8), take(iter(make_stream(paths)), 8))


# bad samples


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_bad_sample_is_counted_once(tmp_path, num_workers):
    paths = make_shards(tmp_path, [6, 6], bad={1, 2, 8, 10})
    batches = take(iter(build_loader(make_stream(paths, batch_size=4), num_workers)), 12)
    assert set().union(*(batch["skipped"] for batch in batches)) == {"text: missing"}
    usable = sum(len(batch["key"]) for batch in batches)
    counted = sum(batch["skipped"].get("text: missing", 0) for batch in batches)
    assert usable == 48 and abs(counted - 24) <= 4  # 8 usable and 4 bad an epoch; some lie after the last batch


def test_an_epoch_without_a_usable_sample_stops_with_the_counts(tmp_path):
    paths = make_shards(tmp_path, [3], bad={0, 1, 2})
    with pytest.raises(ValueError, match="no usable sample in epoch 0.*'text: missing': 3"):
        next(iter(make_stream(paths)))
    with pytest.raises(ValueError, match="'text: missing': 3"):
        next(read_batches(paths, decode, collate, batch_size=2))


def test_a_reader_without_samples_stops_and_does_not_hang(tmp_path):
    paths = make_shards(tmp_path, [2])
    with pytest.raises(ValueError, match="reader 2 of 3 found no usable sample"):
        next(iter(make_stream(paths, rank=2, world_size=3)))


def test_an_error_in_a_worker_reaches_the_training_process(tmp_path):  # 5 s: torch joins the failed worker so long
    paths = make_shards(tmp_path, [3], bad={0, 1, 2})
    with pytest.raises(ValueError, match="no usable sample"):
        next(iter(build_loader(make_stream(paths), 1)))


def test_one_pass_reads_in_order_with_a_short_last_batch_and_counts_all_bad_samples(tmp_path):
    paths = make_shards(tmp_path, [4, 4], bad={0, 6, 7})
    batches = list(read_batches(paths, decode, collate, batch_size=2))
    assert [batch["key"] for batch in batches] == [["00001", "00002"], ["00003", "00004"], ["00005"]]
    assert [batch["skipped"] for batch in batches] == [{"text: missing": 1}, {}, {"text: missing": 2}]
    limited = list(read_batches(paths, decode, collate, batch_size=2, limit=3))
    assert [batch["key"] for batch in limited] == [["00001", "00002"], ["00003"]]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"seed": -1}, {"rank": 1}, {"rank": -1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        make_stream(["a.tar"], **options)
