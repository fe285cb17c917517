"""The training loop that all stages share.

A stage gives its networks, a data loader and `step(batches, index) -> terms`, which makes one
optimiser step. The randomness of a step is a function of (seed, rank, step), so that no random
state has to be saved; the position in the data is part of the checkpoint. Running the same command
again resumes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

import training.checkpoint as ckpt
from modeling.layers import load_weights
from training.errors import STOPPED_STATUS
from training.metrics import MetricLog, MetricWindow, Progress, TimedIterator, cut_captions
from training.optim import EMA, LossFn, OptimizedNetwork, descend, load_optimizer
from training.run import Run, seed_step
from training.stage import TrainedStage
from training.supervise import CONTINUE, supervised

# (batches of one optimiser step, its index from 0) -> the terms to log, on the device
StepFn = Callable[[Sequence[dict], int], dict[str, Tensor]]
SaveSamples = Callable[[nn.Module, int], None]  # (ema, step) -> a picture in the run folder


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the EMA weights while a stage trains."""

    every_steps: int
    measure: Callable[[nn.Module, int], dict[str, float]]  # (ema, step) -> values; all processes


def train_network(
    run: Run,
    stage: TrainedStage,
    module: nn.Module,
    loss_fn: LossFn,
    loader: StatefulDataLoader,
    inputs: dict,
    save_samples: SaveSamples | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """`train` for a stage of one network, whose step is one update by the mean loss."""
    max_steps = stage.training.max_steps
    network = OptimizedNetwork(run, module, stage.optimizer, stage.training.max_gradient_norm)

    def step(batches: Sequence[dict], index: int) -> dict[str, Tensor]:
        return descend(network, batches, loss_fn, index, max_steps)

    train(run, stage, {"": network}, step, loader, inputs, save_samples, evaluation)


def train(
    run: Run,
    stage: TrainedStage,
    networks: dict[str, OptimizedNetwork],
    step_fn: StepFn,
    loader: StatefulDataLoader,
    inputs: dict,
    save_samples: SaveSamples | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Train to `max_steps`, from the newest checkpoint on if there is one.

    Args:
        networks: by the prefix of their files in a checkpoint; "" is the one with an EMA.
        loader: of a data.shards.ShardStream.
        inputs: fingerprints of what earlier stages gave, kept in each checkpoint.
        save_samples: called on the main process.

    Raises:
        FloatingPointError: a loss or gradient became non-finite.
        SystemExit: STOPPED_STATUS, after a checkpoint, on a signal or after max_hours.
        OSError: what another process or the disk did, see training/supervise.py.
    """
    config = stage.training
    rank, max_steps = run.accelerator.process_index, config.max_steps
    network = networks[""]
    average = network.shard() if config.shard == "full" else None
    ema = EMA(network.module, config.ema_decay, average)
    window = MetricWindow()
    state = TrainingState(run, networks, ema, window, loader, inputs, config.keep_checkpoints)
    step = state.resume()

    # DDP compares the weights of all processes now, and torch.compile reads them.
    for each in networks.values():
        each.wrap(config.compile)

    with (
        supervised(run, loader, config.max_hours, config.timeout_minutes) as supervision,
        ckpt.BackgroundWriter() as writer,
    ):
        watched_batches, heartbeat, ask_to_stop = supervision
        log = MetricLog(run.folder, stage.logging, run.is_main, step)
        batches = TimedIterator(watched_batches)
        progress = Progress(run, config, batches, step)
        while step < max_steps:
            # Randomness: whoever runs this step draws the same numbers.
            seed_step(config.seed, rank, step)

            # One optimiser step. Nothing in it waits for the device.
            parts = [next(batches) for _ in range(config.gradient_accumulation)]
            terms = step_fn(parts, step) | cut_captions(parts, run.device)
            ema.update()
            step += 1
            window.add(step, terms, keys=[key for part in parts for key in part["key"]])

            # Do all processes stop here? They agree by asking after every step.
            stop_reason = ask_to_stop()
            is_last_step = step == max_steps

            # Report: the only place where values are read from the device.
            values: dict[str, float] = {}
            if is_last_step or step % config.log_every_steps == 0:
                window.check_finite(run.folder, rank)
                values |= progress.report(step, window, networks[""].optimizer)
                window.reset()

            # Evaluate the EMA weights; its time does not count for the rates.
            if evaluation and (is_last_step or step % evaluation.every_steps == 0):
                window.check_finite(run.folder, rank)
                with progress.pause():
                    values |= evaluation.measure(ema.whole(), step)

            # Log before the checkpoint: a resumed run neither lacks nor repeats a line.
            if values:
                log.log(step, max_steps, values, progress.seconds_left(step))

            # Pictures before the checkpoint: a complete run has its last one.
            is_sample_step = config.sample_every_steps and step % config.sample_every_steps == 0
            if save_samples and (is_last_step or is_sample_step):
                average = ema.whole()  # all processes help to gather it
                if run.is_main:
                    save_samples(average, step)

            # Checkpoint, written in the background.
            is_checkpoint_step = is_last_step or step % config.checkpoint_every_steps == 0
            if is_checkpoint_step or stop_reason:
                window.check_finite(run.folder, rank)
                log.flush()
                state.save(step, writer)
            writer.check()
            heartbeat()

            if stop_reason:
                break

        # To close the log may take long. Whoever left before would begin the next stage, and on
        # another machine meet this stage's process at the port that all stages share.
        writer.wait()
        log.close()
        run.accelerator.wait_for_everyone()
    if step < max_steps:
        run.say(f"{run.folder}: stopped at step {step} ({stop_reason}). {CONTINUE}")
        raise SystemExit(STOPPED_STATUS)
    run.say(f"{run.folder}: {progress.summary(step)}, now complete")


@dataclass
class TrainingState:
    """Networks, moments, average, position in the data, metrics that are not reported yet."""

    run: Run
    networks: dict[str, OptimizedNetwork]  # by the prefix of their files; "": the one with an EMA
    ema: EMA
    window: MetricWindow
    loader: StatefulDataLoader
    inputs: dict  # fingerprints of what earlier stages gave
    keep: int  # newest checkpoints

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one. Returns the steps that are done."""
        # The main process looks: the others need not read and check every byte again.
        is_main = self.run.is_main
        found = ckpt.latest_checkpoint(self.run.folder, verify=True) if is_main else None
        [latest] = broadcast_object_list([found])
        if latest is None:
            return 0
        step, folder = latest
        state = ckpt.read_state(folder)
        # All of it strictly: a part that is absent would be random, and nothing would show it.
        for prefix, network in self.networks.items():
            load_weights(network.module, folder / (prefix + ckpt.MODEL_FILE))
            load_optimizer(network.optimizer, folder / (prefix + ckpt.OPTIMIZER_FILE))
        load_weights(self.ema.average, folder / ckpt.EMA_FILE)
        self.ema.num_updates = state["ema_updates"]
        self._resume_rank(folder, state["num_processes"])
        self.run.say(f"{self.run.folder}: resuming at step {step}")
        return step

    def _resume_rank(self, folder: Path, num_processes: int) -> None:
        """Restore this process's position in the data and its unreported metrics.

        With another number of processes or workers, or another batch size, the data continues with
        the next epoch, so that none shows a sample twice.
        """
        # Where nothing about the readers has changed, they continue inside their epoch.
        if num_processes == self.run.accelerator.num_processes:
            rank = self.run.accelerator.process_index
            state = ckpt.load_plain(folder / ckpt.rank_file(rank))
            self.window.load_state_dict(state["metrics"], self.run.device)
            try:
                self.loader.load_state_dict(state["loader"])
                return
            except ValueError as error:
                reason = str(error)
        else:
            reason = f"the run had {num_processes} processes before"

        # The next epoch is that after the furthest of all old readers, not only of this rank's.
        files = [folder / ckpt.rank_file(rank) for rank in range(num_processes)]
        states = [ckpt.load_plain(file)["loader"] for file in files]
        try:
            epochs = ", ".join(map(str, self.loader.start_next_epoch(states)))
            self.run.say(f"data continues with epoch {epochs} (counted from 0): {reason}")
        except ValueError as error:
            self.run.say(f"data starts over: {error}")

    def save(self, step: int, writer: ckpt.BackgroundWriter) -> None:
        """Start writing a checkpoint in the background; all processes take part."""
        # Every process adds its own file to the folder that the main one has made.
        accelerator = self.run.accelerator
        if self.run.is_main:
            writer.wait()
            ckpt.begin_checkpoint(self.run.folder, step)
        accelerator.wait_for_everyone()
        folder = ckpt.partial_folder(self.run.folder, step)
        own = {"loader": self.loader.state_dict(), "metrics": self.window.state_dict()}
        with ckpt.explained_write_errors(folder):
            torch.save(own, folder / ckpt.rank_file(accelerator.process_index))
        accelerator.wait_for_everyone()

        # Copies on the CPU: training goes on while they are written. All gather what is sharded.
        snapshot = partial(ckpt.snapshot, is_kept=self.run.is_main)
        parts = {ckpt.EMA_FILE: snapshot(self.ema.average.state_dict())}
        for prefix, network in self.networks.items():
            parts[prefix + ckpt.MODEL_FILE] = snapshot(network.module.state_dict())
            parts[prefix + ckpt.OPTIMIZER_FILE] = snapshot(network.optimizer.state_dict())
        if not self.run.is_main:
            return
        values = {
            "step": step,
            "ema_updates": self.ema.num_updates,
            "num_processes": accelerator.num_processes,
            "inputs": self.inputs,
        }
        writer.start(partial(ckpt.write_checkpoint, folder, parts, values, self.keep))
