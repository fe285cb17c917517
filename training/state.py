"""The state of a training that a checkpoint keeps, and how a run goes on from it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torchdata.stateful_dataloader import StatefulDataLoader

from training import checkpoint as ckpt
from training.ema import EMA
from training.metrics import MetricWindow
from training.optim import OptimizedNetwork, load_optimizer
from training.run import Run


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
        found = [None]
        if self.run.is_main:
            found = [ckpt.latest_checkpoint(self.run.folder, verify=[ckpt.ALL_FILES])]
        latest = broadcast_object_list(found)[0]
        if latest is None:
            return 0
        step, folder = latest
        state = ckpt.read_state(folder)
        for prefix, network in self.networks.items():
            ckpt.load_weights(network.module, folder / (prefix + ckpt.MODEL_FILE))
            load_optimizer(network.optimizer, folder / (prefix + ckpt.OPTIMIZER_FILE))
        ckpt.load_weights(self.ema.average, folder / ckpt.EMA_FILE)
        self.ema.num_updates = state["ema_updates"]
        self._resume_rank(folder, state["num_processes"])
        self.run.say(f"{self.run.folder}: resuming at step {step}")
        return step

    def _resume_rank(self, folder: Path, num_processes: int) -> None:
        """Restore this process's position in the data and its unreported metrics.

        With another number of processes or workers, or another batch size, the data continues with
        the next epoch, so that none shows a sample twice.
        """
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
        files = [folder / ckpt.rank_file(rank) for rank in range(num_processes)]
        states = [ckpt.load_plain(file)["loader"] for file in files]
        try:
            epochs = ", ".join(map(str, self.loader.start_next_epoch(states)))
            self.run.say(f"data continues with epoch {epochs} (counted from 0): {reason}")
        except ValueError as error:
            self.run.say(f"data starts over: {error}")

    def save(self, step: int, writer: ckpt.BackgroundWriter) -> None:
        """Start writing a checkpoint in the background; all processes take part."""
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
        if not self.run.is_main:
            return
        # Copies on the CPU: training goes on while they are written.
        weights = {ckpt.EMA_FILE: ckpt.snapshot(self.ema.average.state_dict())}
        optimizers = {}
        for prefix, network in self.networks.items():
            weights[prefix + ckpt.MODEL_FILE] = ckpt.snapshot(network.module.state_dict())
            moments = ckpt.snapshot(network.optimizer.state_dict())
            optimizers[prefix + ckpt.OPTIMIZER_FILE] = moments
        values = {
            "step": step,
            "ema_updates": self.ema.num_updates,
            "num_processes": accelerator.num_processes,
            "inputs": self.inputs,
        }
        write = partial(ckpt.write_checkpoint, folder, weights, optimizers, values, self.keep)
        writer.start(write)
