"""What the config of every stage has.

A program's dataclass extends StageConfig (or TrainedStage) with its own fields and a `check()`;
scripts/run_experiment.py asks the methods below before the first stage of an experiment starts.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from training.loop import TrainingConfig
from training.metrics import LoggingConfig
from training.optim import OptimizerConfig


@dataclass
class StageConfig:
    """Where a stage reads and writes."""

    runs_dir: str = "runs"  # the results of all experiments
    experiment_dir: str = "${runs_dir}/experiment"  # of this one; default: the YAML's folder name
    run_dir: str = "${experiment_dir}/stage"  # of this stage; default: the YAML's name
    data_dir: str = "datasets"  # where experiments that bring no data look for image shards

    stage: ClassVar[str]  # the name of the program's stage
    networks: ClassVar[tuple[str, ...]] = ()  # sections that can't change in a started run

    def check(self) -> None:
        """Refuse combinations that can't work.

        Raises:
            ValueError: naming the keys, what was given and what is expected.
        """

    def image_shards(self) -> list[str]:
        """Patterns of shards that must be there before the stage starts."""
        return []

    def token_shards(self) -> list[str]:
        """Patterns of shards that an earlier stage may write."""
        return []

    def earlier_runs(self) -> dict[str, str]:
        """Folders of the runs that the stage reads, by key; an earlier stage may make them."""
        return {}


@dataclass
class TrainedStage(StageConfig):
    """A stage with a training loop."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def check(self) -> None:
        """Refuse what the training loop can't do."""
        checkpointing = getattr(self, "activation_checkpointing", "none")
        if self.training.compile and checkpointing == "selective":
            raise ValueError(
                "training.compile=true with activation_checkpointing=selective: the compiler "
                "chooses what is kept, set activation_checkpointing to none or full"
            )
