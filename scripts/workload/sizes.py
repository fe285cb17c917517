"""A stage's YAML, completed by the sizes that earlier runs know.

They come from the run's folder or, if it is not there, from the YAML that makes it: runs/X/STAGE is
made by configs/X/STAGE.yaml.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from modeling.clip_weights import CONFIG_FILE as CLIP_CONFIG_FILE
from modeling.clip_weights import build_clip
from modeling.flow_model import fill_in_sizes
from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.text_encoder import ClipTextEncoder, TextEncoderConfig
from modeling.text_projector import TextProjectorConfig
from scripts.run_experiment.stages import load_stage
from scripts.train_text_encoder import ClipSize, open_clip_config
from training.loading import read_section
from training.run import CONFIG_FILE
from training.stage import StageConfig, TrainedStage, TrainingConfig
from training.tokens import projector_sizes


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
