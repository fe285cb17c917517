"""Run folders -> loaded parts, always with EMA weights.

A run folder's config.yaml alone says how its network is built; the newest complete checkpoint has the weights.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTokConfig
from modeling.image_to_text import Captioner
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.pipeline import ImageGenerator, SamplingConfig
from modeling.text_decoder import TextAutoencoder, TextDecoder, TextDecoderConfig
from modeling.text_encoder import TextEncoder, TextEncoderConfig, TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.checkpoint import EMA_FILE, latest_checkpoint, load_weights, read_state
from training.run import CONFIG_FILE

T = TypeVar("T")


def read_run_config(run_dir: str | Path) -> DictConfig:
    """The resolved config of a run.

    Raises:
        ValueError: no run there; names what the folder holds.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else path.parent.parent
        found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
        raise ValueError(
            f"{run_dir} is no run folder (no {CONFIG_FILE}); {folder} holds: {', '.join(found) or 'nothing'}"
        )
    return OmegaConf.load(path)


def section(config: DictConfig, key: str, schema: type[T]) -> T:
    """One part of a run's config as its dataclass."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config[key]))


def load_ema(module: nn.Module, run_dir: str | Path) -> nn.Module:
    """Fill a module with the EMA weights of a run's newest checkpoint; frozen, in eval mode.

    Raises:
        ValueError: no checkpoint yet, or one of another network.
    """
    load_weights(module, newest_checkpoint(run_dir) / EMA_FILE)
    return module.eval().requires_grad_(False)


def flow_folder(run_dir: Path) -> Path:
    """The stage-3 run of an experiment folder; the folder itself if it is no experiment's."""
    return run_dir / "flowtok" if (run_dir / "flowtok").is_dir() else run_dir


def newest_checkpoint(run_dir: str | Path) -> Path:
    """Folder of a run's newest checkpoint.

    Raises:
        ValueError: no checkpoint yet.
    """
    latest = latest_checkpoint(Path(run_dir))
    if latest is None:
        raise ValueError(f"{run_dir} has no checkpoint yet: run its stage first")
    return latest[1]


def load_newest(run_dir: str | Path, load: Callable[[], T]) -> tuple[T, Path]:
    """What `load` makes of a run's newest checkpoint, and the folder of that one; training may go on meanwhile.

    Raises:
        ValueError: no checkpoint yet, or what `load` raises.
    """
    while True:
        before = latest_checkpoint(Path(run_dir))
        loaded = load()
        if before and newest_checkpoint(run_dir) == before[1]:
            return loaded, before[1]


def load_tokenizer(run_dir: str | Path) -> tuple[ImageTokenizer, TextEncoderConfig]:
    """The image tokenizer of a stage-1 run and the text tower that guides its decoder."""
    config = read_run_config(run_dir)
    if "tokenizer" not in config:
        raise ValueError(
            f"{run_dir} is a run of stage {config.get('stage')!r}, not of stage 'tokenizer'"
        )
    tokenizer = ImageTokenizer(section(config, "tokenizer", ImageTokenizerConfig))
    return load_ema(tokenizer, run_dir), section(config, "text_encoder", TextEncoderConfig)


def load_projector(run_dir: str | Path) -> TextProjector:
    """The text projector of a stage-2 run, of a text decoder's or of a flow's."""
    config = read_run_config(run_dir)
    if "flowtok" in config:
        return load_flow(run_dir).projector
    if "text_decoder" in config:
        return load_autoencoder(run_dir).projector
    return load_ema(TextProjector(section(config, "projector", TextProjectorConfig)), run_dir)


def load_flow(run_dir: str | Path) -> FlowModel:
    """The projector and the DiT of a stage-3 run.

    Raises:
        ValueError: the folder is no such run.
    """
    config = read_run_config(run_dir)
    if "flowtok" not in config:
        raise ValueError(
            f"{run_dir} is a run of stage {config.get('stage')!r}, not of stage 'flowtok'"
        )
    flow = FlowModel(
        section(config, "projector", TextProjectorConfig), section(config, "flowtok", FlowTokConfig)
    )
    flow.null_probability = OmegaConf.select(
        config, "flow.null_probability", default=FlowConfig.null_probability
    )
    return load_ema(flow, run_dir)


def load_autoencoder(run_dir: str | Path) -> TextAutoencoder:
    """The projector and the text decoder of a text_decoder run.

    Raises:
        ValueError: the folder is no such run.
    """
    config = read_run_config(run_dir)
    if "text_decoder" not in config:
        raise ValueError(
            f"{run_dir} is a run of stage {config.get('stage')!r}, not of stage 'text_decoder'"
        )
    sizes = (
        section(config, "projector", TextProjectorConfig),
        section(config, "text_decoder", TextDecoderConfig),
    )
    return load_ema(TextAutoencoder(*sizes), run_dir)


def direction_of(config: DictConfig) -> str:
    """Which way a stage-3 run flows; runs from before there was a choice make images of text."""
    return OmegaConf.select(config, "flow.direction", default="text_to_image")


def load_captioner(run_dir: str | Path, device: torch.device) -> tuple[Captioner, SamplingConfig]:
    """All parts of an experiment for captions, and its default sampling.

    Args:
        run_dir: an experiment folder (with flowtok_caption/ or flowtok/ in it) or a stage-3 run folder.

    Raises:
        ValueError: a flow that does not go from image to text, or a part that is not there any more.
    """
    flow_dir = captioning_run(run_dir)
    config = read_run_config(flow_dir)
    if "flowtok" not in config:
        raise ValueError(
            f"{flow_dir} is a run of stage {config.get('stage')!r}; captions need a flowtok run"
        )
    if direction_of(config) == "text_to_image":
        raise ValueError(
            f"{flow_dir} flows from text to image only: captions need a run with flow.direction=image_to_text or joint"
        )
    trained_on = read_state(newest_checkpoint(flow_dir))["inputs"]
    text_config = section(config, "text_encoder", TextEncoderConfig)
    beside = flow_dir.parent / "text_encoder" / "clip"
    folder = text_config.model.removeprefix("local-dir:")
    if text_config.model != folder and beside.is_dir() and not Path(folder).is_dir():
        text_config.model = (
            f"local-dir:{beside}"  # the experiment was moved; only the tower's tokenizer is used
        )
    flow = load_flow(flow_dir)
    parts = Captioner(
        tokenize=TextTokenizer(text_config),
        tokenizer=find_tokenizer(flow_dir, config.tokenizer_run, trained_on.get("tokenizer")).to(
            device
        ),
        flow=flow.to(device),
        decoder=find_text_decoder(flow_dir, config.text_decoder_run, flow.projector).to(device),
    )
    return parts, section(config, "sampling", SamplingConfig)


def captioning_run(run_dir: str | Path) -> Path:
    """The stage-3 run that makes an experiment's captions, or the run folder itself."""
    run_dir = Path(run_dir)
    return next(
        (run_dir / name for name in ("flowtok_caption", "flowtok") if (run_dir / name).is_dir()),
        run_dir,
    )


def find_text_decoder(
    flow_dir: Path, text_decoder_run: str, projector: TextProjector
) -> TextDecoder:
    """What reads a flow's z_T: where its config says, or beside the flow if the folder was moved.

    Args:
        projector: the flow's; a decoder that was trained on another one's z_T would read nonsense.

    Raises:
        ValueError: none for this projector is there.
    """
    wanted = fingerprint(projector)
    runs = [
        run
        for run in (Path(text_decoder_run), flow_dir.parent / "text_decoder")
        if (run / CONFIG_FILE).is_file()
    ]
    for run in runs:
        autoencoder = load_autoencoder(run)
        if fingerprint(autoencoder.projector) == wanted:
            return autoencoder.decoder
    tried = ", ".join(map(str, runs)) or f"nothing at {text_decoder_run}"
    raise ValueError(
        f"{flow_dir} ends in the z_T of the projector {wanted}, and no text decoder for it is there (found: {tried})"
    )


def load_pipeline(
    run_dir: str | Path, device: torch.device
) -> tuple[ImageGenerator, SamplingConfig]:
    """All parts of an experiment for generation, and its default sampling.

    Args:
        run_dir: an experiment folder (with flowtok/ in it) or a stage-3 run folder.
    """
    run_dir = Path(run_dir)
    flow_dir = flow_folder(run_dir)
    config = read_run_config(flow_dir)
    if "flowtok" not in config:
        raise ValueError(
            f"{flow_dir} is a run of stage {config.get('stage')!r}; sampling needs a flowtok run"
        )
    if direction_of(config) == "image_to_text":
        raise ValueError(
            f"{flow_dir} flows from image to text: it makes captions (sample.py --caption), no images"
        )
    trained_on = read_state(newest_checkpoint(flow_dir))["inputs"]  # empty for a converted run
    text_config = section(config, "text_encoder", TextEncoderConfig)
    text_config.model, text_encoder = find_text_encoder(
        flow_dir, text_config, trained_on.get("text_encoder")
    )
    tokenizer = find_tokenizer(flow_dir, config.tokenizer_run, trained_on.get("tokenizer"))
    check_parts(section(config, "projector", TextProjectorConfig), tokenizer.config, text_encoder)
    parts = ImageGenerator(
        tokenize=TextTokenizer(text_config),
        text_encoder=text_encoder.to(device),
        tokenizer=tokenizer.to(device),
        flow=load_flow(flow_dir).to(
            device
        ),  # the largest part last: what else is missing is known by then
    )
    return parts, section(config, "sampling", SamplingConfig)


def check_parts(
    projector: TextProjectorConfig, tokenizer: ImageTokenizerConfig, text_encoder: TextEncoder
) -> None:
    """Refuse parts of different sizes, which a converted run can have: no fingerprint says what belongs together."""
    latents = (projector.text_tokens, projector.token_channels)
    if (tokenizer.num_tokens, tokenizer.token_channels) != latents:
        raise ValueError(
            f"the flow makes {latents[0]} x {latents[1]} tokens, the tokenizer reads "
            f"{tokenizer.num_tokens} x {tokenizer.token_channels}: set tokenizer_run in the flow's {CONFIG_FILE}"
        )
    states = (text_encoder.context_length, text_encoder.width)
    expected = [(projector.text_tokens, projector.text_width)]
    expected += [(tokenizer.text_tokens, tokenizer.text_width)] if tokenizer.text_guidance else []
    if any(shape != states for shape in expected):
        raise ValueError(
            f"the text tower gives {states[0]} x {states[1]} states, the flow (and the tokenizer's decoder) expect "
            f"{' and '.join(f'{length} x {width}' for length, width in expected)}: set text_encoder in the flow's "
            f"{CONFIG_FILE}"
        )


def find_tokenizer(flow_dir: Path, tokenizer_run: str, wanted: str | None) -> ImageTokenizer:
    """The tokenizer that a flow was trained with: where its config says, or beside the flow if the folder was moved.

    Args:
        wanted: its fingerprint; None for a converted run, which takes the first that is there.

    Raises:
        ValueError: none is there, or none with that fingerprint.
    """
    beside = flow_dir.parent / "tokenizer"
    runs = [run for run in (Path(tokenizer_run), beside) if (run / CONFIG_FILE).is_file()]
    for run in runs:
        tokenizer = load_tokenizer(run)[0]
        if wanted is None or fingerprint(tokenizer) == wanted:
            return tokenizer
    if wanted is None:
        raise ValueError(
            f"{flow_dir} has no tokenizer at {tokenizer_run} or {beside}: convert one there "
            f"(scripts/convert_checkpoint.py), or set tokenizer_run in {flow_dir / CONFIG_FILE}"
        )
    tried = ", ".join(map(str, runs)) or f"nothing at {tokenizer_run}"
    raise ValueError(
        f"{flow_dir} was trained with the tokenizer {wanted}, which is not there any more (found: {tried})"
    )


def find_text_encoder(
    flow_dir: Path, config: TextEncoderConfig, wanted: str | None
) -> tuple[str, TextEncoder]:
    """(model, tower) that a flow was trained with: as its config says, or beside the flow if the folder was moved.

    Args:
        wanted: its fingerprint; None for a converted run, which takes the first.

    Raises:
        ValueError: none with that fingerprint.
    """
    beside = flow_dir.parent / "text_encoder" / "clip"
    models = [config.model] + ([f"local-dir:{beside}"] if beside.is_dir() else [])
    if len(models) == 2 and not Path(config.model.removeprefix("local-dir:")).is_dir():
        models.reverse()
    if wanted is None and not config.model.startswith("local-dir:"):
        models = [config.model]  # nothing would tell that the folder beside is another tower
    for model in models:
        tower = load_text_encoder(replace(config, model=model))
        if wanted is None or fingerprint(tower) == wanted:
            return model, tower
    raise ValueError(
        f"{flow_dir} was trained with the text tower {wanted}, which {' and '.join(models)} is not any more"
    )


def fingerprint(module: nn.Module) -> str:
    """16 hex digits over names, shapes and values of a module's state, and QuickGELU if it is a text tower with it."""
    digest = hashlib.sha256(
        b"quick_gelu" if isinstance(module, TextEncoder) and module.quick_gelu else b""
    )
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
