"""Image shards as they are encoded: whole shards per worker, in order, resized exactly, their text kept as it is.

Each item of `build_encoding_loader` belongs to one shard; a shard's items come in order, shards of different workers
mixed. What a shard gives does not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.captions import Tokenize, collate_text
from data.draws import SampleDraws
from data.image_text import IMAGE_KEYS, ImageDecode, ImageTextConfig, image_decoder
from data.mixture import SourceConfig, open_sources
from data.shards import NoUsableSample, Source, read_batches

PREFETCH_BATCHES = 4  # that each worker keeps ready
LARGEST_MEMBER = 1 << 20  # bytes; longer ones are no text


@dataclass(frozen=True)
class CropAt:
    """In place of random draws: a crop at a share 0..1 of the longer side's free pixels, not flipped, first caption."""

    share: float
    flip: float = 1.0
    recaption: float = 1 - 1e-9  # only where all captions are re-captioned
    caption: float = 0.0

    @property
    def crop_x(self) -> float:
        """Along the width; SampleDraws.crop_x is below 1."""
        return min(self.share, 1 - 1e-9)

    crop_y = crop_x


@dataclass(frozen=True)
class ViewDecode:
    """Raw sample -> {"image": V x 3 x R x R uint8, "caption", "key", "members": {extension: bytes} of its text}."""

    decode: ImageDecode
    num_crops: int  # V; 1: the centre, more: evenly along the longer side, ends included

    def __call__(self, sample: dict[str, Any], draws: SampleDraws | None) -> dict[str, Any]:
        if self.num_crops == 1:
            views = [self.decode(sample, None)]
        else:
            views = [
                self.decode(sample, CropAt(i / (self.num_crops - 1))) for i in range(self.num_crops)
            ]
        members = {name: data for name, data in sample.items() if is_text(name, data)}
        return views[0] | {"image": np.stack([view["image"] for view in views]), "members": members}


def is_text(extension: str, data: Any) -> bool:
    """Whether a member of a sample goes into the token shard beside the latents."""
    is_member = isinstance(data, bytes) and not extension.startswith("__")
    return (
        is_member
        and extension not in IMAGE_KEYS
        and not extension.endswith("npy")
        and len(data) <= LARGEST_MEMBER
    )


@dataclass(frozen=True)
class ViewCollate:
    """Decoded samples -> {"image": B x V x 3 x R x R uint8, "key", "caption", "members": lists, "token_ids": B x L}."""

    tokenize: Tokenize | None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.from_numpy(np.stack([sample["image"] for sample in samples]))
        members = [sample["members"] for sample in samples]
        return {"image": images, "members": members, **collate_text(samples, self.tokenize)}


def encoding_sources(config: ImageTextConfig, image_size: int, num_crops: int) -> list[Source]:
    """One source per image shard of a config, in order, with the captions and filters of its data set."""

    def decoder(source: SourceConfig) -> ViewDecode:
        decode = image_decoder(config, image_size, "exact", source)
        return ViewDecode(
            replace(decode, random_crop=num_crops > 1, flip_probability=0.0), num_crops
        )

    return [
        replace(source, shards=(path,))
        for source in open_sources(config, decoder)
        for path in source.shards
    ]


@dataclass
class EncodingReader(IterableDataset):
    """Items of this worker's shards: {"shard": index} and a batch's keys; after each shard {"shard", "end"}."""

    sources: Sequence[Source]
    tokenize: Tokenize | None
    batch_size: int
    max_bad_share: float

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(first, len(self.sources), step):
            skipped: dict[str, int] = {}
            source, collate = [self.sources[index]], ViewCollate(self.tokenize)
            try:
                for batch in read_batches(source, collate, self.batch_size, self.max_bad_share):
                    for reason, count in batch.pop("skipped").items():
                        skipped[reason] = skipped.get(reason, 0) + count
                    yield {"shard": index, **batch}
            except NoUsableSample as error:  # all filtered: an empty token shard
                skipped = error.skipped
            yield {"shard": index, "end": skipped}


def build_encoding_loader(
    config: ImageTextConfig,
    sources: Sequence[Source],
    tokenize: Tokenize | None,
    batch_size: int,
    pin_memory: bool = False,
) -> DataLoader:
    """One pass over sources of one shard each, see EncodingReader for its items. No more workers than shards."""
    workers = min(config.num_workers, len(sources))
    return DataLoader(
        EncodingReader(sources, tokenize, batch_size, config.max_bad_share),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if workers else None,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
