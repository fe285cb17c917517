"""One evaluation of generated images: inputs read and checked, images made and measured into a folder, one json.

The program eval/generation.py and the trainer of stage 3 (eval/during_training.py) both run it. All processes take
part; only the main one writes reports.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eval.features import Extractor
from eval.gallery import write_gallery
from eval.image_store import ImageStore
from eval.images import CLEAN_SIZE, ImageSet
from eval.json_report import device_name, package_versions
from eval.making import claim_folder, inputs_of, make_images, measure_groups, measure_name
from eval.networks import MeasuringConfig, Networks
from eval.protocol import Caption, Protocol, captions_hash, choose_captions
from eval.reference import (
    Reference,
    is_statistics_file,
    list_reference,
    measure_reference,
    read_reference,
)
from eval.scores import measure
from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.files import write_json
from training.pictures import caption_grid, save_png

REPORT = "evaluation.json"
PICTURES = 64  # in the contact sheet and the gallery


@dataclass(frozen=True)
class Inputs:
    """What a protocol names, read and checked before any network is loaded."""

    protocol: Protocol
    captions: list[Caption]
    images: ImageSet | None  # reference images, listed; None: a statistics file, or no reference
    image_size: int  # pixels of the images that features are taken of


@dataclass(frozen=True)
class Evaluation:
    """What all points of a sweep share."""

    inputs: Inputs
    parts: ImageGenerator
    default: SamplingConfig  # the run's
    networks: Networks
    reference: Reference | None
    model: dict[str, Any]  # which weights make the images
    config: MeasuringConfig
    keep_images: bool
    state: PartialState


def read_captions(protocol: Protocol) -> list[Caption]:
    """The protocol's captions.

    Raises:
        ValueError: absent, not as many as it wants, or such that its metrics or its layout can't use them.
    """
    captions = choose_captions(protocol)
    check_sources(protocol, captions)
    return captions


def read_inputs(
    protocol: Protocol, captions: list[Caption], tokenizer: ImageTokenizerConfig
) -> Inputs:
    """Captions and the images of the reference, listed.

    Raises:
        ValueError: no such images, or a size that the features can't have.
    """
    own = tokenizer.image_size
    size = CLEAN_SIZE if protocol.resize == "clean" else protocol.image_size or own
    if protocol.features == "tokenizer" and size != own:
        raise ValueError(
            f"features=tokenizer needs images of the tokenizer's {own} px, got image_size={size}"
        )
    images = None
    if protocol.reference and not is_statistics_file(protocol.reference):
        images = list_reference(protocol.reference, size, protocol.background, protocol.resize)
    return Inputs(protocol, captions, images, size)


def check_sources(protocol: Protocol, captions: Sequence[Caption]) -> None:
    """Refuse captions that the metrics or the layout can't use."""
    if protocol.layout == "geneval" and not all(caption.record for caption in captions):
        raise ValueError(
            "layout=geneval needs captions from a .jsonl: each image's row is its metadata"
        )
    if "frechet_by_category" in protocol.metrics and not all(
        caption.category for caption in captions
    ):
        raise ValueError(
            "metric frechet_by_category needs captions with a category: MJHQ-30K's meta_data.json"
        )
    if "retrieval" in protocol.metrics and not all(caption.source for caption in captions):
        raise ValueError(
            "metric retrieval needs captions from folders or shards: each belongs to an image there"
        )
    if "retrieval" in protocol.metrics and (
        not protocol.reference or is_statistics_file(protocol.reference)
    ):
        raise ValueError(
            "metric retrieval needs a reference of folders or shards: each caption's own image is there"
        )


def load_reference(
    inputs: Inputs, extractor: Extractor | None, config: MeasuringConfig, state: PartialState
) -> Reference | None:
    """The protocol's statistics file, or its images read and measured by all processes; None without either.

    Raises:
        ValueError: it can't serve.
    """
    protocol = inputs.protocol
    if is_statistics_file(protocol.reference):
        reference = read_reference(Path(protocol.reference[0]), extractor, inputs.image_size)
    elif extractor and inputs.images:
        images, data = inputs.images, protocol.reference
        reference = measure_reference(
            data, images, extractor, config.batch_size, config.num_workers, state
        )
    else:
        return None
    check_reference(inputs, reference)
    return reference


def check_reference(inputs: Inputs, reference: Reference) -> None:
    """Refuse captions whose image or category is not in the reference."""
    wanted, metrics = inputs.captions, inputs.protocol.metrics
    absent = [caption.source for caption in wanted if caption.source not in reference.rows]
    if "retrieval" in metrics and absent:
        raise ValueError(
            f"metric retrieval: {len(absent)} captions are of images that the reference lacks, the first {absent[0]}"
        )
    if "retrieval" in metrics and len(reference.rows) < len(reference.groups):
        raise ValueError(
            "metric retrieval: two reference images of a shard have one name (a key that is there twice, or that "
            "differs in . + _ alone), so that a caption's own image is not known"
        )
    there = {*reference.categories}
    lost = (
        sorted({caption.category for caption in wanted} - there)
        if "frechet_by_category" in metrics
        else []
    )
    if there and lost:
        raise ValueError(
            f"metric frechet_by_category: no reference image lies in a folder {', '.join(lost)}; there are "
            f"{', '.join(sorted(there))}"
        )


def evaluate(evaluation: Evaluation, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Make and measure the images of one protocol into a folder; the report, {} on all processes but the main one."""
    state, networks, started = evaluation.state, evaluation.networks, time.perf_counter()
    inputs, sampling = evaluation.inputs, protocol.sampling(evaluation.default)
    measures = [measure_name(networks.extractor, inputs.image_size)] if networks.extractor else []
    measures += [networks.clip.name] if networks.clip else []
    store = ImageStore(folder, protocol, inputs.captions, evaluation.keep_images, tuple(measures))
    claim_folder(folder, inputs_of(store, sampling, evaluation.model), state.is_main_process)
    keep_features = partial(measure_groups, networks, store, inputs.image_size, state.device)
    made = make_images(
        evaluation.parts, store, sampling, keep_features, evaluation.config.batch_size, state
    )
    work = gather_object([made])  # also: all files are there from here on
    metrics, missing = measure(store, networks, inputs.image_size, evaluation.reference, state)
    if not state.is_main_process:
        return {}
    number, seconds = sum(images for images, _ in work), max(duration for _, duration in work)
    report = {
        "metrics": metrics,
        "missing": missing,
        "num_images": store.num_images,
        "protocol": asdict(protocol),
        "captions_sha256": captions_hash(inputs.captions),
        "sampling": asdict(sampling),
        "image_size": inputs.image_size,
        "reference": evaluation.reference.description if evaluation.reference else None,
        "model": evaluation.model,
        "weights": networks.weights,
        "versions": package_versions(),
        "device": device_name(state.device),
        "num_processes": state.num_processes,
        "num_threads": torch.get_num_threads(),
        "images_made": number,  # the others were there from an earlier call
        "images_per_second": round(number / seconds, 3)
        if number
        else None,  # text to pixels, all processes
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(report, folder / REPORT)
    if store.keep_images:
        write_pictures(store, report, sampling)
    return report


def write_pictures(store: ImageStore, report: dict[str, Any], sampling: SamplingConfig) -> None:
    """samples.png and gallery.html of the first images."""
    shown = range(min(PICTURES, store.num_images))
    files, captions = [store.image_file(i) for i in shown], [store.caption(i).text for i in shown]
    groups = [
        store.read_images(group) for group in range(-(-len(shown) // store.protocol.group_size))
    ]
    if any(group is None for group in groups):
        raise ValueError(
            f"{store.folder / 'images'} holds a damaged image among the first {len(shown)}: delete those"
        )
    images = torch.cat(groups)[: len(shown)].float() / 255
    save_png(caption_grid(images, captions, columns=8), store.folder / "samples.png")
    settings = {
        **asdict(sampling),
        "seed": store.protocol.seed,
        "checkpoint": report["model"]["checkpoint"],
    }
    settings |= {name: value for name, value in report["metrics"].items() if value is not None}
    labels = [f"{number}: {caption}" for number, caption in zip(shown, captions)]
    pictures = [(file.read_bytes(), label) for file, label in zip(files, labels)]
    write_gallery(store.folder / "gallery.html", store.folder.name, pictures, settings)
