"""Run folders -> loaded parts, always with EMA weights.

A run's config.yaml says how its network is built, its newest whole checkpoint has the weights, and
the checkpoint's `inputs` are the fingerprints of the parts that it was trained with. A flow names
its tokenizer's run, and that one its text encoder. Where the experiment's folder was moved, the
parts are found beside the run.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from modeling.fingerprint import fingerprint
from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel, build_flow
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.pipeline import Captioner, ImageGenerator, SamplingConfig
from modeling.text_decoder import TextAutoencoder, TextDecoder, TextDecoderConfig
from modeling.text_encoder import TextEncoder, TextEncoderConfig, TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.checkpoint import EMA_FILE, latest_checkpoint, load_weights, read_state
from training.run import CONFIG_FILE

T = TypeVar("T")
CLIP_FOLDER = Path("text_encoder") / "clip"  # of an experiment that trained its own text tower

# What a run folder says


def read_run_config(run_dir: str | Path) -> DictConfig:
    """The resolved config of a run.

    Raises:
        ValueError: no run there; names what the folder holds.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else path.parent.parent
        found = sorted(p.name for p in folder.glob("*"))
        raise ValueError(
            f"{run_dir} is no run folder (no {CONFIG_FILE}); {folder} holds: "
            f"{', '.join(found) or 'nothing'}"
        )
    return OmegaConf.load(path)


def read_section(run_dir: str | Path, key: str, schema: type[T]) -> T:
    """One part of a run's config as its dataclass.

    Raises:
        ValueError: it is the run of another stage.
    """
    config = read_run_config(run_dir)
    if key not in config:
        stage = config.get("stage")
        raise ValueError(f"{run_dir} is a run of stage {stage!r}: its {CONFIG_FILE} has no {key!r}")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config[key]))


def newest_checkpoint(run_dir: str | Path) -> Path:
    """Folder of a run's newest checkpoint.

    Raises:
        ValueError: no checkpoint yet.
    """
    latest = latest_checkpoint(Path(run_dir))
    if latest is None:
        raise ValueError(f"{run_dir} has no checkpoint yet: run its stage first")
    return latest[1]


def trained_with(run_dir: str | Path) -> dict[str, str]:
    """Fingerprints of the parts that a run was trained with; empty for a converted run."""
    return read_state(newest_checkpoint(run_dir))["inputs"]


def flow_folder(run_dir: str | Path) -> Path:
    """The stage-3 run that makes an experiment's images, or the run folder itself."""
    run = Path(run_dir) / "flowtok"
    return run if run.is_dir() else Path(run_dir)


def captioning_run(run_dir: str | Path) -> Path:
    """The stage-3 run that makes an experiment's captions, or the run folder itself."""
    run = Path(run_dir) / "flowtok_caption"
    return run if run.is_dir() else flow_folder(run_dir)


def direction_of(flow_dir: str | Path) -> str:
    """Which way a stage-3 run flows."""
    return read_section(flow_dir, "flow", FlowConfig).direction


# One network


def load_ema(module: nn.Module, run_dir: str | Path) -> nn.Module:
    """Fill a module with the EMA weights of a run's newest checkpoint; frozen, in eval mode.

    Raises:
        ValueError: no checkpoint yet, or one of another network.
    """
    load_weights(module, newest_checkpoint(run_dir) / EMA_FILE)
    return module.eval().requires_grad_(False)


def load_newest(run_dir: str | Path, load: Callable[[], T]) -> tuple[T, Path]:
    """(what `load` makes of a run's newest checkpoint, its folder); training may go on meanwhile.

    Raises:
        ValueError: no checkpoint yet, or what `load` raises.
    """
    while True:
        before = latest_checkpoint(Path(run_dir))
        loaded = load()
        if before and newest_checkpoint(run_dir) == before[1]:
            return loaded, before[1]


def load_tokenizer(run_dir: str | Path) -> ImageTokenizer:
    """The image tokenizer of a stage-1 run."""
    config = read_section(run_dir, "tokenizer", ImageTokenizerConfig)
    return load_ema(ImageTokenizer(config), run_dir)


def load_flow(run_dir: str | Path) -> FlowModel:
    """Source and velocity network of a stage-3 run."""
    flowtok = read_section(run_dir, "flowtok", FlowTokConfig)
    projector = read_section(run_dir, "projector", TextProjectorConfig)
    flow = read_section(run_dir, "flow", FlowConfig)
    return load_ema(build_flow(projector, flowtok, flow), run_dir)


def load_autoencoder(run_dir: str | Path) -> TextAutoencoder:
    """The projector and the text decoder of a text_decoder run."""
    decoder = read_section(run_dir, "text_decoder", TextDecoderConfig)
    projector = read_section(run_dir, "projector", TextProjectorConfig)
    return load_ema(TextAutoencoder(projector, decoder), run_dir)


def load_projector(run_dir: str | Path) -> TextProjector:
    """The text projector of a stage-2 run, of a text decoder's or of a flow's."""
    config = read_run_config(run_dir)
    if "flowtok" in config:
        return load_flow(run_dir).projector
    if "text_decoder" in config:
        return load_autoencoder(run_dir).projector
    projector = read_section(run_dir, "projector", TextProjectorConfig)
    return load_ema(TextProjector(projector), run_dir)


# The parts that a run was trained with, by their fingerprints


def find_run(
    flow_dir: Path,
    stage: str,
    load: Callable[[Path], T],
    identity: Callable[[T], str],
    wanted: str | None,
) -> tuple[Path, T]:
    """(run of another stage, what `load` makes of it): STAGE_run of a flow's config, or beside it.

    Args:
        wanted: the fingerprint; None, of a converted flow, takes the first that is there.

    Raises:
        ValueError: no run is there, or none with the fingerprint.
    """
    named, beside = Path(read_run_config(flow_dir)[f"{stage}_run"]), flow_dir.parent / stage
    for run in (named, beside):
        if (run / CONFIG_FILE).is_file():
            part = load(run)
            if wanted in (None, identity(part)):
                return run, part
    raise ValueError(
        f"{flow_dir} needs the {stage} {wanted or 'of any fingerprint'}, which is neither at "
        f"{named} nor at {beside}: set {stage}_run in {flow_dir / CONFIG_FILE}"
    )


def find_tokenizer(flow_dir: Path) -> tuple[Path, ImageTokenizer]:
    """(run, tokenizer) that a flow was trained with."""
    wanted = trained_with(flow_dir).get("tokenizer")
    return find_run(flow_dir, "tokenizer", load_tokenizer, fingerprint, wanted)


def find_text_decoder(flow_dir: Path, projector: TextProjector) -> TextDecoder:
    """What reads a flow's z_T. One trained on another projector's z_T would read nonsense."""

    def projector_of(autoencoder: TextAutoencoder) -> str:
        return fingerprint(autoencoder.projector)

    wanted = fingerprint(projector)
    return find_run(flow_dir, "text_decoder", load_autoencoder, projector_of, wanted)[1].decoder


def text_encoder_config(tokenizer_run: str | Path) -> TextEncoderConfig:
    """The text encoder of a stage-1 run, where it is now."""
    return text_encoder_configs(tokenizer_run)[0]


def text_encoder_configs(tokenizer_run: str | Path) -> list[TextEncoderConfig]:
    """The text encoder of a stage-1 run: as its config says, and beside it, the likelier first."""
    config = read_section(tokenizer_run, "text_encoder", TextEncoderConfig)
    folder = config.model.removeprefix("local-dir:")
    beside = Path(tokenizer_run).parent / CLIP_FOLDER
    if folder == config.model or not beside.is_dir():
        return [config]
    moved = replace(config, model=f"local-dir:{beside}")
    return [config, moved] if Path(folder).is_dir() else [moved, config]


def find_text_encoder(tokenizer_run: str | Path, wanted: str | None = None) -> TextEncoder:
    """The text encoder that a tokenizer was trained with.

    Args:
        wanted: the fingerprint that a later run knows; None: the tokenizer's own.

    Raises:
        ValueError: none with that fingerprint.
    """
    wanted = wanted or trained_with(tokenizer_run).get("text_encoder")
    configs = text_encoder_configs(tokenizer_run)
    for config in configs:
        text_encoder = load_text_encoder(config)
        if wanted in (None, text_encoder.identity):
            return text_encoder
    models = " and ".join(config.model for config in configs)
    raise ValueError(f"{tokenizer_run} needs the text encoder {wanted}, not that of {models}")


# All parts


def load_pipeline(
    run_dir: str | Path, device: torch.device
) -> tuple[ImageGenerator, SamplingConfig]:
    """All parts of an experiment, or of a stage-3 run, for generation; and its default sampling.

    Raises:
        ValueError: a flow that goes from image to text, or a part that is absent or does not fit.
    """
    flow_dir = flow_folder(run_dir)
    if direction_of(flow_dir) == "image_to_text":
        raise ValueError(
            f"{flow_dir} flows from image to text: it makes captions (sample.py --caption), no "
            "images"
        )
    sampling = read_section(flow_dir, "sampling", SamplingConfig)
    tokenizer_run, tokenizer = find_tokenizer(flow_dir)
    text_encoder = find_text_encoder(tokenizer_run, trained_with(flow_dir).get("text_encoder"))
    flow = load_flow(flow_dir)
    check_parts(flow, tokenizer, text_encoder)
    parts = ImageGenerator(text_encoder.to(device), tokenizer.to(device), flow.to(device))
    return parts, sampling


def load_captioner(run_dir: str | Path, device: torch.device) -> tuple[Captioner, SamplingConfig]:
    """All parts of an experiment, or of a stage-3 run, for captions; and its default sampling.

    Raises:
        ValueError: a flow that goes from text to image, or a part that is absent.
    """
    flow_dir = captioning_run(run_dir)
    if direction_of(flow_dir) == "text_to_image":
        raise ValueError(
            f"{flow_dir} flows from text to image: captions need a run with "
            "flow.direction=image_to_text"
        )
    sampling = read_section(flow_dir, "sampling", SamplingConfig)
    tokenizer_run, tokenizer = find_tokenizer(flow_dir)
    flow = load_flow(flow_dir)
    parts = Captioner(
        tokenize=TextTokenizer(text_encoder_config(tokenizer_run)),
        tokenizer=tokenizer.to(device),
        flow=flow.to(device),
        decoder=find_text_decoder(flow_dir, flow.projector).to(device),
    )
    return parts, sampling


def check_parts(flow: FlowModel, tokenizer: ImageTokenizer, text_encoder: TextEncoder) -> None:
    """Refuse parts of different sizes, which a converted run can have: it knows no fingerprints.

    Raises:
        ValueError: naming sizes and the key to set.
    """
    config = tokenizer.config
    tokens = (config.num_tokens, config.token_channels)
    states = (config.text_tokens, config.text_width)
    if tokens != flow.flowtok.shape:
        raise ValueError(
            f"the flow makes {flow.flowtok.shape} tokens x channels, the tokenizer reads {tokens}: "
            f"set tokenizer_run in the flow's {CONFIG_FILE}"
        )
    if states != text_encoder.shape:
        raise ValueError(
            f"the text encoder gives {text_encoder.shape} tokens x channels, the tokenizer's "
            f"decoder expects {states}: set text_encoder in the tokenizer's {CONFIG_FILE}"
        )
