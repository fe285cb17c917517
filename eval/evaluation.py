"""One evaluation of generated images: a folder of images, of their features, and evaluation.json.

The program eval/generation.py and the trainer of stage 3 (eval/during_training.py) both run it. All processes take
part; only the main one writes the report.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from eval.feature_nets import Networks
from eval.features import Reference, extract_features, read_features, write_features
from eval.gallery import write_gallery
from eval.generate import ImageFolder, claim_folder, generate_images
from eval.images import ImageSet, Reading, iterate_images
from eval.programs import describe_environment
from eval.protocol import Caption, Protocol, captions_hash
from eval.scores import Measured, compute_scores
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.files import write_json
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
    reference: Reference | None
    image_size: int  # pixels of the images that features are taken of
    reading: Reading
    keep_images: bool = True  # False: only features stay in the folder


def evaluate_images(setup: EvaluationSetup, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Generate and measure the images of a protocol; the report, {} on all processes but the main one."""
    state, started = setup.reading.state, time.perf_counter()
    sampling = protocol.sampling(setup.default)
    path = folder / ("images" if setup.keep_images else "scratch")
    images = ImageFolder(path, protocol, setup.captions)
    claim_folder(folder, images, sampling, setup.model, state)

    # Images are needed for themselves, or for features that no earlier call has left.
    passes = measuring_passes(setup, images, folder / FEATURES)
    absent = [name for name, (file, _) in passes.items() if not file.is_file()]
    [absent] = broadcast_object_list([absent])
    work = (0, 0.0)
    if setup.keep_images or absent:
        work = generate_images(setup.generator, images, sampling, state)
    work = gather_object([work])  # from here on the images of all processes are there
    for name in absent:
        file, measure = passes[name]
        found = measure()
        if state.is_main_process:
            write_features(found, file)
    if not state.is_main_process:
        return {}
    shutil.rmtree(folder / "scratch", ignore_errors=True)

    measured = Measured(
        protocol,
        [images.caption(number) for number in range(len(images))],
        setup.networks,
        setup.reference,
        **{name: read_features(file, len(images)) for name, (file, _) in passes.items()},
    )
    metrics, missing = compute_scores(measured)
    made, seconds = sum(count for count, _ in work), max(duration for _, duration in work)
    report = {
        "metrics": metrics,
        "missing": missing,
        "num_images": len(images),
        "protocol": asdict(protocol),
        "captions_sha256": captions_hash(setup.captions),
        "sampling": asdict(sampling),
        "image_size": setup.image_size,
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


def measuring_passes(
    setup: EvaluationSetup, images: ImageFolder, folder: Path
) -> dict[str, tuple[Path, Callable[[], Tensor]]]:
    """ "features" and "cosines" of all images: the file that keeps them, and what measures them on all processes."""
    net, clip, passes = setup.networks.features, setup.networks.clip, {}
    device, entries = setup.reading.state.device, images.entries()

    def measure_features() -> Tensor:
        resized = ImageSet(entries, setup.image_size, rule=images.protocol.resize)
        return read_all(resized, lambda batch: net(batch["image"].to(device)), net.width)

    def measure_cosines() -> Tensor:
        whole = ImageSet(entries, setup.generator.tokenizer.config.image_size)
        return read_all(whole, lambda batch: clip.cosines(batch["image"], captions(batch)), 1)

    def captions(batch: dict[str, Any]) -> list[str]:
        return [images.caption(number).text for number in batch["index"]]

    def read_all(own: ImageSet, extract: Callable[[dict], Tensor], width: int) -> Tensor:
        found = extract_features(own, extract, width, setup.reading)
        refuse_damaged(found.skipped)
        return found.features

    if net:
        # all that the features depend on is in the name
        parts = [*net.identity.values(), images.protocol.resize, f"{setup.image_size}px"]
        file = folder / f"{'-'.join(str(part)[:12] for part in parts)}.npy"
        passes["features"] = (file, measure_features)
    if clip:
        file = folder / f"clip-{clip.description['weights_fingerprint']}.npy"
        passes["cosines"] = (file, measure_cosines)
    return passes


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
    whole = ImageSet(entries, setup.generator.tokenizer.config.image_size)
    [batch] = iterate_images(whole, NUM_SHOWN)
    refuse_damaged(batch["skipped"])
    save_png(caption_grid(batch["image"] / 255, captions, columns=8), folder / "samples.png")
    settings = {**report["sampling"], "seed": images.protocol.seed}
    settings["checkpoint"] = report["model"]["checkpoint"]
    settings |= {name: value for name, value in report["metrics"].items() if value is not None}
    labels = [f"{number}: {caption}" for number, caption in enumerate(captions)]
    files = [Path(entry.path).read_bytes() for entry in entries]
    write_gallery(folder / "gallery.html", folder.name, zip(files, labels), settings)
