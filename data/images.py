"""Image shards -> batches: as training crops, flips and resizes them, and as they are encoded.

A sample is `KEY.jpg`, or another extension of IMAGE_KEYS, with its captions (data/captions.py).

Encoding reads whole shards per worker, in order, with their text. Each item of
`build_encoding_loader` belongs to one shard; a shard's items come in order, shards of different
workers mixed. What a shard gives does not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.captions import Tokenize, collate_text
from data.config import ReaderConfig, SourceConfig, open_sources
from data.readers import Reader, take_caption
from data.samples import BadSample, SampleCounter, SampleDraws, check_fields
from data.shards import NoUsableSample, Source, read_batches
from data.transforms import (
    HEIF_KEYS,
    IMAGE_KEYS,
    Resize,
    crop,
    load_picture,
    open_image,
    train_crop,
)
from data.workers import share_batch, start_worker

ENCODING_PREFETCH = 4  # batches that each worker of the encoding keeps ready
LARGEST_MEMBER = 1 << 20  # bytes; longer ones are no text
ALMOST_ONE = 1 - 1e-9  # a place is below 1


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
        is_colour = len(self.background) == 3 and {*self.background} <= {*range(256)}
        check_fields(
            self,
            flip_probability=(0 <= self.flip_probability <= 1, "0..1"),
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
    decoded, image = open_sample(source, sample, draws)
    # in order: exact, the centre
    if draws is None:
        pixels = crop(load_picture(image, config.background), image_size, "exact")
        return decoded | {"image": pixels}
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


def open_sample(
    source: SourceConfig, sample: dict[str, Any], draws: SampleDraws | None
) -> tuple[dict[str, Any], Image]:
    """(take_caption's, the image, not decoded yet) of a raw sample; BadSample: it is dropped."""
    decoded = take_caption(source, sample, draws)
    image = open_image(image_bytes(sample))
    source.filters.check_size(*image.size)
    return decoded, image


def image_bytes(sample: dict[str, Any]) -> bytes:
    """The image file of a raw sample; BadSample: it has none."""
    data = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
    if data is None and any(key in sample for key in HEIF_KEYS):
        raise BadSample("image: HEIC needs the package pillow-heif")
    if data is None:
        raise BadSample("image: missing")
    return data


def collate_images(tokenize: Tokenize | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    images = np.stack([sample["image"] for sample in samples])  # B x 3 x R x R
    return {"image": torch.from_numpy(images), **collate_text(samples, tokenize)}


# ----------------------------------------------------------------------------------------- encoding


def encoding_sources(config: ImageTextConfig, image_size: int, num_crops: int) -> list[Source]:
    """One source per image shard of a config, in order, as its data set is decoded."""
    sources = open_sources(config, partial(decode_views, config.background, image_size, num_crops))
    return [replace(source, shards=(path,)) for source in sources for path in source.shards]


def decode_views(
    background: Sequence[int],
    image_size: int,
    num_crops: int,
    source: SourceConfig,
    sample: dict[str, Any],
    draws: None,
) -> dict[str, Any]:
    """Raw sample -> {"image": V x 3 x R x R uint8, "caption", "key", "members": bytes of its text}.

    num_crops: V; 1: the centre, more: evenly along the longer side, ends included.
    """
    decoded, image = open_sample(source, sample, draws)
    # one decoding for all views: it is most of the work
    picture = load_picture(image, background)
    places: list[tuple[float, float] | None] = [None]
    if num_crops > 1:
        shares = [min(i / (num_crops - 1), ALMOST_ONE) for i in range(num_crops)]
        places = [(share, share) for share in shares]
    views = [crop(picture, image_size, "exact", place) for place in places]
    members = {
        name: data
        for name, data in sample.items()
        if not name.startswith("__") and not name.endswith("npy") and name not in IMAGE_KEYS
        if len(data) <= LARGEST_MEMBER
    }
    return decoded | {"image": np.stack(views), "members": members}


def collate_views(tokenize: Tokenize | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of images, B x V x 3 x R x R, with the lists "key", "caption" and "members"."""
    members = [sample["members"] for sample in samples]
    return {"members": members, **collate_images(tokenize, samples)}


class ShardEnd(NamedTuple):
    """What was read of a shard: images, {reason: samples skipped} and {reason: the first one}."""

    num_images: int
    skipped: dict[str, int]
    first: dict[str, str]


@dataclass
class EncodingReader(IterableDataset):
    """Items of this worker's shards: {"shard": index} and a batch; after each {"shard", "end"}.

    "end": a ShardEnd.
    """

    sources: Sequence[Source]
    tokenize: Tokenize | None
    batch_size: int
    max_bad_share: float

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(first, len(self.sources), step):
            counter = SampleCounter(self.max_bad_share, self.sources[index].shards[0])
            collate = partial(collate_views, self.tokenize)
            shard = self.sources[index : index + 1]
            num_read = 0
            # all filtered: an empty token shard
            with suppress(NoUsableSample):
                for batch in read_batches(shard, collate, self.batch_size, counter):
                    num_read += len(batch["key"])
                    yield {"shard": index, **batch}
            yield {"shard": index, "end": ShardEnd(num_read, dict(counter.skipped), counter.first)}


def build_encoding_loader(
    config: ImageTextConfig,
    sources: Sequence[Source],
    tokenize: Tokenize | None,
    batch_size: int,
    pin_memory: bool = False,
) -> DataLoader:
    """One pass over sources of one shard each, by at most as many workers; see EncodingReader."""
    # a worker reads whole shards: more than there are would have nothing to do
    workers = min(config.num_workers, len(sources))
    return DataLoader(
        EncodingReader(sources, tokenize, batch_size, config.max_bad_share),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ENCODING_PREFETCH if workers else None,
        pin_memory=pin_memory,
        collate_fn=share_batch,
        worker_init_fn=start_worker,
    )
