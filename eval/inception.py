"""Inception features for FID, as torch-fidelity computes them; the published files of weights.

InceptionV3 of 2015 with TensorFlow's weights: uint8 images, resized to 299 px as TensorFlow 1 does (bilinear, no
antialiasing, corner-aligned pixels), (x - 128) / 128, features after the last pooling. Weights come from a path or from
torch's cache; nothing is downloaded unless it is asked for, and nothing in a file is executed.
"""

import io
import textwrap
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.perceptual import VGG16_URL
from modeling.published import PublishedWeights

INCEPTION_WIDTH = 2048  # D
INSTALL = "pip install -r requirements-eval.txt"
Precision = Literal["float32", "float64"]
DOWNLOAD = "; --download fetches it"
INCEPTION = PublishedWeights(
    "InceptionV3",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "--inception-weights",
    DOWNLOAD,
)
VGG16 = PublishedWeights("VGG16", VGG16_URL, "--vgg-weights", DOWNLOAD)


class InceptionFeatures(nn.Module):
    """B x 3 x H x W uint8 -> B x 2048 float32, without gradient, whatever the autocast or TF32 setting around it.

    float32 in [0, 255] is taken as it is: B x 3 x 299 x 299, resized already (clean-fid).
    """

    def __init__(self, weights: Path, precision: Precision = "float32"):
        """Raises ValueError: torch-fidelity is not installed, or the file does not hold weights of this net."""
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(
                f"Inception features need torch-fidelity ({error}): {INSTALL}"
            ) from error
        # Its constructor unpickles whatever it is given (weights_only=False): it is given what was read safely.
        checked = io.BytesIO()
        torch.save(read_tensors(weights), checked)
        checked.seek(0)
        try:
            with torch.random.fork_rng(
                devices=[]
            ):  # it draws weights first, which are then replaced
                net = FeatureExtractorInceptionV3("inception", [str(INCEPTION_WIDTH)], checked)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"{weights} has other weights than InceptionV3's: {reason}") from error
        # Its own option "float64" computes in float32 (torch-fidelity 0.4.0, helpers.text_to_dtype).
        net.feature_extractor_internal_dtype = getattr(torch, precision)
        self.net = net.to(net.feature_extractor_internal_dtype)
        self.layers = list(net.children())[
            :-1
        ]  # in the order in which they are called; the last one, fc, gives logits

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), full_precision:
            if images.dtype != torch.float32 or images.shape[-1] != self.net.INPUT_IMAGE_SIZE:
                return self.net(images)[0]  # which refuses other types than uint8
            x = (images.to(self.net.feature_extractor_internal_dtype) - 128) / 128
            for layer in self.layers:
                x = layer(x)
            return x.flatten(1).float()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """B x 2048 -> B x 1008 without bias, as the inception score takes them: float64, which no TF32 rounds."""
        return features.to(self.net.fc.weight.device).double() @ self.net.fc.weight.double().T


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name of a file that torch.save wrote; nothing in it is executed.

    Raises:
        ValueError: cut short, no such file, or one that needs more than tensors.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip raise their own types; torch's text advises to execute the file
        raise ValueError(
            f"{file} is no file of weights alone, or cut short ({type(error).__name__})"
        ) from error
    if not (
        isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())
    ):
        raise ValueError(f"{file} holds something else than tensors by name")
    return tensors
