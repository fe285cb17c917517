"""Images -> features that sets of images are compared by: Inception's, DINOv2's, or the run's tokenizer latents."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from eval.dinov2 import DinoFeatures
from eval.frechet import FeatureStatistics
from eval.images import ImageSet, ResizeRule, iterate_images
from eval.inception import INCEPTION, INCEPTION_WIDTH, InceptionFeatures, Precision
from modeling.fingerprint import fingerprint
from modeling.image_tokenizer import ImageTokenizer
from modeling.published import file_sha256


@dataclass(frozen=True)
class Extractor:
    """B x 3 x R x R uint8 (float32 by the rule "clean") -> B x D float32 on the device, and what it is."""

    features: Callable[[Tensor], Tensor]
    width: int  # D
    identity: dict[str, Any]  # plain values; features of equal ones may be compared
    logits: Callable[[Tensor], Tensor] | None = None  # B x D -> B x classes, of a classifier
    rule: ResizeRule = "crop"  # how images are to be resized for it

    @property
    def name(self) -> str:
        """For files."""
        return "-".join(
            str(value)[:12]
            for value in (*self.identity.values(), *([self.rule] * (self.rule != "crop")))
        )


def inception_extractor(
    weights: Path, precision: Precision, device: torch.device, rule: ResizeRule = "crop"
) -> Extractor:
    """torch-fidelity's InceptionV3.

    Raises:
        ValueError: torch-fidelity is not installed, or the file holds other weights.
    """
    net = InceptionFeatures(weights, precision).to(device)
    identity = {
        "features": "inception",
        "weights_sha256": file_sha256(weights),
        "precision": precision,
    }
    return Extractor(net, INCEPTION_WIDTH, identity, net.logits, rule)


def dinov2_extractor(weights: Path, device: torch.device) -> Extractor:
    """ViT-L/14.

    Raises:
        ValueError: the file holds other weights.
    """
    net = DinoFeatures(weights).to(device)
    return Extractor(
        net, net.net.num_features, {"features": "dinov2", "weights_sha256": file_sha256(weights)}
    )


def tokenizer_extractor(tokenizer: ImageTokenizer) -> Extractor:
    """Latent means of an image tokenizer, flattened."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return tokenizer.encode(images.float() / 255).mean.flatten(1).float()

    width = tokenizer.config.num_tokens * tokenizer.config.token_channels
    return Extractor(
        features, width, {"features": "tokenizer", "weights_sha256": fingerprint(tokenizer)}
    )


def inception_reason() -> str:
    """Why there are no Inception features, and which file to fetch."""
    return f"{INCEPTION.title}'s weights are absent: {INCEPTION.ways_out}"


@dataclass(frozen=True)
class Measured:
    """Features of all images of a set, over all processes."""

    statistics: FeatureStatistics
    features: (
        Tensor | None
    )  # N x D float32 on the CPU, in the images' order; None if they were not kept
    numbers: list[int]  # N: which images of the set; the unreadable ones are missing
    digests: list[str]  # N: hash of each image's pixels
    skipped: list[tuple[str, str]]  # (name, reason) of the unreadable ones

    @property
    def images_sha256(self) -> str:
        """Hash over the pixels of all images in order."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


def measure_images(
    images: ImageSet,
    extractor: Extractor,
    keep_features: bool,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> Measured:
    """Features of a set of images, which the processes share: (rank, number of processes). All must call it.

    Raises:
        ValueError: not one image could be read, or only one.
    """
    statistics, rows, skipped = FeatureStatistics(extractor.width, device), [], []
    for batch in iterate_images(images, batch_size, num_workers, *share):
        skipped += batch["skipped"]
        if batch["index"]:
            features = extractor.features(batch["image"].to(device))
            statistics.add(features)
            kept = features.cpu().numpy() if keep_features else [None] * len(features)
            digests = [
                hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["image"]
            ]
            rows += zip(batch["index"], digests, kept)
    total, skipped = statistics.over_processes(), sorted(gather_object(skipped))
    if total.count.item() < 2:
        reasons = (
            "; ".join(f"{name}: {reason}" for name, reason in skipped[:3]) or "no more are there"
        )
        raise ValueError(
            f"reference: {total.count.item()} images could be read, at least 2 are needed ({reasons})"
        )
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    numbers, digests, kept = ([row[column] for row in rows] for column in range(3))
    return Measured(
        total,
        torch.from_numpy(np.stack(kept)) if keep_features else None,
        numbers,
        digests,
        skipped,
    )
