"""Frechet distance between two sets of features, from running sums; statistics files.

    d^2 = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))         m, C: mean and covariance (n - 1) of D features

Heusel et al. 2017 on Inception features: FID. Everything is float64. The trace of the root is the sum of the roots of
the eigenvalues of C1 C2, as torch-fidelity computes it. Files are npz with `mu`, `sigma`, `count` and `description`;
those of other codes, which have `mu` and `sigma` only, are read, too. `features` (N x D) and `categories` (N names) are
there if they were kept.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean D and covariance D x D of features, float64 on the CPU. count: samples, None if a file does not say."""

    mean: Tensor
    covariance: Tensor
    count: int | None

    def __post_init__(self):
        width = self.mean.numel()
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise ValueError(
                f"statistics of features: mean {tuple(self.mean.shape)} and covariance {tuple(self.covariance.shape)}, "
                "expected D and D x D"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("statistics of features: some are not finite")


class FeatureStatistics:
    """Count, sum and outer products of the features seen so far, float64 on one device. D x D: 34 MB at 2048."""

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
        """The sums of all processes; own ones stay as they are. Every process must call it."""
        total = FeatureStatistics(0, self.sum.device)
        total.count, total.sum, total.outer = (
            sum_over_processes(x) for x in (self.count, self.sum, self.outer)
        )
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


def sum_over_processes(values: Tensor) -> Tensor:
    """A new tensor with the sum of all processes' values; of one process without any others, its own."""
    values = values.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance, which is what papers report. 0 for equal ones, up to rounding (also below 0).

    Raises:
        ValueError: features of different widths.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features of widths {len(first.mean)} and {len(second.mean)} have no distance"
        )
    root_trace = torch.linalg.eigvals(first.covariance @ second.covariance).sqrt().real.sum()
    shift = (first.mean - second.mean).square().sum()
    return (shift + first.covariance.trace() + second.covariance.trace() - 2 * root_trace).item()


def save_statistics(
    path: Path,
    gaussian: Gaussian,
    description: dict[str, Any],
    features: Tensor | None = None,
    categories: Sequence[str] = (),
) -> None:
    """Write a statistics file, aside and then renamed.

    Args:
        description: plain values, what the features are of.
        features: N x D, also kept if given: kernel distance, precision and recall need them.
        categories: N names of what each image is of, kept beside them.
    """
    kept = (
        {}
        if features is None
        else {"features": features.numpy(), "categories": np.array(categories, dtype=np.str_)}
    )
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                mu=gaussian.mean.numpy(),
                sigma=gaussian.covariance.numpy(),
                count=-1 if gaussian.count is None else gaussian.count,
                description=json.dumps(description),
                **kept,
            )
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(path: Path) -> tuple[Gaussian, dict[str, Any]]:
    """Statistics and their description, {} in a file of another code. Nothing in the file is executed.

    Raises:
        ValueError: no such file, cut short, or not of this form.
    """
    if not path.is_file():
        raise ValueError(f"statistics file {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            count = int(arrays["count"]) if "count" in arrays else -1
            description = json.loads(str(arrays["description"])) if "description" in arrays else {}
            mean, covariance = (
                torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma")
            )
            return Gaussian(mean, covariance, None if count < 0 else count), description
    except Exception as error:  # numpy, zip and zlib raise their own types
        raise ValueError(f"{path} is no statistics file, or cut short: {error}") from error


def load_features(path: Path) -> tuple[Tensor, list[str]] | None:
    """The features that a statistics file keeps, N x D, and their categories, N or none; None if it keeps none.

    Raises:
        ValueError: cut short.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "features" not in arrays:
                return None
            categories = (
                arrays["categories"].astype(np.str_).tolist() if "categories" in arrays else []
            )
            return torch.from_numpy(arrays["features"]), categories
    except Exception as error:  # numpy, zip and zlib raise their own types
        raise ValueError(f"{path}: its features cannot be read: {error}") from error
