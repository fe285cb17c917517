"""Run folders -> what they say, and the tokenizer and text encoder of stage 1, with EMA weights.

A run's config.yaml says how its network is built, its newest whole checkpoint has the weights, and
the checkpoint's `inputs` are the fingerprints of the parts that it was trained with. Flows and
whole pipelines: training/pipelines.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from torch import nn

from modeling.dual_tokenizer import DualTokenizer, DualTokenizerConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.layers import load_weights
from modeling.text_encoder import TextEncoder, TextEncoderConfig, load_text_encoder
from training.checkpoint import EMA_FILE, latest_checkpoint, read_state
from training.run import CONFIG_FILE, parse_saved

T = TypeVar("T")
CLIP_FOLDER = Path("text_encoder") / "clip"  # of an experiment that trained its own text tower
NUM_NAMED = 20  # files that an error names
structured = cache(OmegaConf.structured)  # takes longer than to copy one, as merge does

# What a run folder says


def read_run_config(run_dir: str | Path) -> DictConfig:
    """The resolved config of a run, not to be changed; ValueError: no run, or a damaged file."""
    # A run, its experiment and its checkpoints are easily confused: the error names what is there.
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run folder (no {CONFIG_FILE}); {what_is_there(path.parent)}"
        )
    return parse_config(path, path.read_bytes())


def what_is_there(folder: Path) -> str:
    """The run that a folder lies in, or what it or the nearest folder above it holds."""
    # Absolute: a relative path that leads nowhere is often one from another working directory
    above = [folder.absolute(), *folder.absolute().parents]
    if run := next((parent for parent in above if (parent / CONFIG_FILE).is_file()), None):
        return f"it lies in one: name {run}"
    nearest = next(parent for parent in above if parent.is_dir())
    found = sorted(path.name for path in nearest.glob("*"))
    names = ", ".join(found[:NUM_NAMED]) or "nothing"
    return f"{nearest} holds: {names}" + (", ..." if len(found) > NUM_NAMED else "")


@lru_cache(maxsize=32)  # a pipeline asks a few files twenty times, 10 ms each
def parse_config(path: Path, content: bytes) -> DictConfig:
    """The config in a file; content: what it has now, or an older one would be remembered."""
    return OmegaConf.create(parse_saved(path, content))


def read_section(run_dir: str | Path, key: str, schema: type[T]) -> T:
    """One part of a run's config as its dataclass; ValueError if the run has no such part."""
    config = read_run_config(run_dir)
    if key not in config:
        stage = config.get("stage")
        raise ValueError(f"{run_dir} is a run of stage {stage!r}: its {CONFIG_FILE} has no {key!r}")
    return OmegaConf.to_object(OmegaConf.merge(structured(schema), config[key]))


def newest_checkpoint(run_dir: str | Path) -> Path:
    """Folder of a run's newest checkpoint; ValueError if there is none yet."""
    latest = latest_checkpoint(Path(run_dir))
    if latest is None:
        raise ValueError(f"{run_dir} has no checkpoint yet: run its stage first")
    return latest[1]


def trained_with(run_dir: str | Path) -> dict[str, str]:
    """Fingerprints of the parts that a run was trained with; empty for a converted run."""
    return read_state(newest_checkpoint(run_dir))["inputs"]


# One network


def load_ema(module: nn.Module, run_dir: str | Path) -> nn.Module:
    """Fill a module with the EMA weights of a run's newest checkpoint; frozen, in eval mode."""
    load_weights(module, newest_checkpoint(run_dir) / EMA_FILE)
    return module.eval().requires_grad_(False)


def load_newest(run_dir: str | Path, load: Callable[[], T]) -> tuple[T, Path]:
    """(what `load` makes of the newest checkpoint, its folder)."""
    # Training may go on meanwhile: `load` must not mix the files of two checkpoints.
    while True:
        before = latest_checkpoint(Path(run_dir))
        loaded = load()
        if before and newest_checkpoint(run_dir) == before[1]:
            return loaded, before[1]


def load_any_tokenizer(run_dir: str | Path) -> ImageTokenizer | DualTokenizer:
    """The image tokenizer of a stage-1 run, of either kind."""
    if read_run_config(run_dir).get("dual") is not None:
        return load_ema(DualTokenizer(read_section(run_dir, "dual", DualTokenizerConfig)), run_dir)
    config = read_section(run_dir, "tokenizer", ImageTokenizerConfig)
    return load_ema(ImageTokenizer(config), run_dir)


def load_dual_tokenizer(run_dir: str | Path) -> DualTokenizer:
    """The dual tokenizer of a stage-1 run; ValueError if it has one of latents."""
    # Asked of the config: a run of the wrong kind is not to be trained first.
    if read_run_config(run_dir).get("dual") is None:
        raise ValueError(f"{run_dir} has no dual tokenizer: its {CONFIG_FILE} has no 'dual'")
    return load_any_tokenizer(run_dir)


def load_tokenizer(run_dir: str | Path) -> ImageTokenizer:
    """The image tokenizer of a stage-1 run; ValueError if it has one of discrete codes."""
    if read_run_config(run_dir).get("dual") is not None:
        raise ValueError(
            f"{run_dir} has a dual tokenizer, whose codes are for train_next_scale.py: no latents"
        )
    return load_any_tokenizer(run_dir)


# The parts that a run was trained with, by their fingerprints


def text_encoder_config(tokenizer_run: str | Path) -> TextEncoderConfig:
    """The text encoder of a stage-1 run, where it is now."""
    return text_encoder_configs(tokenizer_run)[0]


def text_encoder_configs(tokenizer_run: str | Path) -> list[TextEncoderConfig]:
    """The text encoder of a stage-1 run: where its config says, and beside it, what there is."""
    # A name of the hub is the same everywhere; a folder may have moved with its experiment.
    config = read_section(tokenizer_run, "text_encoder", TextEncoderConfig)
    folder = config.model.removeprefix("local-dir:")
    beside = Path(tokenizer_run).parent / CLIP_FOLDER
    if folder == config.model or not beside.is_dir():
        return [config]

    # What lies where the config says may be another experiment's by now: both count.
    moved = replace(config, model=f"local-dir:{beside}")
    return [config, moved] if Path(folder).is_dir() else [moved]


def find_text_encoder(tokenizer_run: str | Path, wanted: str | None = None) -> TextEncoder:
    """The text encoder that a tokenizer was trained with; ValueError if it is not there any more.

    wanted: the fingerprint that a later run knows; None: the tokenizer's own.
    """
    wanted = wanted or trained_with(tokenizer_run).get("text_encoder")
    # The fingerprint is of the weights, so a tower has to be read before it is known.
    configs = text_encoder_configs(tokenizer_run)
    for config in configs:
        text_encoder = load_text_encoder(config)
        if wanted in (None, text_encoder.identity):
            return text_encoder
    models = " and ".join(config.model for config in configs)
    raise ValueError(f"{tokenizer_run} needs the text encoder {wanted}, not that of {models}")
