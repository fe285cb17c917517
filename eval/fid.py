"""Frechet distance between two sets of features, from running sums; statistics files.

    d^2 = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

m, C: mean and covariance (n - 1) of D features.

Heusel et al. 2017 on Inception features: FID. Everything is float64. The trace of the root is the
sum of the roots of the eigenvalues of C1 C2, as torch-fidelity computes it. A statistics file is an
npz with `mu`, `sigma`, `count` and `description`, and on request `features` (N x D) and
`categories` (N names). Files of other codes with only `mu` and `sigma` are read as well.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from data.files import write_bytes


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
        total.count = sum_over_processes(self.count)
        total.sum = sum_over_processes(self.sum)
        total.outer = sum_over_processes(self.outer)
        return total

    def gaussian(self) -> Gaussian:
        """Mean and covariance.

        Raises:
            ValueError: fewer than 2 samples, or features that were not finite.
        """
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


def sum_over_processes(values: Tensor) -> Tensor:
    """A new tensor with the sum of all processes' values."""
    values = values.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance, as papers report. 0 for equal ones up to rounding, so also below.

    Raises:
        ValueError: features of different widths.
    """
    if first.mean.shape != second.mean.shape:
        widths = f"{len(first.mean)} and {len(second.mean)}"
        raise ValueError(f"features of widths {widths} have no distance")
    # tr (C1 C2)^(1/2): C1 C2 is not symmetric, but its eigenvalues are real up to rounding
    eigenvalues = scipy.linalg.eigvals((first.covariance @ second.covariance).numpy())
    root_trace = np.sqrt(eigenvalues).real.sum()
    shift = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return (shift + traces - 2 * root_trace).item()


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images, as a statistics file keeps them."""

    gaussian: Gaussian
    description: dict[str, Any] = field(default_factory=dict)  # plain values: what it is of
    features: Tensor | None = None  # N x D float32 on the CPU, if they were kept
    categories: Sequence[str] = ()  # N names of the folders that the images lie in, if known
    # known only of images that were just measured:
    rows: dict[str, int] = field(default_factory=dict)  # name of an image -> its row
    groups: Tensor | None = None  # N numbers, equal for pixel-identical images
    skipped: Sequence[tuple[str, str]] = ()  # (name, reason) of unreadable images

    def save(self, path: Path) -> None:
        """Write a statistics file atomically."""
        arrays = {"mu": self.gaussian.mean.numpy(), "sigma": self.gaussian.covariance.numpy()}
        arrays["count"] = -1 if self.gaussian.count is None else self.gaussian.count
        arrays["description"] = json.dumps(self.description)
        if self.features is not None:
            arrays["features"] = self.features.numpy()
            arrays["categories"] = np.array(self.categories, dtype=np.str_)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(buffer.getbuffer(), path)

    @staticmethod
    def load(path: Path) -> "FeatureSet":
        """Read a statistics file, ours or another code's. Nothing in it is executed.

        Raises:
            ValueError: no such file, truncated, or not of this form.
        """
        if not path.is_file():
            raise ValueError(f"statistics file {path} does not exist")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return _parse(arrays)
        except Exception as error:  # numpy, zip and zlib raise types of their own
            raise ValueError(f"{path} is no statistics file, or truncated: {error}") from error


def _parse(arrays: Mapping[str, np.ndarray]) -> FeatureSet:
    # Every code's
    mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    count = int(arrays["count"]) if "count" in arrays else -1
    gaussian = Gaussian(mean, covariance, None if count < 0 else count)
    description = json.loads(str(arrays["description"])) if "description" in arrays else {}
    # Ours, with --keep-features
    if "features" not in arrays:
        return FeatureSet(gaussian, description)
    features = torch.from_numpy(arrays["features"])
    categories = arrays["categories"].astype(np.str_).tolist() if "categories" in arrays else []
    if features.shape != (count, len(mean)) or len(categories) not in (0, count):
        given = f"features {tuple(features.shape)} and {len(categories)} categories"
        raise ValueError(f"{given} of {count} images with {len(mean)} features")
    return FeatureSet(gaussian, description, features, categories)
