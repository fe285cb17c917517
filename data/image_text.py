"""Images with captions -> batches for the image tokenizer.

A sample is `{key}.jpg` (or another extension of IMAGE_KEYS) and a caption, as img2dataset and scripts/make_shards
write them:  000000012.jpg  000000012.txt  000000012.json
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from data.captions import CaptionChoice, Tokenize, collate_text
from data.draws import SampleDraws
from data.filters import SampleFilter
from data.mixture import ReaderConfig, SourceConfig, check_fields, check_metadata, open_sources
from data.shards import BadSample, ShardStream, build_loader, read_batches
from data.transforms import Resize, center_crop, load_picture, open_image, train_crop

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif")


@dataclass
class ImageTextConfig(ReaderConfig):
    """Image shards and how training sees them."""

    # a random part of the longer side; false: the centre
    random_crop: bool = True
    # probability of a left-right flip
    flip_probability: float = 0.5
    # how training makes images smaller, see data/transforms.py. Reading in order is exact unless it is asked otherwise.
    resize: Resize = "fast"
    # RGB, 0..255, what lies behind transparent pixels
    background: list[int] = field(default_factory=lambda: [255, 255, 255])

    def validate(self) -> None:
        """ValueError naming the field, the value and what is expected. Whether the files exist is not looked at."""
        super().validate()
        expected = {
            "flip_probability": (0 <= self.flip_probability <= 1, "0..1"),
            "resize": (self.resize in ("fast", "exact"), "fast or exact"),
            "background": (
                len(self.background) == 3 and all(0 <= value <= 255 for value in self.background),
                "three values 0..255",
            ),
        }
        check_fields(self, expected)


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
    sources = open_sources(cfg, partial(image_decoder, cfg, image_size, cfg.resize))
    stream = ShardStream(
        sources,
        ImageCollate(tokenize),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle_buffer=cfg.shuffle_buffer,
        max_bad_share=cfg.max_bad_share,
    )
    return build_loader(stream, cfg.num_workers, pin_memory)


def read_images(
    cfg: ImageTextConfig,
    image_size: int,
    tokenize: Tokenize | None,
    batch_size: int,
    shards: Sequence[str] | None = None,
    limit: int | None = None,
    resize: Resize = "exact",
) -> Iterator[dict[str, Any]]:
    """One pass in order, centre crop, no flip, first caption, in this process; batches as above, the last may be short.

    shards: patterns to read instead of the config's, for example one rank's part; with the captions and filters of the
    config itself, whatever its sources say. limit: samples at most.
    """
    sources = open_sources(cfg, partial(image_decoder, cfg, image_size, resize), shards)
    return read_batches(sources, ImageCollate(tokenize), batch_size, cfg.max_bad_share, limit)


@dataclass(frozen=True)
class ImageDecode:
    """Raw sample -> {"image": 3 x R x R uint8, "caption", "key"}. BadSample: no caption, no usable image, filtered."""

    image_size: int
    captions: CaptionChoice
    filters: SampleFilter
    background: tuple[int, ...]
    random_crop: bool
    flip_probability: float
    resize: Resize

    def __call__(self, sample: dict[str, Any], draws: SampleDraws | None) -> dict[str, Any]:
        caption = self.captions(sample, draws)
        check_metadata(self.filters, sample, caption)
        data = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
        if data is None:
            raise BadSample("image: missing")
        image = open_image(data)
        self.filters.check_size(*image.size)
        picture = load_picture(
            image, self.background, self.image_size if self.resize == "fast" else 0
        )
        if draws is None:
            pixels = center_crop(picture, self.image_size, self.resize)
        else:
            pixels = train_crop(
                picture,
                self.image_size,
                draws,
                self.random_crop,
                self.flip_probability,
                self.resize,
            )
        return {"key": sample["__key__"], "caption": caption, "image": pixels}


def image_decoder(
    cfg: ImageTextConfig, image_size: int, resize: Resize, source: SourceConfig
) -> ImageDecode:
    """How a config decodes the samples of one of its sources. ValueError: an impossible image_size."""
    if image_size < 1:
        raise ValueError(f"image_size: given {image_size}, expected pixels >= 1")
    return ImageDecode(
        image_size=image_size,
        captions=source.caption_choice(),
        filters=SampleFilter(source.filters),
        background=tuple(cfg.background),
        random_crop=cfg.random_crop,
        flip_probability=cfg.flip_probability,
        resize=resize,
    )


@dataclass(frozen=True)
class ImageCollate:
    """Decoded samples -> batch; the tokenizer runs once per batch."""

    tokenize: Tokenize | None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.from_numpy(
            np.stack([sample["image"] for sample in samples])
        )  # B x 3 x R x R
        return {"image": images, **collate_text(samples, self.tokenize)}
