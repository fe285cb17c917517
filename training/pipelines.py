"""Runs of later stages -> projectors, flows, and all parts of a generator or captioner.

EMA weights. A flow names its tokenizer's run, and that one its text encoder. Where the experiment's
folder was moved, the parts are found beside the flow's run; fingerprints refuse wrong ones. Whole
pipelines are also those of folders that scripts/export.py wrote.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from modeling.flow import FlowConfig
from modeling.flow_model import FlowModel, build_flow
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import fingerprint
from modeling.next_scale import NextScale, NextScaleConfig, NextScaleGenerator, NextScaleSampling
from modeling.pipeline import (
    Captioner,
    FlowTokPipeline,
    Generator,
    ImageGenerator,
    Sampling,
    SamplingConfig,
)
from modeling.pretrained import is_pretrained
from modeling.text_decoder import TextAutoencoder, TextDecoderConfig
from modeling.text_encoder import TextEncoder, TextTokenizer
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.loading import (
    find_text_encoder,
    load_dual_tokenizer,
    load_ema,
    load_tokenizer,
    read_run_config,
    read_section,
    text_encoder_config,
    trained_with,
)
from training.run import CONFIG_FILE

T = TypeVar("T")


def flow_folder(run_dir: str | Path) -> Path:
    """The stage-3 run that makes an experiment's images, or the run folder itself."""
    runs = (Path(run_dir) / stage for stage in ("flowtok", "next_scale"))
    return next((run for run in runs if run.is_dir()), Path(run_dir))


def is_next_scale(run_dir: str | Path) -> bool:
    """Whether an experiment or a run makes images scale by scale, without a flow."""
    if is_pretrained(run_dir):
        return False
    return read_run_config(flow_folder(run_dir)).get("stage") == "next_scale"


def captioning_run(run_dir: str | Path) -> Path:
    """The stage-3 run that makes an experiment's captions, or the run folder itself."""
    # An experiment has one run for each direction, named as the launcher names its stages.
    run = Path(run_dir) / "flowtok_caption"
    return run if run.is_dir() else flow_folder(run_dir)


def direction_of(flow_dir: str | Path) -> str:
    """Which way a stage-3 run flows; one that predicts scales does as to text_to_image."""
    if is_next_scale(flow_dir):
        return "text_to_image"
    return read_section(flow_dir, "flow", FlowConfig).direction


def directions_of(run_dir: str | Path) -> set[str]:
    """Which ways an experiment, a stage-3 run or an exported folder flows."""
    if is_pretrained(run_dir):
        config = FlowTokPipeline.from_pretrained(run_dir).config
        return {name for name in ("text_to_image", "image_to_text") if getattr(config, name)}
    # Of an experiment's two runs of stage 3, either may be absent.
    runs = {flow_folder(run_dir), captioning_run(run_dir)} - {Path(run_dir)}
    return {direction_of(run) for run in runs or {Path(run_dir)}}


def example_captions(run_dir: str | Path) -> list[str]:
    """The captions of the pictures that an experiment or a stage-3 run makes of itself."""
    if is_pretrained(run_dir):
        return FlowTokPipeline.from_pretrained(run_dir).config.captions
    return list(read_run_config(flow_folder(run_dir)).pictures.captions)


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
    # A flow has trained its projector on: its own counts, not that of stage 2.
    config = read_run_config(run_dir)
    if "flowtok" in config:
        return load_flow(run_dir).projector
    if "text_decoder" in config:
        return load_autoencoder(run_dir).projector
    projector = read_section(run_dir, "projector", TextProjectorConfig)
    return load_ema(TextProjector(projector), run_dir)


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
    """
    # What the config names may be gone, or another experiment's by now: the fingerprint decides.
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


def find_tokenizer(run: Path, load: Callable[[Path], T] = load_tokenizer) -> tuple[Path, T]:
    """(run, tokenizer) that a flow, or what `load` makes of another stage's, was trained with."""
    return find_run(run, "tokenizer", load, fingerprint, trained_with(run).get("tokenizer"))


def load_pipeline(
    run_dir: str | Path, device: torch.device
) -> tuple[ImageGenerator, SamplingConfig]:
    """All parts of an experiment, or of a stage-3 run, for images; and its default sampling."""
    if is_pretrained(run_dir):
        exported = FlowTokPipeline.from_pretrained(run_dir, device)
        return exported.generator, exported.direction("text_to_image").sampling
    flow_dir = flow_folder(run_dir)
    if is_next_scale(flow_dir):
        raise ValueError(f"{flow_dir} has no flow: sample.py --prompts draws its images")
    if direction_of(flow_dir) == "image_to_text":
        raise ValueError(f"{flow_dir} flows from image to text, no images: sample.py --caption")
    tokenizer_run, tokenizer = find_tokenizer(flow_dir)
    text_encoder = find_text_encoder(tokenizer_run, trained_with(flow_dir).get("text_encoder"))
    flow = load_flow(flow_dir)
    check_parts(flow, tokenizer, text_encoder)
    parts = ImageGenerator(text_encoder.to(device), tokenizer.to(device), flow.to(device))
    return parts, read_section(flow_dir, "sampling", SamplingConfig)


def load_generator(run_dir: str | Path, device: torch.device) -> tuple[Generator, Sampling]:
    """As load_pipeline, also of a run of stage next_scale."""
    if not is_next_scale(run_dir):
        return load_pipeline(run_dir, device)
    run = flow_folder(run_dir)
    # No sizes to compare: these runs all know the fingerprints of their parts.
    tokenizer_run, tokenizer = find_tokenizer(run, load_dual_tokenizer)
    text_encoder = find_text_encoder(tokenizer_run, trained_with(run).get("text_encoder"))
    model = load_ema(NextScale(read_section(run, "next_scale", NextScaleConfig)), run)
    parts = NextScaleGenerator(text_encoder.to(device), tokenizer.to(device), model.to(device))
    return parts, read_section(run, "sampling", NextScaleSampling)


def network_of(generator: Generator) -> nn.Module:
    """What leads from text to tokens: the flow, or what predicts them scale by scale."""
    return generator.flow if isinstance(generator, ImageGenerator) else generator.model


def load_captioner(run_dir: str | Path, device: torch.device) -> tuple[Captioner, SamplingConfig]:
    """All parts of an experiment, or of a stage-3 run, for captions; and its default sampling."""
    if is_pretrained(run_dir):
        exported = FlowTokPipeline.from_pretrained(run_dir, device)
        return exported.captioner, exported.direction("image_to_text").sampling
    flow_dir = captioning_run(run_dir)
    if direction_of(flow_dir) == "text_to_image":
        raise ValueError(
            f"{flow_dir} flows from text to image: captions need flow.direction=image_to_text"
        )
    tokenizer_run, tokenizer = find_tokenizer(flow_dir)
    flow = load_flow(flow_dir)

    # A decoder that was trained on another projector's z_T would read nonsense.
    wanted = fingerprint(flow.projector)
    _, autoencoder = find_run(
        flow_dir, "text_decoder", load_autoencoder, lambda x: fingerprint(x.projector), wanted
    )
    parts = Captioner(
        tokenize=TextTokenizer(text_encoder_config(tokenizer_run)),
        tokenizer=tokenizer.to(device),
        flow=flow.to(device),
        decoder=autoencoder.decoder.to(device),
    )
    return parts, read_section(flow_dir, "sampling", SamplingConfig)


def check_parts(flow: FlowModel, tokenizer: ImageTokenizer, text_encoder: TextEncoder) -> None:
    """Refuse parts of different sizes."""
    # Fingerprints exclude them, but a converted run has none.
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
