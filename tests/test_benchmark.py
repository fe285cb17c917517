"""scripts/benchmark.py: it measures what it says; the times themselves are not tested."""

import json

import pytest
from tiny_experiment import Experiment

from scripts import benchmark, benchmark_readers


def run(capsys, *words):
    benchmark.main(benchmark.parse_args([*map(str, words)]))
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["text_encoder", "tokenizer", "text_projector", "flowtok"])
def test_the_reader_of_every_stage_that_trains_is_measured(chain, capsys, stage):
    words = ["data", chain.config_file(stage), "--seconds", 0.1, "--consume", 400, "--json"]
    result = json.loads(run(capsys, *words))
    assert result["samples_per_second"] > 0 and result["megabytes_per_second"] > 0
    assert result["batch_size"] == 8 and result["num_workers"] == 0
    assert 0 < result["wait_share"] < 1


def test_a_slow_consumer_waits_little_and_a_fast_one_long():
    class Slow:
        def __iter__(self):
            import time

            while True:
                time.sleep(0.01)
                yield {}

    fast = benchmark.measure(Slow(), 0.3, consume=1e6, batch_size=10)
    slow = benchmark.measure(Slow(), 0.3, consume=100, batch_size=10)
    assert fast["wait_share"] > 0.9 > 0.5 > slow["wait_share"]
    assert slow["samples_per_second"] < 100 < fast["samples_per_second"]


def test_a_small_tower_that_is_not_trained_yet_is_no_obstacle(tmp_path, tiny_shards, capsys):
    experiment = Experiment(tmp_path, tiny_shards)
    assert "samples/s with 0 workers" in run(
        capsys, "data", experiment.config_file("tokenizer"), "--seconds", 0.1
    )


def test_a_stage_that_does_not_train_is_refused(chain):
    with pytest.raises(ValueError, match="stage 'report' has no training reader"):
        benchmark.main(benchmark.parse_args(["data", str(chain.config_file("report"))]))


def test_the_readers_are_compared_on_equal_work(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_readers, "CONTENTS", {"photo-like": 1.0})
    monkeypatch.setattr(benchmark_readers, "SAMPLES", 300)
    monkeypatch.setattr(benchmark_readers, "SAMPLES_PER_SHARD", 100)
    images = benchmark_readers.compare_images(rounds=1, count=2)
    assert images["photo-like"]["mean_difference_255ths"] < 1.5
    monkeypatch.setattr(benchmark_readers, "compare_images", lambda: images)
    output = run(capsys, "readers")
    assert (
        "photos, photo-like: " in output and "tokens: " in output and "times webdataset's" in output
    )
