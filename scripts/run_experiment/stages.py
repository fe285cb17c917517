"""Which stages a command line names, with their configs: experiments, STAGES, overrides."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import load_config, valid_keys

# It imports torch, which takes seconds: a command line that can't work is refused before.
if TYPE_CHECKING:
    from training.stage import StageConfig

# stage -> module and dataclass of its program
PROGRAMS = {
    "scenes": ("scripts.make_scenes", "ScenesStage"),
    "artists": ("scripts.make_artists", "ArtistsStage"),
    "text_encoder": ("scripts.train_text_encoder", "TextEncoderStage"),
    "tokenizer": ("train_tokenizer", "TokenizerStage"),
    "tokens": ("scripts.encode_tokens", "TokensStage"),
    "text_projector": ("train_text_projector", "TextProjectorStage"),
    "text_decoder": ("train_text_decoder", "TextDecoderStage"),
    "flowtok": ("train_flowtok", "FlowTokStage"),
    "next_scale": ("train_next_scale", "NextScaleStage"),
    "reader": ("train_reader", "ReaderStage"),
    "report": ("eval.report", "ReportStage"),
}
WITHOUT_NETWORK = ("scenes", "artists", "report")  # stages of one process
# Of the YAML files of an experiment: stages, and further rounds of them
ORDER = (
    *("scenes", "artists"),
    *("text_encoder", "tokenizer", "tokens", "text_projector", "flowtok"),
    *("tokens_finetune", "flowtok_finetune", "tokenizer_512", "tokens_512", "flowtok_512"),
    *("text_decoder", "flowtok_caption", "next_scale", "reader", "report"),
)


@dataclass(frozen=True)
class Stage:
    """A YAML of an experiment with the overrides that are for it."""

    file: Path
    overrides: tuple[str, ...]
    config: "StageConfig"

    @property
    def name(self) -> str:
        # The YAML's: the stage's, or that of a further round of it
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
    # A word is an override or an experiment, whatever their order; a folder may have a = in it.
    names, overrides = [], []  # overrides: (stage, "" for all; key=value)
    for word in words:
        first, _, rest = word.partition(".")
        if "=" not in word or "/" in word.partition("=")[0]:
            names.append(word)
        else:
            overrides.append((first, rest) if first in ORDER else ("", word))
    experiments = [find_experiment(name, configs) for name in names or ["scenes"]]
    files = [file for folder in experiments for file in stage_files(folder)]

    # Only those of STAGES, and no override for another one
    present = [name for name in ORDER if name in {file.stem for file in files}]
    asked = wanted.split() or present
    if unknown := {*asked} - {*present}:
        valid = ", ".join(present)
        raise ValueError(f"STAGES={' '.join(sorted(unknown))}: the stages are {valid}")
    chosen = [name for name in present if name in asked]
    for target, rest in overrides:
        if target and target not in chosen:
            raise ValueError(
                f"{target}.{rest} is for stage {target}, which is not among those to run: "
                f"{', '.join(chosen)}. A key {target!r} of another stage takes its name in front: "
                f"{chosen[0]}.{target}.{rest}"
            )

    # An override for all goes to every stage; where one lacks its key, the error says which has it
    stages = []
    for file in files:
        if file.stem in chosen:
            own = tuple(rest for target, rest in overrides if target in ("", file.stem))
            try:
                stages.append(Stage(file, own, load_stage(file, own)))
            except ValueError as error:
                shared = [rest for target, rest in overrides if not target]
                way_out = to_one_stage(file.stem, shared, chosen)
                stage = f"stage {file.parent.name}/{file.stem}"
                raise ValueError(f"{stage}: {error}{way_out}") from error
    return stages


def to_one_stage(stage: str, shared: Sequence[str], chosen: Sequence[str]) -> str:
    """How to give an override to the stages that have its key, if this one has not."""
    for override in shared:
        key = override.partition("=")[0]
        owners = [name for name in chosen if key in valid_keys(stage_class(name))]
        if owners and stage not in owners:
            return f". {key} is of {', '.join(owners)}: for one of them, STAGE.{override}"
    return ""


def find_experiment(name: str, configs: Path) -> Path:
    folder = Path(name).expanduser() if "/" in name else configs / name
    if stage_files(folder):
        return folder
    # Who thinks of stages names one where an experiment is expected.
    if name in ORDER:
        raise ValueError(f"no experiment {name!r}; to run the stage: STAGES={name}")
    valid = [path.name for path in sorted(configs.iterdir()) if stage_files(path)]
    raise ValueError(f"no experiment {name!r}; valid: {', '.join(valid)}")


def stage_files(folder: Path) -> list[Path]:
    # In the order in which they run, whatever else lies in the folder
    return [path for name in ORDER if (path := folder / f"{name}.yaml").is_file()]
