"""Images to measure or to caption: files, folders, tar shards -> batches of all processes.

The data is listed before anything is read: an image's number depends only on the data, and a broken
shard stops an evaluation before it starts.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.captions import captions_of
from data.entries import Entry, clean_key, read_parts
from data.images import image_bytes
from data.samples import BadSample
from data.sources import folder_entries, is_tar_name, tar_entries
from data.transforms import crop, load_picture, open_image
from data.workers import share_batch, start_worker
from modeling.pipeline import Captioner, SamplingConfig
from training.pictures import caption_grid
from training.run import TIMEOUT_MINUTES
from training.supervise import Watchdog, watched

ResizeRule = Literal["crop", "clean"]
RULES = {
    "crop": "shorter side resized to image_size (Pillow, bicubic, antialiased), centre square",
    "clean": "clean-fid's: the whole image to 299 x 299 (Pillow, bicubic, antialiased, float32 "
    "channels), not rounded",
}
CLEAN_SIZE = 299  # pixels, Inception's own
WHITE = (255, 255, 255)
SHEET_COLUMNS = 6
SILENCE = f"no batch of images for {TIMEOUT_MINUTES:g} minutes"

# What there is


def list_images(data: Sequence[str]) -> list[Entry]:
    """Images of folders (with sub-folders) and local tar shards (paths, braces, globs), in order.

    ValueError: no such folder or shard, a broken shard, no image, or an image named twice.
    """
    entries, seen = [], set()
    for name in map(os.path.expanduser, data):
        for entry in folder_entries(name) if os.path.isdir(name) else tar_entries([name]):
            if entry.fault is not None:  # other files of a folder
                continue
            # Twice in a reference, an image would count twice in its statistics
            place = (os.path.abspath(entry.path), entry.span)
            if place in seen:
                raise ValueError(f"{image_name(entry)} is named twice by {' '.join(data)}")
            seen.add(place)
            entries.append(entry)
    return entries


def list_pictures(names: Sequence[str]) -> list[Entry]:
    """Image files, images of folders (with sub-folders) and of shards, in the order given."""
    entries = []
    for name in map(os.path.expanduser, names):
        if os.path.isdir(name) or is_tar_name(name):
            entries += list_images([name])
        elif os.path.isfile(name):
            entries.append(Entry(clean_key(name), name, captions=[]))
        else:
            raise ValueError(f"{name} does not exist; expected an image, a folder or a tar shard")
    return entries


def choose_images(names: Sequence[str], number: int) -> list[Entry]:
    """`number` evenly spaced images of folders and shards, or all if there are fewer."""
    # Evenly, because neighbours in a shard are often alike
    entries = list_images(names)
    return [entries[index] for index in spread_evenly(len(entries), number)]


def spread_evenly(available: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced indices of so many, both ends included, or all if there are fewer."""
    return np.linspace(0, available - 1, min(wanted, available)).round().astype(int).tolist()


def image_name(entry: Entry) -> str:
    """What messages call an image: its file, or its shard and its key there."""
    return entry.path if entry.span is None else f"{entry.path}: {entry.key}"


def entry_captions(entry: Entry, keys: Sequence[str], option: str) -> list[str]:
    """All captions under the first of the keys that has any; ValueError if none has.

    option: where the keys are set, for the message.
    """
    # Metrics need a text for every image: here a broken caption is no reason to skip
    try:
        captions = captions_of(read_parts(entry), keys)
    except BadSample as error:
        raise ValueError(f"{image_name(entry)}: {error.reason}") from error
    if not captions:
        tried = ", ".join(keys)
        raise ValueError(f"{image_name(entry)} has no caption under {tried} ({option})")
    return captions


# Reading


@dataclass(frozen=True)
class ImageSet(Dataset):
    """Images by number: {"index", "image": 3 x R x R uint8, "caption"}.

    Of an unreadable image {"index", "name", "reason"}. Centre crop of R pixels, resized exactly
    (data/transforms.py), or what `clean_resize` gives. The caption is the first one under the first
    of `caption_keys` that has any, in the sample's members or in files beside the image; else "".
    """

    entries: Sequence[Entry]
    image_size: int
    caption_keys: tuple[str, ...] = ()
    background: tuple[int, ...] = WHITE  # RGB, 0..255, behind transparent pixels
    rule: ResizeRule = "crop"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        try:
            parts = read_parts(entry)
            picture = load_picture(open_image(image_bytes(parts)), self.background)
            if self.rule == "clean":
                pixels = clean_resize(np.asarray(picture.image))
            else:
                pixels = crop(picture, self.image_size, "exact")
            captions = captions_of(parts, self.caption_keys)
            return {"index": index, "image": pixels, "caption": next(iter(captions), "")}
        # Not raised: a worker's exception would end the whole evaluation
        except BadSample as error:
            reason = error.reason
        except OSError as error:
            reason = f"image: unreadable ({type(error).__name__})"
        return {"index": index, "name": image_name(entry), "reason": reason}


def clean_resize(image: np.ndarray) -> np.ndarray:
    """H x W x 3 uint8 -> 3 x 299 x 299 float32 in [0, 255], as clean-fid does in mode "clean".

    Parmar et al. 2022: each channel by Pillow in float32, bicubic and antialiased, whatever the
    aspect; clipped to the range, not rounded.
    """
    # Pillow resizes float32 one channel at a time; bytes it would round on the way
    channels = [Image.fromarray(image[:, :, channel].astype(np.float32)) for channel in range(3)]
    size = (CLEAN_SIZE, CLEAN_SIZE)
    resized = [channel.resize(size, Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized]).clip(0, 255)


@dataclass(frozen=True)
class Reading:
    """How the processes read sets of images."""

    batch_size: int
    num_workers: int  # reading processes of each process; 0: none
    state: PartialState


def iterate_images(
    images: ImageSet, batch_size: int, num_workers: int = 0, state: PartialState | None = None
) -> Iterator[dict[str, Any]]:
    """Images in order, with a state only this process's; the last batch may be short.

    "image": B x 3 x R x R uint8 (float32 by the rule "clean") in [0, 255]; "index": B numbers;
    "caption": B strings; "skipped": [(name, reason)] of unreadable images in between. B counts the
    readable ones and may be 0.

    Raises:
        ChildProcessError: a reading process died.
        ValueError: no room for a batch in shared memory.
    """
    # Process r of P reads the images r, r + P, ...: torch's own sampler would repeat some, so that
    # all processes get equally many
    rank, num_processes = (state.process_index, state.num_processes) if state else (0, 1)
    loader = DataLoader(
        images,
        batch_size,
        sampler=range(len(images))[rank::num_processes],
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that no number is taken from the global one
    )
    # A process that waits in vain for another's images must end, too
    with watched(loader) as batches, Watchdog(TIMEOUT_MINUTES, SILENCE) as watchdog:
        for batch in batches:
            yield batch
            watchdog.heartbeat()


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of an ImageSet -> a batch of iterate_images."""
    readable = [sample for sample in samples if "reason" not in sample]
    pixels = [sample["image"] for sample in readable]
    images = np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)
    batch = {
        "image": torch.from_numpy(images),
        "index": [sample["index"] for sample in readable],
        "caption": [sample["caption"] for sample in readable],
        "skipped": [(sample["name"], sample["reason"]) for sample in samples if "reason" in sample],
    }
    return share_batch(batch)


def to_bytes(pixels: Tensor, what: str) -> Tensor:
    """B x 3 x R x R in [0, 1] -> uint8, rounded; FloatingPointError, naming what it is of."""
    if not pixels.isfinite().all():
        raise FloatingPointError(f"{what} is not finite")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


# Captioning


def caption_images(
    captioner: Captioner, entries: Sequence[Entry], sampling: SamplingConfig, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Batches of iterate_images with images in [0, 1] and the captions that are read in them.

    ValueError: an image that was named itself cannot be read.
    """
    images = ImageSet(entries, captioner.tokenizer.config.image_size)
    # An image that was named itself comes with its captions known: none
    named = {entry.path for entry in entries if entry.captions == []}
    for batch in iterate_images(images, batch_size):
        for name, reason in batch["skipped"]:
            if name in named:
                raise ValueError(f"{name} cannot be captioned: {reason}")
        pixels = batch["image"].float() / 255
        captions = captioner.captions(pixels, sampling) if len(pixels) else []
        yield batch | {"image": pixels, "caption": captions}


def sheet_of(images: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Contact sheet of batches of images, B x 3 x R x R in [0, 1] each, and all their captions."""
    if not captions:
        raise ValueError("no image could be read")
    pixels = torch.cat([batch for batch in images if len(batch)])
    return caption_grid(pixels, [*captions], min(SHEET_COLUMNS, len(captions)))
