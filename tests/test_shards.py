"""data/shards.py: who reads which sample, the order and the position of the stream."""

import gzip
import pickle
from collections import Counter

import pytest
import torch

from data.shards import BadSample, ShardStream, build_loader, read_batches
from data.tar import write_shard

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
