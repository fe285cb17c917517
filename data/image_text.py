"""Images with captions -> batches for the image tokenizer.

A sample is `{key}.jpg` (or another extension of IMAGE_KEYS) and a caption, as img2dataset and scripts/make_shards
write them:  000000012.jpg  000000012.txt  000000012.json
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from data.captions import Tokenize, caption_of, check_caption_keys, collate_text
from data.shards import BadSample, ShardStream, build_loader, read_batches
from data.tar import expand_shards
from data.transforms import decode_image, train_crop

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif")


@dataclass
class ImageTextConfig:
    # tar files: paths, `x-{000..010}.tar`, globs
    shards: list[str] = field(default_factory=list)
    # where the caption lies, tried in order: an extension, or json:field
    caption_keys: list[str] = field(default_factory=lambda: ["txt", "json:caption"])
    # a random part of the longer side; false: the centre
    random_crop: bool = True
    # probability of a left-right flip
    flip_probability: float = 0.5
    # pixels; an image whose longer side is shorter is skipped. 0: keep all
    min_longer_side: int = 0
    # longer / shorter side; an image above it is skipped. 0: no limit
    max_aspect_ratio: float = 0.0
    # RGB, 0..255, what lies behind transparent pixels
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    # samples; each worker shuffles within blocks of so many and holds one in memory as file bytes. 1: in order
    shuffle_buffer: int = 2000
    # worker processes per rank; 0: read in the training process
    num_workers: int = 4

    def validate(self) -> None:
        """ValueError naming the field, the value and what is expected. Whether the files exist is not looked at."""
        expected = {
            "shards": (bool(self.shards), "at least one path or pattern"),
            "flip_probability": (0 <= self.flip_probability <= 1, "0..1"),
            "min_longer_side": (self.min_longer_side >= 0, "pixels >= 0"),
            "max_aspect_ratio": (self.max_aspect_ratio == 0 or self.max_aspect_ratio >= 1, "0 (no limit) or >= 1"),
            "background": (
                len(self.background) == 3 and all(0 <= value <= 255 for value in self.background),
                "three values 0..255",
            ),
            "shuffle_buffer": (self.shuffle_buffer >= 0, "samples >= 0"),
            "num_workers": (self.num_workers >= 0, "processes >= 0"),
        }
        for name, (holds, meaning) in expected.items():
            if not holds:
                raise ValueError(f"{name}: given {getattr(self, name)!r}, expected {meaning}")
        check_caption_keys(self.caption_keys)


def build_image_loader(
    cfg: ImageTextConfig,
    image_size: int,
    tokenize: Tokenize | None,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """Endless shuffled batches of one rank; batch_size is per rank. See data.shards for order and resuming.

    "image": B x 3 x R x R uint8 in [0, 255]; "token_ids": B x L int64, absent if tokenize is None;
    "caption", "key": lists of str; "skipped": {reason: count} since the last batch of the same worker.
    """
    cfg.validate()
    decode = _decoder(cfg, image_size, cfg.random_crop, cfg.flip_probability)
    stream = ShardStream(
        expand_shards(cfg.shards),
        decode,
        ImageCollate(tokenize),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle_buffer=cfg.shuffle_buffer,
    )
    return build_loader(stream, cfg.num_workers, pin_memory)


def read_images(
    cfg: ImageTextConfig,
    image_size: int,
    tokenize: Tokenize | None,
    batch_size: int,
    shards: Sequence[str] | None = None,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass in order, centre crop, no flip, in this process; batches as above, the last one may be short.

    shards: patterns to read instead of cfg.shards, for example one rank's part. limit: samples at most.
    """
    cfg.validate()
    decode = _decoder(cfg, image_size, random_crop=False, flip_probability=0.0)
    paths = expand_shards(cfg.shards if shards is None else shards)
    return read_batches(paths, decode, ImageCollate(tokenize), batch_size, limit)


@dataclass(frozen=True)
class ImageDecode:
    """Raw sample -> {"image": 3 x R x R uint8, "caption", "key"}. BadSample: no caption, no usable image, filtered."""

    image_size: int
    caption_keys: tuple[str, ...]
    background: tuple[int, ...]
    min_longer_side: int
    max_aspect_ratio: float
    random_crop: bool
    flip_probability: float

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        caption = caption_of(sample, self.caption_keys)
        data = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
        if data is None:
            raise BadSample("image: missing")
        image = decode_image(data, self.background)
        shorter, longer = sorted(image.size)
        if longer < self.min_longer_side:
            raise BadSample("filter: min_longer_side")
        if self.max_aspect_ratio and longer > self.max_aspect_ratio * shorter:
            raise BadSample("filter: max_aspect_ratio")
        pixels = train_crop(image, self.image_size, rng, self.random_crop, self.flip_probability)
        return {"key": sample["__key__"], "caption": caption, "image": pixels}


def _decoder(cfg: ImageTextConfig, image_size: int, random_crop: bool, flip_probability: float) -> ImageDecode:
    if image_size < 1:
        raise ValueError(f"image_size: given {image_size}, expected pixels >= 1")
    return ImageDecode(
        image_size=image_size,
        caption_keys=tuple(cfg.caption_keys),
        background=tuple(cfg.background),
        min_longer_side=cfg.min_longer_side,
        max_aspect_ratio=cfg.max_aspect_ratio,
        random_crop=random_crop,
        flip_probability=flip_probability,
    )


@dataclass(frozen=True)
class ImageCollate:
    """Decoded samples -> batch; the tokenizer runs once per batch."""

    tokenize: Tokenize | None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.from_numpy(np.stack([sample["image"] for sample in samples]))  # B x 3 x R x R
        return {"image": images, **collate_text(samples, self.tokenize)}
