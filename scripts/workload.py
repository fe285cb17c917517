"""The real work of every stage on made-up batches and random weights, for plan.py and benchmark.py.

`build_workload` gives a stage's own step: its networks, losses and optimiser, without data, weights
files and compilation. `read_stage` completes the networks' configs first: what a stage takes from
earlier runs comes from the run's folder or, if it is not there, from the YAML that makes it
(configs/X/STAGE.yaml makes runs/X/STAGE).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils import flop_counter

import train_flowtok
import train_text_decoder
import train_text_projector
import train_tokenizer
from configs.load import load_config
from modeling import clip_weights, perceptual
from modeling.discriminator import Discriminator
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.losses import freeze_unused_alignment
from modeling.text_encoder import ClipTextEncoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from scripts import encode_tokens, train_text_encoder
from scripts.run_experiment.stages import program_of
from training.optim import OptimizedNetwork, descend
from training.run import CONFIG_FILE, Run
from training.stage import StageConfig, TrainedStage, TrainingConfig
from training.tokens import StoredCaptions, StoredTokens, projector_sizes, unknown_tokens

MAX_TOKEN_ID = 49_000  # below CLIP's vocabulary

# torch counts the FLOPs of attention by CUDA's kernels only.
for kernel, formula in (
    ("_scaled_dot_product_flash_attention_for_cpu", flop_counter.sdpa_flop),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", flop_counter.sdpa_backward_flop),
):
    register = flop_counter.register_flop_formula(getattr(torch.ops.aten, kernel), get_raw=True)
    register(formula)

# Sizes from earlier runs


def stage_class(name: str) -> type[StageConfig]:
    """The dataclass of a stage or of a round of it: that of flowtok_512 is stage flowtok's."""
    module, schema = program_of(name)
    return getattr(import_module(module), schema)


def load_stage(file: Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The config of a YAML that is named after its stage."""
    return load_config(stage_class(file.stem), file, list(overrides))


def load_earlier(run_dir: str, file: Path) -> StageConfig:
    """The config of a run that a stage names.

    Args:
        file: the stage's YAML; the run's is in another experiment's folder, or beside it.

    Raises:
        ValueError: there is neither run nor YAML.
    """
    # A run knows more than a YAML: what was overridden.
    run = Path(run_dir)
    if (run / CONFIG_FILE).is_file():
        saved = OmegaConf.load(run / CONFIG_FILE)
        schema = OmegaConf.structured(stage_class(saved.pop("stage")))
        return OmegaConf.to_object(OmegaConf.merge(schema, saved))

    # runs/X/STAGE is made by configs/X/STAGE.yaml, with another experiment_dir by one beside ours.
    beside = file.resolve().with_name(f"{run.name}.yaml")
    usual = beside.parents[1] / run.parent.name / beside.name
    for made_by in (usual, beside):
        if made_by.is_file():
            return load_stage(made_by)
    raise ValueError(f"{run_dir} is no run, and neither {usual} nor {beside} is there to make it")


def find_clip(model: str, file: Path) -> dict:
    """open_clip's model config of a text tower.

    Raises:
        ValueError: its sizes can't be known without a download.
    """
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        saved = folder / clip_weights.CONFIG_FILE
        if saved.is_file():
            return json.loads(saved.read_text())["model_cfg"]
        return train_text_encoder.open_clip_config(load_earlier(str(folder.parent), file).clip)
    known = files("open_clip") / "model_configs" / f"{model}.json"
    if not known.is_file():
        raise ValueError(f"text_encoder.model={model}: of unknown size, name an open_clip model")
    return json.loads(known.read_text())


def find_projector(config: StageConfig, file: Path) -> TextProjectorConfig:
    """The projector of a stage: its own, or that of the run which it starts from."""
    runs = config.earlier_runs()
    source = runs.get("init_from") or runs.get("projector_run")
    if config.projector is None and source:
        return find_projector(load_earlier(source, file), file)
    return config.projector or TextProjectorConfig()


@dataclass
class Stage:
    """A stage's config with all sizes filled in."""

    config: StageConfig
    clip: dict | None  # open_clip's model config of the text tower; None: the stage has none
    tokenizer: ImageTokenizerConfig

    @property
    def training(self) -> TrainingConfig | None:
        """None: the stage does not train."""
        return self.config.training if isinstance(self.config, TrainedStage) else None

    @property
    def precision(self) -> str:
        """fp32 or bf16."""
        return (self.training or self.config).precision


def read_stage(file: str | Path, overrides: Sequence[str] = ()) -> Stage:
    """A YAML, completed by what earlier runs know.

    Raises:
        ValueError: a bad config, or an earlier run of unknown sizes.
    """
    file = Path(file)
    config = load_stage(file, overrides)
    if config.stage == "report":
        raise ValueError(f"{file}: stage report only reads runs")
    if isinstance(config, train_text_encoder.TextEncoderStage):
        return Stage(config, None, ImageTokenizerConfig())

    # The tokenizer's config names the text tower, whose L x T decide K and the text's sizes.
    is_tokenizer = isinstance(config, train_tokenizer.TokenizerStage)
    origin = config if is_tokenizer else load_earlier(config.tokenizer_run, file)
    clip = find_clip(origin.text_encoder.model, file)
    with torch.device("meta"):
        length, width = build_tower(clip).shape
    sizes = replace(origin.tokenizer, num_tokens=length, text_tokens=length, text_width=width)

    # The stage's own networks follow.
    if is_tokenizer:
        config.tokenizer = sizes
    elif isinstance(config, TrainedStage):
        config.projector = replace(find_projector(config, file), **projector_sizes(sizes))
    if isinstance(config, train_flowtok.FlowTokStage):
        channels = sizes.token_channels
        config.flowtok = replace(config.flowtok, num_tokens=length, token_channels=channels)
    return Stage(config, clip, sizes)


def build_tower(clip: dict) -> ClipTextEncoder:
    """A frozen text tower; the image tower, which is not used, is next to nothing."""
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {key: clip[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in clip}
    return ClipTextEncoder(clip_weights.build_clip({**text, "vision_cfg": vision}))


# Steps


@dataclass
class Workload:
    """A stage's own step."""

    networks: dict[str, OptimizedNetwork]  # what is trained; "" is the one with an EMA
    frozen: dict[str, nn.Module]  # what else is on the GPU
    make_batch: Callable[[int], dict]  # number of samples -> batch
    step: Callable[[Sequence[dict], int], Any]  # (batches, index)


def build_workload(stage: Stage, run: Run, stored_states: bool = False) -> Workload:
    """The step of any stage. stored_states: stages 2 and 3 read text states, and run no tower."""
    builders = {
        train_text_encoder.TextEncoderStage: clip_workload,
        train_tokenizer.TokenizerStage: tokenizer_workload,
        encode_tokens.TokensStage: encoding_workload,
        train_text_projector.TextProjectorStage: token_workload,
        train_text_decoder.TextDecoderStage: caption_workload,
        train_flowtok.FlowTokStage: token_workload,
    }
    build = builders[type(stage.config)]
    has_tower = stage.clip is not None and not (stored_states and build is token_workload)
    return build(stage, run, build_tower(stage.clip).to(run.device) if has_tower else None)


def one_network(
    config: TrainedStage,
    run: Run,
    model: nn.Module,
    losses: Callable[[nn.Module, dict], dict[str, Tensor]],
    make_batch: Callable[[int], dict],
    tower: ClipTextEncoder | None = None,
) -> Workload:
    """A stage whose step is one update."""
    training = config.training
    network = OptimizedNetwork(run, model, config.optimizer, training.max_gradient_norm)
    network.wrap()

    def step(batches: Sequence[dict], index: int) -> dict[str, Tensor]:
        return descend(network, batches, losses, index, training.max_steps)

    return Workload({"": network}, {"text_tower": tower} if tower else {}, make_batch, step)


def captions(length: int, count: int) -> dict:
    """A batch of token ids, B x L."""
    return {"token_ids": torch.randint(MAX_TOKEN_ID, (count, length))}


def images(image_size: int, length: int, count: int) -> dict:
    """A batch of images with captions."""
    pixels = torch.randint(256, (count, 3, image_size, image_size), dtype=torch.uint8)
    return {"image": pixels, **captions(length, count)}


def clip_workload(stage: Stage, run: Run, tower: None) -> Workload:
    """Training of a small CLIP."""
    config = stage.config
    pair = train_text_encoder.ClipPair(train_text_encoder.open_clip_config(config.clip))
    losses = partial(train_text_encoder.compute_losses, run)
    make_batch = partial(images, config.clip.image_size, config.clip.context_length)
    return one_network(config, run, pair, losses, make_batch)


def tokenizer_workload(stage: Stage, run: Run, tower: ClipTextEncoder) -> Workload:
    """Stage 1."""
    config = stage.config
    distance = random_perceptual(config, run)
    model = train_tokenizer.build_model(config, run, has_checkpoint=True)
    clip, sizes = config.training.max_gradient_norm, config.tokenizer
    networks = {"": OptimizedNetwork(run, model, config.optimizer, clip)}
    if config.adversarial.weight:
        discriminator = Discriminator()
        optimizer = config.discriminator_optimizer
        networks["discriminator_"] = OptimizedNetwork(run, discriminator, optimizer, clip)
    for network in networks.values():
        network.wrap()
    parts = train_tokenizer.Parts(run, tower, distance)
    frozen = {"text_tower": tower, "perceptual": distance}
    return Workload(
        networks=networks,
        frozen={name: module for name, module in frozen.items() if module is not None},
        make_batch=partial(images, sizes.image_size, sizes.text_tokens),
        step=partial(train_tokenizer.train_step, config, parts, networks),
    )


def random_perceptual(config, run: Run) -> perceptual.PerceptualLoss | None:
    """Stage 1's perceptual networks, with random numbers in place of their weights files."""
    if not config.losses.perceptual_weight:
        return None
    # Without files the networks stay on the meta device, but for LPIPS' heads.
    with (
        patch.object(perceptual.PublishedWeights, "find", return_value=None),
        patch.object(perceptual, "_load_into", lambda net, file, prefix="": net),
    ):
        distance = perceptual.PerceptualLoss(config.perceptual)
    # All get weights of one sign, so that no distance is zero or infinite.
    for module in distance.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = 0.02 * torch.rand(parameter.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return distance.to(run.device)


def token_workload(stage: Stage, run: Run, tower: ClipTextEncoder | None) -> Workload:
    """Stages 2 and 3."""
    config, sizes = stage.config, stage.config.projector
    info = unknown_tokens(sizes.text_tokens, sizes.token_channels, latent_scale=1.0)
    tokens = StoredTokens(run, None, config.data, info, None, tower)
    if isinstance(config, train_flowtok.FlowTokStage):
        model = train_flowtok.build_model(config, info, None)
        losses = partial(train_flowtok.compute_losses, config, tokens)
    else:
        model = TextProjector(sizes)
        freeze_unused_alignment(model, config.losses)
        losses = partial(train_text_projector.compute_losses, config, tokens)

    def make_batch(count: int) -> dict:
        shape = (count, sizes.text_tokens, sizes.token_channels)
        batch = {"latent_mean": torch.randn(shape), "latent_logvar": torch.randn(shape) - 4}
        if tower is not None:
            return batch | captions(sizes.text_tokens, count)
        states = torch.randn(count, sizes.text_tokens, sizes.text_width).half()
        return batch | {"text_states": states}

    return one_network(config, run, model, losses, make_batch, tower)


def caption_workload(stage: Stage, run: Run, tower: ClipTextEncoder) -> Workload:
    """Stage text_decoder."""
    config = stage.config
    stored = StoredCaptions(run, None, config.data, None, tower, has_text_states=False)
    model = train_text_decoder.build_model(config, None)
    losses = partial(train_text_decoder.compute_losses, config, stored)
    make_batch = partial(captions, config.projector.text_tokens)
    return one_network(config, run, model, losses, make_batch, tower)


def encoding_workload(stage: Stage, run: Run, tower: ClipTextEncoder) -> Workload:
    """scripts/encode_tokens.py: nothing is trained."""
    sizes = stage.tokenizer
    tokenizer = ImageTokenizer(sizes).requires_grad_(False).eval().to(run.device)

    def encode(batches: Sequence[dict], index: int) -> None:
        with torch.no_grad(), run.accelerator.autocast():
            for batch in batches:
                tokenizer.encode(batch["image"].to(run.device).float().div_(255))
                if stage.config.store_text_states:
                    tower(batch["token_ids"].to(run.device))

    frozen = {"tokenizer": tokenizer, "text_tower": tower}
    return Workload({}, frozen, partial(images, sizes.image_size, sizes.text_tokens), encode)
