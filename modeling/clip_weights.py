"""Finding and loading the weights of CLIP models with open_clip, and writing our own.

Weights come from open_clip's hub tags, from a local file, or from a folder that `save_clip` wrote
(`model: local-dir:PATH`), as scripts/train_text_encoder.py does.

The trap: OpenAI's weights (DFN's and MetaCLIP's too) want QuickGELU, most others the exact GELU,
and the wrong one gives states that are slightly off, without any error. The model's name says which
(-quickgelu), or `exact_gelu`; where neither does, loading stops.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
from torch import nn

from .layers import save_weights


class OpenClip:
    """The package, imported when something of it is first used: it takes seconds."""

    # Not by importlib's LazyLoader: code that looks at all modules, as torch's compiler does, would
    # begin the import in its midst, and leave an empty module behind.
    def __getattr__(self, name: str) -> Any:
        import open_clip

        return getattr(open_clip, name)


open_clip = OpenClip()
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
OLDER_WEIGHTS_FILE = "open_clip_pytorch_model.bin"  # of hub repositories without safetensors
QUICK = "-quickgelu"
HUB = huggingface_hub.constants.ENDPOINT
HUB_TIMEOUT = 10  # seconds
TORCHSCRIPT_ADVICE = (
    "it is a TorchScript archive (the form of OpenAI's own files): a program, which is not run "
    "here. If it comes from OpenAI, take out its weights once: "
    """python -c "import torch, safetensors.torch as s; s.save_file({k: v for k, v in """
    """torch.jit.load('FILE', map_location='cpu').state_dict().items() if """
    """v.is_floating_point()}, 'FILE.safetensors')" and set KEY.pretrained=FILE.safetensors"""
)
NO_DOWNLOAD = "it is not on this machine, and nothing may be downloaded"


@dataclass
class ClipWeights:
    """Which CLIP of open_clip."""

    model: str = "ViT-L-14-336-quickgelu"  # open_clip name, hf-hub:ORG/REPO or local-dir:FOLDER
    # open_clip tag or weights file; hf-hub:, local-dir: and transformers have their own
    pretrained: str = "openai"
    # Only with a weights file of a model that exists with and without -quickgelu: the file wants
    # the one without.
    exact_gelu: bool = False
    key: ClassVar[str] = "clip"  # what messages call the group of these keys
    title: ClassVar[str] = "the CLIP"

    @property
    def names_its_weights(self) -> bool:
        """Whether `model` says where the weights are (hf-hub:, local-dir:)."""
        return ":" in self.model

    @property
    def tag(self) -> dict:
        """What open_clip knows of the weights; empty for a file."""
        if self.names_its_weights:
            return {}
        return open_clip.get_pretrained_cfg(self.model, self.pretrained)


@dataclass
class ClipConfig(ClipWeights):
    """A whole CLIP that scores images; model "own": the one that a run's own tower is from."""

    model: str = "ViT-B-32-quickgelu"


class AbsentWeights(ValueError):
    """Weights that are not on this machine; the message says which file to fetch."""


# Checks, which load and download nothing


def check_local_dir(config: ClipWeights) -> None:
    """Refuse a local-dir: model whose folder is not there."""
    folder = Path(config.model.removeprefix("local-dir:"))
    if config.model.startswith("local-dir:") and not (folder / CONFIG_FILE).is_file():
        raise AbsentWeights(
            f"{config.key}.model: {folder} holds no {CONFIG_FILE}: train one by "
            "scripts/train_text_encoder.py, or name an open_clip model"
        )


def check_clip(config: ClipWeights) -> None:
    """Refuse a CLIP that can't be loaded, or whose activation is wrong or not known."""
    check_local_dir(config)
    key, model, pretrained = config.key, config.model, config.pretrained
    models = open_clip.list_models()
    if not config.names_its_weights and model not in models:
        raise ValueError(
            f"{key}.model: unknown open_clip model {model!r} (open_clip.list_models())"
        )
    if not (config.names_its_weights or pretrained):
        raise ValueError(f"{key}.pretrained is empty: name a tag of open_clip or a file")
    tag = config.tag
    if not (config.names_its_weights or tag or Path(pretrained).is_file()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise AbsentWeights(
            f"{key}.pretrained={pretrained} is neither a file nor a tag of {model} (tags: {tags})"
        )

    # The activation: a tag knows it; a file does not, and its model's name says it, or has a twin.
    twin = model + QUICK
    has_twin = twin in models
    if config.exact_gelu and (tag or not has_twin):
        raise ValueError(f"{key}.exact_gelu: {model}, {pretrained} says it already: leave it out")
    if has_twin and tag.get("quick_gelu"):
        raise ValueError(f"{key}: {pretrained} wants QuickGELU: set {key}.model={twin}")
    if has_twin and not tag and not config.exact_gelu:
        raise ValueError(
            f"{key}: {pretrained} does not say its activation, and {model} exists with two. "
            f"Weights of OpenAI, DFN or MetaCLIP: set {key}.model={twin}. Weights trained with the "
            f"exact GELU (LAION, DataComp): set {key}.exact_gelu=true"
        )


# Loading


def load_clip(config: ClipWeights, download: bool = True) -> nn.Module:
    """Load a whole CLIP (encode_image, encode_text), frozen, in eval mode and float32.

    Raises:
        AbsentWeights: they are not here, and can't be or (download=False) may not be downloaded.
        ValueError: see check_clip; or weights that can't be read.
    """
    check_clip(config)
    # Such a repository's config lies on the hub, too, so the cache alone is not looked at.
    if config.model.startswith("hf-hub:") and not download:
        raise cannot_load(config, NO_DOWNLOAD, AbsentWeights)
    weights = None if config.names_its_weights else find_weights(config, download)
    try:
        # Without require_pretrained a name whose weights are not found gives random ones.
        clip = open_clip.create_model(config.model, weights, require_pretrained=True)
    except Exception as error:  # open_clip, the hub, torch, pickle, safetensors have own types
        raise cannot_load(config, one_line(error)) from error
    return clip.eval().requires_grad_(False)


def find_weights(config: ClipWeights, download: bool) -> str:
    """What open_clip.create_model is to load: a file, or the tag to download."""
    tag = config.tag
    if not tag:
        # torch's own advice would be to run it.
        if is_torchscript(config.pretrained):
            advice = TORCHSCRIPT_ADVICE.replace("KEY", config.key)
            raise cannot_load(config, advice.replace("FILE", config.pretrained))
        return config.pretrained

    # Of a tag on the hub: its cache, without asking the hub
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    names = [WEIGHTS_FILE, OLDER_WEIGHTS_FILE]
    # The tag may name its file; a safetensors twin is tried first, since it is read without pickle.
    if file:
        names = [str(Path(file).with_suffix(".safetensors")), file]
    for name in names if repository else []:
        path = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return path

    # To be downloaded
    if not download:
        raise cannot_load(config, NO_DOWNLOAD, AbsentWeights)
    if repository and (silence := why_hub_is_silent()):
        reason = f"it is not in the hub's cache on this machine, and {silence}"
        raise cannot_load(config, reason, AbsentWeights)
    return config.pretrained


def why_hub_is_silent() -> str:
    """Why the hub can't be asked, "" if it answers."""
    try:
        huggingface_hub.get_session().head(HUB, timeout=HUB_TIMEOUT)
    except Exception:  # of requests or httpx, by the version of huggingface_hub
        is_offline = huggingface_hub.constants.HF_HUB_OFFLINE
        return "HF_HUB_OFFLINE is set" if is_offline else f"{HUB} does not answer"
    return ""


def one_line(error: Exception) -> str:
    """What a package says, whose messages are often a page."""
    return " ".join(str(error).split())[:300]


def cannot_load(
    config: ClipWeights, reason: str, kind: type[ValueError] = ValueError
) -> ValueError:
    """The error that says why, and which file of the hub to fetch elsewhere and how to name it."""
    key, model, tag = config.key, config.model, config.tag
    weights = "" if config.names_its_weights else f", {config.pretrained}"
    message = f"cannot load {config.title} {model}{weights}: {reason}"
    if model.startswith("hf-hub:"):
        origin = f"{CONFIG_FILE} and {WEIGHTS_FILE} of {HUB}/{model.removeprefix('hf-hub:')}"
        setting = f"put them into one folder here and set {key}.model=local-dir:FOLDER"
    elif tag:
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        origin = f"{file or WEIGHTS_FILE} of {HUB}/{repository}" if repository else tag["url"]
        setting = f"set {key}.pretrained=PATH_OF_THE_FILE; {key}.model stays {model}"
    else:
        return kind(message)
    return kind(f"{message}. Without network: download {origin} elsewhere, {setting}")


def is_torchscript(path: str) -> bool:
    """Whether a file is a TorchScript archive instead of saved tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def clip_inputs(config: ClipWeights, clip: nn.Module) -> tuple[Callable, Callable]:
    """(PIL image -> 3 x S x S, captions -> token ids B x L), as the CLIP was trained with."""
    preprocessing = preprocessing_of(config, clip)
    transform = open_clip.transform.image_transform_v2(preprocessing, is_train=False)
    return transform, clip_tokenizer(config)


def clip_tokenizer(config: ClipWeights) -> Callable:
    """open_clip's tokenizer of a model; ValueError if it can't be loaded."""
    # A repository that can't be reached would pass for one with a tokenizer of transformers
    model_config(config)
    try:
        return open_clip.get_tokenizer(config.model)
    except ImportError as error:  # other tokenizers than CLIP's need a package
        raise ValueError(
            f"cannot load the tokenizer of {config.title} {config.model}: {error}: "
            "pip install -r requirements-text.txt"
        ) from error
    except Exception as error:  # of the hub
        raise cannot_load(config, one_line(error)) from error


def has_quick_gelu(network: nn.Module) -> bool:
    """Whether the activation of a network of open_clip is QuickGELU, which weights don't show."""
    return any(isinstance(part, open_clip.transformer.QuickGELU) for part in network.modules())


def preprocessing_of(config: ClipWeights, clip: nn.Module) -> Any:
    """open_clip's PreprocessCfg, how images are made ready for a loaded CLIP: size, mean, std."""
    transform = open_clip.transform
    values = transform.merge_preprocess_dict(clip.visual.preprocess_cfg, config.tag)
    return transform.PreprocessCfg(**values)


def model_config(config: ClipWeights) -> dict:
    """open_clip's description of a model: embed_dim, vision_cfg, text_cfg."""
    check_local_dir(config)
    try:
        found = open_clip.get_model_config(config.model)
    except Exception as error:  # of the hub
        raise cannot_load(config, one_line(error), AbsentWeights) from error
    if found is None:
        raise ValueError(
            f"{config.key}.model: open_clip knows no {config.model!r} (open_clip.list_models())"
        )
    return found


def build_image_tower(description: dict) -> nn.Module:
    """A fresh image tower from {"embed_dim", "vision_cfg", "quick_gelu"}, with random weights."""
    return open_clip.model._build_vision_tower(**description)


# Our own


def build_clip(model_config: dict) -> nn.Module:
    """A fresh open_clip.CLIP from {"embed_dim", "vision_cfg", "text_cfg"}, with random weights."""
    return open_clip.model.CLIP(**model_config)


def save_clip(clip: nn.Module, model_config: dict, folder: Path) -> None:
    """Write the folder that `model: local-dir:FOLDER` reads: aside, then renamed over an older."""
    # Aside, and renamed: another stage never reads half a tower.
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: x.detach().cpu().contiguous() for name, x in clip.state_dict().items()}
    save_weights(weights, partial / WEIGHTS_FILE)
    # As scripts/train_text_encoder.py shows images to its CLIP: in [-1, 1].
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
