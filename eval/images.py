"""Images to measure on: folders and tar shards -> batches, every image once over all processes.

The data is listed before anything is read: an image's number depends on the data alone, and a broken shard stops an
evaluation before it starts. Process r of P reads the images r, r + P, ...: none twice, and none to fill a batch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.bad_samples import BadSample
from data.captions import captions_of
from data.entries import Entry, read_parts
from data.readers import image_bytes
from data.sources import folder_entries, tar_entries
from data.transforms import center_crop, load_picture, open_image

ResizeRule = Literal["crop", "clean"]
RESIZE_RULE = "shorter side resized to image_size (Pillow, bicubic, antialiased), centre square"
CLEAN_RULE = "clean-fid's: the whole image to 299 x 299 (Pillow, bicubic, antialiased, float32 channels), not rounded"
RULES = {"crop": RESIZE_RULE, "clean": CLEAN_RULE}
CLEAN_SIZE = 299  # pixels, Inception's own


def list_images(data: Sequence[str]) -> list[Entry]:
    """Images of folders (with sub-folders) and local tar shards (paths, braces, globs), in the order given.

    Raises:
        ValueError: no such folder or shard, a broken shard, no image, or an image that two of them name.
    """
    entries, seen = [], set()
    for name in data:
        for entry in folder_entries(name) if os.path.isdir(name) else tar_entries([name]):
            place = (os.path.abspath(entry.path), entry.span)
            if place in seen:
                raise ValueError(f"{image_name(entry)} is named twice by {' '.join(data)}")
            seen.add(place)
            entries.append(entry)
    return entries


def image_name(entry: Entry) -> str:
    """An image as messages call it: its file, or its shard and its key there."""
    return entry.path if entry.span is None else f"{entry.path}: {entry.key}"


@dataclass(frozen=True)
class ImageSet(Dataset):
    """Images by number: {"index", "image": 3 x R x R uint8, "caption"}, or {"index", "name", "reason"} if unreadable.

    Centre crop of R pixels, resized exactly (data/transforms.py), or what `clean_resize` gives. The caption is the
    first one under the first of `caption_keys` that has any, in the sample's members or in files beside the image; ""
    without one.
    """

    entries: Sequence[Entry]
    image_size: int
    caption_keys: tuple[str, ...]
    background: tuple[int, ...]  # RGB, 0..255, behind transparent pixels
    rule: ResizeRule = "crop"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"index": index, **self._read(self.entries[index])}
        except BadSample as error:
            reason = error.reason
        except OSError as error:
            reason = f"image: unreadable ({type(error).__name__})"
        return {"index": index, "name": image_name(self.entries[index]), "reason": reason}

    def _read(self, entry: Entry) -> dict[str, Any]:
        parts = read_parts(entry)
        picture = load_picture(open_image(image_bytes(parts)), self.background)
        if self.rule == "clean":
            pixels = clean_resize(np.asarray(picture.image))
        else:
            pixels = center_crop(picture, self.image_size, "exact")
        return {"image": pixels, "caption": next(iter(captions_of(parts, self.caption_keys)), "")}


def clean_resize(image: np.ndarray) -> np.ndarray:
    """H x W x 3 uint8 -> 3 x 299 x 299 float32 in [0, 255], as clean-fid resizes (Parmar et al. 2022, mode "clean").

    Each channel by Pillow in float32, bicubic and antialiased, whatever the aspect; cut to the range, not rounded.
    """
    channels = [Image.fromarray(image[:, :, channel].astype(np.float32)) for channel in range(3)]
    resized = [
        channel.resize((CLEAN_SIZE, CLEAN_SIZE), Image.Resampling.BICUBIC) for channel in channels
    ]
    return np.stack([np.asarray(channel) for channel in resized]).clip(0, 255)


def iterate_images(
    images: ImageSet, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """This process's images in order; the last batch may be short.

    "image": B x 3 x R x R uint8 (float32 by the rule "clean") in [0, 255]; "index": B numbers; "caption": B strings;
    "skipped": [(name, reason)] of the unreadable ones in between. B counts the readable ones and may be 0.
    """
    return iter(
        DataLoader(
            images,
            batch_size,
            sampler=range(rank, len(images), world_size),
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: no number is taken from the global one
        )
    )


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of an ImageSet -> a batch of `iterate_images`."""
    readable = [sample for sample in samples if "reason" not in sample]
    pixels = (
        np.stack([sample["image"] for sample in readable])
        if readable
        else np.empty((0, 3, 0, 0), np.uint8)
    )
    return {
        "image": torch.from_numpy(pixels),
        "index": [sample["index"] for sample in readable],
        "caption": [sample["caption"] for sample in readable],
        "skipped": [(sample["name"], sample["reason"]) for sample in samples if "reason" in sample],
    }
