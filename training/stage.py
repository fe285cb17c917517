"""What the config of every stage has.

A program's dataclass extends StageConfig (or TrainedStage) with its own fields and a `check()`;
scripts/run_experiment asks the methods below before the first stage of an experiment starts.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.readers import Reader
from data.shards import ShardLoader
from modeling.layers import check_least
from training.metrics import LoggingConfig
from training.optim import OptimizerConfig
from training.run import TIMEOUT_MINUTES, Run


@dataclass
class StageConfig:
    """Where a stage reads and writes."""

    runs_dir: str = "runs"  # the results of all experiments
    experiment_dir: str = "${runs_dir}/experiment"  # of this one; default: the YAML's folder name
    run_dir: str = "${experiment_dir}/stage"  # of this stage; default: the YAML's name
    data_dir: str = "datasets"  # where experiments that bring no data look for image shards

    stage: ClassVar[str]  # the name of the program's stage
    networks: ClassVar[tuple[str, ...]] = ()  # sections, keys that can't change in a started run

    def __post_init__(self):
        for name in ("runs_dir", "experiment_dir", "run_dir", "data_dir"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty, expected a folder")

    def check(self) -> None:
        """Refuse combinations that can't work: ValueError names the keys and what is given."""
        if data := getattr(self, "data", None):
            data.check()

    def image_shards(self) -> list[str]:
        """Patterns of shards that must be there before the stage starts."""
        return []

    def token_shards(self) -> list[str]:
        """Patterns of shards that an earlier stage may write."""
        return []

    def outputs(self) -> list[str]:
        """The image shards that the stage writes."""
        return []

    def earlier_runs(self) -> dict[str, str]:
        """Folders of the runs that the stage reads, by key; an earlier stage may make them."""
        keys = ("tokenizer_run", "projector_run", "init_from", "text_decoder_run")
        return {key: run for key in keys if (run := getattr(self, key, ""))}


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
    # full: weights, gradients, moments and EMA are split among the processes (FSDP2), for networks
    # that do not fit one GPU. A run may change from one to the other.
    shard: Literal["none", "full"] = "none"
    # Processes that train_flowtok.sh starts without GPUs, at most one a core, unless NUM_PROCESSES
    # says how many. Threads do not speed up the smallest networks, processes do.
    cpu_processes: int = 1

    def __post_init__(self):
        check_least(self, 1, "max_steps", "batch_size", "gradient_accumulation", "cpu_processes")
        check_least(self, 1, "log_every_steps", "checkpoint_every_steps", "keep_checkpoints")
        check_least(self, 0, "max_gradient_norm", "sample_every_steps", "seed", "max_hours")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 < self.timeout_minutes < 1e6:
            raise ValueError(f"timeout_minutes must be in (0, 1e6), got {self.timeout_minutes}")

    def split_batch(self, num_processes: int) -> int:
        """Samples in a batch of one process; ValueError: batch_size is not divisible."""
        # DDP averages over processes: with batches of two sizes, samples would not count alike.
        batches = num_processes * self.gradient_accumulation
        if self.batch_size % batches:
            raise ValueError(
                f"training.batch_size {self.batch_size} is not divisible by processes x "
                f"gradient_accumulation = {num_processes} x {self.gradient_accumulation}"
            )
        return self.batch_size // batches


@dataclass
class TrainedStage(StageConfig):
    """A stage with a training loop."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def check(self) -> None:
        """Refuse what the training loop can't do."""
        is_selective = getattr(self, "activation_checkpointing", "none") == "selective"
        if self.training.compile and is_selective:
            raise ValueError(
                "training.compile=true with activation_checkpointing=selective: the compiler "
                "chooses what is kept, set activation_checkpointing to none or full"
            )
        # Both wrap the blocks; together they have not been tried.
        if self.training.shard == "full":
            if self.training.compile:
                raise ValueError("training.shard=full with training.compile=true: set one of them")
            if self.stage in ("next_scale", "reader") or getattr(self, "dual", None):
                raise ValueError("training.shard=full: not with a dual tokenizer, set it to none")
        super().check()


def open_stream(run: Run, training: TrainingConfig, reader: Reader) -> ShardLoader:
    """This process's endless batches of what a reader reads."""
    num_processes = run.accelerator.num_processes
    return reader.stream(
        training.split_batch(num_processes),
        training.seed,
        run.accelerator.process_index,
        num_processes,
        pin_memory=run.device.type == "cuda",
    )
