"""Perceptual distance of stage 1: LPIPS with VGG16, and ConvNeXt-Small's logits' squared error.

In: reconstruction and target, B x 3 x R x R in [0, 1], R >= 16; values outside are not cut. The
nets are frozen, always in eval mode, run in float32 in any autocast precision, and give a gradient
to the reconstruction only. Their weights are torchvision's files; LPIPS' five linear heads come
with the lpips package. Recipe: TA-TiTok. LPIPS: Zhang et al. 2018, version 0.1.
"""

import pickle
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import check_least
from .published import PublishedWeights

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
CONVNEXT_URL = "https://download.pytorch.org/models/convnext_small-0c510722.pth"
VGG16_FILE = PublishedWeights("VGG16", VGG16_URL, "perceptual.vgg_weights")
CONVNEXT_FILE = PublishedWeights("ConvNeXt-Small", CONVNEXT_URL, "perceptual.convnext_weights")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]
CONVNEXT_SIZE = 224  # pixels

LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 among the layers of vgg16().features
LPIPS_LAYERS = (3, 8, 15, 22, 29)
NORM_EPSILON = 1e-8  # added to a squared norm


@dataclass
class PerceptualConfig:
    """Parts of the perceptual distance. A part of weight 0 is not built or looked for."""

    lpips_weight: float = 1.0
    convnext_weight: float = 0.1
    # Paths of vgg16-397923af.pth, convnext_small-0c510722.pth; empty: torch's cache, downloaded to
    # it if absent
    vgg_weights: str = ""
    convnext_weights: str = ""

    def __post_init__(self):
        check_least(self, 0, "lpips_weight", "convnext_weight")


def _load_into(net: nn.Module, file: Path, prefix: str = "") -> nn.Module:
    """Give a net on the meta device the tensors under `prefix` of a weights file, in float32."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        net.load_state_dict(own, assign=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{file} has no weights for this net: {reason}") from error
    return net.float()


class FrozenDistance(nn.Module):
    """`compare` of what `describe` makes of reconstruction and target, B x 3 x R x R -> B."""

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(reconstruction.device.type, enabled=False):
            with torch.no_grad():
                expected = self.describe(target.float())
            return self.compare(self.describe(reconstruction.float()), expected)

    def train(self, mode: bool = True) -> "FrozenDistance":
        # ConvNeXt drops whole blocks in train mode.
        return super().train(False)


class LPIPS(FrozenDistance):
    """Sum over five layers of VGG16 of weighted squared differences of unit-length features.

    The mean over positions; images in [0, 1].
    """

    def __init__(self, vgg_weights: Path):
        super().__init__()
        # Here: one takes seconds, the other scipy along, and its five heads are all that is used
        import lpips
        from torchvision import models

        with torch.device("meta"):  # no random initialisation, no random numbers drawn
            features = models.vgg16().features[: LPIPS_LAYERS[-1] + 1]
        self.features = _load_into(features, vgg_weights, prefix="features.")
        heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        heads = torch.load(heads_file, map_location="cpu", weights_only=True)
        names = [f"lin{index}.model.1.weight" for index in range(len(LPIPS_LAYERS))]
        self.heads = nn.ParameterList(heads[name] for name in names)  # 1 x C x 1 x 1 each
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE)[:, None, None])
        self.requires_grad_(False).eval()

    def describe(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of the five layers, B x C x H x W each."""
        x = (images * 2 - 1 - self.shift) / self.scale
        described = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in LPIPS_LAYERS:
                # The lpips package adds its epsilon outside the root: at all-zero features the
                # root's gradient is infinite there, and its product with 0 is NaN.
                described.append(x / (x.square().sum(dim=1, keepdim=True) + NORM_EPSILON).sqrt())
        return described

    def compare(self, found: list[Tensor], expected: list[Tensor]) -> Tensor:
        layers = zip(self.heads, found, expected)
        return sum(F.conv2d((a - b).square(), head).mean(dim=(1, 2, 3)) for head, a, b in layers)


class ConvNeXtDistance(FrozenDistance):
    """Mean squared error of ConvNeXt-Small's 1000 ImageNet logits, images resized to 224 px."""

    def __init__(self, convnext_weights: Path):
        super().__init__()
        from torchvision import models

        with torch.device("meta"):
            convnext = models.convnext_small()
        self.convnext = _load_into(convnext, convnext_weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.requires_grad_(False).eval()

    def describe(self, images: Tensor) -> Tensor:
        size = (CONVNEXT_SIZE, CONVNEXT_SIZE)
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return self.convnext((images - self.mean) / self.std)  # B x 1000

    def compare(self, found: Tensor, expected: Tensor) -> Tensor:
        return (found - expected).square().mean(dim=1)


class PerceptualLoss(nn.Module):
    """The parts in use, unweighted, and "perceptual", their weighted mean: means over the batch.

    perceptual = (lpips_weight LPIPS + convnext_weight MSE) / (lpips_weight + convnext_weight), as
    TA-TiTok's "lpips-convnext_s-1.0-0.1": its perceptual weight of 1.1 on this mean is
    LPIPS + 0.1 MSE. No trainable parameter: it is neither wrapped in DDP nor part of a checkpoint.

    Raises:
        ValueError: a file is absent and can't be downloaded, is not what its name says, or both
            weights are 0.
    """

    def __init__(self, config: PerceptualConfig):
        super().__init__()
        if not (config.lpips_weight or config.convnext_weight):
            raise ValueError(
                "perceptual: lpips_weight and convnext_weight are both 0, expected one above it"
            )
        # Both files are looked at before a net is built, which takes seconds.
        nets = {}
        if config.lpips_weight:
            nets["lpips"] = LPIPS, VGG16_FILE.find(config.vgg_weights, download=True)
        if config.convnext_weight:
            file = CONVNEXT_FILE.find(config.convnext_weights, download=True)
            nets["convnext"] = ConvNeXtDistance, file
        self.parts = nn.ModuleDict({name: build(file) for name, (build, file) in nets.items()})
        self.weights = {"lpips": config.lpips_weight, "convnext": config.convnext_weight}

    def forward(self, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        terms = {name: part(reconstruction, target).mean() for name, part in self.parts.items()}
        total = sum(self.weights[name] * term for name, term in terms.items())
        return terms | {"perceptual": total / sum(self.weights[name] for name in terms)}
