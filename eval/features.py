"""Sets of images -> features: of generated images, and of their reference.

The processes share the images of a set (eval/images.py); all of them must call these functions.
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from eval.feature_nets import FeatureNet
from eval.fid import FeatureSet, FeatureStatistics
from eval.images import RULES, ImageSet, Reading, image_name, iterate_images, list_images
from eval.protocol import Caption, Protocol


class Extracted(NamedTuple):
    """Features of the N readable images of a set."""

    statistics: FeatureStatistics
    features: Tensor | None  # N x D float32 on the CPU, in the images' order, if they were kept
    numbers: list[int]  # of the images in their set
    digests: list[str]  # hash of each image's pixels
    skipped: list[tuple[str, str]]  # (name, reason) of the unreadable images


def extract_features(
    images: ImageSet,
    extract: Callable[[dict[str, Any]], Tensor],
    width: int,
    reading: Reading,
    keep_features: bool = True,
) -> Extracted:
    """Features of a set of images. extract: a batch of iterate_images -> B x width."""
    # This process's share
    statistics, rows, skipped = FeatureStatistics(width, reading.state.device), [], []
    for batch in iterate_images(images, reading.batch_size, reading.num_workers, reading.state):
        skipped += batch["skipped"]
        if batch["index"]:
            features = extract(batch)
            statistics.add(features)
            kept = features.cpu().numpy() if keep_features else [None] * len(features)
            digests = [hashlib.sha256(image.numpy()).hexdigest() for image in batch["image"]]
            rows += zip(batch["index"], digests, kept)
    # All processes' shares, in the images' order
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    numbers, digests, kept = ([row[column] for row in rows] for column in range(3))
    features = torch.from_numpy(np.stack(kept)) if keep_features and rows else None
    skipped = sorted(gather_object(skipped))
    return Extracted(statistics.over_processes(), features, numbers, digests, skipped)


def measure_reference(
    data: Sequence[str], images: ImageSet, net: FeatureNet, reading: Reading, keep: bool = True
) -> FeatureSet:
    """Features of the images of folders and shards (data).

    Raises:
        ValueError: fewer than 2 images could be read.
    """
    device = reading.state.device
    found = extract_features(
        images, lambda batch: net(batch["image"].to(device)), net.width, reading, keep
    )
    count = len(found.numbers)
    if count < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.skipped[:3])
        raise ValueError(f"reference: {count} readable images, expected at least 2 ({reasons})")
    # Where an image lies says its category, as in MJHQ-30K; a shard does not
    entries = [images.entries[number] for number in found.numbers]
    in_folders = not any(entry.span for entry in entries)
    description = {
        **describe_features(net, images.image_size, RULES[images.rule]),
        "data": [*data],
        "background": [*images.background],
        "images_sha256": hashlib.sha256("".join(found.digests).encode()).hexdigest(),
        "num_images": count,
        "num_skipped": len(found.skipped),
    }
    return FeatureSet(
        gaussian=found.statistics.gaussian(),
        description=description,
        features=found.features,
        categories=[Path(entry.path).parent.name for entry in entries] if in_folders else (),
        rows={image_name(entry): row for row, entry in enumerate(entries)},
        groups=number_groups(found.digests),
        skipped=found.skipped,
    )


def describe_features(net: FeatureNet, image_size: int, rule: str) -> dict[str, Any]:
    """What must be equal for features to be compared; plain values."""
    return {**net.identity, "image_size": image_size, "resize": rule}


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

    Without a network the reference is only listed or read.

    Raises:
        ValueError: the reference can't serve.
    """
    path, reference = protocol.statistics_file, None
    # A file says what it is of
    if path:
        reference = FeatureSet.load(path)
        if net:
            rule = RULES[protocol.resize]
            check_features(path, reference, net, describe_features(net, image_size, rule))
        described = {"file": str(path), "num_images": reference.gaussian.count}
        reference = replace(reference, description=described | reference.description)
    # Images are listed even without a network: what is not there is an error at once
    elif protocol.reference:
        entries, background = list_images(protocol.reference), tuple(protocol.background)
        images = ImageSet(entries, image_size, (), background, protocol.resize)
        if net:
            reference = measure_reference(protocol.reference, images, net, reading)
    if reference:
        check_captions(protocol, captions, reference)
    return reference


def check_features(
    path: Path, found: FeatureSet, net: FeatureNet, expected: dict[str, Any]
) -> None:
    """Refuse a statistics file of other features or image sizes; another code's says neither."""
    width = len(found.gaussian.mean)
    if width != net.width:
        raise ValueError(f"{path} has {width} features, {net.identity['features']} has {net.width}")
    for key, value in expected.items():
        known = found.description.get(key, value)
        if known != value and key != "precision":  # float32 and float64 may be compared
            raise ValueError(
                f"{path} has {key} {known!r}, expected {value!r}: make another with "
                "scripts/reference_stats.py"
            )


def check_captions(protocol: Protocol, captions: Sequence[Caption], reference: FeatureSet) -> None:
    """Refuse captions whose image or category is not in the reference."""
    if "retrieval" in protocol.metrics:
        absent = [caption.source for caption in captions if caption.source not in reference.rows]
        if absent:
            raise ValueError(f"metric retrieval: not in the reference: {', '.join(absent[:3])}")
        if len(reference.rows) < len(reference.groups):
            raise ValueError(
                "metric retrieval: two reference images of a shard have one name (a key that occurs "
                "twice, or keys that differ only in . + _), so a caption's own image is not known"
            )
    available = sorted({*reference.categories})
    absent = sorted({caption.category for caption in captions}.difference(available))
    if "frechet_by_category" in protocol.metrics and available and absent:
        raise ValueError(
            f"metric frechet_by_category: not in the reference: {', '.join(absent)}; there are "
            f"{', '.join(available)}"
        )
