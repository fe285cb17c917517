"""One evaluation of generated images: a folder of images, of their features, and evaluation.json.

eval/generation.py runs it, as a program and while stage 3 trains. All processes take part; only the
main one writes the report. On several machines the folder must be one that all of them see.
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.entries import Entry
from data.files import load_json, write_bytes, write_json
from eval.feature_nets import Networks
from eval.features import BatchFn, FeatureSet, extract_features
from eval.images import ImageSet, Reading, iterate_images, to_bytes
from eval.programs import describe_environment
from eval.protocol import Caption, Protocol, captions_hash
from eval.scores import Measured, compute_scores
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.pictures import caption_grid, save_png, write_gallery

REPORT = "evaluation.json"
NUM_SHOWN = 64  # images of the contact sheet and the gallery
# The fields of a protocol that the images depend on, beside captions and sampling
IMAGE_FIELDS = ("images_per_caption", "seed", "group_size", "layout")


@dataclass(frozen=True)
class EvaluationSetup:
    """What the evaluations of a call share."""

    captions: list[Caption]
    generator: ImageGenerator
    default: SamplingConfig  # the run's
    model: dict[str, Any]  # which weights make the images
    networks: Networks  # those that measure
    reference: FeatureSet | None
    reading: Reading

    @property
    def image_size(self) -> int:
        return self.generator.tokenizer.config.image_size


def evaluate_images(setup: EvaluationSetup, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Generate and measure images; the report, {} on all processes but the main one."""
    state, started = setup.reading.state, time.perf_counter()
    sampling = protocol.sampling(setup.default)
    images = ImageFolder(folder / "images", protocol, setup.captions)
    claim_folder(folder, images, sampling, setup.model)
    # The images of all processes are there once their counts are
    work = gather_object([generate_images(setup.generator, images, sampling)])

    # The numbers, on the main process
    features = measure_features(setup, images, folder / "features")
    cosines = measure_cosines(setup, images, folder / "features")
    if not state.is_main_process:
        return {}
    each_caption = [images.caption(number) for number in range(len(images))]
    measured = Measured(protocol, each_caption, setup.networks, setup.reference, features, cosines)
    metrics, missing = compute_scores(measured)

    # The report, with all that the numbers depend on
    made = sum(count for count, _ in work)
    seconds = max(duration for _, duration in work)
    report = {
        "metrics": metrics,
        "missing": missing,
        "num_images": len(images),
        "protocol": asdict(protocol),
        "captions_sha256": captions_hash(setup.captions),
        "sampling": asdict(sampling),
        "image_size": protocol.feature_size(setup.image_size),
        "reference": setup.reference.description if setup.reference else None,
        "model": setup.model,
        "weights": setup.networks.weights,
        **describe_environment(state),
        "num_threads": torch.get_num_threads(),
        "images_made": made,  # the others are from an earlier call
        "images_per_second": round(made / seconds, 3) if made else None,  # of all processes
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(report, folder / REPORT)
    write_pictures(setup, images, report, folder)
    return report


# The images


@dataclass(frozen=True)
class ImageFolder:
    """Where the images of some captions lie. Image i is of caption i // images_per_caption."""

    path: Path
    protocol: Protocol
    captions: Sequence[Caption]

    def __len__(self) -> int:
        return len(self.captions) * self.protocol.images_per_caption

    def caption(self, number: int) -> Caption:
        return self.captions[number // self.protocol.images_per_caption]

    def file(self, number: int) -> Path:
        """000012.png; in GenEval's layout 00003/samples/0000.png."""
        if self.protocol.layout == "flat":
            return self.path / f"{number:06d}.png"
        caption, sample = divmod(number, self.protocol.images_per_caption)
        return self.path / f"{caption:05d}" / "samples" / f"{sample:04d}.png"

    def entries(self) -> list[Entry]:
        files = (str(self.file(number)) for number in range(len(self)))
        return [Entry(file, file, captions=[]) for file in files]

    def write(self, number: int, image: Tensor) -> None:
        """Save 3 x R x R uint8, in GenEval's layout with its caption's record beside it."""
        file = self.file(number)
        if self.protocol.layout == "geneval":
            record = json.dumps(self.caption(number).record) + "\n"
            write_bytes(record.encode(), file.parent.parent / "metadata.jsonl")
        save_png(Image.fromarray(rearrange(image, "c h w -> h w c").numpy()), file)


def claim_folder(
    folder: Path, images: ImageFolder, sampling: SamplingConfig, model: dict[str, Any]
) -> None:
    """Note a new folder's inputs; ValueError if it has images of others. Every process calls it."""
    inputs = {
        "captions_sha256": captions_hash(images.captions),
        "num_captions": len(images.captions),
        **{name: getattr(images.protocol, name) for name in IMAGE_FIELDS},
        "sampling": asdict(sampling),
        "model": model,
    }
    # Written before the first image: an image without it would be of unknown origin
    file = folder / "inputs.json"
    if not file.is_file():
        if PartialState().is_main_process:
            write_json(inputs, file)
        return
    # Images of other weights or captions must not be continued
    found = load_json(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged, so the images there are of no use: delete {folder}")
    differ = [key for key in inputs if found.get(key) != inputs[key]]
    if differ:
        raise ValueError(
            f"{folder} holds images of another evaluation ({', '.join(differ)} differ): choose "
            "another --output, or delete it"
        )


def generate_images(
    generator: ImageGenerator, images: ImageFolder, sampling: SamplingConfig
) -> tuple[int, float]:
    """Make this process's share of the absent images: (how many, seconds from text to pixels).

    FloatingPointError: an image is not finite.
    """
    # An image is a function of (seed, its number): the networks always see the same group_size
    # images together, so that neither the batch size nor the number of processes changes a bit on
    # the CPU (with equal threads). Groups are dealt out to the processes in turn
    state, protocol, made, seconds = PartialState(), images.protocol, 0, 0.0
    starts = range(0, len(images), protocol.group_size)
    own = starts[state.process_index :: state.num_processes]
    for start in tqdm(own, "images", disable=not state.is_main_process, delay=10, mininterval=10):
        numbers = range(len(images))[start : start + protocol.group_size]
        if all(images.file(number).is_file() for number in numbers):
            continue
        # The last group is padded, so that all have one size
        padded = [*numbers] + [numbers[-1]] * (protocol.group_size - len(numbers))
        captions = [images.caption(number).text for number in padded]
        # The clock stops before files are written
        began = time.perf_counter()
        pixels, _ = generator.generate(captions, sampling, protocol.seed, padded)
        what = f"one of the images {numbers[0]}..{numbers[-1]}"
        pixels = to_bytes(pixels, what)[: len(numbers)].cpu()
        seconds += time.perf_counter() - began
        made += len(numbers)
        for number, image in zip(numbers, pixels, strict=True):
            images.write(number, image)
    return made, seconds


# What is measured of them


def measure_features(setup: EvaluationSetup, images: ImageFolder, folder: Path) -> Tensor | None:
    """N x D of the feature network, on the main process; None without the network."""
    net = setup.networks.features
    if net is None:
        return None
    protocol = images.protocol
    device = setup.reading.state.device
    # The name says all that the numbers depend on
    size = protocol.feature_size(setup.image_size)
    parts = [str(part)[:12] for part in (*net.identity.values(), protocol.resize, f"{size}px")]
    shown = ImageSet(images.entries(), size, rule=protocol.resize)
    file = folder / f"{'-'.join(parts)}.npy"
    return measure_once(
        file, shown, lambda batch: net(batch["image"].to(device)), net.width, setup.reading
    )


def measure_cosines(setup: EvaluationSetup, images: ImageFolder, folder: Path) -> Tensor | None:
    """N x 1 of image and caption, on the main process; None without a CLIP."""
    clip = setup.networks.clip
    if clip is None:
        return None

    # At full size: CLIP has its own preprocessing
    def cosines(batch: dict[str, Any]) -> Tensor:
        captions = [images.caption(number).text for number in batch["index"]]
        return clip.cosines(batch["image"], captions)

    shown = ImageSet(images.entries(), setup.image_size)
    return measure_once(folder / f"clip-{clip.identity}.npy", shown, cosines, 1, setup.reading)


def measure_once(
    file: Path, images: ImageSet, extract: BatchFn, width: int, reading: Reading
) -> Tensor | None:
    """N x width of a set of images, kept in a file; every process calls it, the main one gets it.

    ValueError: naming damaged images, or a damaged file.
    """
    # One process's look counts: a file may appear between two looks
    state = reading.state
    [is_there] = broadcast_object_list([file.is_file()])
    if not is_there:
        _, rows, skipped = extract_features(images, extract, width, reading)
        refuse_damaged(skipped)
        # What was measured stays: another metric, or a sweep's next call, needs no network
        if state.is_main_process:
            buffer = io.BytesIO()
            np.save(buffer, np.stack([features for _, _, features in rows]))
            write_bytes(buffer.getbuffer(), file)
    if not state.is_main_process:
        return None
    try:
        numbers = torch.from_numpy(np.load(file, allow_pickle=False))
        if len(numbers) != len(images):
            raise ValueError(f"{len(numbers)} rows for {len(images)} images")
    except (EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to measure anew") from error
    return numbers.to(state.device)


def refuse_damaged(skipped: Sequence[tuple[str, str]]) -> None:
    """ValueError for generated images, (name, reason), that can't be read."""
    if skipped:
        names = ", ".join(name for name, _ in skipped[:3])
        raise ValueError(f"{len(skipped)} damaged images, delete them to make them anew: {names}")


def write_pictures(
    setup: EvaluationSetup, images: ImageFolder, report: dict[str, Any], folder: Path
) -> None:
    """samples.png and gallery.html of the first images."""
    entries = images.entries()[:NUM_SHOWN]
    captions = [images.caption(number).text for number in range(len(entries))]
    [batch] = iterate_images(ImageSet(entries, setup.image_size), NUM_SHOWN)
    refuse_damaged(batch["skipped"])
    save_png(caption_grid(batch["image"] / 255, captions, columns=8), folder / "samples.png")
    # The page holds its images, so that it can be sent
    settings = {**report["sampling"], "seed": images.protocol.seed}
    settings["checkpoint"] = report["model"]["checkpoint"]
    settings |= {name: value for name, value in report["metrics"].items() if value is not None}
    labels = [f"{number}: {caption}" for number, caption in enumerate(captions)]
    files = [Path(entry.path).read_bytes() for entry in entries]
    write_gallery(folder / "gallery.html", folder.name, zip(files, labels), settings)
