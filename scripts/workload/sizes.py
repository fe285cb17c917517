"""A stage's YAML, completed by the sizes that earlier runs know.

They come from the run's folder or, if it is not there, from the YAML that makes it: runs/X/STAGE is
made by configs/X/STAGE.yaml.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from modeling.clip_weights import CONFIG_FILE as CLIP_CONFIG_FILE
from modeling.clip_weights import build_clip
from modeling.flow_model import fill_in_sizes
from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.text_encoder import ClipTextEncoder, TextEncoder, TextEncoderConfig
from modeling.text_projector import TextProjectorConfig
from modeling.transformers_text import build_tower, load_package, load_part
from scripts.run_experiment.stages import WITHOUT_NETWORK, load_stage
from scripts.train_text_encoder import ClipSize, open_clip_config
from training.loading import read_section
from training.run import CONFIG_FILE
from training.stage import StageConfig, TrainedStage, TrainingConfig
from training.tokens import projector_sizes

# Of T5 v1.1 and of Flan-T5: width, blocks, heads of 64 channels, width of the gated MLP
T5_NAME = re.compile(r"google/(?:t5-v1_1|flan-t5)-(\w+)")
T5_SIZES = {
    "small": (512, 8, 6, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "xl": (2048, 24, 32, 5120),
    "xxl": (4096, 24, 64, 10240),
}


@dataclass
class Stage:
    """A stage's config with all sizes filled in."""

    config: StageConfig
    # Makes the text tower with random weights; None: the stage has none
    make_tower: Callable[[], TextEncoder] | None
    tokenizer: ImageTokenizerConfig

    @property
    def training(self) -> TrainingConfig | None:
        # None: the stage does not train
        return self.config.training if isinstance(self.config, TrainedStage) else None

    @property
    def precision(self) -> str:
        return (self.training or self.config).precision

    def batch(self, num_gpus: int) -> int:
        """Samples of one GPU in one pass; ValueError if so many can't share the batch."""
        return self.training.split_batch(num_gpus) if self.training else self.config.batch_size


def read_stage(file: str | Path, overrides: Sequence[str] = ()) -> Stage:
    """The stage that a YAML configures.

    Raises:
        ValueError: a bad config, or an earlier run of unknown sizes.
    """
    file = Path(file)
    config = load_stage(file, overrides)
    if config.stage in WITHOUT_NETWORK:
        raise ValueError(f"{file}: stage {config.stage} trains no network")
    if is_of_codes(config):
        raise ValueError(f"{file}: {why_unplanned(config)}")
    # It is trained before there are any tokens.
    if config.stage == "text_encoder":
        return Stage(config, None, ImageTokenizerConfig())

    # The text tower's L x T are the sizes of the text.
    if config.stage == "tokenizer":
        text_encoder, tokenizer = config.text_encoder, config.tokenizer
    else:
        run = config.tokenizer_run
        text_encoder = read_earlier(run, "text_encoder", TextEncoderConfig, file)
        tokenizer = read_earlier(run, "tokenizer", ImageTokenizerConfig, file)
    make_tower = find_tower(text_encoder, file)
    with torch.device("meta"):
        tower = make_tower()
    tokenizer = tokenizer.for_text(tower.shape, tower.masks_padding)

    # The stage's own networks follow.
    if config.stage == "tokenizer":
        contrasts_text = config.losses.contrast_weight > 0
        config.tokenizer = replace(tokenizer, contrasts_text=contrasts_text)
    elif isinstance(config, TrainedStage):
        config.projector = replace(find_projector(config, file), **projector_sizes(tokenizer))
    if config.stage == "flowtok":
        config.flowtok = fill_in_sizes(config.flowtok, config.projector, tokenizer.num_tokens)
    return Stage(config, make_tower, tokenizer)


def is_of_codes(config: StageConfig) -> bool:
    """Whether a stage makes or reads a dual tokenizer's codes, for which there is no workload."""
    return config.stage in ("next_scale", "reader") or bool(getattr(config, "dual", None))


def why_unplanned(config: StageConfig) -> str:
    """Why nothing is known of a stage's cost; "" if fake tensors tell it."""
    if is_of_codes(config):
        return "nothing is known of the cost of a dual tokenizer's stages"
    if config.stage == "flowtok" and config.flow.objective == "mean_flow":
        return "flow.objective=mean_flow: its derivative can't be taken of fake tensors"
    return ""


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
            config = load_stage(made_by)
            if section == "projector":
                return find_projector(config, made_by)
            return getattr(config, section)
    raise ValueError(f"{run_dir} is no run, and neither {usual} nor {beside} is there to make it")


def find_projector(config: StageConfig, file: Path) -> TextProjectorConfig:
    """The projector of a stage: its own, or that of the run which it starts from."""
    runs = config.earlier_runs()
    source = runs.get("init_from") or runs.get("projector_run")
    if config.projector is None and source:
        return read_earlier(source, "projector", TextProjectorConfig, file)
    return config.projector or TextProjectorConfig()


def find_tower(text_encoder: TextEncoderConfig, file: Path) -> Callable[[], TextEncoder]:
    """What makes a text tower of a config's sizes, with random weights.

    Raises:
        ValueError: its sizes can't be known without a download.
    """
    if text_encoder.family == "open_clip":
        return partial(build_clip_tower, find_clip(text_encoder.model, file))
    # T5's sizes are known: no config of the hub is needed
    name = T5_NAME.fullmatch(text_encoder.model)
    if name and name[1] in T5_SIZES:
        width, depth, num_heads, mlp_width = T5_SIZES[name[1]]
        settings = load_package().T5Config(
            d_model=width,
            num_layers=depth,
            num_heads=num_heads,
            d_ff=mlp_width,
            feed_forward_proj="gated-gelu",
        )
    else:
        settings = load_part("AutoConfig", text_encoder)
    settings = getattr(settings, "text_config", settings)  # of a whole CLIP
    return partial(build_tower, settings, text_encoder.context_length)


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
    # A file of open_clip's, which only modeling/ imports
    known = files("open_clip") / "model_configs" / f"{model}.json"
    if not known.is_file():
        raise ValueError(f"text_encoder.model={model}: of unknown size, name an open_clip model")
    return json.loads(known.read_text())


def build_clip_tower(clip: dict) -> ClipTextEncoder:
    # The image tower, which is not used, is next to nothing.
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {key: clip[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in clip}
    return ClipTextEncoder(build_clip({**text, "vision_cfg": vision}))
