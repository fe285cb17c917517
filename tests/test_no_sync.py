"""Between two log lines the training loop never waits for the device: no .item(), bool(), float().

On the CPU such reads are seen by the operators behind them (_local_scalar_dense; those whose output
size is data) and by the methods that copy to the host, wherever they are called from. On a GPU
torch's sync debug mode refuses whatever else waits. Samples are read in a worker process, as in a
real run: what it does is not the loop's.
"""

import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from test_tokenizer_stage import GAME
from tiny_experiment import training
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_tokenizer
from modeling import perceptual
from modeling.discriminator import Discriminator
from training import loop
from training.metrics import MetricLog, MetricWindow

ROOT = Path(__file__).parents[1]
ATEN = torch.ops.aten
WAITING_OPS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal}
WAITING_OPS |= {ATEN.is_nonzero, ATEN._unique2, ATEN.unique_consecutive, ATEN.unique_dim}
WAITING_METHODS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item}
STAGES = ["tokenizer", "text_projector", "flowtok"]


def is_ours(file: str) -> bool:
    """Whether a file is the product's: not this test, nor of an environment in the folder."""
    return ROOT in Path(file).parents and "site-packages" not in file and file != __file__


class Watch:
    """Places of this repository from which a value was read while it is on."""

    def __init__(self):
        self.is_on = False
        self.steps = 0
        self.found: list[str] = []

    def note(self, what, waits) -> None:
        if self.is_on and waits:
            place = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)][-1]
            name = Path(place.filename).relative_to(ROOT)
            self.found.append(f"{what} at {name}:{place.lineno}")

    def modes(self) -> tuple:
        """What sees each operator and each method of a tensor."""
        watch = self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                watch.note(func, func._overloadpacket in WAITING_OPS)
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                watch.note(func, func in WAITING_METHODS)
                return func(*args, **(kwargs or {}))

        return Operators(), Methods()


@contextmanager
def watching(monkeypatch):
    """Watch the steps of a training, from a step's begin to the next log line."""
    watch, seed_step, log = Watch(), loop.seed_step, MetricLog.log
    check = MetricWindow.check_finite

    def refuse_syncs(is_on):
        watch.is_on = is_on
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if is_on else "default")

    def watched_step(*args):  # the first thing of a step
        refuse_syncs(True)
        watch.steps += 1
        seed_step(*args)

    def stop_watching(function):
        def stopped(*args, **kwargs):
            refuse_syncs(False)
            function(*args, **kwargs)

        return stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "seed_step", watched_step)
        # the first of what happens for a log line
        patch.setattr(MetricWindow, "check_finite", stop_watching(check))
        patch.setattr(MetricLog, "log", stop_watching(log))
        try:
            operators, methods = watch.modes()
            with operators, methods:
                yield watch
        finally:
            refuse_syncs(False)


def train(chain, folder, stage, monkeypatch, *options, steps=6, log_every=3):
    """What is found in a run of so many steps."""
    length = training(max_steps=steps, log_every_steps=log_every, sample_every_steps=0)
    length += [*training(checkpoint_every_steps=steps), "data.num_workers=1"]
    with watching(monkeypatch) as watch:
        chain.run_in(folder, stage, *length, *options)
    assert watch.steps == steps
    return watch.found


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_no_step_between_log_lines_waits_for_the_device(chain, tmp_path, monkeypatch, stage):
    assert train(chain, tmp_path, stage, monkeypatch) == []


def test_nor_with_every_loss_of_stage_1(chain, tmp_path, monkeypatch, vgg_file, convnext_file):
    monkeypatch.setattr(perceptual, "CONVNEXT_SIZE", 64)  # 224 take seconds
    monkeypatch.setattr(train_tokenizer, "Discriminator", partial(Discriminator, width=32))
    options = [option for option in GAME if not option.startswith("training.")]
    options += ["training.batch_size=2", "losses.perceptual_weight=1.1"]
    options += [f"perceptual.vgg_weights={vgg_file}", "activation_checkpointing=selective"]
    options += [f"perceptual.convnext_weights={convnext_file}"]
    assert train(chain, tmp_path, "tokenizer", monkeypatch, *options, steps=4, log_every=4) == []


def test_nor_in_bf16_with_accumulation_and_checkpointing_in_stage_3(chain, tmp_path, monkeypatch):
    options = ["activation_checkpointing=full", "training.precision=bf16"]
    options.append("training.gradient_accumulation=2")
    assert train(chain, tmp_path, "flowtok", monkeypatch, *options) == []


def test_a_read_in_the_loop_is_found_and_its_place_is_named(chain, tmp_path, monkeypatch):
    def update(self, update=loop.EMA.update):
        update(self)
        self.average.latent_scale.sum().item()

    monkeypatch.setattr(loop.EMA, "update", update)
    found = train(chain, tmp_path, "flowtok", monkeypatch)
    assert len(found) == 2 * 6  # each item() and the operator behind it
    # The loop called what this test put there.
    assert all(" at training/loop.py:" in place for place in found)
