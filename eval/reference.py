"""What generated images are compared with: a statistics file, or the images of folders and shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from eval.features import Extractor, measure_images
from eval.frechet import Gaussian, load_features, load_statistics
from eval.images import RULES, ImageSet, ResizeRule, image_name, list_images

MAKE = "scripts/reference_stats.py makes one"


@dataclass(frozen=True)
class Reference:
    """Features of the real images."""

    gaussian: Gaussian
    features: Tensor | None  # M x D on the CPU; None: the statistics file keeps none
    categories: list[str]  # M names of folders that the images lie in; [] if that is not known
    rows: dict[str, int]  # name of an image -> its row; {} of a statistics file
    groups: Tensor | None  # M numbers, equal for pixel-identical images
    description: dict[str, Any]  # plain values


def describe_images(
    data: Sequence[str], images: ImageSet, extractor: Extractor, images_sha256: str
) -> dict[str, Any]:
    """What a statistics file says of its images."""
    return {
        **extractor.identity,
        "data": list(data),
        "image_size": images.image_size,
        "resize": RULES[images.rule],
        "background": list(images.background),
        "images_sha256": images_sha256,
    }


def read_reference(path: Path, extractor: Extractor | None, image_size: int) -> Reference:
    """A statistics file, if it is of these features and of images of this size. One of another code says neither.

    extractor: None if there is none to compare with; the file is checked all the same.

    Raises:
        ValueError: cut short, or of other features or another size.
    """
    gaussian, description = load_statistics(path)
    width = len(gaussian.mean)
    if description.get("image_size", image_size) != image_size:
        raise ValueError(
            f"{path} is of images of {description['image_size']} px, the generated ones have {image_size} px: set "
            f"image_size={description['image_size']} in the protocol, or take another file ({MAKE})"
        )
    if extractor:
        check_features(path, width, description, extractor)
    features, categories = load_features(path) or (None, [])
    if features is not None and features.shape != (gaussian.count, width):
        raise ValueError(
            f"{path}: features {tuple(features.shape)}, expected {(gaussian.count, width)}"
        )
    if categories and len(categories) != gaussian.count:
        raise ValueError(f"{path}: {len(categories)} categories, expected {gaussian.count}")
    described = {"file": str(path), "num_images": gaussian.count, **description}
    return Reference(gaussian, features, categories, {}, None, described)


def check_features(
    path: Path, width: int, description: dict[str, Any], extractor: Extractor
) -> None:
    """Refuse a file of other features; of float32 and float64 they may be compared."""
    if width != extractor.width:
        raise ValueError(
            f"{path} has statistics of {width} features, {extractor.name} has {extractor.width}"
        )
    for key, value in extractor.identity.items():
        if key != "precision" and description.get(key, value) != value:
            raise ValueError(f"{path} has {key} {description[key]}, expected {value}; {MAKE}")
    rule = RULES[extractor.rule]
    if description.get("resize", rule) != rule:
        raise ValueError(
            f"{path} is of images resized so: {description['resize']}; expected: {rule}; {MAKE}"
        )


def measure_reference(
    data: Sequence[str],
    images: ImageSet,
    extractor: Extractor,
    batch_size: int,
    num_workers: int,
    state: PartialState,
) -> Reference:
    """The images of folders and shards, read and measured by all processes.

    Raises:
        ValueError: fewer than 2 images could be read.
    """
    share = (state.process_index, state.num_processes)
    found = measure_images(images, extractor, True, batch_size, num_workers, state.device, share)
    names = [image_name(images.entries[number]) for number in found.numbers]
    known: dict[str, int] = {}
    groups = torch.tensor([known.setdefault(digest, len(known)) for digest in found.digests])
    description = describe_images(data, images, extractor, found.images_sha256)
    description |= {"num_images": len(names), "num_skipped": len(found.skipped)}
    rows = {name: row for row, name in enumerate(names)}
    categories = categories_of(images, found.numbers)
    return Reference(
        found.statistics.gaussian(), found.features, categories, rows, groups, description
    )


def categories_of(images: ImageSet, numbers: Sequence[int]) -> list[str]:
    """Names of the folders that images of a set lie in (MJHQ-30K has one a category); [] if some are in shards."""
    entries = [images.entries[number] for number in numbers]
    return (
        []
        if any(entry.span for entry in entries)
        else [Path(entry.path).parent.name for entry in entries]
    )


def is_statistics_file(reference: Sequence[str]) -> bool:
    """Whether a protocol's reference is a statistics file.

    Raises:
        ValueError: one among others.
    """
    files = [name for name in reference if name.endswith(".npz")]
    if files and len(reference) > 1:
        raise ValueError(
            f"protocol: reference is one .npz or several folders and shards, got {list(reference)}"
        )
    return bool(files)


def list_reference(
    data: Sequence[str], image_size: int, background: Sequence[int], rule: ResizeRule
) -> ImageSet:
    """The images of folders and shards, listed before anything is read.

    Raises:
        ValueError: no such folder or shard, or no image there.
    """
    return ImageSet(list_images(data), image_size, (), tuple(background), rule)
