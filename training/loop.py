"""The training loop that all stages share: resume, steps, accumulation, clipping, EMA, logs, samples, checkpoints.

A stage gives a model, a data loader and a function batch -> loss terms. The randomness of a step is a function of
(seed, rank, step), so that no random state has to be saved; the data position is part of the checkpoint.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial as partial_function
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from training import checkpoint as ckpt
from training.ema import EMA
from training.faults import Watchdog, end_without, explain_faults, outlive_requests
from training.metrics import LoggingConfig, MetricLog, MetricWindow
from training.optim import OptimizerConfig, load_optimizer
from training.player import Opponent, Player
from training.run import TIMEOUT_MINUTES, Run, lock_run
from training.stop import STOPPED_STATUS, StopRequest, clear_mark, mark_stopped

BAD_STEPS_WINDOW = 1000  # steps
LossFn = Callable[
    [nn.Module, dict], dict[str, Tensor]
]  # (model, batch) -> terms; "loss" is what is minimised


@dataclass
class TrainingConfig:
    """Length, batch, precision and rhythm of a stage."""

    max_steps: int = 1000  # optimiser steps
    batch_size: int = 256  # samples per optimiser step, over all processes and accumulation steps
    gradient_accumulation: int = 1  # passes per optimiser step
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast; weights, optimiser and EMA stay float32
    compile: bool = False  # torch.compile for each transformer block; a minute at the start, needs a C++ compiler
    seed: int = 0
    max_gradient_norm: float = 1.0  # clip; 0 turns clipping off
    ema_decay: float = 0.9999
    log_every_steps: int = 50
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2  # newest ones kept
    keep_every_steps: int = 0  # those of steps that are a multiple of this are kept, too; 0: none
    max_hours: float = 0.0  # wall clock; then stop cleanly, before the queue does it. 0: no limit
    timeout_minutes: float = (
        TIMEOUT_MINUTES  # one that gets no step, picture, evaluation done for so long ends
    )
    max_bad_steps: int = (
        0  # of 1000 steps, those with a non-finite loss or gradient that are left out; more: stop
    )
    sample_every_steps: int = 0  # picture of samples; 0: only at the end

    def __post_init__(self):
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "log_every_steps",
            "checkpoint_every_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_checkpoints < 1:
            raise ValueError(
                f"training.keep_checkpoints must be at least 1, got {self.keep_checkpoints}"
            )
        if not 0 < self.timeout_minutes < 1e6:
            raise ValueError(
                f"training.timeout_minutes must be in (0, 1e6), got {self.timeout_minutes}"
            )
        names = (
            "max_gradient_norm",
            "sample_every_steps",
            "seed",
            "keep_every_steps",
            "max_hours",
            "max_bad_steps",
        )
        for name in names:
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


def printable(key: str) -> str:
    """A sample's key from data of unknown origin, short and on one line."""
    return key if key.isprintable() and len(key) <= 100 else ascii(key[:100])


def describe_bad_step(step: int, rank: int, terms: dict[str, float], keys: list[str]) -> str:
    """One line on a step with a non-finite value, with the samples if the loss of this process is the cause."""
    own_fault = any(
        not math.isfinite(v) for name, v in terms.items() if not name.endswith("gradient_norm")
    )
    samples = (
        f"samples: {', '.join(map(printable, keys))}"
        if own_fault
        else "the loss of this process is finite"
    )
    shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    return f"non-finite loss or gradient at step {step}, rank {rank}: {shown}; {samples}"


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the EMA weights while a stage trains."""

    every_steps: int
    measure: Callable[
        [nn.Module, int], dict[str, float]
    ]  # (ema_model, step) -> values to log; on all processes


class Trainer:
    """State of one stage's training. Saved and resumed: model, ema, optimizer, step and the loader's position.

    `inputs` says what earlier stages gave (fingerprints); it is kept in each checkpoint. The weights and the optimiser
    of an opponent are kept as well; its metrics are named "discriminator/...".
    """

    def __init__(
        self,
        run: Run,
        config: TrainingConfig,
        optimizer: OptimizerConfig,
        model: nn.Module,
        loader,
        inputs: dict | None = None,
        opponent: Opponent | None = None,
    ):
        self.run, self.config, self.loader, self.opponent = run, config, loader, opponent
        self.inputs = inputs or {}
        self.player = Player(run, model, optimizer)
        self.ema = EMA(self.player.model, config.ema_decay)
        self.step = 0
        self.bad_steps: list[int] = []  # recent steps with a non-finite loss or gradient
        self.window = MetricWindow()
        self.writer = ckpt.BackgroundWriter()
        self._resume()
        for player in self._players().values():
            player.prepare(config.compile)

    def _players(self) -> dict[str, Player]:
        """The players by the prefix of their files in a checkpoint."""
        return {"": self.player} | (
            {"discriminator_": self.opponent.player} if self.opponent else {}
        )

    def _resume(self) -> None:
        folder = self._newest_checkpoint()
        if folder is None:
            return
        for prefix, player in self._players().items():
            ckpt.load_weights(player.model, folder / (prefix + ckpt.MODEL_FILE))
            load_optimizer(player.optimizer, folder / (prefix + ckpt.OPTIMIZER_FILE))
        ckpt.load_weights(self.ema.average, folder / ckpt.EMA_FILE)
        state = ckpt.read_state(folder, ("step", "ema_updates", "bad_steps", "num_processes"))
        self.step, self.ema.num_updates, self.bad_steps = (
            state["step"],
            state["ema_updates"],
            state["bad_steps"],
        )
        self._resume_rank(folder, state["num_processes"])
        self.run.say(f"{self.run.folder}: resuming at step {self.step}")

    def _newest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose contents are whole, as the main process finds it."""
        found = (
            [ckpt.latest_checkpoint(self.run.folder, verify_contents=True)]
            if self.run.is_main
            else [None]
        )
        latest = broadcast_object_list(found)[0]
        return latest[1] if latest else None

    def _resume_rank(self, folder: Path, num_processes: int) -> None:
        """Restore the data position exactly; with other processes, workers or batches, go on with the next epoch."""
        if num_processes == self.run.accelerator.num_processes:
            state = ckpt.load_plain(folder / ckpt.rank_file(self.run.accelerator.process_index))
            self.window.load_state_dict(state["metrics"], self.run.device)
            try:
                self.loader.load_state_dict(state["loader"])
                return
            except ValueError as error:
                reason = str(error)
        else:
            reason = f"the run had {num_processes} processes before"
        states = [
            ckpt.load_plain(folder / ckpt.rank_file(rank))["loader"]
            for rank in range(num_processes)
        ]
        try:
            epochs = ", ".join(map(str, self.loader.start_next_epoch(states)))
            self.run.say(
                f"data goes on with epoch {epochs} (from 0), so that no epoch shows a sample twice: {reason}"
            )
        except ValueError as error:
            self.run.say(f"data starts over: {error}")

    def save(self) -> None:
        """Start writing a checkpoint of the current step in the background; all processes take part."""
        accelerator, run_dir = self.run.accelerator, self.run.folder
        if self.run.is_main:
            self.writer.wait()
            ckpt.begin_checkpoint(run_dir, self.step)
        accelerator.wait_for_everyone()
        partial = run_dir / "checkpoints" / f"{ckpt.PREFIX}{self.step:08d}{ckpt.PARTIAL_SUFFIX}"
        own = {"loader": self.loader.state_dict(), "metrics": self.window.state_dict()}
        with ckpt.writing(partial):
            torch.save(own, partial / ckpt.rank_file(accelerator.process_index))
        accelerator.wait_for_everyone()
        if self.run.is_main:
            weights = {ckpt.EMA_FILE: ckpt.snapshot(self.ema.average.state_dict())}
            optimizers = {}
            for prefix, player in self._players().items():
                weights[prefix + ckpt.MODEL_FILE] = ckpt.snapshot(player.model.state_dict())
                optimizers[prefix + ckpt.OPTIMIZER_FILE] = ckpt.snapshot(
                    player.optimizer.state_dict()
                )
            state = {
                "step": self.step,
                "ema_updates": self.ema.num_updates,
                "bad_steps": self.bad_steps,
            }
            state |= {"inputs": self.inputs, "num_processes": accelerator.num_processes}
            keep = self.config.keep_checkpoints, self.config.keep_every_steps
            self.writer.start(
                partial_function(ckpt.write_checkpoint, partial, weights, optimizers, state, *keep)
            )

    def check_finite(self) -> None:
        """Count the steps since the last report that had a non-finite value; they changed no weights.

        Raises:
            FloatingPointError: more of the last 1000 steps than training.max_bad_steps; names step, rank, terms, keys.
        """
        bad = [entry for entry in self.window.bad_steps() if entry[0] not in self.bad_steps]
        self.bad_steps = [
            step for step in self.bad_steps if step > self.step - BAD_STEPS_WINDOW
        ] + [b[0] for b in bad]
        for step, terms, keys in bad:
            text = describe_bad_step(step, self.run.accelerator.process_index, terms, keys)
            if len(self.bad_steps) > self.config.max_bad_steps:
                raise FloatingPointError(
                    f"{text}. The last checkpoint of {self.run.folder} is from before it. Lower the learning rate or "
                    f"training.max_gradient_norm, or let training.max_bad_steps of {BAD_STEPS_WINDOW} steps be left out"
                )
            print(f"left out: {text}", flush=True)

    def optimizer_step(self, batches: Iterator[dict], loss_fn: LossFn) -> None:
        """One optimiser step over `gradient_accumulation` passes; the mean terms go to the window, on the device."""
        passes, opponent = self.config.gradient_accumulation, self.opponent
        is_game = opponent is not None and self.step >= opponent.start_step
        sums: dict[str, Tensor] = {}
        keys: list[str] = []
        for index in range(passes):
            batch, is_last = next(batches), index == passes - 1
            keys += batch["key"]
            terms = self.player.backward(
                lambda model, batch=batch: loss_fn(model, batch), passes, is_last
            )
            if is_game:
                others = opponent.player.backward(opponent.loss_fn, passes, is_last)
                terms |= {f"discriminator/{name}": value for name, value in others.items()}
            sums = {
                name: value + sums[name] if name in sums else value for name, value in terms.items()
            }
        sums["gradient_norm"] = self.player.update(
            self.step, self.config.max_steps, self.config.max_gradient_norm
        )
        self.ema.update()
        if is_game:
            own_step, own_steps = (
                self.step - opponent.start_step,
                self.config.max_steps - opponent.start_step,
            )
            norm = opponent.player.update(own_step, own_steps, self.config.max_gradient_norm)
            sums["discriminator/gradient_norm"] = norm
            opponent.after_step()
        self.step += 1
        self.window.add(self.step, sums, keys)

    def train(
        self,
        loss_fn: LossFn,
        logging: LoggingConfig,
        save_samples: Callable[[nn.Module, int], None],
        evaluation: Evaluation | None = None,
    ) -> None:
        """Run to max_steps. `save_samples(ema_model, step)` makes a picture; called on the main process only.

        Raises:
            FloatingPointError: losses or gradients became non-finite.
            SystemExit: status STOPPED_STATUS, after a checkpoint, on a signal or when max_hours are over.
            OSError: what another process or the disk did, see training/faults.py.
        """
        clear_mark(self.run.folder)
        for player in self._players().values():
            player.wrapped.train()
        self.loader.worker_init_fn = outlive_requests
        with explain_faults() as workers:
            batches = TimedIterator(
                iter(self.loader)
            )  # before the lock: workers of a killed trainer would hold it
            workers += multiprocessing.active_children()
            with lock_run(self.run), end_without(workers):
                self._run_steps(loss_fn, batches, logging, save_samples, evaluation)

    def _run_steps(
        self,
        loss_fn: LossFn,
        batches: "TimedIterator",
        logging: LoggingConfig,
        save_samples,
        evaluation,
    ) -> None:
        """The steps that are left, with all that happens between them."""
        config, run = self.config, self.run
        log = MetricLog(run.folder, logging, run.is_main, str(run.folder), self.step)
        report = Progress(self, batches)
        watchdog = Watchdog(config.timeout_minutes)
        with (
            watchdog,
            StopRequest(config.max_hours, run.started, config.timeout_minutes) as stop,
            self.writer,
        ):
            while self.step < config.max_steps:
                seed_step(config.seed, run.accelerator.process_index, self.step)
                self.optimizer_step(batches, loss_fn)
                reason = stop.reason()
                values = {}
                if is_due(self.step, config.log_every_steps, config.max_steps):
                    self.check_finite()
                    values |= report.take()
                    self.window.reset()
                if evaluation and is_due(self.step, evaluation.every_steps, config.max_steps):
                    self.check_finite()
                    with report.pause():
                        values |= evaluation.measure(self.ema.average, self.step)
                if values:  # one line a step; before the checkpoint, so that a resumed run neither lacks nor repeats it
                    log.log(self.step, config.max_steps, values, report.seconds_left())
                if is_due(self.step, config.sample_every_steps, config.max_steps) and run.is_main:
                    save_samples(self.ema.average, self.step)
                if is_due(self.step, config.checkpoint_every_steps, config.max_steps) or reason:
                    self.check_finite()
                    log.flush()
                    self.save()  # after the picture: a complete run has its last one
                self.writer.check()
                watchdog.pat()
                if reason and self.step < config.max_steps:
                    self._stop(log, reason)
            self.writer.wait()
            run.accelerator.wait_for_everyone()
        log.close()
        run.say(f"{run.folder}: {report.summary()}, now complete")

    def _stop(self, log: MetricLog, reason: str) -> None:
        """End the program once the checkpoint is on disk."""
        self.writer.wait()
        self.run.accelerator.wait_for_everyone()
        log.close()
        if self.run.is_main:
            mark_stopped(self.run.folder, reason)
        self.run.say(
            f"{self.run.folder}: stopped at step {self.step} ({reason}); run the same command again to go on"
        )
        raise SystemExit(STOPPED_STATUS)


class Progress:
    """Means, rates and the time left, for a report."""

    def __init__(self, trainer: Trainer, batches: "TimedIterator"):
        self.trainer, self.batches = trainer, batches
        self.start = self.mark = time.perf_counter()
        self.first_step = self.marked_step = trainer.step

    def take(self) -> dict[str, float]:
        """Values; the rates are those since the last call."""
        trainer, config, now = self.trainer, self.trainer.config, time.perf_counter()
        values = trainer.window.means(lambda x: trainer.run.accelerator.reduce(x, reduction="mean"))
        values["learning_rate"] = trainer.player.optimizer.param_groups[0]["lr"]
        values["samples_per_second"] = (
            (trainer.step - self.marked_step) * config.batch_size / (now - self.mark)
        )
        values["data_wait_share"] = self.batches.take_seconds() / (now - self.mark)
        for skipped in gather_object([self.batches.take_skipped()]):  # of all processes
            for reason, count in skipped.items():
                values[f"skipped/{reason}"] = values.get(f"skipped/{reason}", 0) + count
        self.mark, self.marked_step = now, trainer.step
        return values

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count for the rates."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def seconds_left(self) -> float:
        """Until the last step, at the speed so far, pictures and evaluations included."""
        done, left = (
            self.trainer.step - self.first_step,
            self.trainer.config.max_steps - self.trainer.step,
        )
        return (time.perf_counter() - self.start) / done * left

    def summary(self) -> str:
        """Steps and seconds of this start."""
        return f"{self.trainer.step - self.first_step} steps in {time.perf_counter() - self.start:.0f} s"


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
