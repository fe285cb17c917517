"""What can be known before the first stage runs, so that the last one does not fail after days."""

import fnmatch
import os.path
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from braceexpand import braceexpand

from data.files import check_writable
from data.storage import is_remote
from data.tar import expand_shards, split_pattern
from scripts.encode_tokens import TokensStage, output_paths
from scripts.run_experiment.stages import Stage
from scripts.train_text_encoder import TextEncoderStage
from train_reader import ReaderStage
from train_tokenizer import TokenizerStage
from training.checkpoint import latest_checkpoint
from training.run import CONFIG_FILE
from training.stage import TrainedStage
from training.tokens import TOKENS_INFO_FILE, TokensInfo

LOCAL_TOWER = "local-dir:"
TOWER = "clip"  # in the run of stage text_encoder
Made = dict[str, Stage]  # folder -> the earlier stage of this command that makes it


@contextmanager
def errors_of(stage: Stage) -> Iterator[None]:
    """Errors say which stage they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {stage}: {error}") from error


def cpu_processes(stages: Sequence[Stage]) -> int:
    """How many processes without GPUs all stages want."""
    configs = [stage.config for stage in stages if isinstance(stage.config, TrainedStage)]
    return min((config.training.cpu_processes for config in configs), default=1)


def check_configs(stages: Sequence[Stage], num_processes: int) -> None:
    """Refuse what the configs alone show: batches that don't divide, stages in one folder.

    Raises:
        ValueError: naming stage, key and value.
    """
    owners: Made = {}
    for stage in stages:
        with errors_of(stage):
            if isinstance(stage.config, TrainedStage):
                stage.config.training.split_batch(num_processes)
            folder = os.path.normpath(stage.config.run_dir)
            if owners.setdefault(folder, stage) is not stage:
                raise ValueError(f"run_dir {folder} is that of stage {owners[folder]} already")


def check_inputs(stages: Sequence[Stage]) -> None:
    """Refuse stages whose images, runs or tokens are neither there nor made by an earlier stage.

    Raises:
        ValueError: naming stage, key and value, and the way out; or a folder that can't be written.
    """
    for _, error in input_errors(stages):
        if error:
            raise error


def input_errors(stages: Sequence[Stage]) -> Iterator[tuple[Stage, ValueError | None]]:
    """Each stage, and what check_inputs would raise for it."""
    made: Made = {}
    for stage in stages:
        error = None
        try:
            with errors_of(stage):
                check_stage_inputs(stage, made)
        except ValueError as found:
            error = found
        yield stage, error
        folder = os.path.normpath(stage.config.run_dir)
        made[folder] = stage
        if isinstance(stage.config, TextEncoderStage):
            made[os.path.join(folder, TOWER)] = stage


def check_stage_inputs(stage: Stage, made: Made) -> None:
    """check_inputs for one stage."""
    check_runs(stage, made)
    if not is_complete(stage):
        check_writable(Path(stage.config.run_dir) / CONFIG_FILE)
        find_images(stage, made)
        for pattern in stage.config.token_shards():
            check_tokens(stage, pattern, made)


def is_complete(stage: Stage) -> bool:
    """Whether the stage's run needs no data any more."""
    folder = Path(stage.config.run_dir)
    if isinstance(stage.config, TokensStage):
        is_there = (folder / TOKENS_INFO_FILE).is_file()
        return is_there and not TokensInfo.load(folder).damage(folder)
    if not isinstance(stage.config, TrainedStage):
        return False
    latest = latest_checkpoint(folder)
    return latest is not None and latest[0] >= stage.config.training.max_steps


def is_newer(picture: Path, run_dir: str) -> bool:
    """Whether a picture was drawn after a run's newest checkpoint was written."""
    latest = latest_checkpoint(Path(run_dir)) if picture.is_file() else None
    return latest is not None and latest[1].stat().st_mtime < picture.stat().st_mtime


def check_runs(stage: Stage, made: Made) -> None:
    """The runs that a stage reads are there, or an earlier stage makes them."""
    runs = stage.config.earlier_runs()
    if isinstance(stage.config, TokenizerStage) and (tower := tower_folder(stage.config)):
        runs = {**runs, "text_encoder.model": tower}
    for key, run in runs.items():
        folder = os.path.normpath(run)
        if folder not in made and not os.path.isdir(folder):
            raise ValueError(
                f"{key}={folder} does not exist, and no earlier stage of this command makes it: "
                "run that stage first (its experiment may be named in front of this one, in the "
                f"same command), or set {stage.name}.{key}"
            )


def find_images(stage: Stage, made: Made) -> list[str]:
    """Image shards that the stage will find: those that are there, or that a stage will write."""
    planned, others = [], []
    for pattern in sorted(set(stage.config.image_shards())):
        writer = made.get(os.path.normpath(os.path.dirname(pattern)))
        if writer and (shards := [os.path.normpath(path) for path in writer.config.outputs()]):
            planned += match_planned(pattern, shards, writer)
        else:
            others.append(pattern)
    try:
        return planned + (expand_shards(others) if others else [])
    except ValueError as error:
        data_dir = stage.config.data_dir
        ways = [f"{stage.name}.data.shards=[FOLDER/*.tar]"]
        if any(pattern.startswith(f"{data_dir}/") for pattern in others):
            ways.insert(0, f"data_dir=FOLDER (now {data_dir})")
        raise ValueError(
            f"{error}. Make image shards with scripts/make_shards.py (docs/data.md) and say where "
            f"they are: {' or '.join(ways)}"
        ) from error


def match_planned(pattern: str, shards: Sequence[str | Path], writer: Stage) -> list[str]:
    """The shards that a stage will write, of its folder, that a pattern matches.

    Raises:
        ValueError: there is none.
    """
    wanted = os.path.basename(pattern)
    matched = [str(s) for s in shards if fnmatch.fnmatch(os.path.basename(s), wanted)]
    if not matched:
        raise ValueError(
            f"shards: {pattern!r} matches none of the {len(shards)} shards that stage {writer} "
            f"will write: {shards[0]} ... {shards[-1]}"
        )
    return matched


def check_tokens(stage: Stage, pattern: str, made: Made) -> None:
    """Token shards are there, or an earlier stage will write them."""

    def will_be_there(path: str) -> bool:
        folder = os.path.normpath(path)
        return os.path.isdir(path) or any(f"{name}/".startswith(f"{folder}/") for name in made)

    folder, rest = split_pattern(pattern, will_be_there)
    for part in (folder + name for name in braceexpand(rest, escape=False)):
        writer = made.get(os.path.normpath(os.path.dirname(part)))
        try:
            if writer and isinstance(writer.config, TokensStage) and not is_complete(writer):
                images = find_images(writer, made)
                match_planned(part, output_paths(images, Path(writer.config.run_dir)), writer)
            elif not is_remote(part):
                expand_shards([part])
        except ValueError as error:
            way_out = f"set {stage.name}.data.shards"
            raise ValueError(
                f"data.{error}. Run the stage that writes them first, or {way_out}"
            ) from error


def skip_stages(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages without those that have no use or no package here, and why they are left out.

    Unused is a text tower other than that of the tokenizer beside it.
    """
    used = {s.file.parent: s.config for s in stages if isinstance(s.config, TokenizerStage)}
    kept, reasons = [], []
    # A reader that runs alone says itself what it lacks.
    no_reader = len(stages) > 1 and find_spec("transformers") is None
    for stage in stages:
        tokenizer = used.get(stage.file.parent)
        own = os.path.join(os.path.normpath(stage.config.run_dir), TOWER)
        is_tower = isinstance(stage.config, TextEncoderStage)
        if is_tower and tokenizer and tower_folder(tokenizer) != own:
            model = tokenizer.text_encoder.model
            reasons.append(f"{stage}: skipped, the tokenizer's text_encoder.model is {model}")
        elif no_reader and isinstance(stage.config, ReaderStage):
            reasons.append(f"{stage}: skipped, it needs pip install -r requirements-text.txt")
        else:
            kept.append(stage)
    return kept, reasons


def tower_folder(config: TokenizerStage) -> str:
    """The folder of the tokenizer's text tower, "" if it comes from elsewhere than a run."""
    model = config.text_encoder.model
    return os.path.normpath(model.removeprefix(LOCAL_TOWER)) if LOCAL_TOWER in model else ""
