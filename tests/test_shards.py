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
from data.storage import open_shard
from data.tar import scan_tar, write_shard


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


def make_shards(folder, sizes, bad=(), name="s", key="{:05d}"):
    """Paths of one shard per size, samples numbered through; those in `bad` have no text."""
    paths, number = [], 0
    for index, size in enumerate(sizes):
        numbers = range(number, number + size)
        extensions = {i: "cls" if i in bad else "txt" for i in numbers}
        samples = [{"__key__": key.format(i), extensions[i]: f"sample {i}"} for i in numbers]
        paths.append(str(folder / f"{name}-{index:03d}.tar"))
        write_shard(paths[-1], samples)
        number += size
    return paths


def make_sources(folder, sizes, weights, bad=()):
    """Sources "a", "b", ... of shards of these sizes; keys begin with the source's name."""
    return [
        Source(name, tuple(make_shards(folder, each, bad, name, name + "{:03d}")), decode, weight)
        for name, each, weight in zip("abc", sizes, weights, strict=False)
    ]


def make_stream(
    paths, batch_size=1, seed=0, rank=0, num_processes=1, shuffle_buffer=7, max_bad_share=1.0
):
    """Of paths, or of sources."""
    sources = [Source("", tuple(paths), decode)] if isinstance(paths[0], str) else paths
    return ShardStream(
        sources, collate, batch_size, seed, rank, num_processes, shuffle_buffer, max_bad_share
    )


def make_loader(paths, num_workers=0, **options):
    return build_loader(make_stream(paths, **options), num_workers)


def read(paths, batch_size, max_bad_share=1.0, limit=None):
    counter = SampleCounter(max_bad_share, "reading in order")
    return read_batches([Source("", tuple(paths), decode)], collate, batch_size, counter, limit)


def epoch_of(state):
    return state["positions"][0]["epoch"]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def first(stream, count):
    return take(iter(stream), count)


def keys_of(batches):
    return [key for batch in batches for key in batch["key"]]


def numbered(count):
    return [f"{i:05d}" for i in range(count)]


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
        assert (a["key"], a["skipped"]) == (b["key"], b["skipped"])
        assert torch.equal(a["draw"], b["draw"])


def cut(path, damage="cut"):
    """Break a tar: inside its third sample, so that two are left, at its first byte, or wholly."""
    data = Path(path).read_bytes()
    with open_shard(path) as file:
        third = [end for _, _, end in scan_tar(file, path)][1]
    Path(path).unlink()
    if damage == "cut":
        Path(path).write_bytes(data[: third + 600])
    elif damage == "overwritten":
        Path(path).write_bytes(data[:third] + b"\xff" * 512 + data[third + 512 :])


# who reads what, in which order


@pytest.mark.parametrize(
    ("sizes", "count"),
    [([[5] * 8], 40), ([[20] * 2], 40), ([[40]], 40), ([[5] * 8, [10, 10]], 140)],
    ids=["more", "fewer", "one", "mixture"],
)
def test_each_sample_once_per_epoch_over_two_ranks_and_two_workers(tmp_path, sizes, count):
    sources = make_sources(tmp_path, sizes, [3.0, 1.0])
    found = {name: [Counter(), Counter()] for name in "ab"[: len(sizes)]}
    for rank in range(2):
        batches = first(make_loader(sources, 2, rank=rank, num_processes=2), count)
        assert {batch["threads"] for batch in batches} == {1}
        for worker in range(2):
            mine = keys_of(batch for batch in batches if batch["worker"] == worker)
            for (name, epochs), size in zip(found.items(), map(sum, sizes), strict=True):
                keys, share = [key for key in mine if key[0] == name], size // 4
                assert len(keys) >= 2 * share
                epochs[0].update(keys[:share])
                epochs[1].update(keys[share : 2 * share])
    for (name, epochs), size in zip(found.items(), map(sum, sizes), strict=True):
        assert epochs == [Counter(f"{name}{i:03d}" for i in range(size))] * 2


def test_the_order_changes_with_epoch_and_seed_and_is_the_same_for_the_same_seed(tmp_path):
    paths = make_shards(tmp_path, [10] * 3)
    one, two = epoch_of_reader(make_stream(paths), epochs=2)
    assert one != two and sorted(one) == sorted(two)
    assert epoch_of_reader(make_stream(paths), epochs=2) == [one, two]
    assert epoch_of_reader(make_stream(paths, seed=1))[0] != one
    # a buffer of one keeps the order inside a shard
    (keys,) = epoch_of_reader(make_stream(paths, shuffle_buffer=1))
    shards = [numbered(30)[begin : begin + 10] for begin in (0, 10, 20)]
    assert sorted(keys[begin : begin + 10] for begin in (0, 10, 20)) == shards


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
    batches = first(make_stream(paths, seed=3, rank=rank, num_processes=num_processes), 16)
    assert [int(key) for key in keys_of(batches)] == keys
    assert batches[-1]["draw"].item() == draw


def test_the_draws_of_a_sample_depend_on_its_epoch_and_not_on_who_reads_it(tmp_path):
    paths = make_shards(tmp_path, [6] * 4)

    def draws(**options):
        stream, found = make_stream(paths, **options), {}
        for batch in stream:
            if epoch_of(stream.state_dict()) == 2:
                return found
            found[epoch_of(stream.state_dict()), batch["key"][0]] = batch["draw"].item()

    alone = draws()
    halves = [draws(rank=rank, num_processes=2, shuffle_buffer=3) for rank in range(2)]
    assert halves[0] | halves[1] == alone
    assert len(set(alone.values())) == 48


def test_every_batch_is_full_across_epochs(tmp_path):
    batches = first(make_stream(make_shards(tmp_path, [5, 6]), batch_size=4), 11)
    assert {len(batch["key"]) for batch in batches} == {4}
    assert Counter(keys_of(batches)) == dict.fromkeys(numbered(11), 4)


# resuming


def streams(folder, kind):
    """What is read of a kind of data: paths or sources."""
    if "mixture" in kind:
        sources = make_sources(folder, [[5, 9, 8], [11]], [2.0, 1.0], bad={3, 11})
        cut(sources[0].shards[1])
        return sources
    paths = make_shards(folder, [22] if "fewer" in kind else [5, 9, 8], bad={3, 4, 11})
    if "broken" in kind:
        cut(paths[len(paths) // 2])
    if "packed" in kind:
        Path(f"{paths[0]}.gz").write_bytes(gzip.compress(Path(paths[0]).read_bytes()))
        return [f"{paths[0]}.gz"]
    return paths


@pytest.mark.parametrize(
    ("kind", "num_workers", "reasons"),
    [
        ("more, broken", 2, {"text: missing", "shard: truncated"}),
        ("fewer", 2, {"text: missing"}),
        ("fewer, packed", 0, {"text: missing"}),
        ("fewer, broken", 0, {"shard: truncated"}),
        ("mixture, broken", 0, {"text: missing", "shard: truncated"}),
        ("mixture, broken", 2, {"text: missing", "shard: truncated"}),
    ],
)
def test_resuming_after_any_batch_continues_exactly(tmp_path, kind, num_workers, reasons):
    # inside blocks of 7, across blocks, sources and epochs
    data = streams(tmp_path, kind)
    whole, states, expected = make_loader(data, num_workers, batch_size=3), [], []
    batches = iter(whole)
    for _ in range(26):
        states.append(pickle.loads(pickle.dumps(whole.state_dict())))
        expected.append(next(batches))
    assert set().union(*(batch["skipped"] for batch in expected)) == reasons
    for step in range(20) if num_workers == 0 else (1, 7, 14):
        resumed = make_loader(data, num_workers, batch_size=3)
        resumed.load_state_dict(states[step])
        same(first(resumed, 2), expected[step : step + 2])
        # again, from where the resumed one stands
        again = make_loader(data, num_workers, batch_size=3)
        again.load_state_dict(resumed.state_dict())
        same(first(again, 4), expected[step + 2 : step + 6])
    same(first(again, 1), expected[:1])  # a second iter() is a fresh start


def test_resuming_decodes_nothing_that_it_skips_and_reads_no_shard_before_its_block(tmp_path):
    paths = make_shards(tmp_path, [10] * 4)
    stream = make_stream(paths, batch_size=2, shuffle_buffer=10)
    batches = iter(stream)
    order = keys_of(take(batches, 13))  # 26 samples: in the third shard
    state, expected = stream.state_dict(), next(batches)
    Path(paths[int(order[0]) // 10]).unlink()
    decoded = []

    def counting(sample, draws):
        decoded.append(sample["__key__"])
        return decode(sample, draws)

    source = Source("", tuple(paths), counting)
    resumed = make_stream([source], batch_size=2, shuffle_buffer=10)
    resumed.load_state_dict(state)
    same(first(resumed, 1), [expected])
    assert decoded == expected["key"]


def test_other_settings_are_refused_and_moved_shards_are_not(tmp_path):
    paths = make_shards(tmp_path, [5, 9])
    loader = make_loader(paths, batch_size=3)
    first(loader, 1)
    state = loader.state_dict()
    moved = ["moved/" + Path(path).name for path in paths]
    make_loader(moved, batch_size=3).load_state_dict(state)
    for text, options in {
        "seed was 0, is 1": {"seed": 1},
        "batch_size was 3, is 4": {"batch_size": 4},
        "shuffle_buffer was 7, is 8": {"shuffle_buffer": 8},
        "rank was 0, is 1; num_processes was 1, is 2": {"rank": 1, "num_processes": 2},
        "num_workers was 0, is 2": {"num_workers": 2},
        "num_shards was 2, is 1": {"paths": paths[:1]},
        "shard_names_crc32": {"paths": paths[::-1]},
        "num_sources was 1, is 2": {"paths": make_sources(tmp_path, [[5], [9]], [1.0, 1.0])},
    }.items():
        other = make_loader(**{"paths": paths, "batch_size": 3, **options})
        with pytest.raises(ValueError, match=text):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match="does not fit"):
            other.load_state_dict({"something": "else"})


def test_a_stream_can_be_pickled_and_its_loader_leaves_the_global_generator_alone(tmp_path):
    paths = make_shards(tmp_path, [8])
    before = torch.get_rng_state()
    expected = first(make_loader(paths), 8)
    assert torch.equal(torch.get_rng_state(), before)
    same(first(pickle.loads(pickle.dumps(make_stream(paths))), 8), expected)


# another number of readers


# More and fewer shards than readers.
@pytest.mark.parametrize(("sizes", "num_workers"), [([20] * 6, 2), ([50], 0)])
def test_with_other_readers_the_next_epoch_begins_and_is_seen_once(tmp_path, sizes, num_workers):
    paths, total = make_shards(tmp_path, sizes), sum(sizes)
    loaders = [make_loader(paths, num_workers, rank=rank, num_processes=2) for rank in range(2)]
    for loader, count in zip(loaders, (3, 7), strict=True):
        first(loader, count)
    states = [loader.state_dict() for loader in loaders]
    alone = make_loader(paths, num_workers)
    assert alone.start_next_epoch(states) == [1]
    batches = iter(alone)
    keys = keys_of(take(batches, total))
    assert len(set(keys)) == total
    assert keys == keys_of(first(make_loader(paths, num_workers), 2 * total))[total:]
    # the position is saved and restored as ever
    resumed = make_loader(paths, num_workers)
    resumed.load_state_dict(alone.state_dict())
    same(first(resumed, 20), take(batches, 20))
    # states of other data do not set the epoch
    with pytest.raises(ValueError, match="num_shards was"):
        make_loader([*paths, *make_shards(tmp_path, [4], name="t")]).start_next_epoch(states)


# several sources


def reweighted(sources, *weights):
    return [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]


def test_a_source_gives_its_share_of_the_usable_samples(tmp_path):
    # of the first one, 3 of 4 are bad
    sources = make_sources(tmp_path, [[20, 20], [9], [9]], [5.0, 3.0, 2.0], bad=range(10, 40))

    def counts(sources, count):
        names = [key[0] for key in keys_of(first(make_stream(sources, batch_size=10), count))]
        return [names.count(name) for name in "abc"]

    assert [round(count / 4000, 1) for count in counts(sources, 400)] == [0.5, 0.3, 0.2]
    assert [count > 0 for count in counts(reweighted(sources, 1, 0, 3), 20)] == [True, False, True]


def test_the_order_inside_a_source_does_not_depend_on_the_others(tmp_path):
    sources = make_sources(tmp_path, [[9, 9], [9, 9]], [1.0, 1.0])

    def order(*sources):
        keys = keys_of(first(make_stream(sources), 80))
        return [[key for key in keys if key[0] == name] for name in "ab"]

    a, b = order(*sources)
    more_a, less_b = order(*reweighted(sources, 5, 1))
    assert more_a[: len(a)] == a and order(sources[0])[0][: len(a)] == a
    assert b[: len(less_b)] == less_b
    assert [key[1:] for key in b] != [key[1:] for key in a[: len(b)]]  # though made alike
    # the mixture itself: the same for the same seed, another for another
    sequences = [keys_of(first(make_stream(sources, seed=seed), 60)) for seed in (0, 0, 1)]
    assert sequences[0] == sequences[1]
    assert [key[0] for key in sequences[0]] != [key[0] for key in sequences[2]]


def test_a_mixture_resumes_with_other_weights_where_each_source_stands(tmp_path):
    sources = make_sources(tmp_path, [[9, 9], [9, 9]], [1.0, 1.0])
    stream = make_stream(sources)
    seen = keys_of(first(stream, 12))
    resumed = make_stream(reweighted(sources, 3, 1))
    resumed.load_state_dict(stream.state_dict())
    seen += keys_of(first(resumed, 40))
    for name, whole_epoch in (("a", True), ("b", False)):
        keys = [key for key in seen if key[0] == name][:18]
        assert len(set(keys)) == len(keys) and (len(keys) == 18 or not whole_epoch)


# shards that break off, bad samples


@pytest.mark.parametrize(("sizes", "readers"), [([3, 9, 4, 12, 2], 2), ([12, 8], 3)])
@pytest.mark.parametrize("damage", ["cut", "missing", "overwritten"])
def test_the_rest_of_a_broken_shard_is_one_bad_sample_and_all_else_is_read_once(
    tmp_path, sizes, readers, damage
):
    paths = make_shards(tmp_path, sizes, bad={0})
    cut(paths[1], damage)
    left = {"cut": 2, "overwritten": 1, "missing": 0}[damage]
    lost = numbered(sum(sizes[:2]))[sizes[0] + left :]
    seen, skipped = Counter(), Counter()
    for rank in range(readers):
        stream = make_stream(paths, rank=rank, num_processes=readers, shuffle_buffer=5)
        for batch in stream:
            skipped.update(batch["skipped"])  # also behind the last usable sample of its epoch
            if epoch_of(stream.state_dict()) == 3:
                break
            seen.update(batch["key"])
    assert seen == {key: 3 for key in numbered(sum(sizes))[1:] if key not in lost}
    reason = "shard: truncated" if damage == "cut" else "shard: unreadable"
    # in each epoch, and perhaps at the start of the fourth
    assert set(skipped) == {reason, "text: missing"} and {*skipped.values()} <= {3, 4}


def test_a_reader_whose_only_shard_is_lost_goes_on_in_the_next_epoch(tmp_path):
    paths = make_shards(tmp_path, [3, 3])
    Path(paths[0]).unlink()
    for rank in range(2):
        keys = keys_of(first(make_stream(paths, rank=rank, num_processes=2), 6))
        assert set(keys) == {"00003", "00004", "00005"}


def test_one_pass_reads_in_order_with_a_short_last_batch_and_counts_all_bad_samples(tmp_path):
    paths = make_shards(tmp_path, [4, 4, 4], bad={0, 6, 7})
    cut(paths[2])
    batches = list(read(paths, batch_size=2))
    expected = [["00001", "00002"], ["00003", "00004"], ["00005", "00008"], ["00009"]]
    assert [batch["key"] for batch in batches] == expected
    skipped = [{"text: missing": 1}, {}, {"text: missing": 2}, {"shard: truncated": 1}]
    assert [batch["skipped"] for batch in batches] == skipped
    limited = read(paths, batch_size=2, limit=3)
    assert [batch["key"] for batch in limited] == [["00001", "00002"], ["00003"]]


def test_an_epoch_without_a_usable_sample_stops_with_counts_and_the_first_case(tmp_path):
    paths = make_shards(tmp_path, [3], bad={0, 1, 2})
    case = r".*text: missing: 3, first 00000 \(members cls\)"
    with pytest.raises(ValueError, match=f"^reader 0 of 1 found no usable .* epoch 0{case}"):
        first(make_loader(paths), 1)
    with pytest.raises(ValueError, match=f"no usable sample in 1 shards{case}"):
        next(read(paths, batch_size=2))
    with pytest.raises(ValueError, match=r"epoch 9.*shard: unreadable: 10, .*x.tar: No such file"):
        first(make_stream([str(tmp_path / "x.tar")]), 1)
    with pytest.raises(ValueError, match="reader 2 of 3 found no usable sample"):
        first(make_stream(make_shards(tmp_path, [2]), rank=2, num_processes=3), 1)


@pytest.mark.parametrize("num_workers", [None, 1])  # in order, in a worker
def test_whoever_reads_stops_at_too_many_bad_samples_with_the_same_words(tmp_path, num_workers):
    paths = make_shards(tmp_path, [200], bad=range(0, 200, 10))
    named = ", ".join(f"{i:05d}" for i in range(0, 50, 10))
    message = rf"^\w+ \w+ \w+.*: 10 of the last 100 .*text: missing: 10, first 00000 .*: {named}\. "
    batches = read(paths, batch_size=5, max_bad_share=0.05)
    if num_workers:
        batches = iter(make_loader(paths, num_workers, shuffle_buffer=1, max_bad_share=0.05))
    with pytest.raises(ValueError, match=message):
        take(batches, 150)
    assert len(keys_of(read(paths, batch_size=5, max_bad_share=0.2))) == 180


def count(bad, max_bad_share, reason="text: missing", total=150):
    """A counter that has seen `total` samples; those in `bad` were skipped for a reason."""
    counter = SampleCounter(max_bad_share, "reader 0 of 1")
    for i in range(total):
        counter.skip(f"{i:05d}", reason, "members cls") if i in bad else counter.usable()
    return counter


def test_as_many_as_allowed_and_filtered_ones_do_not_stop_it_and_a_share_of_one_never_stops():
    most = set(range(200)) - {7}
    for counter, number in (
        (count({3, 5, 20, 30, 50}, 0.05), 5),
        (count(most, 1.0), 149),
        (count(most, 0.05, "filter: min_longer_side"), 149),
    ):
        told = counter.tell()
        (reason,) = counter.first
        assert told["skipped"] == {reason: number} and told["first_skipped"] == counter.first
        assert counter.first[reason] in ("00003 (members cls)", "00000 (members cls)")
        counter.skip("later", reason)
        assert counter.tell() == {"skipped": {reason: 1}} and counter.tell() == {"skipped": {}}


def test_only_the_recent_samples_count():
    counter = count(range(5), 0.05, total=5)
    for _ in range(3):
        for _ in range(980):
            counter.usable()
        for _ in range(40):
            counter.skip("x", "x")
    with pytest.raises(ValueError, match="51 of the last 1000"):
        for _ in range(12):
            counter.skip("x", "x")
