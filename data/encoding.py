"""Image shards as they are encoded: whole shards per worker, in order, with their text.

Each item of `build_encoding_loader` belongs to one shard; a shard's items come in order, shards of
different workers mixed. What a shard gives does not depend on the number of workers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.captions import Tokenize
from data.config import SourceConfig, open_sources
from data.images import ImageTextConfig, collate_images, decode_image
from data.samples import SampleCounter, SampleDraws
from data.shards import NoUsableSample, Source, read_batches
from data.transforms import IMAGE_KEYS
from data.workers import share_batch, start_worker

PREFETCH_BATCHES = 4  # that each worker keeps ready
LARGEST_MEMBER = 1 << 20  # bytes; longer ones are no text


@dataclass(frozen=True)
class CropAt:
    """In place of draws: a crop at a share 0..1 of the free pixels, no flip, first caption."""

    share: float
    flip: float = 1.0
    recaption: float = 1 - 1e-9  # only where all captions are re-captioned
    caption: float = 0.0
    window: float = 0.0

    @property
    def crop_x(self) -> float:
        """Along the width; SampleDraws.crop_x is below 1."""
        return min(self.share, 1 - 1e-9)

    crop_y = crop_x


def decode_views(
    config: ImageTextConfig,
    image_size: int,
    num_crops: int,
    source: SourceConfig,
    sample: dict[str, Any],
    draws: SampleDraws | None,
) -> dict[str, Any]:
    """Raw sample -> {"image": V x 3 x R x R uint8, "caption", "key", "members": bytes of its text}.

    num_crops: V; 1: the centre, more: evenly along the longer side, ends included.
    """
    places = [None]
    if num_crops > 1:
        places = [CropAt(i / (num_crops - 1)) for i in range(num_crops)]
    views = [decode_image(config, image_size, source, sample, place) for place in places]
    members = {name: data for name, data in sample.items() if is_text(name, data)}
    return views[0] | {"image": np.stack([view["image"] for view in views]), "members": members}


def is_text(extension: str, data: Any) -> bool:
    """Whether a member of a sample goes into the token shard beside the latents."""
    if extension.startswith("__") or extension.endswith("npy") or extension in IMAGE_KEYS:
        return False
    return len(data) <= LARGEST_MEMBER


def collate_views(tokenize: Tokenize | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of images, B x V x 3 x R x R, with the lists "key", "caption" and "members"."""
    members = [sample["members"] for sample in samples]
    return {"members": members, **collate_images(tokenize, samples)}


def encoding_sources(config: ImageTextConfig, image_size: int, num_crops: int) -> list[Source]:
    """One source per image shard of a config, in order, as its data set is decoded."""
    exact = replace(config, random_crop=True, flip_probability=0.0, resize="exact")
    sources = open_sources(config, partial(decode_views, exact, image_size, num_crops))
    return [replace(source, shards=(path,)) for source in sources for path in source.shards]


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
            skipped: Counter[str] = Counter()
            num_read = 0
            collate = partial(collate_views, self.tokenize)
            shard = [self.sources[index]]
            try:
                for batch in read_batches(shard, collate, self.batch_size, counter):
                    skipped.update(batch.pop("skipped"))
                    batch.pop("first_skipped", None)  # the shard's end tells
                    num_read += len(batch["key"])
                    yield {"shard": index, **batch}
            except NoUsableSample:  # all filtered: an empty token shard
                skipped.update(counter.take_skipped())
            yield {"shard": index, "end": ShardEnd(num_read, dict(skipped), counter.first)}


def build_encoding_loader(
    config: ImageTextConfig,
    sources: Sequence[Source],
    tokenize: Tokenize | None,
    batch_size: int,
    pin_memory: bool = False,
) -> DataLoader:
    """One pass over sources of one shard each, by at most as many workers; see EncodingReader."""
    workers = min(config.num_workers, len(sources))
    return DataLoader(
        EncodingReader(sources, tokenize, batch_size, config.max_bad_share),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=pin_memory,
        collate_fn=share_batch,
        worker_init_fn=start_worker,
    )
