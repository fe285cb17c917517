"""Images -> captions by a loaded captioner; a contact sheet or a jsonl of them.

An unreadable image is an error if it was named itself; in a folder or shard it is left out, named
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
from data.files import write_text
from eval.images import ImageSet, image_name, iterate_images, list_images
from modeling.pipeline import Captioner, SamplingConfig
from training.pictures import caption_grid

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
    """Image files, images of folders (with sub-folders) and of shards, in the order given."""
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
    """`number` evenly spaced images of folders and shards, or all if there are fewer."""
    entries = list_images(names)
    chosen = np.linspace(0, len(entries) - 1, min(number, len(entries))).round().astype(int)
    return [entries[index] for index in chosen]


def caption_images(
    captioner: Captioner, entries: Sequence[Entry], sampling: SamplingConfig, batch_size: int
) -> Iterator[Captioned]:
    """Captions batch by batch, in order.

    Raises:
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
        yield Captioned(batch["index"], pixels, captions, batch["skipped"])


def caption_sheet(
    captioner: Captioner, entries: Sequence[Entry], sampling: SamplingConfig
) -> Image.Image:
    """Contact sheet of a few images with their captions; unreadable ones are left out."""
    [batch] = caption_images(captioner, entries, sampling, len(entries))
    return sheet_of([batch.images], batch.captions)


def sheet_of(images: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Contact sheet of batches of images, B x 3 x R x R in [0, 1] each, and all their captions."""
    if not captions:
        raise ValueError("no image could be read")
    pixels = torch.cat([batch for batch in images if len(batch)])
    return caption_grid(pixels, [*captions], min(SHEET_COLUMNS, len(captions)))


def write_captions(
    path: Path, entries: Sequence[Entry], batches: Iterable[Captioned]
) -> tuple[int, int]:
    """Lines {"image", "caption"} into a jsonl, atomically. Returns (captions, skipped images)."""
    lines, skipped = [], 0
    for batch in batches:
        skipped += len(batch.skipped)
        for index, caption in zip(batch.index, batch.captions, strict=True):
            row = {"image": image_name(entries[index]), "caption": caption}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        raise ValueError(f"none of {skipped} images could be read")
    write_text("".join(lines), path)
    return len(lines), skipped
