"""Features of sets of images: their Gaussian, the Frechet distance, statistics files, references.

    d^2 = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

m, C: mean and covariance (n - 1) of D features, float64. Heusel et al. 2017 on Inception features:
FID.
"""

import hashlib
import io
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor

from data.files import write_bytes
from eval.feature_nets import FeatureNet
from eval.images import RULES, ImageSet, Reading, image_name, iterate_images, list_images
from eval.protocol import Caption, Protocol

BatchFn = Callable[[dict[str, Any]], Tensor]  # a batch of iterate_images -> B x width

# Gaussians


@dataclass(frozen=True)
class Gaussian:
    """Mean D and covariance D x D of features, float64 on the CPU. count: None if unknown."""

    mean: Tensor
    covariance: Tensor
    count: int | None

    def __post_init__(self):
        width = self.mean.numel()
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            given = f"mean {tuple(self.mean.shape)}, covariance {tuple(self.covariance.shape)}"
            raise ValueError(f"statistics of features: {given}, expected D and D x D")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("statistics of features: not finite")


class FeatureStatistics:
    """Count, sum and outer products of features, float64 on one device. D x D: 34 MB at 2048."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Count in a batch, B x D."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer.addmm_(features.T, features)

    def over_processes(self) -> "FeatureStatistics":
        """The sums of all processes, in a new object. Every process must call it."""
        total = FeatureStatistics(0, self.sum.device)
        own = (self.count, self.sum, self.outer)
        total.count, total.sum, total.outer = reduce(own, reduction="sum")
        return total

    def gaussian(self) -> Gaussian:
        """Mean and covariance; ValueError of fewer than 2 images, or features not finite."""
        # Sums of squares lose digits where means are large: float64 has enough of them
        count = self.count.item()
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {count}")
        mean = self.sum / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean.cpu(), covariance.cpu(), count)


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance of N x D features; raises as FeatureStatistics.gaussian does."""
    statistics = FeatureStatistics(features.shape[1], features.device)
    statistics.add(features)
    return statistics.gaussian()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance, as papers report. 0 for equal ones up to rounding, so also below.

    The trace of the root is the sum of the roots of the eigenvalues of C1 C2, as in torch-fidelity.
    """
    # C1 C2 is not symmetric, but its eigenvalues are real up to rounding
    eigenvalues = scipy.linalg.eigvals((first.covariance @ second.covariance).numpy())
    root_trace = np.sqrt(eigenvalues).real.sum()
    shift = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return (shift + traces - 2 * root_trace).item()


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images, as a statistics file keeps them.

    A statistics file is an npz with `mu`, `sigma`, `count` and `description`, on request with
    `features` (N x D). Files of other codes with only `mu` and `sigma` are read as well.
    """

    gaussian: Gaussian
    description: dict[str, Any] = field(default_factory=dict)  # plain values: what it is of
    features: Tensor | None = None  # N x D float32 on the CPU, if they were kept
    # known only of images that were just measured:
    rows: dict[str, int] = field(default_factory=dict)  # name of an image -> its row
    groups: Tensor | None = None  # N numbers, equal for pixel-identical images
    skipped: Sequence[tuple[str, str]] = ()  # (name, reason) of unreadable images

    def save(self, path: Path) -> None:
        arrays = {"mu": self.gaussian.mean.numpy(), "sigma": self.gaussian.covariance.numpy()}
        arrays |= {"description": json.dumps(self.description), "count": self.gaussian.count}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(buffer.getbuffer(), path)

    @staticmethod
    def load(path: Path) -> "FeatureSet":
        """Read a statistics file, ours or another code's. Nothing in it is executed.

        ValueError: no such file, truncated, or not of this form.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return FeatureSet._parse(arrays)
        except Exception as error:  # numpy, zip and zlib raise types of their own
            raise ValueError(f"{path} is absent, truncated or no statistics: {error}") from error

    @staticmethod
    def _parse(arrays: Mapping[str, np.ndarray]) -> "FeatureSet":
        mean = torch.from_numpy(arrays["mu"].astype(np.float64))
        covariance = torch.from_numpy(arrays["sigma"].astype(np.float64))
        count = int(arrays["count"]) if "count" in arrays else None
        features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
        if features is not None and features.shape != (count, len(mean)):
            raise ValueError(f"features {tuple(features.shape)}, {count} x {len(mean)} expected")
        description = json.loads(str(arrays.get("description", "{}")))
        return FeatureSet(Gaussian(mean, covariance, count), description, features)


# Measuring. All processes must call these functions; they share the images of a set


def extract_features(
    images: ImageSet, extract: BatchFn, width: int, reading: Reading, keep: bool = True
) -> tuple[FeatureStatistics, list[tuple], list[tuple[str, str]]]:
    """Features of a set of images, of all processes; keep: of each image, not only their sums.

    Returns the features' sums; of each readable image, in order, its number in the set, the hash of
    its pixels, and its features (`width` float32, or None); (name, reason) of the unreadable ones.
    """
    # This process's share
    statistics = FeatureStatistics(width, reading.state.device)
    rows, skipped = [], []
    for batch in iterate_images(images, reading.batch_size, reading.num_workers, reading.state):
        skipped += batch["skipped"]
        if batch["index"]:
            features = extract(batch)
            statistics.add(features)
            kept = features.cpu().numpy() if keep else [None] * len(features)
            digests = [hashlib.sha256(image.numpy()).hexdigest() for image in batch["image"]]
            rows += zip(batch["index"], digests, kept)
    # All processes' shares, in the images' order
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    return statistics.over_processes(), rows, sorted(gather_object(skipped))


def measure_reference(
    data: Sequence[str], images: ImageSet, net: FeatureNet, reading: Reading, keep: bool = True
) -> FeatureSet:
    """Features of a reference (data: its names); ValueError if fewer than 2 images are readable.

    keep: the features of each image, not only their Gaussian.
    """
    device = reading.state.device
    statistics, rows, skipped = extract_features(
        images, lambda batch: net(batch["image"].to(device)), net.width, reading, keep
    )
    # A covariance of fewer than two images is not defined
    if len(rows) < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise ValueError(f"reference: {len(rows)} readable images, expected at least 2 ({reasons})")
    numbers, digests, features = zip(*rows)
    description = {
        **describe_features(net, images),
        "data": [*data],
        "background": [*images.background],
        # Tells whether two references are of the same pixels
        "images_sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "num_images": len(rows),
        "num_skipped": len(skipped),
    }
    return FeatureSet(
        gaussian=statistics.gaussian(),
        description=description,
        features=torch.from_numpy(np.stack(features)) if keep else None,
        rows={image_name(images.entries[n]): row for row, n in enumerate(numbers)},
        groups=number_groups(digests),
        skipped=skipped,
    )


def describe_features(net: FeatureNet, images: ImageSet) -> dict[str, Any]:
    """What must be equal for features to be compared; plain values."""
    return {**net.identity, "image_size": images.image_size, "resize": RULES[images.rule]}


def number_groups(items: Sequence[Hashable]) -> Tensor:
    """The same number for equal items, counted from 0 in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(item, len(numbers)) for item in items])


def load_reference(
    protocol: Protocol,
    captions: Sequence[Caption],
    net: FeatureNet | None,
    image_size: int,
    reading: Reading,
) -> FeatureSet | None:
    """The protocol's statistics file, or its images, listed and measured; None without either.

    Without a network it is only read or listed. ValueError: the reference can't serve.
    """
    # Listing is quick, and finds a wrong name before networks run
    path = protocol.statistics_file
    entries = [] if path else list_images(protocol.reference)
    images = ImageSet(entries, image_size, (), tuple(protocol.background), protocol.resize)
    if path:
        found = FeatureSet.load(path)
        if net:
            check_features(path, found, net, images)
        described = {"file": str(path), "num_images": found.gaussian.count}
        return replace(found, description=described | found.description)
    if not (protocol.reference and net):
        return None

    found = measure_reference(protocol.reference, images, net, reading)
    if "retrieval" in protocol.metrics:
        absent = [caption.source for caption in captions if caption.source not in found.rows]
        if absent:
            raise ValueError(f"metric retrieval: not in the reference: {', '.join(absent[:3])}")
        # Keys of a shard that differ only in . + _ become one name: which is a caption's own?
        if len(found.rows) < len(found.groups):
            raise ValueError("metric retrieval: two reference images of a shard have one name")
    return found


def check_features(path: Path, found: FeatureSet, net: FeatureNet, images: ImageSet) -> None:
    """Refuse a statistics file of other features or image sizes; another code's says neither."""
    width = len(found.gaussian.mean)
    if width != net.width:
        raise ValueError(f"{path} has {width} features, {net.identity['features']} has {net.width}")
    for key, value in describe_features(net, images).items():
        known = found.description.get(key, value)
        if known != value:
            raise ValueError(
                f"{path} has {key} {known!r}, expected {value!r}: make another with "
                "scripts/reference_stats.py"
            )
