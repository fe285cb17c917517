"""Captions -> images and their features in an image store, each process its own groups; what is there is not repeated.

Image i is a function of (seed, i): the networks always see the same group_size images together, so that neither batch
size nor number of processes changes a bit on the CPU (with equal threads).
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image
from torch import Tensor

from data.entries import load_json
from data.transforms import Picture, center_crop
from eval.features import Extractor
from eval.image_store import ImageStore
from eval.images import clean_resize
from eval.networks import Networks
from eval.protocol import captions_hash
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.files import write_json

INPUTS = "inputs.json"
PROGRESS_SECONDS = 10


def claim_folder(folder: Path, inputs: dict[str, Any], is_main_process: bool) -> None:
    """Refuse a folder with images of other inputs; note the inputs in a new one. Every process calls it.

    Raises:
        ValueError: naming what differs.
    """
    file = folder / INPUTS
    if file.is_file():
        found = load_json(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(
                f"{file} is damaged, so that nobody knows what the images there are of: delete {folder}"
            )
        differ = [key for key in inputs if found.get(key) != inputs[key]]
        if differ:
            raise ValueError(
                f"{folder} holds images of another evaluation ({', '.join(differ)} differ): choose another --output, "
                "or delete it"
            )
    elif is_main_process:
        write_json(inputs, file)


def inputs_of(store: ImageStore, sampling: SamplingConfig, model: dict[str, Any]) -> dict[str, Any]:
    """All that the images depend on, as plain values."""
    names = ("images_per_caption", "seed", "group_size", "rounding", "autocast", "layout")
    return {
        "captions_sha256": captions_hash(store.captions),
        "num_captions": len(store.captions),
        **{name: getattr(store.protocol, name) for name in names},
        "sampling": asdict(sampling),
        "model": model,
    }


def make_images(
    parts: ImageGenerator,
    store: ImageStore,
    sampling: SamplingConfig,
    measure: Callable[[list[tuple[int, Tensor]]], None],
    batch_size: int,
    state: PartialState,
) -> tuple[int, float]:
    """Do this process's part of what is not done yet.

    Args:
        measure: takes (group, images) of about batch_size images and stores their features.

    Returns:
        (images made, seconds that making them took, without features and files).
    """
    made, seconds = 0, 0.0
    own = range(state.process_index, store.num_groups, state.num_processes)
    at_once = max(1, batch_size // store.protocol.group_size)
    start = told = time.perf_counter()
    for first in range(0, len(own), at_once):
        waiting = []
        for group in own[first : first + at_once]:
            if store.is_finished(group):
                continue
            images = store.read_images(group)
            if images is None:
                began = time.perf_counter()
                images = make_group(parts, store, sampling, group)
                seconds += time.perf_counter() - began
                made += len(images)
                if store.keep_images:
                    store.write_images(group, images)
            waiting.append((group, images))
        if waiting:
            measure(waiting)
        if state.is_main_process and time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            done = min(first + at_once, len(own)) / len(own)
            print(
                f"{done:.1%} of {store.num_images} images, {(told - start) * (1 / done - 1):.0f} s left",
                flush=True,
            )
    return made, seconds


def make_group(
    parts: ImageGenerator, store: ImageStore, sampling: SamplingConfig, group: int
) -> Tensor:
    """Images of a group, B x 3 x R x R uint8 on the CPU. The networks see group_size images, the last one repeated.

    Raises:
        FloatingPointError: an image is not finite.
    """
    numbers = store.numbers(group)
    padded = numbers + [numbers[-1]] * (store.protocol.group_size - len(numbers))
    captions = [store.caption(number).text for number in padded]
    with torch.autocast(parts.device.type, torch.bfloat16, enabled=store.protocol.autocast):
        images, _ = parts.generate(captions, sampling, store.protocol.seed, padded)
    if not images.isfinite().all():
        raise FloatingPointError(f"an image among {numbers[0]}..{numbers[-1]} is not finite")
    pixels = images[: len(numbers)] * 255
    return (pixels.round() if store.protocol.rounding == "round" else pixels).to(torch.uint8).cpu()


def measure_groups(
    networks: Networks,
    store: ImageStore,
    image_size: int,
    device: torch.device,
    groups: list[tuple[int, Tensor]],
) -> None:
    """Features and cosines of some groups' images, all at once, into their files."""
    images, sizes = (
        torch.cat([images for _, images in groups]),
        [len(images) for _, images in groups],
    )
    found = {}
    if networks.extractor:
        found[measure_name(networks.extractor, image_size)] = networks.extractor.features(
            resize(images, image_size, networks.extractor.rule).to(device)
        )
    if networks.clip:
        captions = [
            store.caption(number).text for group, _ in groups for number in store.numbers(group)
        ]
        found[networks.clip.name] = networks.clip.cosines(images, captions)
    for measure, values in found.items():
        for (group, _), part in zip(groups, values.split(sizes)):
            store.write_features(measure, group, part)


def measure_name(extractor: Extractor, image_size: int) -> str:
    """What an image store calls features of images of a size."""
    return f"{extractor.name}-{image_size}px"


def resize(images: Tensor, size: int, rule: str = "crop") -> Tensor:
    """B x 3 x R x R uint8 -> B x 3 x size x size, by the rule that reference images are resized by."""
    if images.shape[-1] == size and rule == "crop":
        return images
    arrays = rearrange(images, "b c h w -> b h w c").numpy()
    if rule == "clean":
        return torch.from_numpy(np.stack([clean_resize(array) for array in arrays]))
    pictures = [Picture(Image.fromarray(array), *images.shape[:-3:-1]) for array in arrays]
    return torch.from_numpy(np.stack([center_crop(picture, size, "exact") for picture in pictures]))
