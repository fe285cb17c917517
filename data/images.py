"""Image shards -> batches: how training crops, flips and resizes them.

A sample is `KEY.jpg`, or another extension of IMAGE_KEYS, with its captions (data/captions.py).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from data.captions import Tokenize, collate_text
from data.config import ReaderConfig, SourceConfig
from data.readers import Reader, take_caption
from data.samples import BadSample, SampleDraws, check_fields
from data.transforms import (
    HEIF_KEYS,
    IMAGE_KEYS,
    Resize,
    center_crop,
    load_picture,
    open_image,
    train_crop,
)


@dataclass
class ImageTextConfig(ReaderConfig):
    """Image shards and how training sees them."""

    # a random part of the longer side; false: the centre
    random_crop: bool = True
    # probability of a left-right flip
    flip_probability: float = 0.5
    # how training makes images smaller, see data/transforms.py. One pass in order is always exact.
    resize: Resize = "fast"
    # RGB, 0..255, what lies behind transparent pixels
    background: list[int] = field(default_factory=lambda: [255, 255, 255])

    def __post_init__(self):
        super().__post_init__()
        is_colour = len(self.background) == 3 and all(
            0 <= value <= 255 for value in self.background
        )
        check_fields(
            self,
            flip_probability=(0 <= self.flip_probability <= 1, "0..1"),
            resize=(self.resize in ("fast", "exact"), "fast or exact"),
            background=(is_colour, "three values 0..255"),
        )


def image_reader(config: ImageTextConfig, image_size: int, tokenize: Tokenize | None) -> Reader:
    """Batches with "image": B x 3 x R x R uint8 in [0, 255]; in one pass centre crops, exact."""
    decode = partial(decode_image, config, image_size)
    return Reader(config, decode, partial(collate_images, tokenize))


def decode_image(
    config: ImageTextConfig,
    image_size: int,
    source: SourceConfig,
    sample: dict[str, Any],
    draws: SampleDraws | None,
) -> dict[str, Any]:
    """Raw sample -> {"image": 3 x R x R uint8, "caption", "key"}."""
    # what can drop the sample before its pixels are decoded
    decoded = take_caption(source, sample, draws)
    image = open_image(image_bytes(sample))
    source.filters.check_size(*image.size)
    # in order: exact, the centre
    if draws is None:
        picture = load_picture(image, config.background)
        return decoded | {"image": center_crop(picture, image_size, "exact")}
    # in training: large JPEGs at a fraction of their size, a random crop
    picture = load_picture(image, config.background, image_size if config.resize == "fast" else 0)
    pixels = train_crop(
        picture,
        image_size,
        draws,
        random_crop=config.random_crop,
        flip_probability=config.flip_probability,
        resize=config.resize,
    )
    return decoded | {"image": pixels}


def image_bytes(sample: dict[str, Any]) -> bytes:
    """The image file of a raw sample.

    Raises:
        BadSample: it has none.
    """
    data = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
    if data is None and any(key in sample for key in HEIF_KEYS):
        raise BadSample("image: HEIC needs the package pillow-heif")
    if data is None:
        raise BadSample("image: missing")
    return data


def collate_images(tokenize: Tokenize | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    images = np.stack([sample["image"] for sample in samples])  # B x 3 x R x R
    return {"image": torch.from_numpy(images), **collate_text(samples, tokenize)}
