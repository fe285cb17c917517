"""The frozen networks that images are measured with, in float32 and without gradient.

Features for distances between sets of images (Inception, DINOv2, the run's own tokenizer), and
CLIP's cosine of an image and its caption. Weights come from a path or torch's cache; nothing is
downloaded unless asked for, nothing in a file is executed.
"""

import hashlib
import io
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from eval.programs import INSTALL, describe_file
from eval.protocol import Protocol
from modeling.clip_weights import (
    AbsentWeights,
    ClipConfig,
    ClipWeights,
    clip_inputs,
    has_quick_gelu,
    load_clip,
    preprocessing_of,
)
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import fingerprint
from modeling.perceptual import VGG16_URL
from modeling.pipeline import ImageGenerator
from modeling.published import PublishedWeights, file_sha256
from modeling.vision_teacher import prepare
from training.checkpoint import load_plain

INCEPTION_WIDTH = 2048  # D
DINO_MODEL, DINO_PIXELS = "vit_large_patch14_dinov2", 224
DINO_MEAN, DINO_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DOWNLOAD = "; --download fetches it"
INCEPTION = PublishedWeights("InceptionV3", INCEPTION_URL, "--inception-weights", DOWNLOAD)
VGG16 = PublishedWeights("VGG16", VGG16_URL, "--vgg-weights", DOWNLOAD)
# By the protocol's `features`: where the weights come from; the tokenizer's are the run's own
PUBLISHED = {
    "inception": INCEPTION,
    "dinov2": PublishedWeights("DINOv2", DINO_URL, "--dinov2-weights", DOWNLOAD),
}


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
    """Also takes float32 in [0, 255] as it is: B x 3 x 299 x 299, already resized (clean-fid).

    InceptionV3 of 2015 as torch-fidelity runs it for FID: bytes are resized to 299 px as
    TensorFlow 1 does (bilinear, no antialiasing, aligned corners), (x - 128) / 128, and the
    features are those after the last pooling. Published numbers hold only with exactly these
    steps.
    """

    width = INCEPTION_WIDTH

    def __init__(self, weights: Path):
        """Raises ValueError: torch-fidelity is not installed, or the file holds other weights."""
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"Inception needs torch-fidelity ({error}): {INSTALL}") from error
        # Its constructor unpickles what it is given (weights_only=False): give it checked tensors
        with tensors_of(weights, "InceptionV3") as tensors:
            checked = io.BytesIO()
            torch.save(tensors, checked)
            checked.seek(0)
            self.net = FeatureExtractorInceptionV3("inception", [str(INCEPTION_WIDTH)], checked)
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


class DinoFeatures(FeatureNet):
    """The class token, D = 1024.

    ViT-L/14 at 224 px (torch, bicubic, antialiased), the class token after the last norm: for the
    Frechet distance of Stein et al. 2023.
    """

    def __init__(self, weights: Path):
        """Raises ValueError: the file does not hold weights of this net."""
        super().__init__()
        import timm  # here: it takes a second

        with tensors_of(weights, DINO_MODEL) as state:
            net = timm.create_model(
                DINO_MODEL, pretrained=False, img_size=DINO_PIXELS, num_classes=0
            )
            # Positions were learned at 518 px and are resized to the grid of 224 px
            net.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, net))
        self.net = net.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(DINO_MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DINO_DEVIATION).view(3, 1, 1))
        self.width = net.num_features
        self.identity = {"features": "dinov2", "weights_sha256": file_sha256(weights)}

    def forward(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
            pixels = prepare(images.float() / 255, DINO_PIXELS, self.mean, self.deviation)
            return self.net(pixels)


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
    """Images and captions -> cosines, by any CLIP of open_clip in float32.

    For the CLIP score of Hessel et al. 2021. Images go through its own preprocessing at their full
    size; captions have no prefix and are cut to its context.
    """

    def __init__(self, config: ClipWeights, device: torch.device, download: bool):
        """Raises AbsentWeights: the file to fetch; ValueError: unknown model, bad weights."""
        with torch.random.fork_rng(devices=[]):  # it first draws weights, then replaces them
            self.clip = load_clip(config, download).to(device)
        self.preprocess, self.tokenize = clip_inputs(config, self.clip)
        # Weights alone do not say which cosines they give
        reading = has_quick_gelu(self.clip), preprocessing_of(config, self.clip)
        self.device = device
        self.description: dict[str, Any] = {
            "model": config.model,
            "pretrained": None if config.names_its_weights else config.pretrained,
            "exact_gelu": config.exact_gelu,
            "weights_fingerprint": fingerprint(self.clip),
            "scale": "100 * mean over the images of max(cosine of image and caption, 0)",
        }
        read_as = hashlib.sha256(repr(reading).encode()).hexdigest()[:8]
        self.identity = f"{self.description['weights_fingerprint']}-{read_as}"

    def see(self, images: Tensor) -> Tensor:
        """Features B x E, of length 1, of images B x 3 x R x R uint8 on the CPU."""
        arrays = rearrange(images, "b c h w -> b h w c").numpy()
        pixels = torch.stack([self.preprocess(Image.fromarray(array)) for array in arrays])
        with full_precision(self.device):
            return self.clip.encode_image(pixels.to(self.device), normalize=True)

    def read(self, captions: list[str]) -> Tensor:
        """Features B x E, of length 1, of captions."""
        with full_precision(self.device):
            return self.clip.encode_text(self.tokenize(captions).to(self.device), normalize=True)

    def cosines(self, images: Tensor, captions: list[str]) -> Tensor:
        """B x 3 x R x R uint8 on the CPU and their captions -> B x 1 float32."""
        return (self.see(images) * self.read(captions)).sum(dim=1, keepdim=True).float()


@contextmanager
def tensors_of(weights: Path, net: str) -> Iterator[dict[str, Tensor]]:
    """To build a net in: tensors by name of what torch.save wrote; nothing in it is executed.

    ValueError: no such file, truncated, more than tensors, or those of another net.
    """
    tensors = load_plain(weights)
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{weights} is no file of weights: it does not hold tensors by name")
    try:
        with torch.random.fork_rng(devices=[]):  # the net first draws weights, then replaces them
            yield tensors
    except (RuntimeError, KeyError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{weights} has other weights than {net}'s: {reason}") from error


@dataclass
class Networks:
    """The networks that a protocol needs; None where it needs none, or the weights are absent."""

    features: FeatureNet | None = None
    clip: ClipScorer | None = None
    absent: dict[str, str] = field(default_factory=dict)  # why one is, by "features" and "clip"
    weights: dict[str, Any] = field(default_factory=dict)  # plain values


def load_networks(
    protocol: Protocol, generator: ImageGenerator, paths: Mapping[str, str | None], download: bool
) -> Networks:
    """What the protocol's metrics need; ValueError: damaged weights, another net's, no such file.

    generator: the run's, for its own tokenizer and CLIP. paths: files of weights by PUBLISHED's
    names; without one torch's cache. download: absent weights into torch's and the hub's cache.
    """
    # The CLIP score alone needs no features
    found, state, file, kind = Networks(), PartialState(), None, protocol.features
    needs_features = bool({*protocol.metrics} - {"clip_score"})
    # One process a machine downloads, the others find the files
    with state.local_main_process_first():
        if needs_features and kind in PUBLISHED:
            file = PUBLISHED[kind].find(paths[kind], download)
        if "clip_score" in protocol.metrics:
            try:
                found.clip = ClipScorer(clip_of(protocol, generator), state.device, download)
                found.weights["clip"] = found.clip.description
            except AbsentWeights as error:
                found.absent["clip"] = str(error)
    # The feature network, or why there is none
    if needs_features and kind == "tokenizer":
        found.features = TokenizerFeatures(generator.tokenizer)
    elif needs_features and file is None:
        found.absent["features"] = PUBLISHED[kind].absence
    elif needs_features:
        found.weights[kind] = describe_file(file)
        net = InceptionFeatures(file) if kind == "inception" else DinoFeatures(file)
        found.features = net.to(state.device)
    return found


def clip_of(protocol: Protocol, generator: ImageGenerator) -> ClipConfig:
    """The protocol's CLIP; "own" is the one whose text tower the run has."""
    if protocol.clip.model != "own":
        return protocol.clip
    tower = generator.text_encoder.tokenize.config
    if tower.family != "open_clip":
        raise AbsentWeights(f"clip.model=own: {tower.model} has no image tower, name a CLIP")
    return replace(
        protocol.clip, model=tower.model, pretrained=tower.pretrained, exact_gelu=tower.exact_gelu
    )
