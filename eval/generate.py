"""Captions -> a folder of images, shared by all processes.

Image i is a function of (seed, i): the networks always see the same `group_size` consecutive images
together, so that neither the batch size nor the number of processes changes a bit on the CPU (with
equal threads). The last group is filled up with images that are dropped. Images that exist are not
made again. On several machines the folder must be one that all of them see.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.entries import Entry, load_json
from data.files import write_bytes, write_json
from eval.protocol import Caption, Protocol, captions_hash
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.pictures import encode_png

INPUTS = "inputs.json"
# what of a protocol the images depend on, beside the captions and the sampling
IMAGE_FIELDS = ("images_per_caption", "seed", "group_size", "rounding", "autocast", "layout")


@dataclass(frozen=True)
class ImageFolder:
    """Where the images of some captions lie. Image i is of caption i // images_per_caption."""

    path: Path
    protocol: Protocol
    captions: Sequence[Caption]

    def __len__(self) -> int:
        return len(self.captions) * self.protocol.images_per_caption

    def caption(self, number: int) -> Caption:
        """The caption of an image."""
        return self.captions[number // self.protocol.images_per_caption]

    def file(self, number: int) -> Path:
        """000012.png; in GenEval's layout 00003/samples/0000.png."""
        if self.protocol.layout == "flat":
            return self.path / f"{number:06d}.png"
        caption, sample = divmod(number, self.protocol.images_per_caption)
        return self.path / f"{caption:05d}" / "samples" / f"{sample:04d}.png"

    def entries(self) -> list[Entry]:
        """The images, to be read as a set of images."""
        files = (str(self.file(number)) for number in range(len(self)))
        return [Entry(file, file, captions=[]) for file in files]

    def write(self, number: int, image: Tensor) -> None:
        """3 x R x R uint8; beside it what the layout wants to know of its caption."""
        file = self.file(number)
        if self.protocol.layout == "geneval":
            record = json.dumps(self.caption(number).record) + "\n"
            write_bytes(record.encode(), file.parent.parent / "metadata.jsonl")
        write_bytes(encode_png(Image.fromarray(rearrange(image, "c h w -> h w c").numpy())), file)


def claim_folder(
    folder: Path,
    images: ImageFolder,
    sampling: SamplingConfig,
    model: dict[str, Any],
    state: PartialState,
) -> None:
    """Refuse a folder with images of other inputs; note the inputs in a new one.

    Every process calls it.

    Raises:
        ValueError: naming what differs.
    """
    inputs = {
        "captions_sha256": captions_hash(images.captions),
        "num_captions": len(images.captions),
        **{name: getattr(images.protocol, name) for name in IMAGE_FIELDS},
        "sampling": asdict(sampling),
        "model": model,
    }
    # An earlier call's, or the first
    file = folder / INPUTS
    if file.is_file():
        found = load_json(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(
                f"{file} is damaged, so the images there are of no use: delete {folder}"
            )
        differ = [key for key in inputs if found.get(key) != inputs[key]]
        if differ:
            raise ValueError(
                f"{folder} holds images of another evaluation ({', '.join(differ)} differ): choose "
                "another --output, or delete it"
            )
    elif state.is_main_process:
        write_json(inputs, file)


def generate_images(
    generator: ImageGenerator, images: ImageFolder, sampling: SamplingConfig, state: PartialState
) -> tuple[int, float]:
    """Make this process's share of the images that are not there.

    Returns:
        (images made, seconds from text to pixels).
    """
    # Groups are dealt out to the processes in turn
    made, seconds = 0, 0.0
    starts = range(0, len(images), images.protocol.group_size)
    own = starts[state.process_index :: state.num_processes]
    for start in tqdm(own, "images", disable=not state.is_main_process, delay=10, mininterval=10):
        numbers = range(len(images))[start : start + images.protocol.group_size]
        if all(images.file(number).is_file() for number in numbers):
            continue
        # The clock stops before files are written
        began = time.perf_counter()
        pixels = _generate_group(generator, images, sampling, numbers)
        seconds += time.perf_counter() - began
        made += len(numbers)
        for number, image in zip(numbers, pixels, strict=True):
            images.write(number, image)
    return made, seconds


def _generate_group(
    generator: ImageGenerator, images: ImageFolder, sampling: SamplingConfig, numbers: range
) -> Tensor:
    """B x 3 x R x R uint8 on the CPU; a FloatingPointError if one is not finite."""
    # The last group is filled up, so that all groups are of one size
    protocol = images.protocol
    padded = [*numbers] + [numbers[-1]] * (protocol.group_size - len(numbers))
    captions = [images.caption(number).text for number in padded]
    with torch.autocast(generator.device.type, torch.bfloat16, enabled=protocol.autocast):
        pixels, _ = generator.generate(captions, sampling, protocol.seed, padded)
    if not pixels.isfinite().all():
        raise FloatingPointError(f"one of the images {numbers[0]}..{numbers[-1]} is not finite")
    # [0, 1] -> bytes, without what filled up
    pixels = pixels[: len(numbers)] * 255
    if protocol.rounding == "round":
        pixels = pixels.round()
    return pixels.to(torch.uint8).cpu()
