"""The frozen CLIP text tower and its tokenizer: the only user of open_clip in modeling (paper, Sec. 3.2 and 4.1).

In: token ids B x L (from `TextTokenizer`, which cuts and pads). Out: text states B x L x T, the last hidden states
after the final LayerNorm, causal mask kept, no projection. Weights come from open_clip's hub tags, from a local file,
or from a folder that `save_clip` wrote (`model: local-dir:PATH`), as scripts/train_text_encoder.py does.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass
class TextEncoderConfig:
    """Which text tower. The release's is ViT-L-14-336-quickgelu with pretrained openai: 77 tokens, width 768."""

    model: str = "ViT-L-14-336-quickgelu"  # an open_clip name, hf-hub:ORG/REPO, or local-dir:FOLDER
    pretrained: str = "openai"  # an open_clip tag or a weights file; ignored for hf-hub: and local-dir:


class TextTokenizer:
    """Captions -> token ids B x L, cut to the context length with the end token kept, padded with 0. Picklable."""

    def __init__(self, config: TextEncoderConfig):
        self.model = config.model
        self._tokenizer = None
        self.context_length: int = self._load().context_length

    def _load(self):
        if self._tokenizer is None:
            check_local_dir(self.model)
            self._tokenizer = open_clip.get_tokenizer(self.model)
            if not hasattr(self._tokenizer, "sot_token_id"):
                raise ValueError(f"text_encoder.model {self.model} has no CLIP BPE tokenizer; choose a CLIP model")
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
        if tokenizer.eot_token_id in ids:  # padding follows the end token; a 0 before it is an exclamation mark
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
        tower = getattr(clip, "text", clip)  # CustomTextCLIP keeps the tower in .text, CLIP in itself
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

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids B x L -> text states B x L x T (float32, or the autocast precision)."""
        x = self.token_embedding(token_ids) + self.positional_embedding  # B x L x T
        x = self.transformer(x, attn_mask=self.attn_mask)
        return self.ln_final(x)


def check_local_dir(model: str) -> None:
    """Refuse a local-dir: model whose folder is not there.

    Raises:
        ValueError: naming the folder and how it is made.
    """
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:") and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"text_encoder.model: {folder} holds no {CONFIG_FILE}; train one with scripts/train_text_encoder.py "
            "(bash train_flowtok.sh does it first), or name an open_clip model"
        )


def load_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Load the frozen text tower.

    Raises:
        ValueError: unknown model, missing file, or weights that can neither be found nor downloaded.
    """
    check_local_dir(config.model)
    local = ":" in config.model
    if not local and config.model not in open_clip.list_models():
        raise ValueError(f"text_encoder.model: unknown open_clip model {config.model!r}; see open_clip.list_models()")
    if not local and not config.pretrained:
        raise ValueError("text_encoder.pretrained is empty: a frozen tower needs weights (an open_clip tag or a file)")
    try:
        clip = open_clip.create_model(config.model, None if local else config.pretrained, require_pretrained=True)
    except (RuntimeError, OSError, FileNotFoundError) as error:
        raise ValueError(
            f"cannot load the text tower {config.model!r}, pretrained {config.pretrained!r}: {error}. Without network: "
            "download the weights elsewhere and set text_encoder.pretrained=/path/to/file"
        ) from error
    return TextEncoder(clip)


def build_clip(model_config: dict) -> nn.Module:
    """A fresh open_clip.CLIP from {"embed_dim", "vision_cfg", "text_cfg"}, with random weights."""
    return open_clip.model.CLIP(**model_config)


def save_clip(clip: nn.Module, model_config: dict, folder: Path) -> None:
    """Write a CLIP model as the folder that `model: local-dir:FOLDER` reads: aside, then renamed over an older one."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in clip.state_dict().items()}, partial / WEIGHTS_FILE)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (partial / CONFIG_FILE).write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
