"""data/shards.py: who reads which sample, the order and the position of the stream."""

import gzip
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.samples import BadSample, SampleCounter
from data.shards import ShardStream, Source, build_loader, read_batches
from data.tar import scan_shard, write_shard

torch.set_num_threads(1)


def decode(sample, draws):
    """Key and one random number; a sample without a text is bad."""
    if "txt" not in sample:
        raise BadSample("text: missing")
    return {"key": sample["__key__"], "draw": draws.crop_x if draws else 0.0}


def collate(samples):
    info = torch.utils.data.get_worker_info()
    return {
        "key": [sample["key"] for sample in samples],
        "draw": torch.tensor([sample["draw"] for sample in samples], dtype=torch.float64),
        "worker": info.id if info else 0,
        "threads": torch.get_num_threads(),
    }


def make_shards(folder, sizes, bad=()):
    """Paths of one shard per size, samples numbered through; those in `bad` have no text."""
    paths, number = [], 0
    for index, size in enumerate(sizes):
        keys = range(number, number + size)
        samples = [
            {"__key__": f"{i:05d}", ("cls" if i in bad else "txt"): f"sample {i}"} for i in keys
        ]
        paths.append(str(folder / f"s-{index:03d}.tar"))
        write_shard(paths[-1], samples)
        number += size
    return paths


def one_source(paths, decode=decode):
    return [Source("", tuple(paths), decode)]


def make_stream(
    paths, batch_size=1, seed=0, rank=0, num_processes=1, shuffle_buffer=7, max_bad_share=1.0
):
    return mixed_stream(
        one_source(paths), batch_size, seed, rank, num_processes, shuffle_buffer, max_bad_share
    )


def mixed_stream(
    sources, batch_size=1, seed=0, rank=0, num_processes=1, shuffle_buffer=7, max_bad_share=1.0
):
    return ShardStream(
        sources, collate, batch_size, seed, rank, num_processes, shuffle_buffer, max_bad_share
    )


def read(paths, batch_size, max_bad_share=1.0, limit=None):
    return read_batches(one_source(paths), collate, batch_size, max_bad_share, limit)


def epoch_of(state):
    return state["positions"][0]["epoch"]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def epoch_of_reader(stream, epochs=1):
    """Keys that a stream of batch size 1 yields in each of its first epochs."""
    keys, batches = [[] for _ in range(epochs)], iter(stream)
    while True:
        batch = next(batches)
        epoch = epoch_of(stream.state_dict())
        if epoch == epochs:
            return keys
        keys[epoch] += batch["key"]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (
            a["key"] == b["key"]
            and a["skipped"] == b["skipped"]
            and torch.equal(a["draw"], b["draw"])
        )


# who reads what, in which order


@pytest.mark.parametrize(
    "sizes", [[5] * 8, [20] * 2, [40]], ids=["more_shards", "fewer_shards", "one_shard"]
)
def test_each_sample_once_per_epoch_over_two_ranks_and_two_workers(tmp_path, sizes):
    paths = make_shards(tmp_path, sizes)
    epochs = [Counter(), Counter()]
    for rank in range(2):
        loader = build_loader(make_stream(paths, rank=rank, num_processes=2), num_workers=2)
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
    readers = [
        make_stream(paths, rank=r, num_processes=3, shuffle_buffer=shuffle_buffer) for r in range(3)
    ]
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


@pytest.mark.parametrize(
    ("rank", "num_processes", "keys", "draw"),
    [
        (1, 2, [20, 17, 16, 18, 19, 15, 14, 3, 21, 0, 1, 2, 4, 6, 7, 8], 0.25859724700961184),
        (4, 5, [3, 14, 7, 19, 12, 9, 14, 4, 24, 19, 14, 4, 7, 19, 12, 2], 0.3580176680949253),
    ],
)
def test_the_order_stays_what_it_was_when_earlier_runs_were_made(
    tmp_path, rank, num_processes, keys, draw
):
    paths = make_shards(tmp_path, [5, 9, 8, 4])
    batches = take(iter(make_stream(paths, seed=3, rank=rank, num_processes=num_processes)), 16)
    assert [int(key) for key in keys_of(batches)] == keys
    assert batches[-1]["draw"].item() == draw


def test_a_shuffle_buffer_of_one_keeps_the_order_inside_a_shard(tmp_path):
    (keys,) = epoch_of_reader(make_stream(make_shards(tmp_path, [10, 10]), shuffle_buffer=1))
    assert sorted([keys[:10], keys[10:]]) == [
        [f"{i:05d}" for i in range(10)],
        [f"{i:05d}" for i in range(10, 20)],
    ]


def test_the_draws_of_a_sample_depend_on_its_epoch_and_not_on_who_reads_it(tmp_path):
    paths = make_shards(tmp_path, [6] * 4)

    def draws(epochs, **options):
        stream = make_stream(paths, **options)
        batches = iter(stream)
        pairs = ((batch, epoch_of(stream.state_dict())) for batch in batches)
        found = {}
        for batch, epoch in pairs:
            if epoch == epochs:
                return found
            found[epoch, batch["key"][0]] = batch["draw"].item()

    alone, halves = (
        draws(2),
        [draws(2, rank=r, num_processes=2, shuffle_buffer=3) for r in range(2)],
    )
    assert halves[0] | halves[1] == alone
    assert len(set(alone.values())) == 48


def test_every_batch_is_full_across_epochs(tmp_path):
    batches = take(iter(make_stream(make_shards(tmp_path, [5, 6]), batch_size=4)), 11)
    assert {len(batch["key"]) for batch in batches} == {4}
    assert Counter(key for batch in batches for key in batch["key"]) == {
        f"{i:05d}": 4 for i in range(11)
    }


# resuming


def test_resuming_after_any_batch_continues_exactly(tmp_path):
    paths = make_shards(
        tmp_path, [5, 9, 8], bad={3, 4, 11}
    )  # blocks of 7, epochs of 22, batches of 3
    whole = make_stream(paths, batch_size=3)
    batches, states = iter(whole), [whole.state_dict()]
    expected = []
    for _ in range(24):
        expected.append(next(batches))
        states.append(whole.state_dict())
    assert epoch_of(states[-1]) == 3
    for k in range(20):
        resumed = make_stream(paths, batch_size=3)
        resumed.load_state_dict(states[k])
        same(take(iter(resumed), 4), expected[k : k + 4])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("sizes", [[5, 9, 8], [22]], ids=["more_shards", "fewer_shards"])
def test_a_loader_resumes_exactly_inside_blocks_and_across_blocks_and_epochs(
    tmp_path, num_workers, sizes
):
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


def test_a_compressed_shard_resumes_like_the_plain_one(tmp_path):
    (plain,) = make_shards(tmp_path, [12])
    (tmp_path / "s-000.tar.gz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    stream = make_stream([plain + ".gz"], shuffle_buffer=5)
    expected = take(iter(make_stream([plain], shuffle_buffer=5)), 11)
    same(take(iter(stream), 7), expected[:7])
    resumed = make_stream([plain + ".gz"], shuffle_buffer=5)
    resumed.load_state_dict(stream.state_dict())
    same(take(iter(resumed), 4), expected[7:])


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
    order = [
        key for batch in take(batches, 13) for key in batch["key"]
    ]  # 26 samples: in the third shard
    state, expected = stream.state_dict(), next(batches)
    (tmp_path / f"s-{int(order[0]) // 10:03d}.tar").unlink()
    decoded = []

    def counting(sample, draws):
        decoded.append(sample["__key__"])
        return decode(sample, draws)

    resumed = mixed_stream(one_source(paths, counting), batch_size=2, shuffle_buffer=10)
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
        ({"rank": 1, "num_processes": 2}, "num_processes was 1, is 2"),
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
    same(
        take(iter(pickle.loads(pickle.dumps(make_stream(paths)))), 8),
        take(iter(make_stream(paths)), 8),
    )


# bad samples


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_bad_sample_is_counted_once(tmp_path, num_workers):
    paths = make_shards(tmp_path, [6, 6], bad={1, 2, 8, 10})
    batches = take(iter(build_loader(make_stream(paths, batch_size=4), num_workers)), 12)
    assert set().union(*(batch["skipped"] for batch in batches)) == {"text: missing"}
    usable = sum(len(batch["key"]) for batch in batches)
    counted = sum(batch["skipped"].get("text: missing", 0) for batch in batches)
    assert (
        usable == 48 and abs(counted - 24) <= 4
    )  # 8 usable and 4 bad an epoch; some lie after the last batch


def test_an_epoch_without_a_usable_sample_stops_with_the_counts(tmp_path):
    paths = make_shards(tmp_path, [3], bad={0, 1, 2})
    with pytest.raises(ValueError, match="no usable sample in epoch 0.*text: missing: 3"):
        next(iter(make_stream(paths)))
    with pytest.raises(
        ValueError, match="no usable sample in 1 shards.*text: missing: 3; the first bad: 00000, 0"
    ):
        next(read(paths, batch_size=2))


def test_a_reader_without_samples_stops_and_does_not_hang(tmp_path):
    paths = make_shards(tmp_path, [2])
    with pytest.raises(ValueError, match="reader 2 of 3 found no usable sample"):
        next(iter(make_stream(paths, rank=2, num_processes=3)))


def test_an_error_in_a_worker_reaches_the_training_process(
    tmp_path,
):  # 5 s: torch joins the failed worker so long
    paths = make_shards(tmp_path, [3], bad={0, 1, 2})
    with pytest.raises(ValueError, match="no usable sample"):
        next(iter(build_loader(make_stream(paths), 1)))


def test_one_pass_reads_in_order_with_a_short_last_batch_and_counts_all_bad_samples(tmp_path):
    paths = make_shards(tmp_path, [4, 4], bad={0, 6, 7})
    batches = list(read(paths, batch_size=2))
    assert [batch["key"] for batch in batches] == [
        ["00001", "00002"],
        ["00003", "00004"],
        ["00005"],
    ]
    assert [batch["skipped"] for batch in batches] == [
        {"text: missing": 1},
        {},
        {"text: missing": 2},
    ]
    limited = list(read(paths, batch_size=2, limit=3))
    assert [batch["key"] for batch in limited] == [["00001", "00002"], ["00003"]]


# several sources


def make_sources(folder, sizes, weights, bad=()):
    """Sources "a", "b", ... of shards of these sizes; keys begin with the source's name."""
    sources = []
    for name, shards, weight in zip("abc", sizes, weights, strict=False):
        (folder / name).mkdir()
        paths, number = [], 0
        for size in shards:
            keys = [f"{name}{i:03d}" for i in range(number, number + size)]
            paths.append(str(folder / name / f"{name}{number:03d}.tar"))
            write_shard(
                paths[-1], ({"__key__": key, ("cls" if key in bad else "txt"): "x"} for key in keys)
            )
            number += size
        sources.append(Source(name, tuple(paths), decode, weight))
    return sources


def keys_of(batches):
    return [key for batch in batches for key in batch["key"]]


def reweighted(sources, *weights):
    return [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]


def test_each_sample_of_each_source_once_per_epoch_over_two_ranks_and_two_workers(tmp_path):
    sources = make_sources(
        tmp_path, [[5] * 8, [10, 10]], [3.0, 1.0]
    )  # of "a" whole shards, of "b" every fourth sample
    epochs = {"a": [Counter(), Counter()], "b": [Counter(), Counter()]}
    for rank in range(2):
        batches = take(
            iter(build_loader(mixed_stream(sources, rank=rank, num_processes=2), num_workers=2)),
            140,
        )
        for worker in range(2):
            mine = keys_of(batch for batch in batches if batch["worker"] == worker)
            for name, per_epoch in (("a", 10), ("b", 5)):
                keys = [key for key in mine if key[0] == name]
                assert len(keys) >= 2 * per_epoch
                epochs[name][0].update(keys[:per_epoch])
                epochs[name][1].update(keys[per_epoch : 2 * per_epoch])
    for name, size in (("a", 40), ("b", 20)):
        assert epochs[name] == [Counter(f"{name}{i:03d}" for i in range(size))] * 2


def test_a_source_gives_its_share_of_the_usable_samples(tmp_path):
    bad = {f"a{i:03d}" for i in range(30)}  # 3 of 4
    sources = make_sources(tmp_path, [[20, 20], [15], [9]], [5.0, 3.0, 2.0], bad=bad)
    counts = Counter(
        key[0] for key in keys_of(take(iter(mixed_stream(sources, batch_size=10)), 400))
    )
    assert [round(counts[name] / 4000, 1) for name in "abc"] == [0.5, 0.3, 0.2]
    none = Counter(
        key[0] for key in keys_of(take(iter(mixed_stream(reweighted(sources, 1, 0, 3))), 200))
    )
    assert set(none) == {"a", "c"}


def test_the_mixture_is_the_same_for_the_same_seed_and_another_for_another(tmp_path):
    sources = make_sources(tmp_path, [[9, 9], [9, 9]], [1.0, 1.0])
    first = take(iter(mixed_stream(sources)), 60)
    same(take(iter(mixed_stream(sources)), 60), first)
    other = keys_of(take(iter(mixed_stream(sources, seed=1)), 60))
    assert [key[0] for key in other] != [key[0] for key in keys_of(first)]


def test_the_order_inside_a_source_does_not_depend_on_the_others(tmp_path):
    sources = make_sources(tmp_path, [[9, 9], [9, 9]], [1.0, 1.0])

    def order(*sources):
        keys = keys_of(take(iter(mixed_stream(sources)), 80))
        return [[key for key in keys if key[0] == name] for name in "ab"]

    (a, b), (more_a, less_b), (only_a, _) = (
        order(*sources),
        order(*reweighted(sources, 5, 1)),
        order(sources[0]),
    )
    assert more_a[: len(a)] == a and only_a[: len(a)] == a
    assert b[: len(less_b)] == less_b
    assert [key[1:] for key in b] != [
        key[1:] for key in a[: len(b)]
    ]  # though the two are made alike


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_resumes_exactly_after_any_batch(tmp_path, num_workers):
    sources = make_sources(tmp_path, [[5, 9, 8], [11]], [2.0, 1.0], bad={"a003", "a011", "b004"})
    cut(sources[0].shards[1])

    def loader():
        return build_loader(mixed_stream(sources, batch_size=3), num_workers)

    whole, states, expected = loader(), [], []
    batches = iter(whole)
    for _ in range(30):
        states.append(pickle.loads(pickle.dumps(whole.state_dict())))
        expected.append(next(batches))
    assert {"shard: truncated", "text: missing"} == set().union(
        *(batch["skipped"] for batch in expected)
    )
    for step in range(0, 24, 1 if num_workers == 0 else 7):
        resumed = loader()
        resumed.load_state_dict(states[step])
        same(take(iter(resumed), 6), expected[step : step + 6])


def test_a_mixture_resumes_with_other_weights_where_each_source_stands(tmp_path):
    sources = make_sources(tmp_path, [[9, 9], [9, 9]], [1.0, 1.0])
    stream = mixed_stream(sources)
    seen = keys_of(take(iter(stream), 12))
    resumed = mixed_stream(reweighted(sources, 3, 1))
    resumed.load_state_dict(stream.state_dict())
    seen += keys_of(take(iter(resumed), 40))
    assert Counter(key for key in seen if key[0] == "a")["a000"] >= 1
    for name in "ab":
        keys = [key for key in seen if key[0] == name]
        assert len(set(keys[:18])) == len(keys[:18])
    with pytest.raises(ValueError, match="num_sources was 2, is 1"):
        mixed_stream(sources[:1]).load_state_dict(stream.state_dict())


# shards that break off


def cut(path, damage="cut"):
    """Break a tar: inside its third sample, so that two are left, at its first byte, or wholly."""
    data = bytearray(Path(path).read_bytes())
    third = [end for _, end in scan_shard(path, offset=0, ordinal=0, reader=0, readers=1)][1]
    if damage == "cut":
        Path(path).write_bytes(data[: third + 600])
    elif damage == "overwritten":
        data[third : third + 512] = b"\xff" * 512
        Path(path).write_bytes(data)
    else:
        Path(path).unlink()


@pytest.mark.parametrize(
    ("sizes", "readers"), [([6] * 8, 2), ([12] * 2, 3)], ids=["more_shards", "fewer_shards"]
)
@pytest.mark.parametrize("damage", ["cut", "missing", "overwritten"])
def test_the_rest_of_a_broken_shard_is_one_bad_sample_and_all_else_is_read_once(
    tmp_path, sizes, readers, damage
):
    paths = make_shards(tmp_path, sizes)
    cut(paths[1], damage)
    left = {"cut": 2, "overwritten": 1, "missing": 0}[damage]
    lost = range(sizes[0] + left, 2 * sizes[0])
    seen, skipped = Counter(), Counter()
    for rank in range(readers):
        stream = make_stream(paths, rank=rank, num_processes=readers, shuffle_buffer=5)
        batches = iter(stream)
        batch = next(batches)
        while epoch_of(stream.state_dict()) < 3:
            seen.update(batch["key"])
            skipped.update(batch["skipped"])
            batch = next(batches)
        skipped.update(
            batch["skipped"]
        )  # what was skipped behind the last usable sample of its epoch
    assert seen == {f"{i:05d}": 3 for i in range(sum(sizes)) if i not in lost}
    reason = "shard: truncated" if damage == "cut" else "shard: unreadable"
    # in each epoch, and perhaps at the start of the fourth
    assert set(skipped) == {reason} and 3 <= skipped.total() <= 4


def test_a_reader_whose_only_shard_is_lost_goes_on_in_the_next_epoch(tmp_path):
    paths = make_shards(tmp_path, [3, 3])
    Path(paths[0]).unlink()
    for rank in range(2):
        keys = keys_of(take(iter(make_stream(paths, rank=rank, num_processes=2)), 6))
        assert set(keys) == {"00003", "00004", "00005"}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sizes", [[5, 9, 8], [22]], ids=["more_shards", "fewer_shards"])
def test_a_stream_with_a_broken_shard_resumes_exactly(tmp_path, num_workers, sizes):
    paths = make_shards(tmp_path, sizes, bad={3})
    cut(paths[len(paths) // 2])

    def loader():
        return build_loader(make_stream(paths, batch_size=2), num_workers)

    whole, states, expected = loader(), [], []
    batches = iter(whole)
    for _ in range(24):
        states.append(whole.state_dict())
        expected.append(next(batches))
    assert sum(batch["skipped"].get("shard: truncated", 0) for batch in expected) >= 2
    for step in range(0, 20, 1 if num_workers == 0 else 6):
        resumed = loader()
        resumed.load_state_dict(states[step])
        same(take(iter(resumed), 4), expected[step : step + 4])


def test_one_pass_goes_on_behind_a_broken_shard(tmp_path):
    paths = make_shards(tmp_path, [4, 4, 4])
    cut(paths[1])
    (batch,) = read(paths, batch_size=20)
    assert batch["key"] == [f"{i:05d}" for i in (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)]
    assert batch["skipped"] == {"shard: truncated": 1}


def test_a_stream_of_shards_that_all_cannot_be_read_stops_naming_one(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no usable sample in epoch 9.*shard: unreadable: 10; .*x.tar: No such file",
    ):
        next(iter(make_stream([str(tmp_path / "x.tar")])))


# too many bad samples


def share_stream(tmp_path, bad, max_bad_share, reason="text: missing"):
    """200 samples in order, of which those in `bad` are skipped for a reason."""

    def decode_or_skip(sample, draws):
        if int(sample["__key__"]) in bad:
            raise BadSample(reason)
        return decode(sample, draws)

    paths = make_shards(tmp_path, [200])
    return mixed_stream(
        one_source(paths, decode_or_skip), shuffle_buffer=1, max_bad_share=max_bad_share
    )


def test_more_bad_samples_than_allowed_stop_the_run_with_counts_and_keys(tmp_path):
    message = (
        r"reader 0 of 1: 6 of the last 100 samples are bad, more than max_bad_share = 0.05 allows "
        r"\(text: missing: 6\); the first: 00003, 00005, 00020, 00030, 00050\."
    )
    with pytest.raises(ValueError, match=message):
        take(iter(share_stream(tmp_path, {3, 5, 20, 30, 50, 70}, 0.05)), 150)


def test_as_many_bad_samples_as_allowed_do_not_stop_it(tmp_path):
    take(iter(share_stream(tmp_path, {3, 5, 20, 30, 50}, 0.05)), 400)


def test_filtered_samples_are_not_bad_and_a_share_of_one_never_stops(tmp_path):
    most = set(range(200)) - {7}
    take(iter(share_stream(tmp_path, most, 0.05, reason="filter: min_longer_side")), 2)
    take(iter(share_stream(tmp_path, most, 1.0)), 2)
    with pytest.raises(ValueError, match="99 of the last 100 samples are bad"):
        take(iter(share_stream(tmp_path, most, 0.9)), 2)


def test_only_the_recent_samples_count(tmp_path):
    counter = SampleCounter(0.05, "reader")
    for i in range(5):
        counter.skip(str(i), "x")
    for _ in range(3):
        for _ in range(980):
            counter.usable()
        for i in range(40):
            counter.skip(str(i), "x")
    with pytest.raises(ValueError, match="51 of the last 1000"):
        for i in range(12):
            counter.skip(str(i), "x")


def test_reading_in_order_stops_at_too_many_bad_samples_too(tmp_path):
    paths = make_shards(tmp_path, [200], bad=set(range(0, 200, 10)))
    with pytest.raises(ValueError, match="10 of the last 100 samples are bad.*text: missing"):
        list(read(paths, batch_size=5, max_bad_share=0.05))
    assert sum(len(batch["key"]) for batch in read(paths, batch_size=5, max_bad_share=0.2)) == 180


def test_what_stops_a_worker_reads_as_in_the_same_process(
    tmp_path,
):  # 5 s: torch joins the failed worker so long
    paths = make_shards(tmp_path, [200], bad=set(range(0, 200, 10)))
    with pytest.raises(
        ValueError, match=r"^reader 0 of 1: 10 of the last 100 .* \(1 never stops\)$"
    ):
        take(iter(build_loader(make_stream(paths, shuffle_buffer=1, max_bad_share=0.05), 1)), 150)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"seed": -1}, {"rank": 1}, {"rank": -1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        make_stream(["a.tar"], **options)


# Another number of readers


@pytest.mark.parametrize("sizes", [[20] * 6, [50]])  # more and fewer shards than readers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_with_other_readers_the_next_epoch_begins_and_is_seen_once(tmp_path, sizes, num_workers):
    paths, total = make_shards(tmp_path, sizes), sum(sizes)
    loaders = [
        build_loader(make_stream(paths, rank=rank, num_processes=2), num_workers)
        for rank in range(2)
    ]
    for loader, count in zip(loaders, (3, 7), strict=True):
        batches = iter(loader)
        for _ in range(count):
            next(batches)
    alone = build_loader(make_stream(paths), num_workers)
    assert alone.start_next_epoch([loader.state_dict() for loader in loaders]) == [1]
    batches = iter(alone)
    keys = [next(batches)["key"][0] for _ in range(total)]
    assert len(set(keys)) == total
    undisturbed = iter(build_loader(make_stream(paths), num_workers))
    two_epochs = [next(undisturbed)["key"][0] for _ in range(2 * total)]
    assert keys == two_epochs[total:]


def test_after_such_a_start_the_position_is_saved_and_restored_as_ever(tmp_path):
    paths = make_shards(tmp_path, [20] * 4)
    first, second = (build_loader(make_stream(paths), 0) for _ in range(2))
    first.start_next_epoch(
        [build_loader(make_stream(paths, rank=1, num_processes=2), 0).state_dict()]
    )
    batches = iter(first)
    for _ in range(5):
        next(batches)
    second.load_state_dict(first.state_dict())
    again = iter(second)
    assert [next(batches)["key"] for _ in range(90)] == [next(again)["key"] for _ in range(90)]


def test_states_of_other_data_do_not_set_the_epoch(tmp_path):
    paths = make_shards(tmp_path, [4, 4])
    other = build_loader(make_stream(paths[:1], rank=1, num_processes=2), 0)
    with pytest.raises(ValueError, match="num_shards was 1, is 2"):
        build_loader(make_stream(paths), 0).start_next_epoch([other.state_dict()])
