"""One evaluation of generated images: a folder of images, of their features, and evaluation.json.

The program eval/generation.py and the trainer of stage 3 (eval/during_training.py) both run it. All
processes take part; only the main one writes the report.
"""

import io
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from data.files import write_bytes, write_json
from eval.feature_nets import Networks, WeightsFiles, load_networks
from eval.features import extract_features, load_reference
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


@dataclass
class EvaluationSetup:
    """What the evaluations of a call share; loads the networks that measure, and the reference.

    Raises:
        ValueError: weights or a reference that can't serve.
    """

    protocol: Protocol
    captions: list[Caption]
    generator: ImageGenerator
    default: SamplingConfig  # the run's
    model: dict[str, Any]  # which weights make the images
    files: WeightsFiles
    reading: Reading
    keep_images: bool = True  # False: only features stay in the folder
    reference: FeatureSet | None = None  # given if an earlier setup has loaded it
    networks: Networks = field(init=False)

    def __post_init__(self):
        tokenizer, tower = self.generator.tokenizer, self.generator.text_encoder.tokenize.config
        self.networks = load_networks(
            self.protocol, tokenizer, tower, self.files, self.reading.state
        )
        if self.reference is None:
            net, size = self.networks.features, self.feature_size
            self.reference = load_reference(self.protocol, self.captions, net, size, self.reading)

    @property
    def image_size(self) -> int:
        """Pixels of the generated images."""
        return self.generator.tokenizer.config.image_size

    @property
    def feature_size(self) -> int:
        """Pixels of the images that features are taken of."""
        return self.protocol.feature_size(self.image_size)


def evaluate_images(setup: EvaluationSetup, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Generate and measure images; the report, {} on all processes but the main one.

    Args:
        protocol: that of the setup, but for guidance and steps.
    """
    state, started = setup.reading.state, time.perf_counter()
    sampling = protocol.sampling(setup.default)
    path = folder / ("images" if setup.keep_images else "scratch")
    images = ImageFolder(path, protocol, setup.captions)
    claim_folder(folder, images, sampling, setup.model, state)

    # Images are needed for themselves, or for features that no earlier call has left.
    passes = {each.key: each for each in measuring_passes(setup, images, folder / FEATURES)}
    absent = [key for key, each in passes.items() if not each.file.is_file()]
    [absent] = broadcast_object_list([absent])
    work = (0, 0.0)
    if setup.keep_images or absent:
        work = generate_images(setup.generator, images, sampling, state)
    # From here on the images of all processes are there.
    work = gather_object([work])
    for key in absent:
        _, file, own, extract, width = passes[key]
        found = extract_features(own, extract, width, setup.reading)
        refuse_damaged(found.skipped)
        if state.is_main_process:
            write_array(found.features, file)
    if not state.is_main_process:
        return {}
    shutil.rmtree(folder / "scratch", ignore_errors=True)

    # The main process reads what all have measured.
    arrays = {
        key: read_array(each.file, len(images)).to(state.device) for key, each in passes.items()
    }
    each_caption = [images.caption(number) for number in range(len(images))]
    measured = Measured(protocol, each_caption, setup.networks, setup.reference, **arrays)
    metrics, missing = compute_scores(measured)
    made, seconds = sum(count for count, _ in work), max(duration for _, duration in work)
    report = {
        "metrics": metrics,
        "missing": missing,
        "num_images": len(images),
        "protocol": asdict(protocol),
        "captions_sha256": captions_hash(setup.captions),
        "sampling": asdict(sampling),
        "image_size": setup.feature_size,
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


class Pass(NamedTuple):
    """Something that is measured of all images: N x width numbers."""

    key: str
    file: Path  # its name says all that the numbers depend on
    images: ImageSet
    extract: Callable[[dict[str, Any]], Tensor]  # batch -> B x width
    width: int


def measuring_passes(setup: EvaluationSetup, images: ImageFolder, folder: Path) -> Iterator[Pass]:
    """The "features" and the "cosines" of image and caption, for those that are wanted."""
    net, clip = setup.networks.features, setup.networks.clip
    device, entries = setup.reading.state.device, images.entries()

    def cosines(batch: dict[str, Any]) -> Tensor:
        captions = [images.caption(number).text for number in batch["index"]]
        return clip.cosines(batch["image"], captions)

    if net:
        size, rule = setup.feature_size, images.protocol.resize
        parts = [str(part)[:12] for part in (*net.identity.values(), rule, f"{size}px")]
        file = folder / f"{'-'.join(parts)}.npy"
        resized = ImageSet(entries, size, rule=rule)
        yield Pass("features", file, resized, lambda x: net(x["image"].to(device)), net.width)
    if clip:
        file = folder / f"clip-{clip.description['weights_fingerprint']}.npy"
        yield Pass("cosines", file, ImageSet(entries, setup.image_size), cosines, 1)


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
