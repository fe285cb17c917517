"""The training loop that all stages share.

A stage gives its networks, a data loader and `step(batches, index) -> terms`, which makes one
optimiser step. The randomness of a step is a function of (seed, rank, step), so that no random
state has to be saved; the position in the data is part of the checkpoint. Running the same command
again resumes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from training import checkpoint as ckpt
from training.ema import EMA
from training.metrics import LoggingConfig, MetricLog, MetricWindow, Progress, TimedIterator
from training.optim import OptimizedNetwork
from training.run import TIMEOUT_MINUTES, Run
from training.state import TrainingState
from training.supervise import CONTINUE, STOPPED_STATUS, supervised

# (batches of one optimiser step, its index from 0) -> the terms to log, on the device
StepFn = Callable[[Sequence[dict], int], dict[str, Tensor]]


@dataclass
class TrainingConfig:
    """Length, batch, precision and rhythm of a stage."""

    max_steps: int = 1000  # optimiser steps
    batch_size: int = 256  # samples per optimiser step, over all processes and accumulation steps
    gradient_accumulation: int = 1  # batches per optimiser step
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast; weights, optimiser, EMA stay float32
    compile: bool = False  # torch.compile for each block; a minute at the start, needs a compiler
    seed: int = 0
    max_gradient_norm: float = 1.0  # clip; 0 turns clipping off
    ema_decay: float = 0.9999
    log_every_steps: int = 50
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2  # newest ones kept
    max_hours: float = 0.0  # wall clock; then stop cleanly, before the queue does it. 0: no limit
    timeout_minutes: float = TIMEOUT_MINUTES  # abort if no step, picture or evaluation ends within
    sample_every_steps: int = 0  # pictures; 0: only at the end

    def __post_init__(self):
        minimum = {
            "max_steps": 1,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
            "keep_checkpoints": 1,
            "max_gradient_norm": 0,
            "sample_every_steps": 0,
            "seed": 0,
            "max_hours": 0,
        }
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.timeout_minutes < 1e6:
            raise ValueError(f"timeout_minutes must be in (0, 1e6), got {self.timeout_minutes}")


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the EMA weights while a stage trains."""

    every_steps: int
    measure: Callable[[nn.Module, int], dict[str, float]]  # (ema, step) -> values; all processes


def is_complete(run: Run, config: TrainingConfig, inputs: dict) -> bool:
    """True if the run has a checkpoint of its last step; says so.

    Raises:
        ValueError: its checkpoints were trained on other `inputs` (what earlier stages gave).
    """
    latest = ckpt.latest_checkpoint(run.folder)
    if latest is None:
        return False
    step, folder = latest
    ckpt.check_inputs(folder, inputs)
    if step >= config.max_steps:
        run.say(f"{run.folder}: complete at step {step}, nothing to do")
    return step >= config.max_steps


def batch_per_process(run: Run, config: TrainingConfig) -> int:
    """Samples in a batch of this process.

    Raises:
        ValueError: batch_size is not divisible by processes x accumulation.
    """
    num_processes = run.accelerator.num_processes
    batches = num_processes * config.gradient_accumulation
    if config.batch_size % batches:
        raise ValueError(
            f"training.batch_size {config.batch_size} is not divisible by processes x "
            f"gradient_accumulation = {num_processes} x {config.gradient_accumulation}"
        )
    return config.batch_size // batches


def train(
    run: Run,
    config: TrainingConfig,
    logging: LoggingConfig,
    networks: dict[str, OptimizedNetwork],
    step_fn: StepFn,
    loader,
    inputs: dict,
    save_samples: Callable[[nn.Module, int], None] | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Train to `max_steps`, from the newest checkpoint on if there is one.

    Args:
        networks: by the prefix of their files in a checkpoint; "" is the one with an EMA.
        loader: a StatefulDataLoader of a data.shards.ShardStream.
        inputs: fingerprints of what earlier stages gave, kept in each checkpoint.
        save_samples: (ema, step) -> a picture in the run folder; called on the main process.

    Raises:
        FloatingPointError: a loss or gradient became non-finite.
        SystemExit: STOPPED_STATUS, after a checkpoint, on a signal or after max_hours.
        OSError: what another process or the disk did, see training/supervise.py.
    """
    rank, max_steps = run.accelerator.process_index, config.max_steps
    network = networks[""]
    ema = EMA(network.module, config.ema_decay)
    window = MetricWindow()
    keep = config.keep_checkpoints
    state = TrainingState(run, networks, ema, window, loader, inputs, keep)
    step = state.resume()

    # DDP compares the weights of all processes now, and torch.compile reads them.
    for each in networks.values():
        each.wrap(config.compile)

    with (
        supervised(run, loader, config.max_hours, config.timeout_minutes) as supervisor,
        ckpt.BackgroundWriter() as writer,
    ):
        log = MetricLog(run.folder, logging, run.is_main, str(run.folder), step)
        batches = TimedIterator(supervisor.batches)
        progress = Progress(run, max_steps, config.batch_size, batches, step)
        while step < max_steps:
            # Randomness: whoever runs this step draws the same numbers.
            seed_step(config.seed, rank, step)

            # One optimiser step. Nothing in it waits for the device.
            parts = [next(batches) for _ in range(config.gradient_accumulation)]
            terms = step_fn(parts, step)
            ema.update()
            step += 1
            window.add(step, terms, keys=[key for part in parts for key in part["key"]])

            # Do all processes stop here? They agree by asking after every step.
            stop_reason = supervisor.stop_reason()
            is_last_step = step == max_steps

            # Report: the only place where values are read from the device.
            values: dict[str, float] = {}
            if is_last_step or step % config.log_every_steps == 0:
                window.check_finite(run.folder, rank)
                values |= progress.report(step, window, network.optimizer)
                window.reset()

            # Evaluate the EMA weights; its time does not count for the rates.
            if evaluation and (is_last_step or step % evaluation.every_steps == 0):
                window.check_finite(run.folder, rank)
                with progress.pause():
                    values |= evaluation.measure(ema.average, step)

            # Log before the checkpoint: a resumed run neither lacks nor repeats a line.
            if values:
                log.log(step, max_steps, values, progress.seconds_left(step))

            # Pictures before the checkpoint: a complete run has its last one.
            is_sample_step = config.sample_every_steps and step % config.sample_every_steps == 0
            if save_samples and run.is_main and (is_last_step or is_sample_step):
                save_samples(ema.average, step)

            # Checkpoint, written in the background.
            is_checkpoint_step = is_last_step or step % config.checkpoint_every_steps == 0
            if is_checkpoint_step or stop_reason:
                window.check_finite(run.folder, rank)
                log.flush()
                state.save(step, writer)
            writer.check()
            supervisor.heartbeat()

            # Stop, once the checkpoint is on disk.
            if stop_reason and not is_last_step:
                writer.wait()
                run.accelerator.wait_for_everyone()
                log.close()
                run.say(f"{run.folder}: stopped at step {step} ({stop_reason}). {CONTINUE}")
                raise SystemExit(STOPPED_STATUS)

        writer.wait()
        run.accelerator.wait_for_everyone()
    log.close()
    run.say(f"{run.folder}: {progress.summary(step)}, now complete")


def seed_step(seed: int, rank: int, step: int) -> None:
    """Make the randomness of a step a function of (seed, rank, step)."""
    mixed = np.random.SeedSequence(seed, spawn_key=(rank, step)).generate_state(1, np.uint32)
    torch.manual_seed(int(mixed[0]))
