"""Which stages a command line names, with their configs: experiments, STAGES, overrides."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import load_config

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from training.stage import StageConfig

PROGRAMS = {  # stage -> module and dataclass of its program
    "text_encoder": ("scripts.train_text_encoder", "TextEncoderStage"),
    "tokenizer": ("train_tokenizer", "TokenizerStage"),
    "tokens": ("scripts.encode_tokens", "TokensStage"),
    "text_projector": ("train_text_projector", "TextProjectorStage"),
    "text_decoder": ("train_text_decoder", "TextDecoderStage"),
    "flowtok": ("train_flowtok", "FlowTokStage"),
    "report": ("eval.report", "ReportStage"),
}
ORDER = (  # of the YAML files of an experiment: stages, and further rounds of them
    *("text_encoder", "tokenizer", "tokens", "text_projector", "flowtok"),
    *("tokens_finetune", "flowtok_finetune", "tokenizer_512", "tokens_512", "flowtok_512"),
    *("text_decoder", "flowtok_caption", "report"),
)


@dataclass(frozen=True)
class Stage:
    """A YAML of an experiment with the overrides that are for it."""

    file: Path
    overrides: tuple[str, ...]
    config: "StageConfig"

    @property
    def name(self) -> str:
        """The YAML's: the stage's, or that of a further round of it."""
        return self.file.stem

    def __str__(self) -> str:
        return f"{self.file.parent.name}/{self.name}"

    @property
    def command(self) -> list[str]:
        """Arguments of Python that run it."""
        module, _ = program_of(self.name)
        program = ["-m", module] if "." in module else [f"{module}.py"]
        return [*program, "--config", str(self.file), *self.overrides]


def program_of(name: str) -> tuple[str, str]:
    """Module and dataclass of the program that runs a YAML; tokens_512 is a round of tokens.

    Raises:
        ValueError: its name begins with no stage.
    """
    for stage, program in PROGRAMS.items():
        if f"{name}_".startswith(f"{stage}_"):
            return program
    raise ValueError(f"{name}.yaml is of none of the stages {', '.join(PROGRAMS)}")


def stage_class(name: str) -> type["StageConfig"]:
    """The dataclass of a stage or of a round of it: that of flowtok_512 is stage flowtok's."""
    module, schema = program_of(name)
    return getattr(importlib.import_module(module), schema)


def load_stage(file: Path, overrides: Sequence[str] = ()) -> "StageConfig":
    """The config of a YAML that is named after its stage."""
    return load_config(stage_class(file.stem), file, list(overrides))


def read_stages(words: Sequence[str], wanted: str, configs: Path) -> list[Stage]:
    """The stages of a command line in the order in which they run, with checked configs.

    Args:
        words: names of experiments, or paths of their folders, and overrides.
        wanted: names of stages, space-separated; empty: all.
        configs: the folder of the experiments.

    Raises:
        ValueError: an unknown experiment or stage, or a config that can't work.
    """
    names = [word for word in words if "=" not in word] or ["demo"]
    overrides = [word for word in words if "=" in word]
    folders = [find_experiment(name, configs) for name in names]
    files = choose_files(folders, wanted.split())
    check_targets(overrides, {file.stem for file in files})
    stages = []
    for file in files:
        own = tuple(overrides_of(file.stem, overrides))
        try:
            config = load_stage(file, own)
        except ValueError as error:
            raise ValueError(f"stage {file.parent.name}/{file.stem}: {error}") from error
        stages.append(Stage(file, own, config))
    return stages


def find_experiment(name: str, configs: Path) -> Path:
    """The folder of an experiment that has stages."""
    folder = Path(name) if "/" in name else configs / name
    if stage_files(folder):
        return folder
    if name in ORDER:
        raise ValueError(f"no experiment {name!r}; to run the stage: STAGES={name}")
    valid = [path.name for path in sorted(configs.iterdir()) if stage_files(path)]
    raise ValueError(f"no experiment {name!r}; valid: {', '.join(valid)}")


def stage_files(folder: Path) -> list[Path]:
    """The YAML files of an experiment, in order."""
    return [path for name in ORDER if (path := folder / f"{name}.yaml").is_file()]


def choose_files(folders: Sequence[Path], wanted: Sequence[str]) -> list[Path]:
    """The YAML files of experiments, one experiment after the other; only those of `wanted` stages."""
    files = [file for folder in folders for file in stage_files(folder)]
    present = {file.stem for file in files}
    for name in wanted:
        if name not in present:
            valid = [name for name in ORDER if name in present]
            raise ValueError(f"STAGES={name}: the stages are {', '.join(valid)}")
    return [file for file in files if not wanted or file.stem in wanted]


def target_of(override: str) -> str:
    """The stage that STAGE.key=value is for, "" if it is for all."""
    first, _, rest = override.partition("=")[0].partition(".")
    return first if rest and first in ORDER else ""


def check_targets(overrides: Sequence[str], names: set[str]) -> None:
    """Refuse an override for a stage that does not run."""
    for override in overrides:
        target = target_of(override)
        if target and target not in names:
            chosen = [name for name in ORDER if name in names]
            raise ValueError(
                f"{override} is for stage {target}, which is not among those to run: "
                f"{', '.join(chosen)}. A key {target!r} of another stage takes its name in front: "
                f"{chosen[0]}.{override}"
            )


def overrides_of(name: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of one stage, without its name, in the order given."""
    own = [override for override in overrides if target_of(override) in ("", name)]
    return [word.removeprefix(f"{name}.") if target_of(word) else word for word in own]
