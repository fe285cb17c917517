"""What can be known before the first stage runs, so that the last one does not fail after days."""

import fnmatch
import os.path
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from data.storage import is_remote
from data.tar import expand_shards
from scripts.encode_tokens import TokensStage, output_paths
from scripts.run_experiment.stages import Stage
from scripts.train_text_encoder import TextEncoderStage
from train_tokenizer import TokenizerStage
from training.checkpoint import latest_checkpoint
from training.stage import TrainedStage
from training.tokens import TOKENS_INFO_FILE

LOCAL_TOWER = "local-dir:"


def check_configs(stages: Sequence[Stage], num_processes: int) -> None:
    """Refuse what the configs alone show: batches that don't divide, stages in one folder.

    Raises:
        ValueError: naming stage, key and value.
    """
    owners: dict[str, Stage] = {}
    for stage in stages:
        config = stage.config
        if isinstance(config, TrainedStage):
            training = config.training
            if training.batch_size % (num_processes * training.gradient_accumulation):
                raise ValueError(
                    f"stage {stage}: training.batch_size {training.batch_size} is not divisible by "
                    f"processes x gradient_accumulation = {num_processes} x "
                    f"{training.gradient_accumulation}"
                )
        folder = os.path.normpath(config.run_dir)
        other = owners.setdefault(folder, stage)
        if other is not stage:
            raise ValueError(f"stages {other} and {stage} have the same run_dir {folder}")


def check_inputs(stages: Sequence[Stage]) -> None:
    """Refuse stages whose images, runs or tokens are neither there nor made by an earlier stage.

    Raises:
        ValueError: naming stage, key and value, and the way out.
    """
    made: dict[str, Stage] = {}
    for stage in stages:
        check_runs(stage, made)
        if not is_complete(stage):
            check_images(stage)
            check_tokens(stage, made)
        made[os.path.normpath(stage.config.run_dir)] = stage


def is_complete(stage: Stage) -> bool:
    """Whether the stage's run needs no data any more."""
    folder = Path(stage.config.run_dir)
    if isinstance(stage.config, TokensStage):
        return (folder / TOKENS_INFO_FILE).is_file()
    if not isinstance(stage.config, TrainedStage):
        return False
    latest = latest_checkpoint(folder)
    return latest is not None and latest[0] >= stage.config.training.max_steps


def check_runs(stage: Stage, made: dict[str, Stage]) -> None:
    """The runs that a stage reads are there, or an earlier stage of this command makes them."""
    runs = stage.config.earlier_runs()
    if isinstance(stage.config, TokenizerStage) and (tower := tower_folder(stage.config)):
        runs = {**runs, "text_encoder.model": os.path.dirname(tower)}
    for key, run in runs.items():
        folder = os.path.normpath(run)
        if folder not in made and not os.path.isdir(folder):
            experiment, _, name = folder.rpartition("/")
            raise ValueError(
                f"stage {stage}: {key}={folder} does not exist, and no earlier stage of this "
                f"command makes it: run {name} of experiment {os.path.basename(experiment)} first "
                f"(it may be named in front in the same command), or set {stage.name}.{key}"
            )


def check_images(stage: Stage) -> None:
    """Image shards are there."""
    patterns = sorted(set(stage.config.image_shards()))
    try:
        if patterns:
            expand_shards(patterns)
    except ValueError as error:
        data_dir = stage.config.data_dir
        ways = [f"{stage.name}.data.shards=[FOLDER/*.tar]"]
        if any(pattern.startswith(f"{data_dir}/") for pattern in patterns):
            ways.insert(0, f"data_dir=FOLDER (now {data_dir})")
        raise ValueError(
            f"stage {stage}: {error}. Make image shards with scripts/make_shards.py "
            f"(docs/data.md) and say where they are: {' or '.join(ways)}"
        ) from error


def check_tokens(stage: Stage, made: dict[str, Stage]) -> None:
    """Token shards are there, or an earlier stage of this command will write them."""
    for pattern in stage.config.token_shards():
        writer = made.get(os.path.normpath(os.path.dirname(pattern)))
        try:
            if writer and not is_complete(writer):
                check_matches(pattern, writer)
            else:
                expand_shards([pattern])
        except ValueError as error:
            raise ValueError(
                f"stage {stage}: data.{error}. Run the stage that writes them first, or set "
                f"{stage.name}.data.shards"
            ) from error


def check_matches(pattern: str, writer: Stage) -> None:
    """A pattern, each of its braces, matches a shard that a stage will write."""
    if is_remote(pattern) or not isinstance(writer.config, TokensStage):
        return
    images = expand_shards(writer.config.image_shards())
    names = [path.name for path in output_paths(images, Path(writer.config.run_dir))]
    for part in braceexpand(os.path.basename(pattern), escape=False):
        if not fnmatch.filter(names, part):
            raise ValueError(
                f"shards: {pattern!r} matches none of the {len(names)} shards that stage {writer} "
                f"will write: {names[0]} ... {names[-1]}"
            )


def skip_unused_towers(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages without the text towers that the tokenizer beside them does not use; says why."""
    used = {
        stage.file.parent: stage.config
        for stage in stages
        if isinstance(stage.config, TokenizerStage)
    }
    kept, reasons = [], []
    for stage in stages:
        tokenizer = used.get(stage.file.parent)
        own = os.path.join(os.path.normpath(stage.config.run_dir), "clip")
        is_tower = isinstance(stage.config, TextEncoderStage)
        if is_tower and tokenizer and tower_folder(tokenizer) != own:
            model = tokenizer.text_encoder.model
            reasons.append(f"{stage}: skipped, the tokenizer's text_encoder.model is {model}")
        else:
            kept.append(stage)
    return kept, reasons


def tower_folder(config: TokenizerStage) -> str:
    """The folder of the tokenizer's text tower, "" if it comes from elsewhere than a run."""
    model = config.text_encoder.model
    return os.path.normpath(model.removeprefix(LOCAL_TOWER)) if LOCAL_TOWER in model else ""
