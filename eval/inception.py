"""Inception features for FID, as torch-fidelity computes them; finding weights that are published as files.

InceptionV3 of 2015 with TensorFlow's weights: uint8 images, resized to 299 px as TensorFlow 1 does (bilinear, no
antialiasing, corner-aligned pixels), (x - 128) / 128, features after the last pooling. Weights come from a path or from
torch's cache; nothing is downloaded unless it is asked for, and nothing in a file is executed.
"""

import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.perceptual import VGG16_URL, file_sha256

INCEPTION_WIDTH = 2048  # D
INSTALL = "pip install -r requirements-eval.txt"
Precision = Literal["float32", "float64"]


@dataclass(frozen=True)
class PublishedWeights:
    """Weights with a public address, whose file name ends in the first digits of its SHA-256 (torch.hub's custom)."""

    title: str
    url: str
    option: str  # of the command line, for a path

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps the file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name

    @property
    def ways_out(self) -> str:
        """What to do without the file."""
        return (
            f"fetch {self.url} and put it into {self.cached.parent} ($TORCH_HOME/hub/checkpoints) or name it with "
            f"{self.option}; --download fetches it"
        )

    def find(self, path: str | None, download: bool) -> Path | None:
        """The file at `path`, or in torch's cache, downloaded to it if that is allowed; None if it is not there.

        Raises:
            ValueError: no file at `path`, a download that failed, or a file that is not what its name says.
        """
        file = Path(path).expanduser() if path else self.cached
        if path and not file.is_file():
            raise ValueError(f"{self.option}: no file {file}")
        if not file.is_file() and download:
            self._download()
        if not file.is_file():
            return None
        expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
        if expected and not (found := file_sha256(file)).startswith(expected[1]):
            raise ValueError(
                f"{file} is damaged or another file: by its name, its SHA-256 starts with {expected[1]}, but it is "
                f"{found}; {self.ways_out}"
            )
        return file

    def _download(self) -> None:
        digits = self.cached.stem.rpartition("-")[2]
        try:
            self.cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(self.cached), hash_prefix=digits)
        except (OSError, RuntimeError) as error:  # no network, no disk, broken transfer
            raise ValueError(f"{self.title} was not downloaded ({error}); {self.ways_out}") from error


INCEPTION = PublishedWeights(
    "InceptionV3",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "--inception-weights",
)
VGG16 = PublishedWeights("VGG16", VGG16_URL, "--vgg-weights")


class InceptionFeatures(nn.Module):
    """B x 3 x H x W uint8 -> B x 2048 float32, without gradient, whatever the autocast or TF32 setting around it."""

    def __init__(self, weights: Path, precision: Precision = "float32"):
        """Raises ValueError: torch-fidelity is not installed, or the file does not hold weights of this net."""
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"Inception features need torch-fidelity ({error}): {INSTALL}") from error
        # Its constructor unpickles whatever it is given (weights_only=False): it is given what was read safely.
        checked = io.BytesIO()
        torch.save(read_tensors(weights), checked)
        checked.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):  # it draws weights first, which are then replaced
                net = FeatureExtractorInceptionV3("inception", [str(INCEPTION_WIDTH)], checked)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"{weights} has other weights than InceptionV3's: {reason}") from error
        # Its own option "float64" computes in float32 (torch-fidelity 0.4.0, helpers.text_to_dtype).
        net.feature_extractor_internal_dtype = getattr(torch, precision)
        self.net = net.to(net.feature_extractor_internal_dtype)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), full_precision:
            return self.net(images)[0]

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
        raise ValueError(f"{file} is no file of weights alone, or cut short ({type(error).__name__})") from error
    if not (isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())):
        raise ValueError(f"{file} holds something else than tensors by name")
    return tensors
