"""Sets of images -> features: of generated images, and of the reference that they are compared with.

The processes share the images of a set (eval/images.py); all of them must call these functions.
"""

import hashlib
import io
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from eval.feature_nets import FeatureNet
from eval.fid import FeatureStatistics, Gaussian, StatisticsFile
from eval.images import (
    CLEAN_SIZE,
    RULES,
    ImageSet,
    Reading,
    image_name,
    iterate_images,
    list_images,
)
from eval.protocol import Caption, Protocol
from training.files import write_bytes

MAKE = "scripts/reference_stats.py makes one"


@dataclass(frozen=True)
class SetFeatures:
    """Features of the N readable images of a set, over all processes."""

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
) -> SetFeatures:
    """Features of a set of images.

    Args:
        extract: a batch of iterate_images -> B x D, D being the width.
    """
    statistics, rows, skipped = FeatureStatistics(width, reading.state.device), [], []
    for batch in iterate_images(images, reading.batch_size, reading.num_workers, reading.state):
        skipped += batch["skipped"]
        if batch["index"]:
            features = extract(batch)
            statistics.add(features)
            kept = features.cpu().numpy() if keep_features else [None] * len(features)
            digests = [hashlib.sha256(image.numpy()).hexdigest() for image in batch["image"]]
            rows += zip(batch["index"], digests, kept)
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    return SetFeatures(
        statistics=statistics.over_processes(),
        features=torch.from_numpy(np.stack([kept for *_, kept in rows]))
        if keep_features and rows
        else None,
        numbers=[number for number, *_ in rows],
        digests=[digest for _, digest, _ in rows],
        skipped=sorted(gather_object(skipped)),
    )


def write_features(features: Tensor, file: Path) -> None:
    """N x D float32 into a .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    write_bytes(buffer.getbuffer(), file)


def read_features(file: Path, count: int) -> Tensor:
    """N x D float32 of `count` images; raises ValueError naming a damaged file."""
    try:
        features = torch.from_numpy(np.load(file, allow_pickle=False))
        if len(features) != count:
            raise ValueError(f"{len(features)} rows for {count} images")
        return features
    except (EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to measure anew") from error


@dataclass(frozen=True)
class Reference:
    """Features of the M real images that generated ones are compared with."""

    gaussian: Gaussian
    description: dict[str, Any]  # plain values
    features: Tensor | None = None  # M x D on the CPU; None: the statistics file keeps none
    categories: Sequence[str] = ()  # M names of folders that the images lie in, if known
    rows: dict[str, int] = field(default_factory=dict)  # name of an image -> its row, if known
    groups: Tensor | None = None  # M numbers, equal for pixel-identical images
    skipped: Sequence[tuple[str, str]] = ()  # (name, reason) of the unreadable images


def feature_size(protocol: Protocol, own_size: int) -> int:
    """Pixels of the images that features are taken of, generated at own_size; raises ValueError if it can't be."""
    size = CLEAN_SIZE if protocol.resize == "clean" else protocol.image_size or own_size
    if protocol.features == "tokenizer" and size != own_size:
        raise ValueError(f"image_size={size}: features=tokenizer needs its own {own_size} px")
    return size


def load_reference(
    protocol: Protocol,
    captions: Sequence[Caption],
    net: FeatureNet | None,
    image_size: int,
    reading: Reading,
) -> Reference | None:
    """The protocol's statistics file, or its images, listed and measured; None without either, or without net.

    Raises:
        ValueError: the reference can't serve.
    """
    file, reference = protocol.statistics_file, None
    if file:
        reference = read_reference(file, net, image_size, RULES[protocol.resize])
    elif protocol.reference:
        entries, background = list_images(protocol.reference), tuple(protocol.background)
        images = ImageSet(entries, image_size, (), background, protocol.resize)
        if net:
            reference = measure_reference(protocol.reference, images, net, reading)
    if reference:
        check_reference(protocol, captions, reference)
    return reference


def read_reference(path: Path, net: FeatureNet | None, image_size: int, rule: str) -> Reference:
    """A statistics file of these features and of images of this size. One of another code says neither.

    Raises:
        ValueError: a damaged file, or one of other features or another size.
    """
    file = StatisticsFile.load(path)
    size = file.description.get("image_size", image_size)
    if size != image_size:
        raise ValueError(
            f"{path} is of images of {size} px, the generated ones have {image_size} px: set image_size={size} in the "
            f"protocol, or take another file ({MAKE})"
        )
    if net:
        check_features(path, file, net, rule)
    count = file.gaussian.count
    description = {"file": str(path), "num_images": count, **file.description}
    return Reference(file.gaussian, description, file.features, file.categories)


def check_features(path: Path, file: StatisticsFile, net: FeatureNet, rule: str) -> None:
    """Refuse a file of other features; float32 and float64 may be compared."""
    width = len(file.gaussian.mean)
    if width != net.width:
        raise ValueError(f"{path} has {width} features, {net.identity['features']} has {net.width}")
    expected = {**net.identity, "resize": rule}
    expected.pop("precision", None)
    for key, value in expected.items():
        found = file.description.get(key, value)
        if found != value:
            raise ValueError(f"{path} has {key} {found!r}, expected {value!r}; {MAKE}")


def measure_reference(
    data: Sequence[str], images: ImageSet, net: FeatureNet, reading: Reading, keep: bool = True
) -> Reference:
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
    entries = [images.entries[number] for number in found.numbers]
    in_folders = not any(entry.span for entry in entries)
    description = {
        **net.identity,
        "data": [*data],
        "image_size": images.image_size,
        "resize": RULES[images.rule],
        "background": [*images.background],
        "images_sha256": hashlib.sha256("".join(found.digests).encode()).hexdigest(),
        "num_images": count,
        "num_skipped": len(found.skipped),
    }
    return Reference(
        gaussian=found.statistics.gaussian(),
        description=description,
        features=found.features,
        categories=[Path(entry.path).parent.name for entry in entries] if in_folders else (),
        rows={image_name(entry): row for row, entry in enumerate(entries)},
        groups=number_groups(found.digests),
        skipped=found.skipped,
    )


def number_groups(items: Sequence[Hashable]) -> Tensor:
    """The same number for equal items, counted from 0 in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(item, len(numbers)) for item in items])


def check_reference(protocol: Protocol, captions: Sequence[Caption], reference: Reference) -> None:
    """Refuse captions whose image or category is not in the reference."""
    if "retrieval" in protocol.metrics:
        absent = [caption.source for caption in captions if caption.source not in reference.rows]
        if absent:
            raise ValueError(f"metric retrieval: not in the reference: {', '.join(absent[:3])}")
        if len(reference.rows) < len(reference.groups):
            raise ValueError(
                "metric retrieval: two reference images of a shard have one name (a key that occurs twice, or keys "
                "that differ only in . + _), so a caption's own image is not known"
            )
    available = {*reference.categories}
    absent = sorted({caption.category for caption in captions} - available)
    if "frechet_by_category" in protocol.metrics and available and absent:
        raise ValueError(
            f"metric frechet_by_category: not in the reference: {', '.join(absent)}; there are "
            f"{', '.join(sorted(available))}"
        )
