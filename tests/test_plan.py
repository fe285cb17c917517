"""scripts/plan.py and its parts: FLOPs against hand counts, memory against real steps, shortcuts against none."""

import json
import os
import re
import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_plan import plan_of
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from configs.load import load_config
from eval import planning
from eval.budget import GIB, GPUS, Machine, accumulation_needed, checkpoint_bytes, largest_batch
from eval.planning import Workload, at_batch, measure_forward, measure_step
from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.perceptual import PerceptualConfig
from modeling.text_encoder import TextEncoderConfig, load_text_encoder
from modeling.text_projector import TextProjectorConfig
from scripts import plan
from scripts.plan_costs import make_plan
from scripts.plan_stages import EmptyPerceptualLoss, Sizes, StatesAlone, build_tower, find_sizes
from training import checkpoint as ckpt
from training.optim import OptimizerConfig, build_optimizer

ROOT = Path(__file__).parents[1]
MODES = ("none", "selective", "full")
XL = FlowTokConfig(width=1152, depth=28, num_heads=16)


# --- FLOPs against counts by hand: 2 for each multiply-add, matrix products only ---


def dense(tokens, inside, outside):
    return 2 * tokens * inside * outside


def attention(tokens, width):
    return 2 * (2 * tokens * tokens * width)  # scores, and their product with the values


def dit_by_hand(config):
    """(all but attention, attention) of one forward pass."""
    k, c, w = config.num_tokens, config.token_channels, config.width
    hidden = int(w * config.mlp_ratio)
    block = (
        dense(1, w, 6 * w)
        + dense(k, w, 3 * w)
        + dense(k, w, w)
        + dense(k, w, hidden)
        + dense(k, hidden, w)
    )
    outside = (
        dense(k, c, w) + dense(1, 256, w) + dense(1, w, w) + dense(1, w, 2 * w) + dense(k, w, c)
    )
    return config.depth * block + outside, config.depth * attention(k, w)


def projector_by_hand(config):
    """(all but attention, attention) of the projector; without the alignment MLP."""
    k, w = config.text_tokens, config.width
    block = (
        dense(k, w, 3 * w)
        + dense(k, w, w)
        + dense(k, w, config.mlp_width)
        + dense(k, config.mlp_width, w)
    )
    return config.depth * block + dense(k, w, 2 * config.token_channels), config.depth * attention(
        k, w
    )


def alignment_by_hand(config):
    k, t, a = config.text_tokens, config.text_width, config.alignment_width
    return dense(k, t, a) + dense(k, a, a) + dense(k, a, config.token_channels)


def transformer_by_hand(size, tokens, kept):
    """(all but attention, attention) of a stack of tokenizer blocks, whose last one computes `kept` tokens."""
    w, hidden = size.width, int(2 / 3 * 4 * size.width)
    queries = (
        2 * dense(1, w, w) + dense(1, w, 2 * hidden) + dense(1, hidden, w)
    )  # also out and MLP, of a token
    queried = (size.depth - 1) * tokens + kept
    return queried * queries + size.depth * dense(tokens, w, 2 * w), queried * attention(
        tokens, w
    ) // tokens


def tokenizer_by_hand(config):
    """{part: (all but attention, attention)} of encoder and decoder."""
    patches, k, c = config.grid_size**2, config.num_tokens, config.token_channels
    pixels, e, d = 3 * config.patch_size**2, config.encoder, config.decoder
    encoder, encoder_attention = transformer_by_hand(e, patches + k, k)
    decoder, decoder_attention = transformer_by_hand(d, patches + k + config.text_tokens, patches)
    encoder += dense(patches, pixels, e.width) + dense(k, e.width, 2 * c)
    decoder += dense(k, c, d.width) + dense(config.text_tokens, config.text_width, d.width)
    decoder += (
        dense(patches, d.width, pixels) + 2 * config.image_size**2 * 3 * 3 * 9
    )  # the smoothing 3 x 3 conv
    return {"encoder": (encoder, encoder_attention), "decoder": (decoder, decoder_attention)}


@pytest.mark.parametrize("name", ["flowtok_b", "flowtok_xl", "flowtok_h"])
def test_flops_of_a_training_sample_are_those_counted_by_hand(name):
    config = load_config(ROOT / f"configs/{name}/flowtok.yaml")
    (dit, dit_attention), (projector, projector_attention) = (
        dit_by_hand(config.flowtok),
        projector_by_hand(config.projector),
    )
    rest, attended = (
        dit + projector + alignment_by_hand(config.projector),
        dit_attention + projector_attention,
    )
    # Backward: two products for one, and the scores once more (2.5 for one); nothing flows into the text states.
    inputs = dense(77, 768, 3 * 768) + dense(77, 768, 512) + dense(1, 256, config.flowtok.width)
    found = plan_of(f"{name}/flowtok.yaml")["gflop_per_sample"]
    assert found["forward"] == pytest.approx((rest + attended) / 1e9, rel=0.002)
    assert found["backward"] == pytest.approx((2 * rest - inputs + 2.5 * attended) / 1e9, rel=0.002)
    assert found["text_tower"] == pytest.approx(
        12 * (24 * 77 * 768**2 + attention(77, 768)) / 1e9, rel=1e-6
    )
    assert found["total"] == pytest.approx(sum(found[key] for key in found if key != "total"))


def test_flops_of_an_image_are_those_counted_by_hand():
    found = plan_of("flowtok_xl/flowtok.yaml")["gflop_per_image"]
    assert found["flow"] == pytest.approx(20 * 2 * sum(dit_by_hand(XL)) / 1e9, rel=1e-6)
    assert found["projector"] == pytest.approx(
        sum(projector_by_hand(TextProjectorConfig())) / 1e9, rel=1e-6
    )
    assert found["decoder"] == pytest.approx(
        sum(tokenizer_by_hand(ImageTokenizerConfig())["decoder"]) / 1e9, rel=1e-6
    )
    assert found["total"] == pytest.approx(sum(found[key] for key in found if key != "total"))


@pytest.mark.parametrize("image_size", [256, 512])
def test_flops_of_the_tokenizer_are_those_counted_by_hand(image_size):
    config = ImageTokenizerConfig(image_size=image_size)
    plain = ["losses.perceptual_weight=0", "adversarial.weight=0"]
    found = plan_of(f"tokenizer_bl77_{image_size}/tokenizer.yaml", *plain)
    parts = tokenizer_by_hand(config)
    for part, count in parts.items():
        assert found["gflop_per_image"][part] == pytest.approx(sum(count) / 1e9, rel=1e-6)
    rest, attended = np.sum(list(parts.values()), axis=0)
    inputs = dense(config.grid_size**2, 768, 768) + dense(
        77, 768, 1024
    )  # no gradient into pixels and text states
    assert found["gflop_per_sample"]["forward"] == pytest.approx((rest + attended) / 1e9, rel=1e-6)
    assert found["gflop_per_sample"]["backward"] == pytest.approx(
        (2 * rest - inputs + 2.5 * attended) / 1e9, rel=1e-3
    )


def test_a_solver_of_two_evaluations_a_step_doubles_the_flow():
    two, one = (
        plan_of("flowtok_b/flowtok.yaml", f"sampling.sampler={name}") for name in ("heun", "adams2")
    )
    assert two["gflop_per_image"]["flow"] == pytest.approx(2 * one["gflop_per_image"]["flow"])


def test_a_flow_to_text_has_no_images_and_not_the_papers_days():
    found = plan_of("caption_xl/flowtok_caption.yaml")
    assert "gflop_per_image" not in found and "paper" not in found


def test_guidance_1_halves_the_flow():
    two, one = (
        plan_of("flowtok_b/flowtok.yaml", f"sampling.guidance={g}")["gflop_per_image"]["flow"]
        for g in (2, 1)
    )
    assert two == pytest.approx(2 * one)


# --- FLOPs against torch's own counter on the meta device ---


def flow_work(depth=7, width=64, recompute="none"):
    projector = TextProjectorConfig(
        16, 24, width=24, num_heads=2, mlp_width=32, depth=6, alignment_width=16
    )
    model = FlowModel(projector, FlowTokConfig(16, width=width, depth=depth, num_heads=4))
    model.flowtok.recompute = recompute

    def losses(model, batch):
        output = model(batch["states"], batch["image"], FlowConfig())
        return {
            "loss": (output.velocity.float() - output.target).square().mean()
            + output.alignment.float().mean()
        }

    def make_batch(n):
        return {"states": torch.zeros(n, 16, 24), "image": torch.zeros(n, 16, 16)}

    return Workload(model, make_batch, losses)


def tokenizer_work(depth=6, recompute="none"):
    sizes = TransformerSize(64, depth, 2), TransformerSize(64, depth + 1, 2)
    model = ImageTokenizer(ImageTokenizerConfig(32, 8, 9, 4, *sizes, text_tokens=5, text_width=8))
    model.set_recompute(recompute)

    def losses(model, batch):
        images, mean, logvar = model(batch["image"].float().div(255), batch["states"])
        return {"loss": images.square().mean() + mean.square().mean() + logvar.mean()}

    def make_batch(n):
        return {
            "image": torch.zeros(n, 3, 32, 32, dtype=torch.uint8),
            "states": torch.zeros(n, 5, 8),
        }

    return Workload(model, make_batch, losses)


def flops_on_meta(build):
    """(forward, backward) of a sample, by FlopCounterMode; attention there is plain matrix products."""
    with torch.device("meta"):
        work = build()
        counts = []
        for step in ("forward", "backward"):
            with FlopCounterMode(display=False) as counter:
                if step == "forward":
                    loss = work.loss_fn(work.model.train(), work.make_batch(2))["loss"]
                else:
                    loss.backward()
            counts.append(counter.get_total_flops() / 2)
    return counts


@pytest.mark.parametrize(
    ("make", "scores"),
    [
        (flow_work, (7 * 64 + 6 * 24) * 16**2),
        (tokenizer_work, 64 * (5 * 25**2 + 9 * 25 + 6 * 30**2 + 16 * 30)),
    ],
)
def test_flops_are_those_of_flop_counter_mode_on_the_meta_device(make, scores):
    cost, (forward, backward) = measure_step(make, "fp32"), flops_on_meta(make)
    assert at_batch(cost.forward_flops, 1) == forward
    assert (
        at_batch(cost.training_flops, 1) == forward + backward + 2 * scores
    )  # scores that kernels compute again


# --- Activation checkpointing ---


def test_selective_needs_no_further_product_and_full_one_more_forward_of_the_blocks():
    modes = plan_of("flowtok_xl/flowtok.yaml")["activation_checkpointing"]
    blocks = 28 * (dense(1, 1152, 6 * 1152) + dense(77, 1152, 12 * 1152) + attention(77, 1152))
    total = plan_of("flowtok_xl/flowtok.yaml")["gflop_per_sample"]["total"]
    assert modes["none"]["extra_compute"] == modes["selective"]["extra_compute"] == 0
    assert modes["full"]["extra_compute"] * total == pytest.approx(blocks / 1e9, rel=0.01)
    batches = [modes[mode]["largest_batch_per_gpu_and_pass"] for mode in MODES]
    assert batches == sorted(batches) and len(set(batches)) == 3


def test_the_configured_mode_is_the_one_that_counts():
    none, full = (
        plan_of("flowtok_b/flowtok.yaml", f"activation_checkpointing={mode}")
        for mode in ("none", "full")
    )
    assert full["gflop_per_sample"]["recompute"] > 0 == none["gflop_per_sample"]["recompute"]
    assert full["memory_gib"]["peak"] == full["activation_checkpointing"]["full"]["peak_gib"]
    extra = full["activation_checkpointing"]["full"]["extra_compute"]
    assert full["time"]["days"] == pytest.approx(none["time"]["days"] * (1 + extra))


# --- The shortcuts are exact ---


@pytest.mark.parametrize(
    ("make", "precision", "has_gradients"),
    [(flow_work, "bf16", False), (flow_work, "fp32", True), (tokenizer_work, "bf16", False)],
)
@pytest.mark.parametrize("mode", MODES)
def test_five_blocks_stand_for_all_to_the_byte(make, mode, precision, has_gradients, monkeypatch):
    cut = measure_step(partial(make, recompute=mode), precision, has_gradients)
    monkeypatch.setattr(planning, "RUN_BLOCKS", 100)
    whole = measure_step(partial(make, recompute=mode), precision, has_gradients)
    assert len(cut.live_bytes) < len(whole.live_bytes)
    assert (cut.forward_flops == whole.forward_flops).all() and (
        cut.training_flops == whole.training_flops
    ).all()
    assert (cut.kept_bytes == whole.kept_bytes).all()
    for batch in (1, 2, 3, 8, 64, 1000):
        assert cut.peak_bytes(batch) == whole.peak_bytes(batch)


@pytest.mark.parametrize("make", [flow_work, tokenizer_work])
def test_a_step_leaves_nothing_behind(make):
    assert not measure_step(make, "bf16").live_bytes[-1].any()


def contrastive_work():
    """Logits of all pairs of a batch: grow with its square."""

    def losses(model, batch):
        features = model(batch["x"])
        return {"loss": F.cross_entropy(features @ features.T, torch.arange(len(features)))}

    return Workload(
        nn.Sequential(nn.Linear(8, 32), nn.GELU()), lambda n: {"x": torch.zeros(n, 8)}, losses
    )


@pytest.mark.parametrize("make", [flow_work, tokenizer_work, contrastive_work])
def test_what_one_batch_tells_holds_for_another_to_the_byte(make, monkeypatch):
    cost, batch = measure_step(make, "bf16"), 23
    monkeypatch.setattr(planning, "PROBE_BATCH", batch)
    measured = measure_step(make, "bf16")
    assert cost.peak_bytes(batch) == measured.peak_bytes(batch)
    assert at_batch(cost.kept_bytes, batch) == at_batch(measured.kept_bytes, batch)
    assert at_batch(cost.training_flops, batch) == at_batch(measured.training_flops, batch)


def test_logits_of_all_processes_are_counted():
    cost = measure_step(contrastive_work, "fp32")
    one, four = (cost.peak_bytes(512, num_processes=n) for n in (1, 4))
    assert four - one >= 3 * 4 * 512**2 * 2  # at least the logits and their gradient


# --- Memory against real steps ---


def real_peak(work, precision, batch_size, has_gradients):
    """Bytes that a real step on the CPU takes at most beyond what was there, by torch's profiler."""
    work.model.to_empty(device="cpu")
    for tensor in [*work.model.parameters(), *work.model.buffers()]:
        nn.init.normal_(tensor, std=0.02)
    with planning.CudaLike():
        optimizer = planning.prepare(work.model, precision, has_gradients)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work.loss_fn(work.model, work.make_batch(batch_size))["loss"].backward()
            torch.nn.utils.clip_grad_norm_(work.model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    unfolding = [e for e in events if "slow_conv2d" in e.name()]
    changes = [
        e.nbytes()
        for e in events
        if e.name() == "[memory]" and not any(is_freed_within(e, op, events) for op in unfolding)
    ]
    return np.cumsum(changes).max()


def is_freed_within(change, operator, events):
    """Whether a memory event is one of a buffer's that the operator both takes and gives back.

    A CPU without bf16 convolutions (AVX2) unfolds the images for them, 27 values a pixel of the 3 x 3 convolution:
    a workspace that neither CUDA nor a CPU with AVX-512 has, and the plan therefore doesn't count.
    """
    if not operator.start_ns() <= change.start_ns() <= operator.end_ns():
        return False
    return any(
        e.name() == "[memory]"
        and e.nbytes() == -change.nbytes()
        and operator.start_ns() <= e.start_ns() <= operator.end_ns()
        for e in events
    )


@pytest.mark.parametrize(
    ("make", "precision", "has_gradients"),
    [(flow_work, "fp32", True), (tokenizer_work, "bf16", False)],
)
@pytest.mark.parametrize("mode", MODES)
def test_the_measured_peak_is_that_of_a_real_step(make, mode, precision, has_gradients):
    cost = measure_step(partial(make, recompute=mode), precision, has_gradients)
    with torch.device("meta"):
        work = make(recompute=mode)
    found = real_peak(work, precision, 128, has_gradients)
    assert (
        cost.peak_bytes(128) <= found <= 1.02 * cost.peak_bytes(128)
    )  # the rest: workspaces inside operators


def test_normalisation_and_dropout_keep_what_cuda_keeps():
    x = torch.randn(4, 8, requires_grad=True)
    norm, bf16 = nn.LayerNorm(8), planning.autocast("bf16")
    with bf16, planning.CudaLike():
        assert norm(x.bfloat16()).dtype == torch.float32
    with bf16:
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    saved = []
    with (
        planning.CudaLike(),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor),
    ):
        F.dropout(x, 0.5, training=True)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
    assert [tensor.dtype for tensor in saved] == [torch.bool]


def test_gradients_of_earlier_passes_are_counted_once():
    names = ("training.gradient_accumulation=1", "training.gradient_accumulation=2")
    one, two = (plan_of("flowtok_b/flowtok.yaml", name, "training.batch_size=64") for name in names)
    assert (one["run"]["batch_per_gpu_and_pass"], two["run"]["batch_per_gpu_and_pass"]) == (8, 4)
    memory = two["memory_gib"]
    parts = (
        "weights",
        "gradients",
        "gradient_buckets",
        "optimizer_moments",
        "ema",
        "frozen",
        "activations",
    )
    assert memory["peak"] >= sum(memory[part] for part in parts)
    assert memory["gradients"] == pytest.approx(4 * one["trained_weights"] / GIB)


# --- What lies on the GPU and on the disk ---


def test_resident_bytes_are_those_of_float32_training():
    memory, trained = plan_of("flowtok_xl/flowtok.yaml")["memory_gib"], 697_995_201
    assert memory["optimizer_moments"] == pytest.approx(8 * trained / GIB)
    assert memory["gradients"] == memory["gradient_buckets"] == pytest.approx(4 * trained / GIB)
    assert memory["weights"] == memory["ema"] == pytest.approx(4 * (trained + 77 * 1152 + 1) / GIB)
    assert memory["frozen"] == pytest.approx((4 * 123_060_480 + 77 * 77 * 4) / GIB)
    assert plan_of("flowtok_xl/flowtok.yaml", num_gpus=1)["memory_gib"]["gradient_buckets"] == 0


def test_the_size_of_a_checkpoint_is_that_of_its_files(tmp_path):
    work = flow_work(width=128)
    optimizer = build_optimizer(work.model, OptimizerConfig())
    work.loss_fn(work.model, work.make_batch(2))["loss"].backward()
    optimizer.step()
    for name in (ckpt.MODEL_FILE, ckpt.EMA_FILE):
        ckpt.save_weights(work.model, tmp_path / name)
    torch.save(optimizer.state_dict(), tmp_path / ckpt.OPTIMIZER_FILE)
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert checkpoint_bytes(work) == pytest.approx(found, rel=0.02)


# --- What fits ---


def test_the_largest_batch_fits_and_the_next_does_not():
    name = "flowtok_h/flowtok.yaml"
    for mode in MODES:
        largest = plan_of(name)["activation_checkpointing"][mode]["largest_batch_per_gpu_and_pass"]
        for batch, fits in ((largest, True), (largest + 1, False)):
            fit = plan_of(name, f"training.batch_size={8 * batch}")["activation_checkpointing"][
                mode
            ]
            assert fit["fits"] == fits
            assert (fit["peak_gib"] <= 0.9 * GPUS["a100-80g"].memory_gib) == fits


def test_a_smaller_gpu_takes_a_smaller_batch():
    largest = {
        gpu: plan_of("flowtok_h/flowtok.yaml", gpu=gpu)["activation_checkpointing"]["full"]
        for gpu in ("rtx4090", "a100-40g", "a100-80g", "h200")
    }
    batches = [fit["largest_batch_per_gpu_and_pass"] for fit in largest.values()]
    assert batches == sorted(set(batches))
    assert batches[0] == 0 and largest["rtx4090"]["gradient_accumulation_needed"] is None
    assert largest["h200"]["gradient_accumulation_needed"] == 1


def test_largest_batch_is_found_by_its_peak():
    assert largest_batch(lambda batch: 10 + 3 * batch, 100) == 30
    assert largest_batch(lambda batch: 10 + 3 * batch, 12.9) == 0
    assert largest_batch(lambda batch: batch, 1) == 1


def test_accumulation_is_the_smallest_that_divides_and_fits():
    assert accumulation_needed(512, 600, 500) == 1
    assert accumulation_needed(512, 500, 480) == 2
    assert (
        accumulation_needed(512, 300, 200) == 4
    )  # the gradients of other passes leave no room for 256
    assert accumulation_needed(9, 4, 4) == 3
    assert accumulation_needed(7, 3, 3) == 7
    assert accumulation_needed(7, 0, 0) is None


# --- Days ---


def test_days_are_flops_by_what_the_gpus_do():
    found = plan_of("flowtok_xl/flowtok.yaml")
    flops = found["gflop_per_sample"]["total"] * 1e9 * 4096 * 250_000
    assert found["run"]["samples"] == 4096 * 250_000
    assert found["time"]["days"] == pytest.approx(flops / (8 * 312e12 * 0.4) / 86400)
    assert found["time"]["samples_per_second"] == pytest.approx(
        4096 * 250_000 / found["time"]["days"] / 86400
    )
    other = plan_of("flowtok_xl/flowtok.yaml", gpu="h100-80g", num_gpus=16, share=0.2)
    assert other["time"]["days"] == pytest.approx(found["time"]["days"] * 312 / 989, rel=1e-3)


def test_float32_runs_have_the_peak_of_tf32():
    found = plan_of("flowtok_b/flowtok.yaml", "training.precision=fp32")
    assert found["gpu"]["peak_tflop_per_second"] == 156
    bf16 = plan_of("flowtok_b/flowtok.yaml")
    assert found["time"]["days"] == pytest.approx(2 * bf16["time"]["days"])
    assert found["memory_gib"]["activations"] > 1.5 * bf16["memory_gib"]["activations"]


SMALL = [
    f"tokenizer.{part}.{size}"
    for part in ("encoder", "decoder")
    for size in ("width=64", "depth=1", "num_heads=4")
]


def small_tokenizer(*overrides):
    return plan_of("tokenizer_bl77_256/tokenizer.yaml", *SMALL, *overrides)


def test_steps_before_the_discriminator_are_cheaper():
    never, half, always = (
        small_tokenizer("losses.perceptual_weight=0", *overrides)["time"]["days"]
        for overrides in (
            ["adversarial.weight=0"],
            ["adversarial.weight=0.1", "adversarial.start_step=325000"],
            ["adversarial.weight=0.1", "adversarial.start_step=0"],
        )
    )
    assert never < half < always
    assert half == pytest.approx((never + always) / 2)


def test_the_discriminator_and_the_perceptual_networks_are_counted():
    full = small_tokenizer(
        "losses.perceptual_weight=1.1", "adversarial.weight=0.1", "adversarial.start_step=0"
    )
    plain = small_tokenizer("losses.perceptual_weight=0", "adversarial.weight=0")
    assert full["weights"].keys() - plain["weights"].keys() == {
        "discriminator",
        "perceptual_frozen",
    }
    assert full["trained_weights"] - plain["trained_weights"] == full["weights"]["discriminator"]
    for key in ("frozen", "activations", "peak"):
        assert full["memory_gib"][key] > plain["memory_gib"][key]


def test_perceptual_networks_without_weights_have_the_sizes_of_the_published():
    with torch.device("meta"):
        parts = EmptyPerceptualLoss(PerceptualConfig()).parts
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert sizes == {"lpips": 14_714_688 + 64 + 128 + 256 + 512 + 512, "convnext": 50_223_688}
    with torch.device("meta"):
        assert list(EmptyPerceptualLoss(PerceptualConfig(convnext_weight=0.0)).parts) == ["lpips"]


# --- The paper's figures ---


@pytest.mark.parametrize(
    ("name", "days", "rate"), [("flowtok_xl", 20.4, 22.7), ("flowtok_h", 26.1, 18.2)]
)
def test_shares_for_the_papers_days_and_rate(name, days, rate):
    found = plan_of(f"{name}/flowtok_finetune.yaml")
    paper, training = found["paper"], found["gflop_per_sample"]["total"] * 1e9
    assert paper["share_for_days"] == pytest.approx(
        training * 4096 * 400_000 / (8 * 312e12 * days * 86400)
    )
    assert paper["share_for_images_per_second"] == pytest.approx(
        rate * found["gflop_per_image"]["total"] * 1e9 / 312e12
    )
    assert 0.05 < paper["share_for_days"] < 0.3 and 0.1 < paper["share_for_images_per_second"] < 0.5


def test_h_at_1024_samples_is_always_answered():
    paper = plan_of("flowtok_h/flowtok.yaml", "training.batch_size=64", gpu="rtx4090", num_gpus=1)[
        "paper"
    ]
    assert paper["batch_per_gpu"] == 1024
    expected = plan_of("flowtok_h/flowtok.yaml", "training.batch_size=8192")[
        "activation_checkpointing"
    ]
    for mode, fit in paper["at_batch"].items():
        assert fit["fits"] == expected[mode]["fits"]
        assert fit["peak_gib"] == pytest.approx(expected[mode]["peak_gib"])
        assert fit["extra_compute"] == pytest.approx(expected[mode]["extra_compute"])
    assert {mode: fit["fits"] for mode, fit in paper["at_batch"].items()} == {
        "none": False,
        "selective": False,
        "full": True,
    }


def test_other_sizes_have_no_figures_of_the_paper():
    assert "days" not in plan_of("flowtok_b/flowtok.yaml")["paper"]
    assert plan_of("demo/flowtok.yaml")["paper"] == {}


# --- Where sizes come from ---


def test_the_tokenizer_is_found_beside_the_config_or_in_another_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nobody has trained the demo
    for name, where, size in (
        ("demo/flowtok.yaml", "demo/tokenizer.yaml", 64),
        ("flowtok_xl/flowtok_512.yaml", "flowtok_xl/tokenizer_512.yaml", 512),
        ("flowtok_b_alignment_2/flowtok.yaml", "tokenizer_bl77_256/tokenizer.yaml", 256),
    ):
        path = ROOT / "configs" / name
        sizes = find_sizes(load_config(path), path)
        assert sizes.tokenizer.image_size == size
        assert f"sizes of the tokenizer: {where}" in sizes.notes


def test_experiment_dir_leads_to_the_same_tokenizer():
    path = ROOT / "configs/demo/tokens.yaml"
    sizes = find_sizes(load_config(path, ["experiment_dir=/elsewhere"]), path)
    assert sizes.tokenizer.image_size == 64


def test_an_unknown_tokenizer_is_the_papers_and_that_is_said():
    path = ROOT / "configs/demo/tokens.yaml"
    sizes = find_sizes(load_config(path, ["tokenizer_run=/nowhere"]), path)
    assert sizes.tokenizer == ImageTokenizerConfig()
    assert any("the paper's at 256 px, for /nowhere is not there" in note for note in sizes.notes)


def test_the_tokenizers_run_comes_first(chain):
    path = chain.config_file("flowtok")
    sizes = find_sizes(chain.config("flowtok"), path)
    assert sizes.tokenizer == chain.config("tokenizer").tokenizer
    assert sizes.notes == [f"sizes of the tokenizer: {chain.folder}/tokenizer"]


def test_a_local_tower_is_counted_where_it_is_and_said_to_be_missing_where_not(tiny_clip_dir):
    config = TextEncoderConfig(f"local-dir:{tiny_clip_dir}")
    with torch.device("meta"):
        tower = build_tower(Sizes(ImageTokenizerConfig(), config, (16, 32)))
    real = load_text_encoder(config)
    assert {n: p.shape for n, p in tower.state_dict().items()} == {
        n: p.shape for n, p in real.state_dict().items()
    }
    missing = plan_of("demo/text_projector.yaml", "experiment_dir=nowhere")
    assert (
        "the text tower local-dir:nowhere/text_encoder/clip is not here: not counted"
        in missing["notes"]
    )
    assert (
        missing["gflop_per_sample"]["text_tower"] == 0
        and "text_tower_frozen" not in missing["weights"]
    )


def test_a_tower_from_the_hub_is_not_downloaded():
    sizes = Sizes(ImageTokenizerConfig(), TextEncoderConfig("hf-hub:some/model"), (77, 768))
    assert isinstance(build_tower(sizes), StatesAlone)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_encoder.model=ViT-L-15", "unknown open_clip model 'ViT-L-15'"),
        (
            "text_encoder.model=ViT-B-32",
            r"ViT-B-32 gives 77 x 512 text states, the config expects .* \(77, 768\)",
        ),
        (
            "training.batch_size=4095",
            "training.batch_size 4095 is not divisible by --num-gpus x .* 8 x 1",
        ),
        ("flowtok.widht=3", "did you mean 'flowtok.width'"),
    ],
)
def test_a_wrong_config_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        make_plan(str(ROOT / "configs/flowtok_b/flowtok.yaml"), [override], "a100-80g", 8, 0.4)


# --- The command ---


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    plan.main()


def test_it_needs_no_network_no_data_and_writes_nothing(monkeypatch, tmp_path, capsys):
    def no_network(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, ROOT / "configs/projector_clip_l/text_projector.yaml")
    assert "activations kept for the backward" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_json_is_one_object_and_nothing_else(monkeypatch, capsys):
    run(
        monkeypatch,
        ROOT / "configs/demo/text_encoder.yaml",
        "training.batch_size=64",
        "--num-gpus",
        4,
        "--json",
    )
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["batch_per_gpu_and_pass"] == 16
    assert found["gpu"]["num_gpus"] == 4
    documented = plan.__doc__.split("--json prints")[1]
    for key, value in plan_of("flowtok_h/flowtok.yaml").items():
        assert key in documented
        for inner in (
            value if isinstance(value, dict) and key not in ("weights", "gflop_per_image") else ()
        ):
            assert inner in (*re.findall(r"\w+", documented), *MODES)


def test_the_text_names_units_and_verdicts(monkeypatch, capsys):
    monkeypatch.setattr(plan, "make_plan", lambda *_: plan_of("flowtok_h/flowtok.yaml"))
    run(monkeypatch, "configs/flowtok_h/flowtok.yaml")
    text = capsys.readouterr().out
    for part in (
        "8 x a100-80g: 312 TFLOP/s in bf16, 79.1 GiB = 84.9 GB each, of which 7.9 GiB are kept in reserve",
        "weights, millions",
        "GFLOP per training sample",
        "GFLOP per image",
        "memory of one GPU, GiB",
        "at 40% of the peak: 4.2 days",
        "1024 samples on each of 8 A100 80 GB, activation_checkpointing=full",
        "+31.0% FLOPs",
        "26.1 days on 8 A100",
    ):
        assert part in text


def test_a_stage_that_trains_nothing_says_what_it_does(monkeypatch, capsys):
    run(monkeypatch, ROOT / "configs/demo/report.yaml")
    assert "trains nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/no.yaml"], "does not exist"),
        (["configs/demo/flowtok.yaml", "--gpu", "a200"], "a100-80g"),
        (["configs/demo/flowtok.yaml", "--share", "1.5"], "0 < --share <= 1"),
        (["configs/demo/flowtok.yaml", "--num-gpus", "0"], "--num-gpus >= 1"),
        (
            ["configs/demo/flowtok.yaml", "--num-gpus", "3"],
            "--num-gpus x gradient_accumulation = 3 x 1",
        ),
    ],
)
def test_a_wrong_command_ends_with_status_2_and_its_reason(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_machine_knows_the_limit_in_bytes():
    machine = Machine(GPUS["a100-80g"], num_gpus=8, share=0.5)
    assert machine.limit == pytest.approx(0.9 * 79.1 * 2**30)
    assert machine.seconds(8 * 312e12, "bf16") == pytest.approx(2)
    assert machine.seconds(8 * 156e12, "fp32") == pytest.approx(2)
    for gpu in GPUS.values():
        assert 1.9 < gpu.bf16_tflop_per_second / gpu.tf32_tflop_per_second < 2.1


def test_a_forward_pass_alone_keeps_only_its_output():
    cost = measure_forward(
        lambda: Workload(
            nn.Linear(4, 8), lambda n: {"x": torch.zeros(n, 4)}, lambda m, b: m(b["x"])
        )
    )
    assert at_batch(cost.kept_bytes, 10) == 10 * 8 * 4
    assert at_batch(cost.forward_flops, 10) == 10 * 2 * 4 * 8
    assert cost.peak_bytes(10) == 10 * (4 + 8) * 4
