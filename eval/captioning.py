"""Images -> captions with a loaded captioner: choosing the images, reading them, a contact sheet, a jsonl.

An image that cannot be read: one that was named itself is an error; in a folder or shard it is left out, told by name
and counted, since one broken file should not cost the captions of a whole folder.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.entries import Entry, clean_key
from eval.images import ImageSet, image_name, iterate_images, list_images
from modeling.pipeline import Captioner, SamplingConfig
from training.pictures import caption_grid

BACKGROUND = (255, 255, 255)  # RGB behind transparent pixels
SHARD_ENDINGS = (".tar", ".tar.gz")
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Captioned:
    """Images of a batch that could be read, and what could not."""

    index: list[int]  # of the entries
    images: Tensor  # B x 3 x R x R in [0, 1]
    captions: list[str]
    skipped: list[tuple[str, str]]  # (name, reason)


def list_pictures(names: Sequence[str]) -> list[Entry]:
    """Image files, images of folders (with sub-folders) and of shards, in the order given.

    Raises:
        ValueError: no such file, or a folder or shard without an image.
    """
    entries = []
    for name in names:
        if os.path.isdir(name) or name.endswith(SHARD_ENDINGS):
            entries += list_images([name])
        elif os.path.isfile(name):
            entries.append(Entry(clean_key(name), name, captions=[]))
        else:
            raise ValueError(f"{name} does not exist; expected an image, a folder or a tar shard")
    return entries


def choose_images(names: Sequence[str], number: int) -> list[Entry]:
    """So many images of folders and shards, evenly spaced; fewer if there are not so many."""
    entries = list_images(names)
    return [
        entries[i]
        for i in np.linspace(0, len(entries) - 1, min(number, len(entries))).round().astype(int)
    ]


def caption_images(
    parts: Captioner,
    entries: Sequence[Entry],
    sampling: SamplingConfig,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[Captioned]:
    """Captions batch by batch, in order.

    Raises:
        ValueError: an image that was named itself cannot be read.
    """
    images = ImageSet(entries, parts.tokenizer.config.image_size, (), BACKGROUND)
    named = {entry.path for entry in entries if entry.captions == []}
    for batch in iterate_images(images, batch_size, num_workers):
        for name, reason in batch["skipped"]:
            if name in named:
                raise ValueError(f"{name} cannot be captioned: {reason}")
        pixels = batch["image"].float() / 255
        captions = parts.captions(pixels, sampling) if len(pixels) else []
        yield Captioned(batch["index"], pixels, captions, batch["skipped"])


def caption_sheet(
    parts: Captioner, entries: Sequence[Entry], sampling: SamplingConfig
) -> Image.Image:
    """Contact sheet of a few images with their captions; unreadable ones are left out."""
    batches = list(caption_images(parts, entries, sampling, len(entries)))
    return sheet_of(
        [b.images for b in batches], [caption for b in batches for caption in b.captions]
    )


def sheet_of(images: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Contact sheet of batches of images, B x 3 x R x R in [0, 1] each, with their captions.

    Raises:
        ValueError: there is none.
    """
    if not captions:
        raise ValueError("no image could be read")
    pixels = torch.cat([batch for batch in images if len(batch)])
    return caption_grid(pixels, list(captions), min(SHEET_COLUMNS, len(captions)))


def write_captions(
    path: Path, entries: Sequence[Entry], batches: Iterable[Captioned]
) -> tuple[int, int]:
    """Stream {"image", "caption"} lines into a jsonl: aside, then renamed. Returns (captions, skipped images).

    Raises:
        ValueError: no image could be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, written, skipped = path.with_name(f"{path.name}.{os.getpid()}.tmp"), 0, 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for batch in batches:
                for index, caption in zip(batch.index, batch.captions, strict=True):
                    row = {"image": image_name(entries[index]), "caption": caption}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written, skipped = written + len(batch.captions), skipped + len(batch.skipped)
            file.flush()
            os.fsync(file.fileno())
        if not written:
            raise ValueError(f"none of {skipped} images could be read")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return written, skipped
