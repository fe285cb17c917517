"""scripts/plan.py, scripts/workload/: FLOPs against hand counts, memory against real steps."""

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from conftest import refusal
from tiny_experiment import Experiment
from torch import nn

from modeling.flowtok import FlowTokConfig
from modeling.text_projector import TextProjectorConfig
from scripts import plan
from scripts.plan import make_plan
from scripts.workload.fake import GIB, CudaLike, Meter, measure_step, num_bytes, tower_flops
from scripts.workload.sizes import read_stage
from scripts.workload.steps import build_workload, make_batch
from training.run import CONFIG_FILE, Run

FLOWTOK_B = "configs/flowtok_b/flowtok.yaml"
MODES = ("none", "selective", "full")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Configs of a tiny experiment, none of whose stages has run, and a GPU of its size."""
    # On a real one the largest batch is so large that its captions alone take seconds to make.
    monkeypatch.setitem(plan.GPUS, "a100-80g", (0.5, *plan.GPUS["a100-80g"][1:]))
    return Experiment(tmp_path, tmp_path / "nowhere")


def flowtok_b(*overrides):
    return read_stage(FLOWTOK_B, ["flowtok.depth=2", "projector.depth=2", *overrides])


# FLOPs, by hand: 2 a multiply-add


def dense(tokens, inside, outside):
    return 2 * tokens * inside * outside


def attention(queries, keys, width):
    return 2 * dense(queries, keys, width)  # scores, and their product with the values


def flowtok_by_hand(config: FlowTokConfig):
    """(all but attention, attention) of one forward pass of a sample."""
    k, c, w = config.num_tokens, config.token_channels, config.width
    block = dense(1, w, 6 * w) + dense(k, w, 4 * w) + 2 * dense(k, w, 4 * w)
    ends = dense(k, c, w) + dense(1, 256, w) + dense(1, w, w) + dense(1, w, 2 * w) + dense(k, w, c)
    return config.depth * block + ends, config.depth * attention(k, k, w)


def projector_by_hand(config: TextProjectorConfig):
    """The same of the projector with its alignment MLP."""
    k, t, w, a = config.text_tokens, config.text_width, config.width, config.alignment_width
    block = dense(k, w, 4 * w) + 2 * dense(k, w, config.mlp_width)
    alignment = dense(k, t, a) + dense(k, a, a) + dense(k, a, config.token_channels)
    rest = config.depth * block + dense(k, w, 2 * config.token_channels) + alignment
    return rest, config.depth * attention(k, k, w)


def step_by_hand(rest, attended, inputs):
    """Forward and backward: two products for one, the scores once more, none into the inputs."""
    return 3 * rest - inputs + 3.5 * attended


def test_flops_of_stage_3_are_those_counted_by_hand():
    stage = flowtok_b("losses.alignment_form=cosine_margin")
    parts = flowtok_by_hand(stage.config.flowtok), projector_by_hand(stage.config.projector)
    inputs = dense(77, 768, 3 * 768) + dense(77, 768, 512) + dense(1, 256, 768)
    tower = 12 * (dense(77, 768, 12 * 768) + attention(77, 77, 768))
    expected = step_by_hand(*map(sum, zip(*parts)), inputs) + tower
    assert measure_step(stage, 1, 2).flops == pytest.approx(expected, rel=1e-6)
    assert tower_flops(stage) == tower


def test_flops_of_a_t5_are_those_counted_by_hand():
    pytest.importorskip("transformers", reason="requirements-text.txt is not installed")
    block = 4 * dense(256, 1024, 1024) + 3 * dense(256, 1024, 2816) + attention(256, 256, 1024)
    assert tower_flops(read_stage("configs/flowtok_b_t5/flowtok.yaml")) == 24 * block


def test_full_checkpointing_adds_one_forward_of_the_blocks_and_selective_nothing():
    none, selective, full = (
        measure_step(flowtok_b(f"activation_checkpointing={mode}"), 1, 64) for mode in MODES
    )
    block = dense(1, 768, 6 * 768) + dense(77, 768, 12 * 768) + attention(77, 77, 768)
    assert none.flops == selective.flops
    assert full.flops - none.flops == pytest.approx(2 * block, rel=0.01)
    assert none.peak_gib > selective.peak_gib > full.peak_gib


# Memory


def test_the_meter_counts_what_a_linear_layer_makes_and_keeps():
    with Meter() as meter:
        layer, x = nn.Linear(8, 16), torch.zeros(32, 8)
        weights, inputs, outputs = 4 * (8 * 16 + 16), 4 * 32 * 8, 4 * 32 * 16
        assert meter.live == weights + inputs
        y = layer(x).square()
        assert meter.live == weights + inputs + 2 * outputs  # the layer's, for the backward pass
        y.sum().backward()
        del y
        assert meter.live == 2 * weights + inputs
        assert meter.flops == 2 * dense(32, 8, 16)  # forward, and the gradient of the weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["flowtok", "tokenizer"])
def test_the_planned_peak_is_that_of_a_real_step(tiny, name, mode):
    stage = read_stage(tiny.config_file(name), [f"activation_checkpointing={mode}"])
    run = Run(Path(), Accelerator(cpu=True), 0.0)
    with CudaLike(), Meter() as meter:
        work = build_workload(stage, run)
        batch = make_batch(stage, 16)
        work.step([batch], 0)  # makes the optimiser's moments
        del batch
        meter.peak = meter.live
        work.step([make_batch(stage, 16)], 1)
    real = meter.peak + num_bytes(work.networks[""].module)  # the EMA
    assert measure_step(stage, 1, 16).peak_gib == pytest.approx(real / GIB, rel=0.01)


def test_what_lies_on_a_gpu_is_what_float32_training_needs():
    eight, one = (measure_step(flowtok_b(), number, 1) for number in (8, 1))
    trained, sizes = eight.weights["trained"], eight.resident_gib
    assert sizes["optimizer_moments"] == 8 * trained / GIB
    assert sizes["gradients"] == sizes["gradient_buckets"] == 4 * trained / GIB
    assert sizes["weights"] == sizes["ema"] == 4 * (trained + 77 * 768 + 1) / GIB
    assert one.resident_gib["gradient_buckets"] == 0


def test_sharding_leaves_one_part_of_what_lies_on_a_gpu_and_the_same_checkpoint():
    whole, sharded = (
        measure_step(flowtok_b(f"training.shard={shard}"), 8, 64) for shard in ("none", "full")
    )
    before, after = whole.resident_gib, sharded.resident_gib
    split = ("weights", "ema", "optimizer_moments", "gradients")
    assert all(after[name] == pytest.approx(before[name] / 8) for name in split)
    assert before["gathered"] == after["gradient_buckets"] == 0
    assert sharded.checkpoint_gib == whole.checkpoint_gib
    # Of the gradients, between none and all are there at the peak, one of them whole for a moment.
    saved = 7 / 8 * sum(before[name] for name in split[:3]) + before["gradient_buckets"]
    found = whole.peak_gib - sharded.peak_gib + after["gathered"]
    assert saved - 0.01 < found < saved + 7 / 8 * before["gradients"]


# The plan


def test_a_plan_adds_up(tiny, monkeypatch, capsys):
    words = ["training.gradient_accumulation=2", "--num-gpus=2", "--share=0.5"]
    monkeypatch.setattr(sys, "argv", ["plan.py", str(tiny.config_file("flowtok")), *words])
    plan.main()
    found = yaml.safe_load(capsys.readouterr().out)
    modes, run = found["activation_checkpointing"], found["run"]
    assert (run["batch_size"], run["batch_per_gpu_and_pass"]) == (8, 2)
    assert found["memory_gib"]["peak"] == modes["none"]["peak_gib"]
    batches = [modes[mode]["largest_batch"] for mode in MODES]
    assert batches == sorted(set(batches))
    rate = 0.5 * 2 * 156e12 / (found["gflop_per_sample"]["total"] * 1e9)
    assert found["time"]["days"] == pytest.approx(8 * 4 / rate / 86400, rel=1e-3)
    checkpoint = sum(found["memory_gib"][name] for name in ("weights", "ema", "optimizer_moments"))
    assert found["disk_gib"]["run"] == pytest.approx(checkpoint * 3, rel=1e-3)


# Within the batch that is probed, and beyond it, where the contrastive loss of 8 GPUs shows. Of a
# tiny network it shows within; once its batch fits, once not.
@pytest.mark.parametrize(
    ("is_tiny", "num_gpus", "batch", "usable_gib"),
    [(False, 1, 64, 10.0), (False, 8, 64, 400.0), (True, 1, 4, 0.45), (True, 1, 512, 0.03)],
)
def test_the_largest_batch_fits_and_a_larger_does_not(tiny, is_tiny, num_gpus, batch, usable_gib):
    stage = read_stage(tiny.config_file("flowtok")) if is_tiny else flowtok_b()
    _, found = plan.fit_mode(stage, "none", num_gpus, batch, usable_gib)
    for factor, fits in ((0.98, True), (1.02, False)):
        batch = int(factor * found["largest_batch"])
        assert (measure_step(stage, num_gpus, batch).peak_gib <= usable_gib) is fits


def test_a_batch_that_just_passes_the_probed_one_is_found(monkeypatch):
    def one_gib_a_sample(stage, num_gpus, batch):
        return SimpleNamespace(peak_gib=float(batch), flops=1.0)

    monkeypatch.setattr(plan, "measure_step", one_gib_a_sample)
    stage = SimpleNamespace(config=None)
    _, found = plan.fit_mode(stage, "none", 1, 10, usable_gib=10 + plan.PROBE_BATCH + 0.5)
    assert found["largest_batch"] == 10 + plan.PROBE_BATCH


@pytest.mark.parametrize(
    "words",
    [["losses.contrast_weight=1"], ["losses.vision_weight=1", "vision.model=test_vit"]],
)
def test_what_else_stage_1_computes_counts(tiny, words):
    plain, more = (
        measure_step(read_stage(tiny.config_file("tokenizer"), options), 1, 8)
        for options in ([], words)
    )
    assert plain.weights["trained"] < more.weights["trained"]  # what predicts, the temperature
    assert plain.flops < more.flops
    if "vision.model=test_vit" in words:
        net = timm.create_model("test_vit", num_classes=0)
        assert more.weights["vision_frozen"] == sum(p.numel() for p in net.parameters())
        assert plain.resident_gib["frozen"] < more.resident_gib["frozen"]


def test_steps_before_the_discriminator_cost_less(tiny):
    flops, networks = [], []
    for game in ("{weight: 0}", "{weight: 1, start_step: 2}", "{weight: 1, start_step: 0}"):
        stage = read_stage(tiny.config_file("tokenizer"), [f"adversarial={game}"])
        cost = measure_step(stage, 1, 8)
        flops.append(plan.mean_flops(stage, cost, 1, 8))
        networks.append(cost.weights.keys())
    assert flops[1] == pytest.approx((flops[0] + flops[2]) / 2)
    assert networks[1] - networks[0] == {"discriminator_network"}


# Sizes from earlier runs


def test_sizes_come_from_the_run_or_from_the_yaml_that_makes_it(tiny):
    file = tiny.config_file("flowtok")
    stage = read_stage(file)
    config = stage.config
    assert config.flowtok.num_tokens == config.projector.text_tokens == 16
    assert config.projector.mlp_width == tiny.config("text_projector").projector.mlp_width == 32
    assert (stage.tokenizer.text_width, stage.tokenizer.token_channels) == (64, 4)

    # A run's own config.yaml counts more.
    run = Path(config.projector_run)
    run.mkdir()
    saved = asdict(read_stage(tiny.config_file("text_projector")).config)
    saved["projector"]["mlp_width"] = 48
    (run / CONFIG_FILE).write_text(yaml.safe_dump({"stage": "text_projector", **saved}))
    assert read_stage(file).config.projector.mlp_width == 48


@pytest.mark.parametrize(
    ("file", "overrides", "named"),
    [
        (FLOWTOK_B, ["training.batch_size=100"], "training.batch_size 100"),
        (FLOWTOK_B, ["tokenizer_run=elsewhere/x/tokenizer_9"], "elsewhere/x/tokenizer_9"),
        (FLOWTOK_B, ["flow.objective=mean_flow", "sampling.guidance=1"], "mean_flow"),
        ("configs/emoji/report.yaml", [], "report"),
    ],
)
def test_what_can_not_be_planned_is_refused(file, overrides, named):
    with refusal(named):
        make_plan(file, overrides)
