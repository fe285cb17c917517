"""Text towers of the package transformers: encoders of T5, and the text halves of CLIP and SigLIP.

The package is optional (requirements-text.txt), and this module knows how to do without it until a
tower is wanted. `text_encoder.model` is a folder, or a name on the hub whose files are taken from
the hub's cache if they are there.

Padding: T5 was trained with it hidden, so it is hidden here, and its states are zeros. CLIP and
SigLIP were trained with it in sight, SigLIP even to sum up the text there: all states count.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .clip_weights import HUB, AbsentWeights, one_line, why_hub_is_silent
from .layers import fingerprint
from .text_encoder import TextEncoderConfig

T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
CLIP = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel"}
TOWERS = T5 | CLIP | {f"{kind}_text_model": tower for kind, tower in CLIP.items()}
T5_LENGTH = 77  # of a tower without a limit, if none is set


class NamedModel(Protocol):
    """Which model, and what messages call the group of its keys."""

    key: str
    model: str  # a folder, or a name on the hub


def load_package() -> Any:
    """The package transformers; ValueError without it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "a model of transformers needs the package of that name: "
            "pip install -r requirements-text.txt"
        ) from error
    # Data workers are processes enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Or it lists the image half of a CLIP as unused.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_part(name: str, config: NamedModel, **options: Any) -> Any:
    """CLASS.from_pretrained(model, ...) of the package's class `name`.

    Raises:
        ValueError: a folder from which it can't be loaded.
        AbsentWeights: it is not on this machine and can't be downloaded.
    """
    load = getattr(load_package(), name).from_pretrained
    what = f"{config.key}.model={config.model}"
    folder = Path(config.model)
    if folder.is_absolute() and not folder.is_dir():
        raise AbsentWeights(f"{what} is no folder")
    try:
        # The hub's cache, without asking the hub
        return load(config.model, local_files_only=True, **options)
    except Exception as error:  # OSError, ValueError, those of the hub, safetensors, tokenizers
        if folder.is_dir():
            raise ValueError(f"cannot load {what}: {one_line(error)}") from error
    try:
        if silence := why_hub_is_silent():
            raise OSError(f"it is neither a folder nor in the hub's cache, and {silence}")
        return load(config.model, **options)
    except Exception as error:
        raise AbsentWeights(
            f"cannot load {what}: {one_line(error)}. Without network: download the files of "
            f"{HUB}/{config.model} elsewhere, put them into one folder here and set "
            f"{config.key}.model=FOLDER"
        ) from error


def load_whole(name: str, config: NamedModel) -> nn.Module:
    """load_part of a class of models; ValueError also if weights are missing."""
    model, report = load_part(name, config, output_loading_info=True)
    # The package fills them with random numbers and a warning.
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"{config.key}.model={config.model} lacks weights: {missing}")
    return model


class TransformersTokenizer:
    """A tower's own tokenizer: ids cut to the context length with the end token kept, padded."""

    def __init__(self, config: NamedModel, tokenizer: Any, context_length: int):
        """tokenizer: the package's, of the model that `config` names."""
        self.config = config
        self.context_length = context_length
        self._tokenizer = tokenizer

    def __call__(self, captions: list[str]) -> Tensor:
        length = self.context_length
        batch = self._tokenizer(captions, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(batch["input_ids"])

    def num_tokens(self, caption: str) -> int:
        return len(self._tokenizer(caption, verbose=False)["input_ids"])

    def decode(self, token_ids: Tensor) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True).strip()


class TransformersTextEncoder(nn.Module):
    """A text tower of transformers, frozen and in eval mode, in float32: a TextEncoder."""

    tokenize: TransformersTokenizer | None = None

    def __init__(self, tower: nn.Module, length: int):
        """length: L of its states, of `states_length`."""
        super().__init__()
        self.shape = (length, tower.config.hidden_size)
        self.masks_padding = tower.config.model_type in T5
        self.pad_id = tower.config.pad_token_id
        # Hubs have halves: in float32 the run's precision decides, as with CLIP's tower.
        self.tower = tower.float()
        self.requires_grad_(False).eval()

    @cached_property
    def identity(self) -> str:
        # The weights show neither the kind, nor the activation, nor where captions are cut.
        config = self.tower.config
        activation = config.feed_forward_proj if self.masks_padding else config.hidden_act
        facts = f"{config.model_type} {activation} {self.shape[0]}"
        return fingerprint(self, facts.encode())

    def train(self, mode: bool = True) -> "TransformersTextEncoder":
        """Stay in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> Tensor:
        if not self.masks_padding:
            return self.tower(input_ids=token_ids).last_hidden_state
        # As what is added to the scores of all heads and queries, B x 1 x 1 x L: of a mask B x L
        # the package reads the values, for which it waits for the device.
        padding = token_ids == self.pad_id  # B x L
        lowest = torch.finfo(torch.float32).min
        scores = torch.zeros(padding.shape, device=padding.device).masked_fill(padding, lowest)
        output = self.tower(input_ids=token_ids, attention_mask=scores[:, None, None])
        return output.last_hidden_state.masked_fill(padding.unsqueeze(-1), 0)


def build_tower(settings: Any, length: int = 0) -> TransformersTextEncoder:
    """A tower with random weights, from a T5Config, CLIPTextConfig or the like."""
    tower = getattr(load_package(), tower_class(settings.model_type))
    return TransformersTextEncoder(tower(settings), states_length(settings, length))


def tower_class(kind: str) -> str:
    """Name of the class of a text tower; ValueError for other models."""
    if kind not in TOWERS:
        raise ValueError(f"text_encoder.model is a {kind}, expected one of {', '.join(TOWERS)}")
    return TOWERS[kind]


def states_length(settings: Any, length: int) -> int:
    """L: TextEncoderConfig.context_length, or what 0 means; ValueError: the tower has less."""
    # Of a model with an image half, too, the text's settings are apart
    text = getattr(settings, "text_config", settings)
    limit = getattr(text, "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(f"text_encoder.context_length={length}: the tower has {limit} places")
    return length or limit or T5_LENGTH


def load_tower(config: TextEncoderConfig) -> TransformersTextEncoder:
    """The tower that a config names, in float32; ValueError as load_part, or it lacks weights."""
    # What can be refused is, before weights are downloaded
    settings = load_part("AutoConfig", config)
    name = tower_class(settings.model_type)
    length = states_length(settings, config.context_length)
    tokenizer = load_part("AutoTokenizer", config)
    encoder = TransformersTextEncoder(load_whole(name, config), length)
    encoder.tokenize = TransformersTokenizer(config, tokenizer, length)
    # The tokenizer's, since a model's config may name none.
    encoder.pad_id = tokenizer.pad_token_id
    return encoder
