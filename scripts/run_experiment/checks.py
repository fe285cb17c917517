"""What can be known before the first stage runs, so that the last one does not fail after days."""

import fnmatch
import os.path
from collections.abc import Iterator, Sequence
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
# Folders that earlier stages of the command make, with the shards that they will write there
Made = dict[str, list[str]]


def cpu_processes(stages: Sequence[Stage]) -> int:
    """How many processes without GPUs all stages want."""
    configs = [stage.config for stage in stages if isinstance(stage.config, TrainedStage)]
    return min((config.training.cpu_processes for config in configs), default=1)


def check_configs(stages: Sequence[Stage], num_processes: int) -> None:
    """Refuse what the configs alone show: batches that don't divide, stages in one folder.

    Raises:
        ValueError: naming stage, key and value.
    """
    owners: dict[str, Stage] = {}
    for stage in stages:
        folder = os.path.normpath(stage.config.run_dir)
        if other := owners.get(folder):
            raise ValueError(f"stage {stage}: run_dir {folder} is that of stage {other} already")
        owners[folder] = stage
        if isinstance(stage.config, TrainedStage):
            try:
                stage.config.training.split_batch(num_processes)
            except ValueError as error:
                raise ValueError(f"stage {stage}: {error}") from error


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
        folder = os.path.normpath(stage.config.run_dir)
        error = None
        try:
            made[folder] = check_stage(stage, made)
        except ValueError as found:
            error = ValueError(f"stage {stage}: {found}")
            made[folder] = []
        yield stage, error
        if isinstance(stage.config, TextEncoderStage):
            made[os.path.join(folder, TOWER)] = []


def check_stage(stage: Stage, made: Made) -> list[str]:
    """check_inputs for one stage; returns the shards that it will write."""
    config = stage.config
    check_runs(stage, made)
    # Of complete tokens the files that are there count, not those that the config asks for.
    if is_complete(stage):
        return config.outputs()
    check_writable(Path(config.run_dir) / CONFIG_FILE)
    images = find_images(stage, made)
    try:
        for pattern in config.token_shards():
            find_shards(pattern, made)
    except ValueError as error:
        way_out = f"Run the stage that writes them first, or set {stage.name}.data.shards"
        raise ValueError(f"data.{error}. {way_out}") from error
    if isinstance(config, TokensStage):
        return [str(path) for path in output_paths(images, Path(config.run_dir))]
    return config.outputs()


def is_complete(stage: Stage) -> bool:
    """Whether the stage's run needs no data any more."""
    folder = Path(stage.config.run_dir)
    if isinstance(stage.config, TokensStage):
        is_there = (folder / TOKENS_INFO_FILE).is_file()
        return is_there and not TokensInfo.load(folder).damage(folder)
    # Stages without training look themselves at what is there.
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
    """Image shards that the stage will find."""
    config = stage.config
    images: dict[str, str] = {}  # by their absolute form
    # Pictures may be drawn of the shards that are trained on: each pattern counts once.
    patterns = dict.fromkeys(config.image_shards())
    try:
        for pattern in patterns:
            for path in find_shards(pattern, made):
                name = path if is_remote(path) else os.path.abspath(path)
                # The stage would refuse it as well, but after those before it.
                if name in images:
                    raise ValueError(
                        f"shard {path} is listed twice, the second time by {pattern!r}"
                    )
                images[name] = path
    except ValueError as error:
        ways = [f"{stage.name}.data.shards=[FOLDER/*.tar]"]
        if pattern.startswith(f"{config.data_dir}/"):
            ways.insert(0, f"data_dir=FOLDER (now {config.data_dir})")
        raise ValueError(
            f"{error}. Make image shards with scripts/make_shards.py (docs/data.md) and say where "
            f"they are: {' or '.join(ways)}"
        ) from error
    return list(images.values())


def find_shards(pattern: str, made: Made) -> list[str]:
    """The shards of a pattern: those that are there, or that an earlier stage will write.

    Raises:
        ValueError: a part of the pattern matches none.
    """

    def will_be_there(path: str) -> bool:
        folder = os.path.normpath(path)
        return os.path.isdir(path) or any(f"{name}/".startswith(f"{folder}/") for name in made)

    # A folder's name is no pattern, also if it has the letters of one and is yet to be made.
    folder, rest = split_pattern(pattern, will_be_there)
    shards = []
    for path in (folder + name for name in braceexpand(rest, escape=False)):
        planned = made.get(os.path.normpath(os.path.dirname(path)))
        if not planned:
            shards += expand_shards([path])
            continue
        wanted = os.path.basename(path)
        matched = [shard for shard in planned if fnmatch.fnmatch(os.path.basename(shard), wanted)]
        if not matched:
            raise ValueError(
                f"shards: {path!r} matches none of the {len(planned)} shards that an earlier stage "
                f"will write: {planned[0]} ... {planned[-1]}"
            )
        shards += matched
    return shards


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
