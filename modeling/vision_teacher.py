"""A frozen vision model, to whose patch features an image tokenizer's latents are drawn.

SoftVQ-VAE (Chen et al. 2025, arXiv 2412.10958) repeats the 1D tokens to the model's grid of patches
and adds 1 - cosine, weight 0.1. The model is any ViT of timm, DINOv2 for one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class VisionConfig:
    """The vision model of losses.vision_weight; without that it is not loaded."""

    model: str = "vit_base_patch14_dinov2.lvd142m"  # of timm, a ViT
    weights: str = ""  # path of its weights; empty: the hub's cache, downloaded to it if absent


class VisionTeacher(nn.Module):
    """Images B x 3 x R x R in [0, 1] -> patch features B x G^2 x T, row by row, no gradient."""

    def __init__(self, config: VisionConfig, grid: int):
        """grid: G, patches along a side; images are resized to so many of the model's patches.

        Raises:
            ValueError: no such ViT, or the file does not hold its weights.
        """
        super().__init__()
        # Here: it takes a second.
        import timm

        overlay = {"file": config.weights} if config.weights else None
        try:
            self.net = timm.create_model(
                config.model,
                pretrained=True,
                pretrained_cfg_overlay=overlay,
                num_classes=0,
                dynamic_img_size=True,  # its positions are resized to any grid
            )
        except Exception as error:  # timm's, torch's, safetensors' and the hub's own types
            where = config.weights or "the hub, as vision.weights is empty"
            raise ValueError(
                f"vision.model={config.model}, weights from {where}: {error}"
            ) from error

        # What its images and its features look like
        self.width = self.net.num_features  # T
        self.side = grid * self.net.patch_embed.patch_size[0]  # pixels
        normalisation = timm.data.resolve_model_data_config(self.net)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(normalisation[name]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features = self.net.forward_features(prepare(images, self.side, self.mean, self.std))
        return features[:, self.net.num_prefix_tokens :]


def prepare(images: Tensor, side: int, mean: Tensor, std: Tensor) -> Tensor:
    """Images B x 3 x R x R in [0, 1] as a ViT takes them: side x side pixels, normalised."""
    # Bicubic overshoots at edges.
    x = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - mean) / std


def spread_tokens(tokens: Tensor, number: int) -> Tensor:
    """Repeat K tokens in order to `number`, evenly: B x K x C -> B x number x C."""
    places = torch.arange(number, device=tokens.device) * tokens.shape[1] // number
    return tokens[:, places]
