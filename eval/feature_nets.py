"""The frozen networks that images are measured with, in float32 and without gradient.

Inception  InceptionV3 of 2015 as torch-fidelity runs it for FID: uint8 images resized to 299 px as
           TensorFlow 1 does (bilinear, no antialiasing, aligned corners), (x - 128) / 128, the
           features after the last pooling.
Tokenizer  the latent means of the run's own image tokenizer.
CLIP       cosine of image and caption for the CLIP score of Hessel et al. 2021. Images go through
           its own preprocessing at their full size; captions have no prefix and are cut to its
           context.
Weights come from a path or torch's cache; nothing is downloaded unless asked for, nothing in a file
is executed.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.programs import INSTALL, describe_file
from eval.protocol import Protocol
from modeling.clip_weights import AbsentWeights, ClipConfig, clip_inputs, load_clip
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import fingerprint
from modeling.perceptual import VGG16_URL
from modeling.pipeline import ImageGenerator
from modeling.published import PublishedWeights, file_sha256

INCEPTION_WIDTH = 2048  # D
DOWNLOAD = "; --download fetches it"
INCEPTION = PublishedWeights(
    "InceptionV3",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "--inception-weights",
    DOWNLOAD,
)
VGG16 = PublishedWeights("VGG16", VGG16_URL, "--vgg-weights", DOWNLOAD)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without gradient, autocast and TF32 convolutions."""
    convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), convolutions:
        yield


class FeatureNet(nn.Module):
    """B x 3 x H x W uint8 -> B x D float32."""

    width: int  # D
    identity: dict[str, Any]  # plain values; features of equal ones may be compared


class InceptionFeatures(FeatureNet):
    """Also takes float32 in [0, 255] as it is: B x 3 x 299 x 299, already resized (clean-fid)."""

    width = INCEPTION_WIDTH

    def __init__(self, weights: Path):
        """Raises ValueError: torch-fidelity is not installed, or the file holds other weights."""
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"Inception needs torch-fidelity ({error}): {INSTALL}") from error
        # Its constructor unpickles what it is given (weights_only=False): give it checked tensors
        checked = io.BytesIO()
        torch.save(read_tensors(weights), checked)
        checked.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):  # it first draws weights, then replaces them
                self.net = FeatureExtractorInceptionV3("inception", [str(INCEPTION_WIDTH)], checked)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"{weights} has other weights than InceptionV3's: {reason}") from error
        self.layers = list(self.net.children())[:-1]  # in calling order; the last gives logits
        self.identity = {"features": "inception", "weights_sha256": file_sha256(weights)}

    def forward(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
            # Bytes: its own resizing and scaling first
            if images.dtype != torch.float32 or images.shape[-1] != self.net.INPUT_IMAGE_SIZE:
                return self.net(images)[0]  # which refuses other types than uint8
            # Resized already
            x = (images - 128) / 128
            for layer in self.layers:
                x = layer(x)
            return x.flatten(1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """B x 2048 -> B x 1008 float64 without bias, as the inception score takes them."""
        weight = self.net.fc.weight.double()
        return features.to(weight) @ weight.T


class TokenizerFeatures(FeatureNet):
    """Latent means, flattened."""

    def __init__(self, tokenizer: ImageTokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.width = tokenizer.config.num_tokens * tokenizer.config.token_channels
        self.identity = {"features": "tokenizer", "weights_sha256": fingerprint(tokenizer)}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images.float() / 255).mean.flatten(1).float()


class ClipScorer:
    """Images and captions -> cosines, by any CLIP of open_clip in float32."""

    def __init__(self, config: ClipConfig, device: torch.device, download: bool):
        """Raises AbsentWeights: the file to fetch; ValueError: unknown model, bad weights."""
        with torch.random.fork_rng(devices=[]):  # it first draws weights, then replaces them
            self.clip = load_clip(config, download).to(device)
        self.preprocess, self.tokenize = clip_inputs(config, self.clip)
        self.device = device
        self.description: dict[str, Any] = {
            "model": config.model,
            "pretrained": None if ":" in config.model else config.pretrained,
            "weights_fingerprint": fingerprint(self.clip),
            "scale": "100 * mean over the images of max(cosine of image and caption, 0)",
        }

    def cosines(self, images: Tensor, captions: list[str]) -> Tensor:
        """B x 3 x R x R uint8 on the CPU and their captions -> B x 1 float32."""
        arrays = rearrange(images, "b c h w -> b h w c").numpy()
        pixels = torch.stack([self.preprocess(Image.fromarray(array)) for array in arrays])
        with full_precision(self.device):
            image = self.clip.encode_image(pixels.to(self.device), normalize=True)  # B x E
            text = self.clip.encode_text(self.tokenize(captions).to(self.device), normalize=True)
        return (image * text).sum(dim=1, keepdim=True).float()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name, of a .safetensors or of what torch.save wrote; nothing in it is executed.

    Raises:
        ValueError: truncated, no such file, or one that needs more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's text advises to execute the file
        kind = type(error).__name__
        raise ValueError(f"{file} is no file of weights, or truncated ({kind})") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{file} is no file of weights: it does not hold tensors by name")
    return tensors


@dataclass
class Networks:
    """The networks that a protocol needs; None where it needs none, or the weights are absent."""

    features: FeatureNet | None = None
    clip: ClipScorer | None = None
    absent: dict[str, str] = field(default_factory=dict)  # why one is, by "features" and "clip"
    weights: dict[str, Any] = field(default_factory=dict)  # plain values


def explain_absence(weights: PublishedWeights) -> str:
    """Why there is no metric, and where to get the weights."""
    return f"{weights.title}'s weights are absent: {weights.ways_out}"


def load_networks(
    protocol: Protocol,
    generator: ImageGenerator,
    inception_weights: str | None,
    state: PartialState,
    download: bool = False,
) -> Networks:
    """What the protocol's metrics need.

    Args:
        generator: the run's, for its own tokenizer and CLIP.
        inception_weights: path; None: torch's cache.
        download: absent weights into torch's and the hub's cache.

    Raises:
        ValueError: weights of another net, damaged ones, or no file at a given path.
    """
    found, file = Networks(), None
    needs_features = bool({*protocol.metrics} - {"clip_score"})
    needs_inception = needs_features and protocol.features == "inception"
    # One process a machine downloads, the others find the files
    with state.local_main_process_first():
        if needs_inception:
            file = INCEPTION.find(inception_weights, download)
        if "clip_score" in protocol.metrics:
            try:
                found.clip = ClipScorer(clip_of(protocol, generator), state.device, download)
                found.weights["clip"] = found.clip.description
            except AbsentWeights as error:
                found.absent["clip"] = str(error)
    # The feature network, or why there is none
    if file:
        found.weights["inception"] = describe_file(file)
        found.features = InceptionFeatures(file).to(state.device)
    elif needs_inception:
        found.absent["features"] = explain_absence(INCEPTION)
    elif needs_features:
        found.features = TokenizerFeatures(generator.tokenizer)
    return found


def clip_of(protocol: Protocol, generator: ImageGenerator) -> ClipConfig:
    """The protocol's CLIP; "own" is the one whose text tower the run has."""
    if protocol.clip.model != "own":
        return protocol.clip
    tower = generator.text_encoder.tokenize.config
    return replace(
        protocol.clip,
        model=tower.model,
        pretrained=tower.pretrained,
        exact_gelu=tower.exact_gelu,
    )
