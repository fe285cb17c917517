"""The stages as workloads of eval/planning.py: networks without weights, batches of the right shapes, their own losses.

For scripts/plan.py. Workloads are built on the meta device; nothing is downloaded, no data and no run is needed.
"""

import json
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from configs.schema import (
    FlowTokStage,
    StageConfig,
    TextDecoderStage,
    TextEncoderStage,
    TextProjectorStage,
    TokenizerStage,
)
from modeling.adversarial import is_active
from torch import Tensor, nn
from torchvision import models
from training.stored_captions import StoredCaptions
from training.stored_tokens import StoredTokens

import train_flowtok
import train_text_decoder
import train_tokenizer
from configs.load import load_config
from eval.planning import Terms, Workload, autocast
from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.losses import contrastive_loss, freeze_unused_alignment
from modeling.perceptual import (
    LPIPS,
    LPIPS_LAYERS,
    ConvNeXtDistance,
    PerceptualConfig,
    PerceptualLoss,
)
from modeling.text_decoder import TextAutoencoder
from modeling.text_encoder import CONFIG_FILE, TextEncoder, TextEncoderConfig, build_clip, open_clip
from modeling.text_projector import TextProjector, TextProjectorConfig
from scripts.train_text_encoder import ClipPair, open_clip_config
from train_text_projector import compute_losses as projector_losses
from training.loading import read_run_config, section
from training.run import CONFIG_FILE as RUN_CONFIG_FILE

SMALL_VISION = {
    "image_size": 32,
    "patch_size": 16,
    "width": 64,
    "layers": 1,
}  # the half of a CLIP that is not used


@dataclass
class Sizes:
    """Of the networks that a stage reads or runs, and where they were found."""

    tokenizer: ImageTokenizerConfig
    text_encoder: TextEncoderConfig
    text_shape: tuple[int, int]  # L x T of the text states
    notes: list[str] = field(default_factory=list)


def find_sizes(config: StageConfig, path: Path) -> Sizes:
    """Sizes of the tokenizer and the text tower that a stage works with.

    The tokenizer's are, in this order, in the config itself, in the tokenizer's run, in a YAML that makes that run
    (beside `path` or in another experiment's folder next to it), or the paper's.
    """
    notes: list[str] = []
    if isinstance(config, TokenizerStage):
        tokenizer, text_encoder = config.tokenizer, config.text_encoder
    elif isinstance(config, TextDecoderStage):
        tokenizer, text_encoder = (
            ImageTokenizerConfig(),
            config.text_encoder,
        )  # it works with no image
    else:
        tokenizer, text_encoder, where = find_tokenizer(config, path)
        text_encoder = getattr(config, "text_encoder", text_encoder)
        notes.append(f"sizes of the tokenizer: {where}")
    part = getattr(config, "projector", tokenizer)
    if tower_config(text_encoder) is None:
        notes.append(f"the text tower {text_encoder.model} is not here: not counted")
    if (
        isinstance(config, TokenizerStage)
        and config.losses.perceptual_weight
        and config.training.precision == "bf16"
    ):
        notes.append(
            "the perceptual networks run in float32, but count at the bf16 peak in the time"
        )
    return Sizes(tokenizer, text_encoder, (part.text_tokens, part.text_width), notes)


def find_tokenizer(
    config: StageConfig, path: Path
) -> tuple[ImageTokenizerConfig, TextEncoderConfig, str]:
    """The tokenizer that a stage reads, its text tower, and where that was found."""
    run = os.path.normpath(config.tokenizer_run)
    if (Path(run) / RUN_CONFIG_FILE).is_file():
        saved = read_run_config(run)
        return (
            section(saved, "tokenizer", ImageTokenizerConfig),
            section(saved, "text_encoder", TextEncoderConfig),
            run,
        )
    folder, own = path.resolve().parent, [f"experiment_dir={config.experiment_dir}"]
    others = sorted(
        folder.parent.glob("*/tokenizer*.yaml"),
        key=lambda file: file.parent.name not in Path(run).parts,
    )
    for file, overrides in [(file, own) for file in sorted(folder.glob("tokenizer*.yaml"))] + [
        (f, []) for f in others
    ]:
        try:
            other = load_config(file, overrides)
        except ValueError:  # somebody else's experiment may be broken
            continue
        if isinstance(other, TokenizerStage) and os.path.normpath(other.run_dir) == run:
            return other.tokenizer, other.text_encoder, f"{file.parent.name}/{file.name}"
    return (
        ImageTokenizerConfig(),
        TextEncoderConfig(),
        f"the paper's at 256 px, for {run} is not there",
    )


class StatesAlone(nn.Module):
    """In place of a text tower that is not here: text states of its shape, without weights and work."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape = shape

    def forward(self, token_ids: Tensor) -> Tensor:
        return torch.zeros(len(token_ids), *self.shape)


def tower_config(config: TextEncoderConfig) -> dict | None:
    """open_clip's model config of a tower, or None where it needs a download or a folder that is not there.

    Raises:
        ValueError: open_clip has no such model.
    """
    if config.model.startswith("local-dir:"):
        file = Path(config.model.removeprefix("local-dir:")) / CONFIG_FILE
        return json.loads(file.read_text())["model_cfg"] if file.is_file() else None
    if ":" in config.model:
        return None
    found = open_clip.get_model_config(config.model)
    if found is None:
        raise ValueError(
            f"text_encoder.model: unknown open_clip model {config.model!r}; see open_clip.list_models()"
        )
    return found


def build_tower(sizes: Sizes) -> nn.Module:
    """The frozen text tower without weights; a stand-in where its sizes are not known.

    Raises:
        ValueError: it gives other text states than the stage's networks read.
    """
    found = tower_config(sizes.text_encoder)
    if found is None:
        return StatesAlone(sizes.text_shape)
    wanted = {key: found[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in found}
    tower = TextEncoder(build_clip({**wanted, "vision_cfg": SMALL_VISION}))
    if (tower.context_length, tower.width) != sizes.text_shape:
        raise ValueError(
            f"{sizes.text_encoder.model} gives {tower.context_length} x {tower.width} text states, the config expects "
            f"text_tokens x text_width = {sizes.text_shape}"
        )
    return tower


class EmptyLPIPS(LPIPS):
    """LPIPS of the right shapes, without weights files."""

    def __init__(self):
        nn.Module.__init__(self)
        self.features = models.vgg16().features[: LPIPS_LAYERS[-1] + 1]
        self.heads = nn.ParameterList(
            torch.empty(1, channels, 1, 1) for channels in (64, 128, 256, 512, 512)
        )
        self.register_buffer("shift", torch.zeros(3, 1, 1))
        self.register_buffer("scale", torch.ones(3, 1, 1))
        self.freeze()


class EmptyConvNeXt(ConvNeXtDistance):
    """The ConvNeXt distance of the right shapes, without a weights file."""

    def __init__(self):
        nn.Module.__init__(self)
        self.convnext = models.convnext_small()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        self.freeze()


class EmptyPerceptualLoss(PerceptualLoss):
    """The perceptual loss of the right shapes, without weights files."""

    def __init__(self, config: PerceptualConfig):
        nn.Module.__init__(self)
        self.weights = {"lpips": config.lpips_weight, "convnext": config.convnext_weight}
        build = {"lpips": EmptyLPIPS, "convnext": EmptyConvNeXt}
        self.parts = nn.ModuleDict(
            {name: build[name]() for name, weight in self.weights.items() if weight}
        )


def stand_in_run(precision: str) -> SimpleNamespace:
    """What the losses use of a training.run.Run."""
    accelerator = SimpleNamespace(autocast=partial(autocast, precision))
    return SimpleNamespace(device=torch.device("cpu"), accelerator=accelerator)


def image_batch(image_size: int, text_tokens: int, batch_size: int) -> dict:
    """As data/image_text.py gives it."""
    images = torch.zeros(batch_size, 3, image_size, image_size, dtype=torch.uint8)
    return {"image": images, "token_ids": torch.zeros(batch_size, text_tokens, dtype=torch.int64)}


def token_batch(num_tokens: int, token_channels: int, batch_size: int) -> dict:
    """As data/token_text.py gives it; text and image have the same number of tokens."""
    moments = {
        name: torch.zeros(batch_size, num_tokens, token_channels)
        for name in ("latent_mean", "latent_logvar")
    }
    return moments | {"token_ids": torch.zeros(batch_size, num_tokens, dtype=torch.int64)}


def build_tokenizer_step(
    config: TokenizerStage, sizes: Sizes, recompute: str, step: int
) -> Workload:
    """Stage 1 at step `step`: the adversarial loss starts late."""
    run, tokenizer = stand_in_run(config.training.precision), config.tokenizer
    run.device = torch.device("meta")  # while the networks are built
    tower = build_tower(sizes) if tokenizer.text_guidance else None
    perceptual = EmptyPerceptualLoss(config.perceptual) if config.losses.perceptual_weight else None
    model = train_tokenizer.build_model(
        replace(config, activation_checkpointing=recompute), run, started=True
    )
    losses = train_tokenizer.TokenizerLosses(config, run, tower, perceptual)
    run.device = torch.device("cpu")
    work = Workload(
        model,
        partial(image_batch, tokenizer.image_size, tokenizer.text_tokens),
        lambda model, batch: losses(model, batch, step),
        [module for module in (tower, perceptual) if module is not None],
    )
    if is_active(config.adversarial, step):
        work.opponent, work.opponent_loss_fn = losses.adversary, losses.discriminator_terms
    return work


def build_token_step(
    config: TextProjectorStage | FlowTokStage, sizes: Sizes, recompute: str, step: int
) -> Workload:
    """Stages 2 and 3; the text tower runs each step, as without stored text states."""
    info, tower = SimpleNamespace(latent_scale=1.0), build_tower(sizes)
    tokens = StoredTokens(
        stand_in_run(config.training.precision), None, config.data, info, None, tower
    )
    if isinstance(config, FlowTokStage):
        model = train_flowtok.build_model(
            replace(config, activation_checkpointing=recompute), info, None
        )
        losses = train_flowtok.compute_losses
    else:
        model = TextProjector(config.projector)
        freeze_unused_alignment(model, config.losses)
        losses = projector_losses
    make_batch = partial(token_batch, config.projector.text_tokens, config.projector.token_channels)
    return Workload(model, make_batch, partial(losses, config, info, tokens), [tower])


def build_text_decoder_step(
    config: TextDecoderStage, sizes: Sizes, recompute: str, step: int
) -> Workload:
    """Stage text_decoder with the text tower in each step; an upper bound: every caption fills the whole context."""
    tower, length = build_tower(sizes), config.projector.text_tokens
    captions = StoredCaptions(
        stand_in_run(config.training.precision), None, config.data, None, tower, False
    )

    def make_batch(batch_size: int) -> dict:
        return {"token_ids": torch.zeros(batch_size, length, dtype=torch.int64)}

    def losses(model: nn.Module, batch: dict) -> Terms:
        counted = torch.arange(batch["token_ids"].numel())
        return train_text_decoder.decoder_losses(config, captions, model, batch, counted)

    model = train_text_decoder.build_model(config, None)
    return Workload(model, make_batch, losses, [tower])


def build_clip_step(
    config: TextEncoderStage, sizes: Sizes | None, recompute: str, step: int
) -> Workload:
    """The training of a small CLIP, without its random shift: the shift is drawn on the CPU, fake tensors have none."""

    def losses(model: nn.Module, batch: dict) -> Terms:
        image_features, text_features, log_scale = model(
            batch["image"].float().div_(255), batch["token_ids"]
        )
        return {"loss": contrastive_loss(text_features, image_features, log_scale)}

    make_batch = partial(image_batch, config.clip.image_size, config.clip.context_length)
    return Workload(ClipPair(open_clip_config(config.clip)), make_batch, losses)


TRAINING_STEPS = {
    TextEncoderStage: build_clip_step,
    TokenizerStage: build_tokenizer_step,
    TextProjectorStage: build_token_step,
    TextDecoderStage: build_text_decoder_step,
    FlowTokStage: build_token_step,
}


def build_tower_alone(sizes: Sizes) -> Workload:
    """Captions to text states."""

    def make_batch(batch_size: int) -> dict:
        return {"token_ids": torch.zeros(batch_size, sizes.text_shape[0], dtype=torch.int64)}

    return Workload(
        build_tower(sizes), make_batch, lambda model, batch: {"states": model(batch["token_ids"])}
    )


def build_encoding(sizes: Sizes, with_text_states: bool) -> Workload:
    """scripts/encode_tokens.py: images to latents, and captions to text states if they are stored."""
    tower, tokenizer = build_tower(sizes), sizes.tokenizer

    def encode(model: nn.Module, batch: dict) -> Terms:
        latents = torch.stack([*model.encode(batch["image"].float() / 255)], dim=1)
        return {"latents": latents} | (
            {"states": tower(batch["token_ids"])} if with_text_states else {}
        )

    make_batch = partial(image_batch, tokenizer.image_size, sizes.text_shape[0])
    return Workload(ImageTokenizer(tokenizer), make_batch, encode, [tower])


def build_decoding(sizes: Sizes) -> Workload:
    """Latents and text states to images."""
    tokenizer = sizes.tokenizer

    def make_batch(batch_size: int) -> dict:
        latents = torch.zeros(batch_size, tokenizer.num_tokens, tokenizer.token_channels)
        return {
            "latents": latents,
            "states": torch.zeros(batch_size, tokenizer.text_tokens, tokenizer.text_width),
        }

    def decode(model: nn.Module, batch: dict) -> Terms:
        return {"images": model.decode(batch["latents"], batch["states"])}

    return Workload(ImageTokenizer(tokenizer), make_batch, decode)


def build_projection(config: TextProjectorConfig) -> Workload:
    """Text states to the start of the flow."""

    def make_batch(batch_size: int) -> dict:
        return {"states": torch.zeros(batch_size, config.text_tokens, config.text_width)}

    def project(model: nn.Module, batch: dict) -> Terms:
        return {"latents": model.posterior(batch["states"]).mean}

    return Workload(TextProjector(config), make_batch, project)


def build_velocity(config: FlowTokConfig, guidance: float) -> Workload:
    """One evaluation of the flow, two branches with guidance; modulations of each sample, which sampling shares."""
    branches = 1 if guidance in (0, 1) else 2

    def make_batch(batch_size: int) -> dict:
        return {"x": torch.zeros(batch_size, config.num_tokens, config.token_channels)}

    def velocity(model: nn.Module, batch: dict) -> Terms:
        x = batch["x"].repeat(branches, 1, 1)
        return {"velocity": model(x, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool))}

    return Workload(FlowTok(config), make_batch, velocity)


def weights_by_part(work: Workload) -> dict[str, int]:
    """Number of weights of each network, without buffers (fixed position tables, RoPE angles)."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    model, parts = work.model, {}
    projector = getattr(model, "projector", model)
    if isinstance(projector, TextProjector):
        alignment = count(projector.alignment)
        parts |= {"projector": count(projector) - alignment, "alignment": alignment}
    if isinstance(model, TextAutoencoder):
        parts["text_decoder"] = count(model.decoder)
    if isinstance(model, FlowModel):
        parts["dit"] = count(model.flowtok)
    if isinstance(model, ImageTokenizer):
        parts |= {"encoder": count(model.encoder), "decoder": count(model.decoder)}
    if isinstance(model, ClipPair):
        image_tower = count(model.clip.visual)
        parts |= {"image_tower": image_tower, "text_tower": count(model) - image_tower}
    if work.opponent is not None:
        parts["discriminator"] = count(work.opponent)
    names = {TextEncoder: "text_tower_frozen", EmptyPerceptualLoss: "perceptual_frozen"}
    return parts | {
        names[type(module)]: count(module) for module in work.frozen if type(module) in names
    }
