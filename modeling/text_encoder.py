"""The frozen CLIP text tower and its tokenizer (paper, Sec. 3.2 and 4.1); whole CLIPs. The only user of open_clip.

In: token ids B x L (from `TextTokenizer`, which cuts and pads). Out: text states B x L x T, the last hidden states
after the final LayerNorm, causal mask kept, no projection. Weights come from open_clip's hub tags, from a local file,
or from a folder that `save_clip` wrote (`model: local-dir:PATH`), as scripts/train_text_encoder.py does.

The trap: OpenAI's weights (DFN's and MetaCLIP's too) want QuickGELU, most others the exact GELU, and the wrong one
gives states that are slightly off, without any error. The model's name says which (-quickgelu), or `exact_gelu`; where
neither does, loading stops.
Precision: the weights stay float32. Under a run's bf16 autocast the matrix products are bf16, LayerNorms and the sum
over the blocks float32; a tower cast to bf16 would lose the latter and win only the cast of its weights.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
OLDER_WEIGHTS_FILE = "open_clip_pytorch_model.bin"  # of hub repositories without safetensors
QUICK = "-quickgelu"
HUB, HUB_TIMEOUT = huggingface_hub.constants.ENDPOINT, 10  # seconds
TORCHSCRIPT_ADVICE = (
    "is a TorchScript archive (the form of OpenAI's own files): a program, which is not run here. If it comes from "
    "OpenAI, take out its weights once: "
    """python -c "import torch, safetensors.torch as s; s.save_file({k: v for k, v in torch.jit.load('FILE', """
    """map_location='cpu').state_dict().items() if v.is_floating_point()}, 'FILE.safetensors')" """
    "and set KEY.pretrained=FILE.safetensors"
)


@dataclass
class TextEncoderConfig:
    """Which text tower. The release's is ViT-L-14-336-quickgelu with pretrained openai: 77 tokens, width 768."""

    model: str = "ViT-L-14-336-quickgelu"  # an open_clip name, hf-hub:ORG/REPO, or local-dir:FOLDER
    pretrained: str = (
        "openai"  # an open_clip tag or a weights file; ignored for hf-hub: and local-dir:
    )
    # Only with a weights file of a model that exists with and without -quickgelu: the file wants the one without.
    exact_gelu: bool = False
    key: ClassVar[str] = "text_encoder"  # what messages call the group of these keys
    title: ClassVar[str] = "the text tower"


@dataclass
class ClipConfig(TextEncoderConfig):
    """Which whole CLIP, as text_encoder names the tower of one; model "own": the one a run's own tower is from."""

    model: str = "ViT-B-32-quickgelu"
    key: ClassVar[str] = "clip"
    title: ClassVar[str] = "the CLIP"


class AbsentWeights(ValueError):
    """Weights that are not on this machine; the message says which file to fetch."""


class TextTokenizer:
    """Captions -> token ids B x L, cut to the context length with the end token kept, padded with 0. Picklable."""

    def __init__(self, config: TextEncoderConfig):
        self.config, self.model = config, config.model
        self._tokenizer = None
        self.context_length: int = self._load().context_length

    def _load(self):
        if self._tokenizer is None:
            check_local_dir(self.config)
            self._tokenizer = open_clip.get_tokenizer(self.model)
            if not hasattr(self._tokenizer, "sot_token_id"):
                raise ValueError(
                    f"text_encoder.model {self.model} has no CLIP BPE tokenizer; choose a CLIP model"
                )
        return self._tokenizer

    def __getstate__(self):
        return {**self.__dict__, "_tokenizer": None}  # each worker process builds its own

    def __call__(self, captions: list[str]) -> Tensor:
        return self._load()(captions)

    def num_tokens(self, caption: str) -> int:
        """Tokens of the uncut caption, start and end tokens included; more than context_length means it is cut."""
        return len(self._load().encode(caption)) + 2

    def decode(self, token_ids: Tensor) -> str:
        """The text that a row of ids stands for, without start, end and padding."""
        tokenizer = self._load()
        ids = [i for i in token_ids.tolist() if i != tokenizer.sot_token_id]
        if (
            tokenizer.eot_token_id in ids
        ):  # padding follows the end token; a 0 before it is an exclamation mark
            ids = ids[: ids.index(tokenizer.eot_token_id)]
        else:  # predicted ids may lack the end token
            ids = [i for i in ids if i != 0]
        return tokenizer.decode(ids).strip()


def clip_tokenizer(context_length: int):
    """CLIP's own BPE tokenizer (shipped with open_clip) at a context length: list of captions -> ids B x L."""
    return open_clip.SimpleTokenizer(context_length=context_length)


class TextEncoder(nn.Module):
    """The text half of an open_clip model, frozen and in eval mode."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        tower = getattr(
            clip, "text", clip
        )  # CustomTextCLIP keeps the tower in .text, CLIP in itself
        if not hasattr(tower, "token_embedding"):
            raise ValueError(
                f"{type(tower).__name__} is no CLIP text transformer (no token embedding); choose a CLIP model"
            )
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def context_length(self) -> int:
        """L."""
        return self.positional_embedding.shape[0]

    @property
    def width(self) -> int:
        """T, channels of the text states."""
        return self.positional_embedding.shape[1]

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is QuickGELU; part of a tower's identity that its weights don't show."""
        return any(isinstance(module, QuickGELU) for module in self.transformer.modules())

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids B x L -> text states B x L x T (float32, or the autocast precision)."""
        x = self.token_embedding(token_ids) + self.positional_embedding  # B x L x T
        x = self.transformer(x, attn_mask=self.attn_mask)
        return self.ln_final(x)


def check_local_dir(config: TextEncoderConfig) -> None:
    """Refuse a local-dir: model whose folder is not there.

    Raises:
        AbsentWeights: naming the folder and how it is made.
    """
    folder = Path(config.model.removeprefix("local-dir:"))
    if config.model.startswith("local-dir:") and not (folder / CONFIG_FILE).is_file():
        raise AbsentWeights(
            f"{config.key}.model: {folder} holds no {CONFIG_FILE}; train one with scripts/train_text_encoder.py "
            "(bash train_flowtok.sh does it first), or name an open_clip model"
        )


def check_text_encoder(config: TextEncoderConfig) -> None:
    """Refuse a tower that can't be loaded, or whose activation is not said, without loading or downloading anything.

    Raises:
        ValueError: unknown model or tag, missing file or folder, QuickGELU or not left open or wrong.
    """
    check_local_dir(config)
    if ":" in config.model:
        if config.exact_gelu:
            raise ValueError(
                f"{config.key}.exact_gelu: the config of {config.model} says its activation; leave it out"
            )
        return
    if config.model not in open_clip.list_models():
        raise ValueError(
            f"{config.key}.model: unknown open_clip model {config.model!r}; see open_clip.list_models()"
        )
    if not config.pretrained:
        raise ValueError(
            f"{config.key}.pretrained is empty: it needs weights (an open_clip tag or a file)"
        )
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not tag and not Path(config.pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.model)) or "none"
        raise AbsentWeights(
            f"{config.key}.pretrained={config.pretrained} is neither a file nor a tag of {config.model} (tags: {tags})"
        )
    check_activation(config, tag)


def check_activation(config: TextEncoderConfig, tag: dict) -> None:
    """Refuse a tower whose activation is wrong (the tag knows) or not said (a file can't tell). tag: {} for a file."""
    twin = config.model + QUICK
    has_twin = twin in open_clip.list_models()
    if tag or not has_twin:
        if config.exact_gelu:
            raise ValueError(
                f"{config.key}.exact_gelu is for a weights file of a model that exists with and without {QUICK}; "
                f"{config.model} with pretrained {config.pretrained} says its activation already: leave it out"
            )
        if has_twin and tag.get("quick_gelu", False):
            raise ValueError(
                f"{config.key}: the weights {config.pretrained} want QuickGELU, {config.model} has the exact GELU: set "
                f"{config.key}.model={twin}"
            )
    elif not config.exact_gelu:
        raise ValueError(
            f"{config.key}: {config.pretrained} does not say its activation, and {config.model} exists with two. "
            f"Weights of OpenAI, DFN or MetaCLIP: set {config.key}.model={twin}. Weights trained with the exact GELU "
            f"(LAION, DataComp): set {config.key}.exact_gelu=true"
        )


def load_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Load the frozen text tower, in float32.

    Raises:
        ValueError: see check_text_encoder; or weights that can neither be read nor downloaded.
    """
    return TextEncoder(load_clip(config))


def load_clip(config: TextEncoderConfig, download: bool = True) -> nn.Module:
    """Load a whole CLIP (encode_image, encode_text), frozen, in eval mode and float32.

    Raises:
        AbsentWeights: they are not here, and can't be or (download=False) may not be downloaded.
        ValueError: see check_text_encoder; or weights that can't be read.
    """
    check_text_encoder(config)
    if config.model.startswith("hf-hub:") and not download:
        raise cannot_load(config, "nothing may be downloaded", AbsentWeights)
    weights = None if ":" in config.model else find_weights(config, download)
    try:
        clip = open_clip.create_model(config.model, weights, require_pretrained=True)
    except (
        Exception
    ) as error:  # open_clip, the hub, torch, pickle and safetensors have their own types
        raise cannot_load(config, " ".join(str(error).split())[:300]) from error
    return clip.eval().requires_grad_(False)


def clip_inputs(config: TextEncoderConfig, clip: nn.Module) -> tuple[Callable, Callable]:
    """(PIL image -> 3 x S x S, captions -> token ids B x L), both as the CLIP was trained with.

    Raises:
        ValueError: its tokenizer can't be had.
    """
    # a file does not say what its tag does
    tag = (
        {} if ":" in config.model else open_clip.get_pretrained_cfg(config.model, config.pretrained)
    )
    preprocessing = PreprocessCfg(**merge_preprocess_dict(clip.visual.preprocess_cfg, tag))
    try:
        tokenize = open_clip.get_tokenizer(config.model)
    except Exception as error:  # of packages that other tokenizers than CLIP's need
        raise cannot_load(config, f"its tokenizer: {' '.join(str(error).split())[:300]}") from error
    return image_transform_v2(preprocessing, is_train=False), tokenize


def find_weights(config: TextEncoderConfig, download: bool) -> str:
    """What open_clip.create_model is to load: the given file, the hub's file if it is cached, or the tag to download.

    A cached file is used without asking the hub, and one request tells whether the hub answers: without network,
    huggingface_hub alone retries for three quarters of a minute.

    Raises:
        AbsentWeights: nothing is cached, and the hub does not answer or is not to be asked.
        ValueError: a TorchScript file.
    """
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not tag and is_torchscript(config.pretrained):
        advice = TORCHSCRIPT_ADVICE.replace("KEY", config.key).replace("FILE", config.pretrained)
        raise cannot_load(config, f"it {advice}")
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repository and (not tag or download):
        return config.pretrained
    if not repository:
        raise cannot_load(config, "nothing may be downloaded", AbsentWeights)
    names = (
        [str(Path(file).with_suffix(".safetensors")), file]
        if file
        else [WEIGHTS_FILE, OLDER_WEIGHTS_FILE]
    )
    cached = [huggingface_hub.try_to_load_from_cache(repository, name) for name in names]
    for path in cached:
        if isinstance(path, str):
            return path
    if not download:
        raise cannot_load(config, "it is not in the hub's cache on this machine", AbsentWeights)
    try:
        huggingface_hub.get_session().head(HUB, timeout=HUB_TIMEOUT)
    except Exception as error:  # of requests or httpx, by the version of huggingface_hub
        reason = (
            "HF_HUB_OFFLINE is set"
            if huggingface_hub.constants.HF_HUB_OFFLINE
            else f"{HUB} does not answer"
        )
        message = f"it is not in the hub's cache on this machine, and {reason}"
        raise cannot_load(config, message, AbsentWeights) from error
    return config.pretrained


def cannot_load(
    config: TextEncoderConfig, reason: str, kind: type[ValueError] = ValueError
) -> ValueError:
    """The error that says why, and for weights of the hub what to download elsewhere and how to say where it lies."""
    tag = (
        {} if ":" in config.model else open_clip.get_pretrained_cfg(config.model, config.pretrained)
    )
    message = f"cannot load {config.title} {config.model}" + (
        "" if ":" in config.model else f", {config.pretrained}"
    )
    message += f": {reason}"
    if config.model.startswith("hf-hub:"):
        message += (
            f". Without network: download {CONFIG_FILE} and {WEIGHTS_FILE} of "
            f"{HUB}/{config.model.removeprefix('hf-hub:')} elsewhere, put them into one folder here and set "
            f"{config.key}.model=local-dir:FOLDER"
        )
    if tag:
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        source = f"{file or WEIGHTS_FILE} of {HUB}/{repository}" if repository else tag["url"]
        message += (
            f". Without network: download {source} elsewhere, copy it here and set "
            f"{config.key}.pretrained=PATH_OF_THE_FILE; {config.key}.model stays {config.model}"
        )
    return kind(message)


def is_torchscript(path: str) -> bool:
    """Whether a file is a TorchScript archive instead of saved tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def build_clip(model_config: dict) -> nn.Module:
    """A fresh open_clip.CLIP from {"embed_dim", "vision_cfg", "text_cfg"}, with random weights."""
    return open_clip.model.CLIP(**model_config)


def save_clip(clip: nn.Module, model_config: dict, folder: Path) -> None:
    """Write a CLIP model as the folder that `model: local-dir:FOLDER` reads: aside, then renamed over an older one."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in clip.state_dict().items()},
        partial / WEIGHTS_FILE,
    )
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (partial / CONFIG_FILE).write_text(
        json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}, indent=2)
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
