"""scripts/benchmark.py train, sample, tokenizer, text, growth and all: what they measure; the times are not tested."""

import json
import math
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_launch import MALLOC
from tiny_experiment import Experiment, reset_accelerate

from configs.load import load_config
from scripts import benchmark, benchmark_growth, benchmark_report, benchmark_timing
from scripts.benchmark_flops import forward_gflop, training_gflop, transport_gflop, velocity_gflop
from scripts.benchmark_growth import Point
from scripts.benchmark_timing import Memory, Parts, alternate, spread
from scripts.benchmark_training import build_step
from scripts.plan_stages import find_sizes
from training.run import start_run

CPU = torch.device("cpu")
SHORT = ["--seconds", "0.01", "--repeats", "2"]
SHIPPED = "configs/flowtok_b/flowtok.yaml"


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(benchmark_timing, "MM_SIZES", {"cpu": (16, 32)})
    monkeypatch.setattr(benchmark_timing, "MM_SECONDS", 0.001)
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture
def stage(tmp_path, tiny_clip_dir):
    """Stage -> the arguments that name its tiny config; no stage has run."""
    experiment = Experiment(tmp_path, tmp_path / "nowhere")
    tower = f"text_encoder.model=local-dir:{tiny_clip_dir}"
    return lambda name: ["--config", str(experiment.config_file(name)), tower]


def run(capsys, *words):
    benchmark.main(benchmark.parse_args([*words]))
    return capsys.readouterr().out


def result_of(capsys, *words):
    return json.loads(run(capsys, *words, *SHORT, "--json"))


def check_figures(row):
    for name in ("samples_per_second", "seconds_per_sample", "share", "peak_gflop_per_second"):
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"] < math.inf
    assert row["gflop_per_sample"] > 0
    assert row["samples_per_second"]["low"] == pytest.approx(1 / row["seconds_per_sample"]["high"])


# Parts


def test_train_gives_rates_shares_memory_and_parts_of_stage_3_and_of_its_plain_way(stage, capsys):
    words = ["--batch-size", "4", "--baseline", *stage("flowtok"), "training.max_gradient_norm=2"]
    result = result_of(capsys, "train", *words)
    assert result["batch_size"] == 4 and result["precision"] == "fp32"
    assert result["measures"].keys() == {"train", "plain_train"}
    for row in result["measures"].values():
        check_figures(row)
    assert result["measures"]["plain_train"]["times_as_long"]["median"] > 0
    parts = result["seconds_by_part"]["train"]
    names = [
        "data",
        "text",
        "projector_forward",
        "flow_forward",
        "backward",
        "optimizer",
        "ema",
        "other",
    ]
    assert sorted(parts) == sorted(names) and all(seconds > 0 for seconds in parts.values())
    assert (
        result["peak_memory_gib"] >= 0
        and result["machine"]["torch"] == torch.__version__
        and result["date"]
    )
    assert "--batch-size 4" in result["command"] and result["command"].endswith(
        "training.max_gradient_norm=2"
    )
    assert benchmark.parse_args(
        ["train", *result["command"].split()[3:]]
    ).baseline  # it can be given again


def test_train_runs_the_text_tower_if_asked(stage, capsys):
    plain = result_of(capsys, "train", *stage("flowtok"))["measures"]["train"]["gflop_per_sample"]
    reset_accelerate()
    with_tower = result_of(capsys, "train", "--text-tower", *stage("flowtok"))["measures"]["train"]
    assert with_tower["gflop_per_sample"] > plain


def test_train_measures_stage_2_as_well(stage, capsys):
    check_figures(result_of(capsys, "train", *stage("text_projector"))["measures"]["train"])


def test_tokenizer_gives_encoding_decoding_and_training_with_all_losses(stage, capsys):
    game = [
        "adversarial.weight=0.1",
        "adversarial.start_step=0",
        "discriminator.hidden_channels=32",
    ]
    game += [
        "discriminator.num_stages=1",
        "losses.perceptual_weight=1.1",
        "perceptual.convnext_weight=0",
    ]
    words = ["--batch-size", "2", *stage("tokenizer"), *game]
    result = result_of(capsys, "tokenizer", *words)
    assert result["measures"].keys() == {"encode", "decode", "train"}
    for row in result["measures"].values():
        check_figures(row)
    parts = result["seconds_by_part"]["train"]
    assert {
        "text",
        "encoder_forward",
        "perceptual_forward",
        "discriminator_optimizer",
    } < parts.keys()


def test_sample_gives_the_flow_its_latency_the_decoder_and_the_plain_way(stage, capsys):
    result = result_of(
        capsys, "sample", "--batch-size", "3", "--baseline", *stage("flowtok"), "sampling.steps=2"
    )
    names = {"projector", "flow", "flow_batch_1", "decode", "plain_flow", "plain_flow_batch_1"}
    assert result["measures"].keys() == names
    for row in result["measures"].values():
        check_figures(row)
    assert result["sampler"] == "2 euler steps, guidance 2"
    each = result["seconds_by_part"]["image"]
    assert result["images_per_second"] == pytest.approx(1 / sum(each.values()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_text_gives_the_towers_rate_in_a_precision(stage, capsys, precision):
    result = result_of(
        capsys, "text", "--batch-size", "2", "--precision", precision, *stage("flowtok")
    )
    assert result["precision"] == precision
    check_figures(result["measures"]["text"])


def test_growth_compares_times_with_what_flops_predict(stage, capsys, monkeypatch):
    rows = {"batch_size": [Point(1, 8, 1), Point(2, 8, 1)], "depth": [Point(2, 8, 3)]}
    monkeypatch.setattr(benchmark_growth, "ROWS", rows)
    monkeypatch.setattr(benchmark_growth, "REFERENCE", Point(2, 8, 1))
    result = result_of(capsys, "growth", *stage("flowtok"))
    reference = result["growth"]["batch_size"][1]
    assert reference["deviation"]["median"] == pytest.approx(0)
    assert reference["predicted_seconds_per_sample"] == pytest.approx(
        reference["seconds_per_sample"]["median"]
    )
    deep = result["growth"]["depth"][0]
    ratio = deep["predicted_seconds_per_sample"] / reference["predicted_seconds_per_sample"]
    assert (
        ratio == pytest.approx(deep["gflop_per_sample"] / reference["gflop_per_sample"])
        and 2 < ratio < 3
    )


def test_memory_gives_what_the_plain_way_and_each_activation_checkpointing_keep(stage, capsys):
    result = result_of(capsys, "memory", *stage("flowtok"), "training.precision=bf16")
    modes = result["activation_checkpointing"]
    assert result["precision"] == "bf16" and [*modes] == ["plain", "none", "selective", "full"]
    kept = [mode["activation_mib_per_sample"] for mode in modes.values()]
    assert kept == sorted(set(kept), reverse=True) and kept[-1] > 0
    batches = [mode["largest_batch"] for mode in modes.values()]
    assert batches == sorted(set(batches))
    assert "the plain way: " in run(capsys, "memory", *stage("flowtok"))
    assert [*result_of(capsys, "memory", *stage("tokenizer"))["activation_checkpointing"]] == [
        *modes
    ][1:]


def test_all_runs_each_part_and_reports_what_fails(stage, capsys, monkeypatch):
    def in_this_process(words):
        reset_accelerate()
        return (
            result_of(capsys, *words)
            if words[0] != "sample"
            else {"part": "sample", "error": "died"}
        )

    tiny = " ".join(stage("flowtok"))
    parts = [f"train --baseline --repeats 3 {tiny}", "sample", f"text {tiny}", f"memory {tiny}"]
    monkeypatch.setattr(benchmark_report, "ALL", parts)
    monkeypatch.setattr(benchmark_report, "run_part", in_this_process)
    arguments = benchmark.parse_args(["all", "--precision", "fp32"])
    result = benchmark_report.measure_all(arguments) | benchmark_report.about(arguments)
    assert [part["part"] for part in result["parts"]] == ["train", "sample", "text", "memory"]
    assert "plain_train" in result["parts"][0]["measures"]
    benchmark_report.show(result)
    table = capsys.readouterr().out
    assert (
        "sample: failed, died" in table and "seconds a train: " in table and "threads on" in table
    )


def test_a_parts_own_rounds_count_in_all(monkeypatch):
    monkeypatch.setattr(benchmark_report, "ALL", ["tokenizer --repeats 2", "text"])
    monkeypatch.setattr(benchmark_report, "run_part", benchmark.parse_args)
    parts = benchmark_report.measure_all(benchmark.parse_args(["all", "--seconds", "7"]))["parts"]
    assert [(part.repeats, part.seconds) for part in parts] == [(2, 7.0), (3, 7.0)]


def test_all_can_be_cut_to_some_parts(monkeypatch):
    monkeypatch.setattr(benchmark_report, "run_part", lambda words: words[0])
    arguments = benchmark.parse_args(["all", "--only", "text", "sample"])
    assert benchmark_report.measure_all(arguments)["parts"] == ["sample"] * 3 + ["text"]
    assert "--only text sample" in benchmark_report.about(arguments)["command"]


def test_a_part_in_a_process_of_its_own_gives_its_error(tmp_path):
    result = benchmark_report.run_part(["train", "--config", str(tmp_path / "nowhere.yaml")])
    assert "nowhere.yaml does not exist" in result["error"]


def test_the_parts_of_all_parse_and_name_configs_that_are_there(monkeypatch):
    monkeypatch.chdir(benchmark.ROOT)
    for line in benchmark_report.ALL:
        args = benchmark.parse_args(line.split())
        load_config(args.config, args.overrides)


def test_the_table_shows_every_measurement(stage, capsys):
    output = run(capsys, "sample", "--batch-size", "2", "--baseline", *SHORT, *stage("flowtok"))
    assert "flow_batch_1" in output and "times as long" in output and "peak memory" in output


REFUSED = [
    (
        "train",
        "tokenizer",
        ["--baseline"],
        "--baseline: there is a plain way of stage flowtok only",
    ),
    ("train", "text_encoder", [], "a config of stage 'text_encoder' has no step to measure here"),
    ("train", "flowtok", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (
        "train",
        "flowtok",
        ["--text-tower", "text_encoder.model=hf-hub:a/b"],
        "its size is not known here",
    ),
    ("sample", "tokenizer", [], "sampling needs a config of stage flowtok"),
    ("tokenizer", "flowtok", [], "needs a config of stage tokenizer"),
    ("growth", "tokenizer", [], "growth is that of a DiT"),
    ("text", "text_encoder", [], "stage 'text_encoder' has no frozen text tower"),
    ("memory", "report", [], "stage 'report' does not train"),
    ("text", "report", [], "stage 'report' does not train"),
]


@pytest.mark.parametrize(("part", "name", "options", "message"), REFUSED)
def test_what_can_not_be_measured_is_refused(stage, part, name, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(benchmark.parse_args([part, *stage(name)[:2], *options]))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_on_a_cpu_it_starts_again_with_the_launchers_malloc_once(monkeypatch, on_gpu):
    started = []
    monkeypatch.setattr(benchmark_timing.sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(
        benchmark_timing.os, "execve", lambda program, words, env: started.append(env)
    )
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    benchmark_timing.start_again_keeping_memory()
    assert len(started) == (not on_gpu)
    for env in started:
        assert {name: env[name] for name in MALLOC} == {n: str(v) for n, v in MALLOC.items()} | {
            "MALLOC_TOP_PAD_": "1"
        }
        monkeypatch.setattr(benchmark_timing.os, "environ", env)
        benchmark_timing.start_again_keeping_memory()
        assert (
            len(started) == 1
            and benchmark_timing.describe_machine(CPU)["malloc"]["MALLOC_TOP_PAD_"] == "1"
        )


# What is counted


def test_useful_flops_of_flowtok_b_are_the_issues():
    config = load_config(SHIPPED, ["training.batch_size=16", "training.gradient_accumulation=1"])
    sizes = find_sizes(config, benchmark.FLOWTOK_B)
    training = training_gflop(config, sizes, with_tower=False)
    assert training == pytest.approx(50, rel=0.05)
    assert training == pytest.approx(3 * forward_gflop(config, sizes))
    assert transport_gflop(config, 16) == pytest.approx(536, rel=0.02)
    assert transport_gflop(config, 16) == pytest.approx(
        40 * velocity_gflop(config.flowtok), rel=0.02
    )


def test_activation_checkpointing_adds_no_useful_flops_and_a_frozen_projector_counts_once():
    options = [
        "training.batch_size=2",
        "training.gradient_accumulation=1",
        "projector_run=somewhere",
    ]
    ways = [[], ["activation_checkpointing=full"], ["flow.projector=frozen"]]
    configs = [load_config(SHIPPED, options + way) for way in ways]
    sizes = find_sizes(configs[0], benchmark.FLOWTOK_B)
    plain, recomputing, frozen = (training_gflop(config, sizes, False) for config in configs)
    assert plain == recomputing
    assert 0.7 < frozen / plain < 0.9


# Clocks


def test_ways_are_timed_in_turn():
    calls = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timing = alternate(ways, CPU, torch.float32, 0.003, 3, is_warm={"a"})
    changes = sum(a != b for a, b in pairwise(calls))
    assert calls[0] == "b" and changes == 2 * 3  # warm-up of b, then 3 rounds
    assert [len(times) for times in timing.seconds.values()] == [3, 3]


def test_a_ratio_is_that_of_the_same_round_and_a_share_that_of_the_rate_beside_it():
    timing = benchmark_timing.Timing(
        {"x": [1.0, 2.0, 4.0], "plain_x": [3.0, 6.0, 12.0]}, {"x": [8e9, 4e9, 2e9]}
    )
    assert timing.ratio("plain_x", "x") == {"median": 3.0, "low": 3.0, "high": 3.0}
    figures = timing.figures("x", samples=2, gflop_per_sample=2.0)
    assert figures["share"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert figures["samples_per_second"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert spread([3, 1, 2]) == {"median": 2, "low": 1, "high": 3}


def test_parts_add_up_and_leave_the_objects_as_they_were():
    class Thing:
        def first(self):
            time.sleep(0.02)

        def second(self):
            time.sleep(0.005)

    thing = Thing()
    methods = [("first", thing, "first"), ("never", thing, "__init__")]
    found = Parts(CPU).measure(lambda: (thing.first(), thing.second()), methods, calls=2)
    assert found["first"] >= 0.02 and found["other"] >= 0.005 and found["never"] == 0
    assert not vars(thing)


def test_memory_is_what_came_since_the_start():
    torch.ones(2**26)  # 256 MiB, gone again
    memory = Memory(CPU)
    assert memory.peak_gib() < 0.1
    torch.ones(2**25)
    assert 0.1 < memory.peak_gib() < 0.2


def test_the_step_is_the_trainers_and_changes_weights_and_average(stage, tmp_path):
    _, path, tower = stage("flowtok")
    config = load_config(path, [tower, "training.batch_size=4"])
    step = build_step(config, Path(path), start_run(tmp_path / "run", "fp32", 0), with_tower=False)
    pairs = list(zip(step.trainer.player.model.parameters(), step.trainer.ema.average.parameters()))
    assert all(p.any() for p, _ in pairs)  # nothing is degenerate
    before = [(p.detach().clone(), a.clone()) for p, a in pairs]
    step()
    assert step.trainer.step == 1
    assert all(
        not torch.equal(p, q) and not torch.equal(a, b) for (p, a), (q, b) in zip(pairs, before)
    )
    assert not (tmp_path / "run").exists()
