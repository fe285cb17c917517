"""training.shard=full: against whole weights on one and two processes; kills, files, refusals."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import reset_accelerate
from forks import in_two_processes
from safetensors.torch import save_file
from test_resume import program, run_on_two, state
from tiny_experiment import draw, equal, metrics, training

import train_flowtok
from modeling import flow_model
from modeling.activation_checkpointing import set_activation_checkpointing
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTokConfig
from modeling.layers import Posterior, load_weights
from modeling.text_projector import TextProjectorConfig
from training import checkpoint as ckpt
from training.optim import EMA, OptimizedNetwork, OptimizerConfig, descend, load_optimizer
from training.run import Run

BATCH = 8
# Odd sizes: parts of different lengths, and weights with fewer rows than processes
SIZE = {"width": 18, "depth": 2, "num_heads": 3}
PROJECTOR = TextProjectorConfig(5, 7, mlp_width=27, token_channels=3, dropout=0, **SIZE)
NO_NOISE = {"sample_text_latent": False, "sample_image_latent": False, "null_probability": 0}
KINDS = {  # how it is trained, for so many steps
    "": ({}, 20),
    "muon": ({"optimizer": "muon"}, 5),
    "bf16": ({"precision": "bf16"}, 5),
    "recomputed": ({"mode": "full"}, 3),
    "partly recomputed": ({"mode": "selective"}, 3),
}


class Training:
    """A tiny flow with its projector on made-up batches, of which each process has its share."""

    def __init__(self, shard="none", optimizer="adamw", mode="none", precision="no"):
        reset_accelerate()
        self.run = Run(Path(), Accelerator(cpu=True, mixed_precision=precision), 0.0)
        self.config = train_flowtok.FlowTokStage(flow=FlowConfig(**NO_NOISE))
        torch.manual_seed(0)
        model = build_flow(PROJECTOR, FlowTokConfig(5, 3, **SIZE), self.config.flow)
        for weight in model.parameters():  # none of them zero
            weight.data += 0.02 * torch.randn(weight.shape)
        set_activation_checkpointing(model, mode)
        settings = OptimizerConfig(optimizer, learning_rate=0.003, weight_decay=0.1)
        self.network = OptimizedNetwork(self.run, model, settings, max_gradient_norm=0.5)
        average = self.network.shard() if shard == "full" else None
        self.ema = EMA(self.network.module, 0.9, average)

    def train(self, steps):
        """What a checkpoint holds, losses and gradient norms of steps of two passes each."""
        self.network.wrap()
        told = []
        for step in range(steps):
            batches = [self.share(seed) for seed in (2 * step, 2 * step + 1)]
            told.append(descend(self.network, batches, self.losses, step, steps))
            self.ema.update()
        names = ("loss", "gradient_norm")
        return self.saved() | {name: torch.stack([t[name] for t in told]) for name in names}

    def share(self, seed):
        draw = torch.Generator().manual_seed(seed)
        rank, number = self.run.accelerator.process_index, self.run.accelerator.num_processes
        rows = slice(rank * BATCH // number, (rank + 1) * BATCH // number)
        sizes = {"text": (5, 7), "image": (5, 3), "times": ()}
        return {n: torch.randn(BATCH, *size, generator=draw)[rows] for n, size in sizes.items()}

    def losses(self, model, batch):
        """Stage 3's, with the contrastive one over all processes."""
        tokens = SimpleNamespace(
            info=SimpleNamespace(latent_scale=1.0),
            text_states=lambda batch: batch["text"],
            image_posterior=lambda batch: Posterior(batch["image"], batch["image"]),
        )
        times = batch["times"].sigmoid()
        with patch.object(flow_model, "sample_times", lambda *_: times):
            return train_flowtok.compute_losses(self.config, tokens, model, batch)

    def saved(self):
        """What a checkpoint holds."""
        return {
            "model": ckpt.snapshot(self.network.module.state_dict()),
            "ema": ckpt.snapshot(self.ema.average.state_dict()),
            "optimizer": ckpt.snapshot(self.network.optimizer.state_dict()),
        }

    def load(self, folder):
        load_weights(self.network.module, folder / "model")
        load_weights(self.ema.average, folder / "ema")
        load_optimizer(self.network.optimizer, folder / "optimizer")


def train_each_way(folder, rank):
    """Results of each way in two processes, and what parts of a whole run's files become."""
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused
    results = {}
    for kind, (options, steps) in KINDS.items():
        for shard in ("none", "full"):
            results[kind, shard] = Training(shard, **options).train(steps)
    if rank == 0:
        save_file(results["", "none"]["model"], folder / "model")
        save_file(results["", "none"]["ema"], folder / "ema")
        torch.save(results["", "none"]["optimizer"], folder / "optimizer")
    dist.barrier()
    loaded = Training(shard="full")
    loaded.load(folder)
    results["loaded"] = loaded.saved()
    results["gathered"] = {"ema": ckpt.snapshot(loaded.ema.whole().state_dict())}
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Of both processes."""
    return in_two_processes(
        partial(train_each_way, tmp_path_factory.mktemp("files")), tmp_path_factory.mktemp("ranks")
    )


def tensors(values, prefix=""):
    """Those of nested dicts by dotted name, but AdamW's counters."""
    if isinstance(values, torch.Tensor):
        return {prefix: values}
    if not isinstance(values, dict):
        return {}
    parts = [tensors(value, f"{prefix}.{key}") for key, value in values.items() if key != "step"]
    return {name: tensor for part in parts for name, tensor in part.items()}


def difference(found, expected):
    """Of all tensors together, relative; shapes and types are the same."""
    found, expected = tensors(found), tensors(expected)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape, x.dtype) for n, x in expected.items()
    }
    flat = [torch.cat([x.double().flatten() for x in each.values()]) for each in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


# Adam turns the rounding of a gradient that should be 0, as a key's bias has, into whole steps:
# weights differ by more than losses, and as much between two kinds of whole weights.
@pytest.mark.parametrize(
    ("kind", "near", "near_weights"), [("", 3e-6, 3e-4), ("muon", 3e-6, 3e-4), ("bf16", 0.02, 0.03)]
)
def test_steps_are_those_of_whole_weights_to_rounding(two, kind, near, near_weights):
    options, steps = KINDS[kind]
    one, start = Training(**options).train(steps), Training().saved()["model"]
    whole, sharded = two[0][kind, "none"], two[0][kind, "full"]
    assert difference(one["model"], start) > 0.05
    assert difference(sharded["loss"], whole["loss"]) < near
    for other in (whole, one):
        assert difference(sharded["gradient_norm"], other["gradient_norm"]) < near
        for part in ("model", "ema", "optimizer"):
            assert difference(sharded[part], other[part]) < near_weights, part
    assert equal(two[1][kind, "full"]["model"], sharded["model"])


@pytest.mark.parametrize("kind", ["recomputed", "partly recomputed"])
def test_activation_checkpointing_changes_no_bit(two, kind):
    for name in ("loss", "gradient_norm"):
        assert equal(two[0][kind, "full"][name], two[0]["", "full"][name][:3])


def test_parts_of_a_whole_runs_files_are_those_files_again(two):
    for rank in two:
        for part, values in rank["loaded"].items():
            assert equal(values, two[0]["", "none"][part]), part
        assert equal(rank["gathered"]["ema"], two[0]["", "none"]["ema"])


# The programs


def flowtok(chain, folder, shard, max_steps):
    """A run of stage 3, two passes a step."""
    options = training(max_steps=max_steps, shard=shard, gradient_accumulation=2, log_every_steps=1)
    options.append("optimizer.schedule=constant")
    return ["flowtok", *program(chain, folder, "flowtok", *options)]


def test_killed_and_resumed_runs_end_bit_for_bit_alike_and_modes_may_change(chain, tmp_path):
    whole, parts, mixed = (tmp_path / name for name in ("whole", "parts", "mixed"))
    plans = [(whole, "full", 6), *zip([mixed] * 3, ("none", "full", "none"), (2, 4, 6))]
    done = run_on_two(whole, *(flowtok(chain, *plan) for plan in plans))
    assert done[0] == [0, 0], done[1]

    # Killed in the second pass of step 5.
    statuses, _ = run_on_two(parts, flowtok(chain, parts, "full", 6), killed_at=10)
    assert statuses == [-9, -9]
    statuses, said = run_on_two(parts, flowtok(chain, parts, "full", 6))
    assert statuses == [0, 0] and "resuming at step" in said, said
    expected = state(whole / "flowtok")
    assert equal(state(parts / "flowtok"), expected)
    assert metrics(parts / "flowtok") == metrics(whole / "flowtok")

    # The same but for rounding, also where it was not sharded; one process can go on.
    found = state(mixed / "flowtok")
    assert found["state"] == expected["state"]
    for part in ("model", "ema", ckpt.OPTIMIZER_FILE):
        assert difference(found[part], expected[part]) < 3e-4, part
    assert (mixed / "flowtok" / "samples" / "step_00000004.png").is_file()
    run = chain.run_in(mixed, "flowtok", *training(max_steps=8, shard="full"))
    draw(run, "--prompts", "a red circle", "--output", tmp_path / "x.png")
    assert metrics(run)[-1]["step"] == 8 and (tmp_path / "x.png").is_file()


def test_the_other_continuous_stages_train_the_same_weights_sharded(chain, tmp_path):
    stages = ["text_encoder", "tokenizer", "text_projector", "text_decoder"]
    words = []
    for shard in ("none", "full"):
        for stage in stages:
            options = training(shard=shard)
            words.append([stage, *program(chain, tmp_path / shard, stage, *options)])
    statuses, said = run_on_two(tmp_path / "log", *words)
    assert statuses == [0, 0], said
    for stage in stages:
        one, other = (state(tmp_path / shard / stage) for shard in ("none", "full"))
        for part in ("model", "ema", ckpt.OPTIMIZER_FILE):
            assert difference(one[part], other[part]) < 3e-4, (stage, part)
