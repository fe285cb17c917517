"""DINOv2 features for the Frechet distance that Stein et al. 2023 propose instead of FID: ViT-L/14 at 224 px.

uint8 images, resized to 224 px (torch, bicubic, antialiased), ImageNet's mean and deviation, the class token after the
last norm. Weights come from a local file alone: Meta's .pth or timm's .safetensors; nothing in a file is executed.
"""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from eval.inception import read_tensors

MODEL, PIXELS = "vit_large_patch14_dinov2", 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
ABSENT = (
    "DINOv2's weights are absent: fetch https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth "
    "(or timm/vit_large_patch14_dinov2.lvd142m, model.safetensors) and name it with --dinov2-weights"
)


class DinoFeatures(nn.Module):
    """B x 3 x H x W uint8 -> B x D float32 (1024), without gradient, whatever the autocast setting around it."""

    def __init__(self, weights: Path):
        """Raises ValueError: the file does not hold weights of this net."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # it draws weights first, which are then replaced
            self.net = timm.create_model(MODEL, pretrained=False, img_size=PIXELS, num_classes=0)
        state = read_weights(weights)
        try:
            # positions were learnt at 518 px and are resized to the grid of 224 px
            self.net.load_state_dict(checkpoint_filter_fn(state, self.net))
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{weights} has other weights than DINOv2's {MODEL}: {str(error)[:300]}"
            ) from error
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        size, x = (PIXELS, PIXELS), images.float() / 255
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (x.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        with torch.autocast(images.device.type, enabled=False):
            return self.net((x - mean) / deviation)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors or of what torch.save wrote.

    Raises:
        ValueError: neither, or cut short.
    """
    if file.suffix != ".safetensors":
        return read_tensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or cut short: {error}") from error
