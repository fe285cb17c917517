"""scripts/benchmark.py: what it measures and counts; the times themselves are not tested."""

import platform
from functools import partial

import pytest
import torch
import yaml
from tiny_experiment import Experiment

from modeling.discriminator import Discriminator
from scripts import benchmark
from scripts.workload import steps
from scripts.workload.fake import measure_step
from scripts.workload.sizes import read_stage

WAYS = {
    "train": {"train"},
    "sample": {"text", "projector", "flow", "flow_of_one", "decode"},
    "encode": {"encode"},
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "MM_SIZES", {"cpu": (16, 32)})
    monkeypatch.setattr(benchmark, "MM_SECONDS", 0.001)
    monkeypatch.setattr(benchmark, "PHOTOS", 32)
    monkeypatch.setattr(benchmark, "TOKENS", 300)
    monkeypatch.setattr(steps, "Discriminator", partial(Discriminator, width=32))


def measure(capsys, *words):
    benchmark.main(benchmark.parse_args([*words, "--seconds=0.01", "--rounds=2"]))
    return yaml.safe_load(capsys.readouterr().out)["measures"]


@pytest.mark.parametrize(
    ("part", "stage", "overrides"),
    [
        ("train", "flowtok", ["--text-tower"]),
        ("train", "text_projector", []),
        ("train", "text_decoder", []),
        ("train", "tokenizer", ["adversarial={weight: 0.1, start_step: 0}"]),
        ("sample", "flowtok", []),
        ("encode", "tokens", ["precision=bf16"]),
    ],
)
def test_a_part_gives_rates_and_shares(tmp_path, capsys, part, stage, overrides):
    file = Experiment(tmp_path, tmp_path / "nowhere").config_file(stage)
    found = measure(capsys, part, f"--config={file}", "--batch-size=3", *overrides)
    assert found.keys() == WAYS[part]
    if "--text-tower" in overrides:  # the step that the planner counts
        planned = measure_step(read_stage(file), 1, 3).flops / 1e9
        assert found["train"]["gflop_per_sample"] == pytest.approx(planned, rel=1e-3)
    for row in found.values():
        assert row["gflop_per_sample"] > 0
        for name in ("samples_per_second", "share_of_mm"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_readers_read_made_up_shards(capsys):
    assert measure(capsys, "readers").keys() == {"photos", "tokens"}


@pytest.mark.parametrize("text", ["processor : 0\nFeatures : fp\n", ""])  # ARM's, none on macOS
def test_a_processor_without_a_name_is_called_by_its_kind(tmp_path, monkeypatch, text):
    file = tmp_path / "cpuinfo"
    if text:
        file.write_text(text)
    monkeypatch.setattr(benchmark, "Path", lambda _: file)
    assert benchmark.describe_machine()["cpu"] == platform.machine()


def test_a_share_is_that_of_the_rate_beside_it(monkeypatch):
    rates, times = iter([4e9, 1e9, 2e9]), iter([1.0, 4.0, 8.0])
    monkeypatch.setattr(benchmark, "mm_rate", lambda device, dtype: next(rates))
    monkeypatch.setattr(benchmark, "seconds_per_call", lambda call, device, seconds: next(times))
    one_gflop = {"gflop_per_sample": 1.0}
    monkeypatch.setattr(benchmark, "first_calls", lambda way, device: dict(one_gflop))
    way = benchmark.Way(lambda: None, samples=2)
    args = benchmark.parse_args(["readers", "--rounds=3"])
    row = benchmark.time_ways({"x": way}, torch.device("cpu"), "fp32", args)["x"]
    assert row["share_of_mm"] == {"median": 0.5, "low": 0.125, "high": 0.5}
    assert row["samples_per_second"] == {"median": 0.5, "low": 0.25, "high": 2.0}
