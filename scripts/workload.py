"""A stage's own step on made-up data, for scripts/plan.py and scripts/benchmark.py.

A stage's YAML is completed by the sizes that earlier runs know. They come from the run's folder or,
if it is not there, from the YAML that makes it: runs/X/STAGE is made by configs/X/STAGE.yaml. Then
the real step of the stage is built with random weights: no data, no weights files, no compilation.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn
from torch.utils import flop_counter

import train_flowtok
import train_text_decoder
import train_text_projector
import train_tokenizer
from modeling import perceptual
from modeling.clip_weights import CONFIG_FILE as CLIP_CONFIG_FILE
from modeling.clip_weights import build_clip
from modeling.discriminator import Discriminator
from modeling.flow_model import fill_in_sizes
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.losses import freeze_unused_alignment
from modeling.text_encoder import ClipTextEncoder, TextEncoderConfig
from modeling.text_projector import TextProjector, TextProjectorConfig
from scripts import train_text_encoder
from scripts.run_experiment.stages import load_stage
from scripts.train_text_encoder import ClipSize, open_clip_config
from training.loading import read_section
from training.optim import OptimizedNetwork, descend
from training.run import CONFIG_FILE, Run
from training.stage import StageConfig, TrainedStage, TrainingConfig
from training.tokens import StoredCaptions, StoredTokens, projector_sizes, unknown_tokens

MAX_TOKEN_ID = 49_000  # below CLIP's vocabulary
READ_IMAGES = ("text_encoder", "tokenizer", "tokens")  # stages
READ_TOKENS = ("text_projector", "flowtok")

# torch counts the FLOPs of attention by CUDA's kernels only.
for kernel, formula in (
    ("_scaled_dot_product_flash_attention_for_cpu", flop_counter.sdpa_flop),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", flop_counter.sdpa_backward_flop),
):
    register = flop_counter.register_flop_formula(getattr(torch.ops.aten, kernel), get_raw=True)
    register(formula)

# Its sizes


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
    """The stage that a YAML configures.

    Raises:
        ValueError: a bad config, or an earlier run of unknown sizes.
    """
    file = Path(file)
    config = load_stage(file, overrides)
    if config.stage == "report":
        raise ValueError(f"{file}: stage report only reads runs")
    if config.stage == "text_encoder":
        return Stage(config, None, ImageTokenizerConfig())

    # The text tower's L x T are the number of tokens and the sizes of the text.
    if config.stage == "tokenizer":
        text_encoder, tokenizer = config.text_encoder, config.tokenizer
    else:
        run = config.tokenizer_run
        text_encoder = read_earlier(run, "text_encoder", TextEncoderConfig, file)
        tokenizer = read_earlier(run, "tokenizer", ImageTokenizerConfig, file)
    clip = find_clip(text_encoder.model, file)
    with torch.device("meta"):
        length, width = build_tower(clip).shape
    tokenizer = replace(tokenizer, num_tokens=length, text_tokens=length, text_width=width)

    # The stage's own networks follow.
    if config.stage == "tokenizer":
        config.tokenizer = tokenizer
    elif isinstance(config, TrainedStage):
        config.projector = replace(find_projector(config, file), **projector_sizes(tokenizer))
    if config.stage == "flowtok":
        config.flowtok = fill_in_sizes(config.flowtok, config.projector, length)
    return Stage(config, clip, tokenizer)


def read_earlier(run_dir: str, section: str, schema: type, file: Path) -> Any:
    """A section of a run that a stage names.

    Args:
        file: the stage's YAML; the run's is in another experiment's folder, or beside it.

    Raises:
        ValueError: there is neither run nor YAML.
    """
    # A run knows more than a YAML: what was overridden.
    run = Path(run_dir)
    if (run / CONFIG_FILE).is_file():
        return read_section(run, section, schema)

    # With another experiment_dir the YAML is beside ours.
    beside = file.resolve().with_name(f"{run.name}.yaml")
    usual = beside.parents[1] / run.parent.name / beside.name
    for made_by in (usual, beside):
        if made_by.is_file():
            config = load_stage(made_by, [])
            is_projector = section == "projector"
            return find_projector(config, made_by) if is_projector else getattr(config, section)
    raise ValueError(f"{run_dir} is no run, and neither {usual} nor {beside} is there to make it")


def find_projector(config: StageConfig, file: Path) -> TextProjectorConfig:
    """The projector of a stage: its own, or that of the run which it starts from."""
    runs = config.earlier_runs()
    source = runs.get("init_from") or runs.get("projector_run")
    if config.projector is None and source:
        return read_earlier(source, "projector", TextProjectorConfig, file)
    return config.projector or TextProjectorConfig()


def find_clip(model: str, file: Path) -> dict:
    """open_clip's model config of a text tower.

    Raises:
        ValueError: its sizes can't be known without a download.
    """
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        saved = folder / CLIP_CONFIG_FILE
        if saved.is_file():
            return json.loads(saved.read_text())["model_cfg"]
        return open_clip_config(read_earlier(str(folder.parent), "clip", ClipSize, file))
    known = files("open_clip") / "model_configs" / f"{model}.json"
    if not known.is_file():
        raise ValueError(f"text_encoder.model={model}: of unknown size, name an open_clip model")
    return json.loads(known.read_text())


def build_tower(clip: dict) -> ClipTextEncoder:
    """A frozen text tower; the image tower, which is not used, is next to nothing."""
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {key: clip[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in clip}
    return ClipTextEncoder(build_clip({**text, "vision_cfg": vision}))


# Its step


def make_batch(stage: Stage, count: int, stored_states: bool = False) -> dict:
    """Random samples, with the fields that the stage's loader gives.

    stored_states: stages 2 and 3 read text states in place of token ids.
    """
    config, sizes = stage.config, stage.tokenizer
    length, image_size = sizes.text_tokens, sizes.image_size
    if config.stage == "text_encoder":
        length, image_size = config.clip.context_length, config.clip.image_size
    batch = {}
    if config.stage in READ_IMAGES:
        shape = (count, 3, image_size, image_size)
        batch["image"] = torch.randint(256, shape, dtype=torch.uint8)
    if config.stage in READ_TOKENS:
        shape = (count, sizes.num_tokens, sizes.token_channels)
        batch["latent_mean"] = torch.randn(shape)
        batch["latent_logvar"] = torch.randn(shape) - 4
    if stored_states and config.stage in READ_TOKENS:
        batch["text_states"] = torch.randn(count, length, sizes.text_width).half()
    else:
        batch["token_ids"] = torch.randint(MAX_TOKEN_ID, (count, length))
    return batch


@dataclass
class Workload:
    """A stage's own step."""

    networks: dict[str, OptimizedNetwork]  # what is trained; "" is the one with an EMA
    frozen: dict[str, nn.Module]  # what else is on the GPU
    step: Callable[[Sequence[dict], int], Any]  # (batches, index)


def build_workload(stage: Stage, run: Run, stored_states: bool = False) -> Workload:
    """The step of any stage; stored_states: see make_batch."""
    config = stage.config
    tower = None
    if stage.clip and not (stored_states and config.stage in READ_TOKENS):
        tower = build_tower(stage.clip).to(run.device)
    if config.stage == "tokens":
        return encoding_workload(stage, run, tower)
    if config.stage == "tokenizer":
        return tokenizer_workload(stage, run, tower)

    # The other stages train one network by one loss.
    training = config.training
    model, loss_fn = build_loss(stage, run, tower)
    network = OptimizedNetwork(run, model, config.optimizer, training.max_gradient_norm)
    network.wrap()

    def step(batches: Sequence[dict], index: int) -> dict[str, Tensor]:
        return descend(network, batches, loss_fn, index, training.max_steps)

    return Workload({"": network}, {"text_tower": tower} if tower else {}, step)


def build_loss(stage: Stage, run: Run, tower: ClipTextEncoder | None) -> tuple[nn.Module, Callable]:
    """(network, loss of a batch) of a stage that trains one network."""
    config, sizes = stage.config, stage.tokenizer
    if config.stage == "text_encoder":
        clip = open_clip_config(config.clip)
        return train_text_encoder.ClipPair(clip), partial(train_text_encoder.compute_losses, run)
    if config.stage == "text_decoder":
        captions = StoredCaptions(run, None, config.data, None, tower, has_text_states=False)
        decoder = train_text_decoder.build_model(config, None)
        return decoder, partial(train_text_decoder.compute_losses, config, captions)
    info = unknown_tokens(sizes.num_tokens, sizes.token_channels, latent_scale=1.0)
    tokens = StoredTokens(run, None, config.data, info, None, tower)
    if config.stage == "flowtok":
        flow = train_flowtok.build_model(config, info, None)
        return flow, partial(train_flowtok.compute_losses, config, tokens)
    projector = TextProjector(config.projector)
    freeze_unused_alignment(projector, config.losses)
    return projector, partial(train_text_projector.compute_losses, config, tokens)


def tokenizer_workload(stage: Stage, run: Run, tower: ClipTextEncoder) -> Workload:
    """Stage 1: tokenizer and discriminator in turn."""
    config, frozen = stage.config, {"text_tower": tower}
    if config.losses.perceptual_weight:
        frozen["perceptual"] = made_up_distance(config.perceptual).to(run.device)
    model = train_tokenizer.build_model(config, run, has_checkpoint=True)
    clip = config.training.max_gradient_norm
    networks = {"": OptimizedNetwork(run, model, config.optimizer, clip)}
    if config.adversarial.weight:
        discriminator = Discriminator()
        optimizer = config.discriminator_optimizer
        networks["discriminator_"] = OptimizedNetwork(run, discriminator, optimizer, clip)
    for network in networks.values():
        network.wrap()
    parts = train_tokenizer.Parts(run, tower, frozen.get("perceptual"))
    step = partial(train_tokenizer.train_step, config, parts, networks)
    return Workload(networks, frozen, step)


def made_up_distance(config: perceptual.PerceptualConfig) -> perceptual.PerceptualLoss:
    """Stage 1's perceptual networks, with random numbers in place of their weights files."""
    # Without files the networks stay on the meta device, but for LPIPS' heads.
    with (
        patch.object(perceptual.PublishedWeights, "find", return_value=None),
        patch.object(perceptual, "_load_into", lambda net, file, prefix="": net),
    ):
        distance = perceptual.PerceptualLoss(config)
    # All get weights of one sign, so that no distance is zero or infinite.
    for module in distance.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = 0.02 * torch.rand(parameter.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return distance


def encoding_workload(stage: Stage, run: Run, tower: ClipTextEncoder) -> Workload:
    """scripts/encode_tokens.py: nothing is trained."""
    tokenizer = ImageTokenizer(stage.tokenizer).requires_grad_(False).eval().to(run.device)

    def encode(batches: Sequence[dict], index: int) -> None:
        with torch.no_grad(), run.accelerator.autocast():
            for batch in batches:
                tokenizer.encode(batch["image"].to(run.device).float().div_(255))
                if stage.config.store_text_states:
                    tower(batch["token_ids"].to(run.device))

    return Workload({}, {"tokenizer": tokenizer, "text_tower": tower}, encode)


# What is printed of it


def print_figures(values: dict) -> None:
    """Print nested values as YAML, numbers with four digits."""
    print(yaml.safe_dump(rounded(values), sort_keys=False, default_flow_style=None, width=100))


def rounded(value: Any) -> Any:
    """Nested values with four digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
