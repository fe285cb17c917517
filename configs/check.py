"""Checks a whole experiment before its first stage runs, so that a typo in the last costs no hours.

    python -m configs.check NUM_PROCESSES FILE [key=value ...] [-- FILE ...]

train_flowtok.sh calls it: one `FILE key=value ...` group a stage. Each stage's config is loaded; image shards that must
already exist are looked for, and so are the runs that a stage starts from, unless an earlier stage makes them; batch
sizes must divide by the processes; token counts must agree from stage to stage.
"""

import os.path
import sys
from pathlib import Path

from configs.cli import exit_on_error
from configs.load import load_config
from configs.schema import (
    FlowTokStage,
    ReportStage,
    StageConfig,
    TextDecoderStage,
    TextEncoderStage,
    TextProjectorStage,
    TokenizerStage,
    TokensStage,
)
from data.tar import expand_shards
from training.checkpoint import latest_checkpoint
from training.tokens_info import TOKENS_INFO_FILE

Stages = dict[
    str, StageConfig
]  # by the name of the YAML, which is that of a stage or of a further round of it


def check_batches(stages: Stages, num_processes: int) -> None:
    """Every batch size is divisible by processes x gradient accumulation."""
    for stage, config in stages.items():
        training = getattr(config, "training", None)
        if training is not None and training.batch_size % (
            num_processes * training.gradient_accumulation
        ):
            raise ValueError(
                f"stage {stage}: training.batch_size {training.batch_size} is not divisible by processes x "
                f"gradient_accumulation = {num_processes} x {training.gradient_accumulation}"
            )


def is_complete(config: StageConfig) -> bool:
    """Whether the stage's run needs no data any more."""
    if isinstance(config, TokensStage):
        return (Path(config.run_dir) / TOKENS_INFO_FILE).is_file()
    latest = latest_checkpoint(Path(config.run_dir))
    return latest is not None and latest[0] >= config.training.max_steps


def check_shards(stages: Stages) -> None:
    """Image shards exist; token shards are written on the way and can't be looked for yet."""
    for stage, config in stages.items():
        if not isinstance(config, ReportStage) and is_complete(config):
            continue
        patterns: list[str] = []
        if isinstance(config, TextEncoderStage | TokenizerStage | TokensStage):
            patterns += config.data.all_shards()
        if isinstance(config, TokenizerStage):
            patterns += config.pictures.shards
        if isinstance(config, TextDecoderStage):
            patterns += config.heldout_shards
        if isinstance(config, ReportStage):
            patterns += config.train_shards + config.heldout_shards + config.distractor_shards
        try:
            if patterns:
                expand_shards(sorted(set(patterns)))
        except ValueError as error:
            in_data_dir = any(pattern.startswith(f"{config.data_dir}/") for pattern in patterns)
            ways = [f"data_dir=FOLDER (now {config.data_dir})"] if in_data_dir else []
            ways.append(f"{stage}.data.shards=[FOLDER/*.tar]")
            raise ValueError(
                f"stage {stage}: {error}. Make image shards with scripts/make_shards.py (docs/data.md) and say where "
                f"they are: {' or '.join(ways)}"
            ) from error


def check_runs(stages: Stages) -> None:
    """The runs that a stage reads are there, or an earlier stage of this command makes them."""
    made: set[str] = set()
    for stage, config in stages.items():
        for key in ("tokenizer_run", "projector_run", "init_from", "text_decoder_run"):
            folder = getattr(config, key, "")
            if folder and os.path.normpath(folder) not in made and not Path(folder).is_dir():
                raise ValueError(
                    f"stage {stage}: {key}={os.path.normpath(folder)} does not exist, and no earlier stage of this "
                    f"command makes it; run that stage first, or set {stage}.{key}"
                )
        made.add(os.path.normpath(config.run_dir))


def check_run_dirs(stages: Stages) -> None:
    """No two stages share a folder; that of a flow has the stage's name, where train_flowtok.sh looks for it."""
    owners: dict[str, str] = {}
    for stage, config in stages.items():
        folder = os.path.normpath(config.run_dir)
        if folder in owners:
            raise ValueError(f"stages {owners[folder]} and {stage} have the same run_dir {folder}")
        owners[folder] = stage
        expected = os.path.normpath(os.path.join(config.experiment_dir, stage))
        if isinstance(config, FlowTokStage) and folder != expected:
            raise ValueError(f"stage {stage}: run_dir is {folder}, expected {expected}")


def check_sizes(stages: Stages) -> None:
    """Tokens, channels and text states have the same sizes in every stage that has them."""
    sizes: dict[str, tuple[str, int]] = {}
    for stage, config in stages.items():
        found = {}
        if isinstance(config, TextEncoderStage):
            found = {
                "text tokens": config.clip.context_length,
                "text width": config.clip.text_width,
            }
        if isinstance(config, TokenizerStage):
            part = config.tokenizer
            found = {"image tokens": part.num_tokens, "channels": part.token_channels}
            if part.text_guidance:
                found |= {"text tokens": part.text_tokens, "text width": part.text_width}
        if isinstance(config, TextProjectorStage | TextDecoderStage | FlowTokStage):
            part = config.projector
            found = {
                "text tokens": part.text_tokens,
                "text width": part.text_width,
                "channels": part.token_channels,
            }
            found["image tokens"] = part.text_tokens  # text flows into image token by token
        for name, size in found.items():
            other, first = sizes.setdefault(name, (stage, size))
            if size != first:
                raise ValueError(
                    f"{name}: stage {other} has {first}, stage {stage} has {size}; they must agree"
                )


def main(arguments: list[str]) -> None:
    """Load the configs of all groups and run every check."""
    num_processes, groups = int(arguments[0]), [[]]
    for argument in arguments[1:]:
        groups.append([]) if argument == "--" else groups[-1].append(argument)
    stages = {Path(file).stem: load_config(file, overrides) for file, *overrides in groups}
    check_batches(stages, num_processes)
    check_run_dirs(stages)
    check_shards(stages)
    check_runs(stages)
    check_sizes(stages)


if __name__ == "__main__":
    exit_on_error(lambda: main(sys.argv[1:]))
