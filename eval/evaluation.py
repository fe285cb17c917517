"""One evaluation of generated images: a folder of images, of their features, and evaluation.json.

The program eval/generation.py and the trainer of stage 3 (eval/during_training.py) both run it. All processes take
part; only the main one writes the report.
"""

import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from data.files import write_bytes, write_json
from eval.feature_nets import Networks, WeightsFiles, load_networks
from eval.features import Extracted, extract_features, load_reference
from eval.fid import FeatureSet
from eval.gallery import write_gallery
from eval.generate import ImageFolder, claim_folder, generate_images
from eval.images import ImageSet, Reading, iterate_images
from eval.programs import describe_environment
from eval.protocol import Caption, Protocol, captions_hash
from eval.scores import Measured, compute_scores
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.pictures import caption_grid, save_png

REPORT = "evaluation.json"
FEATURES = "features"  # folder
NUM_SHOWN = 64  # images of the contact sheet and the gallery


@dataclass(frozen=True)
class EvaluationSetup:
    """What the evaluations of a call share."""

    captions: list[Caption]
    generator: ImageGenerator
    default: SamplingConfig  # the run's
    model: dict[str, Any]  # which weights make the images
    networks: Networks
    reference: FeatureSet | None
    reading: Reading
    keep_images: bool  # False: only features stay in the folder

    @property
    def image_size(self) -> int:
        """Pixels of the generated images."""
        return self.generator.tokenizer.config.image_size


def prepare(
    protocol: Protocol,
    captions: list[Caption],
    generator: ImageGenerator,
    default: SamplingConfig,
    model: dict[str, Any],
    files: WeightsFiles,
    reading: Reading,
    keep_images: bool = True,
    reference: FeatureSet | None = None,
) -> EvaluationSetup:
    """Load the networks that a protocol's metrics need, and the reference unless it is given.

    Raises:
        ValueError: weights or a reference that can't serve.
    """
    tokenizer, tower = generator.tokenizer, generator.text_encoder.tokenize.config
    networks = load_networks(protocol, tokenizer, tower, files, reading.state)
    if reference is None:
        size = protocol.feature_size(tokenizer.config.image_size)
        reference = load_reference(protocol, captions, networks.features, size, reading)
    return EvaluationSetup(
        captions, generator, default, model, networks, reference, reading, keep_images
    )


def evaluate_images(setup: EvaluationSetup, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Generate and measure the images of a protocol; the report, {} on all processes but the main one."""
    state, started = setup.reading.state, time.perf_counter()
    sampling = protocol.sampling(setup.default)
    path = folder / ("images" if setup.keep_images else "scratch")
    images = ImageFolder(path, protocol, setup.captions)
    claim_folder(folder, images, sampling, setup.model, state)

    # Images are needed for themselves, or for features that no earlier call has left.
    files = feature_files(setup, images, folder / FEATURES)
    absent = [name for name, file in files.items() if not file.is_file()]
    [absent] = broadcast_object_list([absent])
    work = (0, 0.0)
    if setup.keep_images or absent:
        work = generate_images(setup.generator, images, sampling, state)
    work = gather_object([work])  # from here on the images of all processes are there
    for name in absent:
        found = (
            measure_features(setup, images)
            if name == "features"
            else measure_cosines(setup, images)
        )
        refuse_damaged(found.skipped)
        if state.is_main_process:
            write_array(found.features, files[name])
    if not state.is_main_process:
        return {}
    shutil.rmtree(folder / "scratch", ignore_errors=True)

    arrays = {name: read_array(file, len(images)) for name, file in files.items()}
    each = [images.caption(number) for number in range(len(images))]
    measured = Measured(protocol, each, setup.networks, setup.reference, **arrays)
    metrics, missing = compute_scores(measured)
    made, seconds = sum(count for count, _ in work), max(duration for _, duration in work)
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
    if setup.keep_images:
        write_pictures(setup, images, report, folder)
    return report


def feature_files(setup: EvaluationSetup, images: ImageFolder, folder: Path) -> dict[str, Path]:
    """Where "features" and "cosines" of all images are kept; the name says all that they depend on."""
    net, clip, protocol, files = setup.networks.features, setup.networks.clip, images.protocol, {}
    if net:
        size = f"{protocol.feature_size(setup.image_size)}px"
        parts = [str(part)[:12] for part in (*net.identity.values(), protocol.resize, size)]
        files["features"] = folder / f"{'-'.join(parts)}.npy"
    if clip:
        files["cosines"] = folder / f"clip-{clip.description['weights_fingerprint']}.npy"
    return files


def measure_features(setup: EvaluationSetup, images: ImageFolder) -> Extracted:
    """What the feature network gives of each image, N x D."""
    net, protocol, reading = setup.networks.features, images.protocol, setup.reading
    size = protocol.feature_size(setup.image_size)
    resized = ImageSet(images.entries(), size, rule=protocol.resize)
    return extract_features(
        resized, lambda batch: net(batch["image"].to(reading.state.device)), net.width, reading
    )


def measure_cosines(setup: EvaluationSetup, images: ImageFolder) -> Extracted:
    """Cosine of each image and its caption, N x 1."""

    def cosines(batch: dict[str, Any]) -> Tensor:
        captions = [images.caption(number).text for number in batch["index"]]
        return setup.networks.clip.cosines(batch["image"], captions)

    whole = ImageSet(images.entries(), setup.image_size)
    return extract_features(whole, cosines, 1, setup.reading)


def write_array(features: Tensor, file: Path) -> None:
    """N x D float32 into a .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    write_bytes(buffer.getbuffer(), file)


def read_array(file: Path, count: int) -> Tensor:
    """N x D float32 of `count` images; raises ValueError naming a damaged file."""
    try:
        features = torch.from_numpy(np.load(file, allow_pickle=False))
        if len(features) != count:
            raise ValueError(f"{len(features)} rows for {count} images")
        return features
    except (EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to measure anew") from error


def refuse_damaged(skipped: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError for generated images, (name, reason), that cannot be read."""
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
    settings = {**report["sampling"], "seed": images.protocol.seed}
    settings["checkpoint"] = report["model"]["checkpoint"]
    settings |= {name: value for name, value in report["metrics"].items() if value is not None}
    labels = [f"{number}: {caption}" for number, caption in enumerate(captions)]
    files = [Path(entry.path).read_bytes() for entry in entries]
    write_gallery(folder / "gallery.html", folder.name, zip(files, labels), settings)
