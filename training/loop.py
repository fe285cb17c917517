"""The training loop that all stages share: resume, steps, accumulation, clipping, EMA, logs, samples, checkpoints.

A stage gives a model, a data loader and a function batch -> loss terms. The randomness of a step is a function of
(seed, rank, step), so that no random state has to be saved; the data position is part of the checkpoint.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from training import checkpoint as ckpt
from training.ema import EMA
from training.metrics import LoggingConfig, MetricLog, MetricSums
from training.optim import OptimizerConfig, build_optimizer, learning_rate, load_optimizer
from training.run import Run

LossFn = Callable[[nn.Module, dict], dict[str, Tensor]]  # (model, batch) -> terms; "loss" is what is minimised


@dataclass
class TrainingConfig:
    """Length, batch, precision and rhythm of a stage."""

    max_steps: int = 1000  # optimiser steps
    batch_size: int = 256  # samples per optimiser step, over all processes and accumulation steps
    gradient_accumulation: int = 1  # passes per optimiser step
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast; weights, optimiser and EMA stay float32
    seed: int = 0
    max_gradient_norm: float = 1.0  # clip; 0 turns clipping off
    ema_decay: float = 0.9999
    log_every_steps: int = 50
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2  # newest ones kept
    sample_every_steps: int = 0  # picture of samples; 0: only at the end

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "gradient_accumulation", "log_every_steps", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_checkpoints < 1:
            raise ValueError(f"training.keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        for name in ("max_gradient_norm", "sample_every_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} must not be negative, got {getattr(self, name)}")


def is_complete(run: Run, config: TrainingConfig, inputs: dict | None = None) -> bool:
    """True if the run has a checkpoint of its last step; says so.

    Raises:
        ValueError: its checkpoints were trained on other `inputs` (what earlier stages gave).
    """
    latest = ckpt.latest_checkpoint(run.folder)
    if latest is None:
        return False
    ckpt.check_inputs(latest[1], inputs or {})
    if latest[0] >= config.max_steps:
        run.say(f"{run.folder}: complete at step {latest[0]}, nothing to do")
    return latest[0] >= config.max_steps


def batch_per_pass(run: Run, config: TrainingConfig) -> int:
    """Samples per process and pass.

    Raises:
        ValueError: batch_size is not divisible by processes x accumulation.
    """
    passes = run.accelerator.num_processes * config.gradient_accumulation
    if config.batch_size % passes:
        raise ValueError(
            f"training.batch_size {config.batch_size} is not divisible by processes x gradient_accumulation = "
            f"{run.accelerator.num_processes} x {config.gradient_accumulation}"
        )
    return config.batch_size // passes


def seed_step(seed: int, rank: int, step: int) -> None:
    """Make the randomness of a step a function of (seed, rank, step)."""
    mixed = np.random.SeedSequence(seed, spawn_key=(rank, step)).generate_state(1, np.uint32)
    torch.manual_seed(int(mixed[0]))


def is_due(step: int, every: int, max_steps: int) -> bool:
    """Whether something that happens every `every` steps (0: never) and at the end happens after `step` steps."""
    return step == max_steps or (every > 0 and step % every == 0)


class Trainer:
    """State of one stage's training. Saved and resumed: model, ema, optimizer, step and the loader's position.

    `inputs` says what earlier stages gave (fingerprints); it is kept in each checkpoint.
    """

    def __init__(
        self,
        run: Run,
        config: TrainingConfig,
        optimizer: OptimizerConfig,
        model: nn.Module,
        loader,
        inputs: dict | None = None,
    ):
        self.run, self.config, self.optimizer_config, self.loader = run, config, optimizer, loader
        self.inputs = inputs or {}
        self.model = model.to(run.device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = build_optimizer(self.model, optimizer)
        self.step = 0
        self._resume()
        self.wrapped, self.wrapped_optimizer = run.accelerator.prepare(self.model, self.optimizer)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def _resume(self) -> None:
        latest = ckpt.latest_checkpoint(self.run.folder)
        if latest is None:
            return
        folder = latest[1]
        ckpt.load_weights(self.model, folder / ckpt.MODEL_FILE)
        ckpt.load_weights(self.ema.average, folder / ckpt.EMA_FILE)
        load_optimizer(self.optimizer, folder / ckpt.OPTIMIZER_FILE)
        state = ckpt.read_state(folder)
        self.step, self.ema.num_updates = state["step"], state["ema_updates"]
        self._resume_loader(folder, state["num_processes"])
        self.run.say(f"{self.run.folder}: resuming at step {self.step}")

    def _resume_loader(self, folder, num_processes: int) -> None:
        """Restore the data position; with another number of processes or batch size it can't be, and that is said."""
        if num_processes != self.run.accelerator.num_processes:
            self.run.say(f"data starts over: the run had {num_processes} processes before")
            return
        path = folder / ckpt.loader_file(self.run.accelerator.process_index)
        try:
            self.loader.load_state_dict(torch.load(path, weights_only=True))
        except ValueError as error:
            self.run.say(f"data starts over: {error}")

    def save(self) -> None:
        """Write a checkpoint of the current step; all processes take part."""
        accelerator, run_dir = self.run.accelerator, self.run.folder
        if self.run.is_main:
            ckpt.begin_checkpoint(run_dir, self.step)
        accelerator.wait_for_everyone()
        partial = run_dir / "checkpoints" / f"{ckpt.PREFIX}{self.step:08d}{ckpt.PARTIAL_SUFFIX}"
        torch.save(self.loader.state_dict(), partial / ckpt.loader_file(accelerator.process_index))
        if self.run.is_main:
            state = {"step": self.step, "ema_updates": self.ema.num_updates, "inputs": self.inputs}
            state["num_processes"] = accelerator.num_processes
            ckpt.write_shared_state(partial, self.model, self.ema.average, self.optimizer, state)
        accelerator.wait_for_everyone()
        if self.run.is_main:
            ckpt.commit_checkpoint(partial, self.config.keep_checkpoints)
        accelerator.wait_for_everyone()

    def optimizer_step(self, batches: Iterator[dict], loss_fn: LossFn) -> dict[str, Tensor]:
        """One optimiser step over `gradient_accumulation` passes; returns the mean terms, on the device."""
        passes = self.config.gradient_accumulation
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optimizer_config, self.step, self.config.max_steps)
        sums: dict[str, Tensor] = {}
        for index in range(passes):
            batch = next(batches)
            last = index == passes - 1
            with contextlib.nullcontext() if last else self.run.accelerator.no_sync(self.wrapped):
                terms = loss_fn(self.wrapped, batch)
                self.run.accelerator.backward(terms["loss"] / passes)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / passes
        limit = self.config.max_gradient_norm or float("inf")
        sums["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.trainable, limit, foreach=True)
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return sums

    def train(self, loss_fn: LossFn, logging: LoggingConfig, save_samples: Callable[[nn.Module, int], None]) -> None:
        """Run to max_steps. `save_samples(ema_model, step)` makes a picture; called on the main process only.

        Raises:
            FloatingPointError: a loss or gradient became non-finite.
        """
        config, run = self.config, self.run
        self.wrapped.train()
        sums = MetricSums(run.device)
        log = MetricLog(run.folder, logging, run.is_main, str(run.folder), self.step)
        batches = TimedIterator(iter(self.loader))
        start, mark = time.perf_counter(), time.perf_counter()
        first_step, marked_step = self.step, self.step
        while self.step < config.max_steps:
            seed_step(config.seed, run.accelerator.process_index, self.step)
            terms = self.optimizer_step(batches, loss_fn)
            self.step += 1
            sums.add(self.step, terms)
            if is_due(self.step, config.log_every_steps, config.max_steps):
                means = sums.means(lambda x: run.accelerator.reduce(x, reduction="mean"))
                now = time.perf_counter()
                means["learning_rate"] = self.optimizer.param_groups[0]["lr"]
                means["samples_per_second"] = (self.step - marked_step) * config.batch_size / (now - mark)
                means["data_wait_share"] = batches.take_seconds() / (now - mark)
                means |= {f"skipped/{reason}": count for reason, count in batches.take_skipped().items()}
                left = (now - start) / (self.step - first_step) * (config.max_steps - self.step)
                log.log(self.step, config.max_steps, means, left)
                sums.check_finite()
                sums.reset()
                mark, marked_step = now, self.step
            if is_due(self.step, config.sample_every_steps, config.max_steps) and run.is_main:
                save_samples(self.ema.average, self.step)
            if is_due(self.step, config.checkpoint_every_steps, config.max_steps):
                sums.check_finite()
                self.save()  # after the picture: a complete run has its last one
        run.accelerator.wait_for_everyone()
        log.close()
        run.say(f"{run.folder}: {self.step - first_step} steps in {time.perf_counter() - start:.0f} s, now complete")


class TimedIterator:
    """Counts the seconds spent waiting for batches and the samples that the readers skipped, by reason."""

    def __init__(self, batches: Iterator[dict]):
        self._batches, self._seconds, self._skipped = batches, 0.0, {}

    def __iter__(self) -> "TimedIterator":
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        batch = next(self._batches)
        self._seconds += time.perf_counter() - start
        for reason, count in batch.pop("skipped", {}).items():
            self._skipped[reason] = self._skipped.get(reason, 0) + count
        return batch

    def take_seconds(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def take_skipped(self) -> dict[str, int]:
        """Skipped samples of this process since the last call, by reason."""
        skipped, self._skipped = self._skipped, {}
        return skipped
