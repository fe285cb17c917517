"""CLIP score (Hessel et al. 2021) with any CLIP of open_clip: how well an image fits the caption it was made for.

Cosine of the two embeddings, 0 where it is below; the mean over the images times 100. Images go through the CLIP's own
preprocessing from their full size; captions are taken as they are, without a prefix, and cut to its context.
"""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from modeling.clip_weights import ClipConfig, clip_inputs, load_clip
from modeling.fingerprint import fingerprint
from modeling.text_encoder import TextEncoderConfig

SCALE = "100 * mean over the images of max(cosine of image and caption, 0)"


class ClipScorer:
    """Images and captions -> cosines. A CLIP on one device, in float32."""

    def __init__(self, config: ClipConfig, device: torch.device, download: bool):
        """Raises AbsentWeights: naming the file to fetch; ValueError: no such model, or weights that can't be read."""
        with torch.random.fork_rng(devices=[]):  # it draws weights first, which are then replaced
            self.clip = load_clip(config, download).to(device)
        self.preprocess, self.tokenize = clip_inputs(config, self.clip)
        self.device = device
        self.description: dict[str, Any] = {
            "model": config.model,
            "pretrained": None if ":" in config.model else config.pretrained,
            "weights_fingerprint": fingerprint(self.clip),
            "scale": SCALE,
        }

    @property
    def name(self) -> str:
        """For files."""
        return f"clip-{self.description['weights_fingerprint']}"

    @torch.no_grad()
    def cosines(self, images: Tensor, captions: list[str]) -> Tensor:
        """B x 3 x R x R uint8 on the CPU and their captions -> B x 1 float32."""
        arrays = rearrange(images, "b c h w -> b h w c").numpy()
        pixels = torch.stack([self.preprocess(Image.fromarray(array)) for array in arrays]).to(
            self.device
        )
        full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(self.device.type, enabled=False), full_precision:
            image = self.clip.encode_image(pixels, normalize=True)  # B x E
            text = self.clip.encode_text(self.tokenize(captions).to(self.device), normalize=True)
        return (image * text).sum(dim=1, keepdim=True).float()


def own_clip(config: ClipConfig, text_encoder: TextEncoderConfig) -> ClipConfig:
    """The config with model "own" replaced by the CLIP whose text tower a run was trained with."""
    if config.model != "own":
        return config
    names = ("model", "pretrained", "exact_gelu")
    return replace(config, **{name: getattr(text_encoder, name) for name in names})


def clip_score(cosines: Tensor) -> float:
    """N cosines -> the score, 0 to 100."""
    if not cosines.isfinite().all():
        raise ValueError("a cosine is not finite")
    return 100 * cosines.double().clamp(min=0).mean().item()
