"""FID and other numbers of the images that a trained run makes from captions, by a written protocol.

    python -m eval.generation runs/demo --protocol demo
    accelerate launch --multi_gpu --num_processes 8 --module eval.generation RUN --protocol coco30k \
        captions=[captions_val2014.json] reference=[coco.npz]
    python -m eval.generation RUN --protocol FILE.yaml --guidance 1,1.5,2,3 --steps 10,20,50

RUN is an experiment or its stage-3 run; EMA weights. A protocol is a YAML (eval/protocol.py); key=value changes it.
Image i is a function of (seed, i): the networks always see the same group_size images together, so that neither
--batch-size nor the number of processes changes a bit on the CPU (with equal threads). It costs up to group_size - 1
images that are made and dropped in the last group, and batches of group_size. An interrupted evaluation continues where
it was. Writes images, features and evaluation.json; with several values of guidance or steps a folder each and a table.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from einops import rearrange
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor

from configs.load import check_keys, exit_on_error, parse_overrides, read_yaml
from data.transforms import Picture, center_crop
from eval.features import Extractor, dinov2_extractor, inception_extractor, tokenizer_extractor
from eval.gallery import write_gallery
from eval.image_store import ImageStore
from eval.inception import INCEPTION
from eval.loading import fingerprint, load_pipeline, newest_checkpoint
from eval.pictures import caption_grid, save_png
from eval.protocol import Caption, Protocol, captions_hash, choose_captions, protocol_file
from eval.reference import Reference, is_statistics_file, list_reference, measure_reference, read_reference
from eval.report import describe_file, device_name, package_versions, write_json
from eval.scores import measure
from eval.sweep import write_sweep
from modeling.perceptual import file_sha256
from modeling.pipeline import SamplingConfig, TextToImage
from training.checkpoint import EMA_FILE
from training.run import TIMEOUT_MINUTES

REPORT, INPUTS = "evaluation.json", "inputs.json"
PICTURES = 64  # in the contact sheet and the gallery
PROGRESS_SECONDS = 10


@dataclass(frozen=True)
class Evaluation:
    """What all points of a sweep share."""

    protocol: Protocol
    captions: list[Caption]
    parts: TextToImage
    default: SamplingConfig  # the run's
    extractor: Extractor | None  # None: no weights, or no metric that needs features
    reference: Reference | None
    model: dict[str, Any]  # which weights
    weights: dict[str, Any]  # of the feature network
    args: argparse.Namespace
    state: PartialState

    @property
    def image_size(self) -> int:
        """Pixels of the images that features are taken of."""
        return self.protocol.image_size or self.parts.tokenizer.config.image_size


# ----------------------------------------------------------------------------------------------------------- inputs


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="experiment folder, or a stage-3 run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the protocol")
    parser.add_argument("--protocol", required=True, help="a YAML file, or a name: coco30k, mjhq30k, demo, geneval")
    parser.add_argument("--output", type=Path, help="folder; default: evaluation/PROTOCOL in RUN")
    parser.add_argument("--guidance", type=numbers(float), metavar="LIST", help="as in 1,1.5,2: one evaluation each")
    parser.add_argument("--steps", type=numbers(int), metavar="LIST", help="solver steps, as in 10,20,50")
    parser.add_argument("--batch-size", type=int, default=64, help="images that the feature network sees at once")
    parser.add_argument("--num-workers", type=int, default=2, help="processes of each that read reference images")
    parser.add_argument("--no-images", action="store_true", help="keep features only")
    parser.add_argument("--inception-weights", metavar="FILE", help="InceptionV3; default: torch's cache")
    parser.add_argument("--dinov2-weights", type=Path, metavar="FILE", help="ViT-L/14, for features=dinov2")
    parser.add_argument("--download", action="store_true", help="fetch absent weights into torch's cache")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_intermixed_args(arguments)


def numbers(kind: type) -> Callable[[str], list]:
    """A parser of numbers with commas between."""

    def parse(text: str) -> list:
        return [kind(word) for word in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible values before anything is loaded."""
    for name, smallest in (("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(args, name)}")
    for name in ("guidance", "steps"):
        values = getattr(args, name) or []
        if len({*values}) != len(values):
            raise ValueError(f"--{name} names a value twice: {values}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if args.output and args.output.is_file():
        raise ValueError(f"--output {args.output} is a file, expected a folder")


def load_protocol(name: str, overrides: list[str]) -> Protocol:
    """A protocol's YAML with what the command line changes.

    Raises:
        ValueError: no such file, an unknown key, a wrong type, or values that do not go together.
    """
    path = protocol_file(name)
    node, changes = read_yaml(path), parse_overrides(overrides)
    check_keys(node, Protocol, str(path))
    check_keys(changes, Protocol, "command line")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Protocol), node, changes))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", "") or ""
        raise ValueError(f"{path}: {key + ': ' if key else ''}{str(error).splitlines()[0]}") from error


def check_sources(protocol: Protocol, captions: list[Caption]) -> None:
    """Refuse captions that the metrics or the layout can't use."""
    if protocol.layout == "geneval" and not all(caption.record for caption in captions):
        raise ValueError("layout=geneval needs captions from a .jsonl: each image's row is its metadata")
    if "retrieval" in protocol.metrics and not all(caption.source for caption in captions):
        raise ValueError("metric retrieval needs captions from folders or shards: each belongs to an image there")
    if "retrieval" in protocol.metrics and (not protocol.reference or is_statistics_file(protocol.reference)):
        raise ValueError("metric retrieval needs a reference of folders or shards: each caption's own image is there")


def prepare(args: argparse.Namespace) -> Evaluation:
    """Read and check all inputs; what is wrong with them is said before an image is made.

    Raises:
        ValueError: anything wrong with them.
    """
    check_args(args)
    protocol = load_protocol(args.protocol, args.overrides)
    captions = choose_captions(protocol)
    check_sources(protocol, captions)
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(minutes=TIMEOUT_MINUTES))
    torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 would be rounded to 10 bits on a GPU
    parts, default = load_pipeline(args.run, state.device)
    for point in points(args, protocol):
        point.sampling(default)
    own_size = parts.tokenizer.config.image_size
    size = protocol.image_size or own_size
    if protocol.features == "tokenizer" and size != own_size:
        raise ValueError(f"features=tokenizer needs images of the tokenizer's {own_size} px, got image_size={size}")
    from_file = is_statistics_file(protocol.reference)
    images = None
    if protocol.reference and not from_file:
        images = list_reference(protocol.reference, size, protocol.background)
    with state.local_main_process_first():  # one process a machine downloads
        weights = find_weights(protocol, args)
    extractor, reference = build_extractor(protocol, parts, weights, state.device), None
    if from_file:
        reference = read_reference(Path(protocol.reference[0]), extractor, size)
    elif extractor and images:
        data = protocol.reference
        reference = measure_reference(data, images, extractor, args.batch_size, args.num_workers, state)
        check_retrieval(protocol, captions, reference)
    described = {protocol.features: describe_file(weights)} if weights else {}
    model = describe_model(args.run, parts)
    return Evaluation(protocol, captions, parts, default, extractor, reference, model, described, args, state)


def find_weights(protocol: Protocol, args: argparse.Namespace) -> Path | None:
    """The feature network's file if the protocol needs one and it is there.

    Raises:
        ValueError: a file that the command line names is not there.
    """
    if protocol.features == "tokenizer" or not protocol.metrics:
        return None
    if protocol.features == "inception":
        return INCEPTION.find(args.inception_weights, args.download)
    if args.dinov2_weights and not args.dinov2_weights.is_file():
        raise ValueError(f"--dinov2-weights: no file {args.dinov2_weights}")
    return args.dinov2_weights


def build_extractor(
    protocol: Protocol, parts: TextToImage, weights: Path | None, device: torch.device
) -> Extractor | None:
    """The protocol's features; None without weights, or without metrics."""
    if not protocol.metrics:
        return None
    if protocol.features == "tokenizer":
        return tokenizer_extractor(parts.tokenizer)
    if weights is None:
        return None
    if protocol.features == "dinov2":
        return dinov2_extractor(weights, device)
    return inception_extractor(weights, protocol.precision, device)


def check_retrieval(protocol: Protocol, captions: list[Caption], reference: Reference) -> None:
    """Refuse a caption whose image is not in the reference."""
    absent = [caption.source for caption in captions if caption.source not in reference.rows]
    if "retrieval" in protocol.metrics and absent:
        raise ValueError(
            f"metric retrieval: {len(absent)} captions are of images that the reference lacks, the first {absent[0]}"
        )


def describe_model(run: Path, parts: TextToImage) -> dict[str, Any]:
    """Which weights make the images."""
    checkpoint = newest_checkpoint(run / "flowtok" if (run / "flowtok").is_dir() else run)
    return {
        "checkpoint": checkpoint.name,
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "flow_fingerprint": fingerprint(parts.flow),
        "tokenizer_fingerprint": fingerprint(parts.tokenizer),
        "text_encoder_fingerprint": fingerprint(parts.text_encoder),
    }


def points(args: argparse.Namespace, protocol: Protocol) -> list[Protocol]:
    """The protocol at each guidance and number of steps of the command line."""
    guidances, steps = args.guidance or [protocol.guidance], args.steps or [protocol.steps]
    return [replace(protocol, guidance=guidance, steps=number) for number in steps for guidance in guidances]


# ---------------------------------------------------------------------------------------------------------- images


def claim_folder(folder: Path, inputs: dict[str, Any], is_main_process: bool) -> None:
    """Refuse a folder with images of other inputs; note the inputs in a new one. Every process calls it.

    Raises:
        ValueError: naming what differs.
    """
    file = folder / INPUTS
    if file.is_file():
        found = json.loads(file.read_text())
        differ = [key for key in inputs if found.get(key) != inputs[key]]
        if differ:
            raise ValueError(
                f"{folder} holds images of another evaluation ({', '.join(differ)} differ): choose another --output, "
                "or delete it"
            )
    elif is_main_process:
        write_json(inputs, file)


def inputs_of(evaluation: Evaluation, protocol: Protocol, sampling: SamplingConfig) -> dict[str, Any]:
    """All that the images depend on, as plain values."""
    names = ("images_per_caption", "seed", "group_size", "rounding", "autocast", "layout")
    return {
        "captions_sha256": captions_hash(evaluation.captions),
        "num_captions": len(evaluation.captions),
        **{name: getattr(protocol, name) for name in names},
        "sampling": asdict(sampling),
        "model": evaluation.model,
    }


def make_images(evaluation: Evaluation, store: ImageStore, sampling: SamplingConfig) -> tuple[int, float]:
    """Do this process's part of what is not done yet.

    Returns:
        (images made, seconds that making them took, without features and files).
    """
    state, made, seconds = evaluation.state, 0, 0.0
    own = range(state.process_index, store.num_groups, state.num_processes)
    at_once = max(1, evaluation.args.batch_size // store.protocol.group_size)
    start = told = time.perf_counter()
    for first in range(0, len(own), at_once):
        waiting = []
        for group in own[first : first + at_once]:
            if store.is_finished(group):
                continue
            images = store.read_images(group)
            if images is None:
                began = time.perf_counter()
                images = make_group(evaluation.parts, store, sampling, group)
                seconds += time.perf_counter() - began
                made += len(images)
                if store.keep_images:
                    store.write_images(group, images)
            waiting.append((group, images))
        measure_groups(evaluation, store, waiting)
        if state.is_main_process and time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            done = min(first + at_once, len(own)) / len(own)
            print(f"{done:.1%} of {store.num_images} images, {(told - start) * (1 / done - 1):.0f} s left", flush=True)
    return made, seconds


def make_group(parts: TextToImage, store: ImageStore, sampling: SamplingConfig, group: int) -> Tensor:
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


def measure_groups(evaluation: Evaluation, store: ImageStore, groups: list[tuple[int, Tensor]]) -> None:
    """Features of some groups' images, all at once, into their files."""
    if not (evaluation.extractor and groups):
        return
    images = resize(torch.cat([images for _, images in groups]), evaluation.image_size)
    features = evaluation.extractor.features(images.to(evaluation.state.device))
    for (group, _), part in zip(groups, features.split([len(images) for _, images in groups])):
        store.write_features(group, part)


def resize(images: Tensor, size: int) -> Tensor:
    """B x 3 x R x R uint8 -> B x 3 x size x size, by the rule that reference images are resized by."""
    if images.shape[-1] == size:
        return images
    arrays = rearrange(images, "b c h w -> b h w c").numpy()
    pictures = [Picture(Image.fromarray(array), *images.shape[:-3:-1]) for array in arrays]
    return torch.from_numpy(np.stack([center_crop(picture, size, "exact") for picture in pictures]))


# --------------------------------------------------------------------------------------------------------- program


def evaluate(evaluation: Evaluation, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Make and measure the images of one protocol into a folder; the report, {} on all processes but the main one."""
    state, started = evaluation.state, time.perf_counter()
    sampling = protocol.sampling(evaluation.default)
    name = f"{evaluation.extractor.name}-{evaluation.image_size}px" if evaluation.extractor else None
    store = ImageStore(folder, protocol, evaluation.captions, not evaluation.args.no_images, name)
    claim_folder(folder, inputs_of(evaluation, protocol, sampling), state.is_main_process)
    work = gather_object([make_images(evaluation, store, sampling)])  # also: all files are there from here on
    metrics, missing = measure(store, evaluation.extractor, evaluation.reference, state)
    if not state.is_main_process:
        return {}
    made, seconds = sum(images for images, _ in work), max(duration for _, duration in work)
    report = {
        "metrics": metrics,
        "missing": missing,
        "num_images": store.num_images,
        "protocol": asdict(protocol),
        "captions_sha256": captions_hash(evaluation.captions),
        "sampling": asdict(sampling),
        "image_size": evaluation.image_size,
        "reference": evaluation.reference.description if evaluation.reference else None,
        "model": evaluation.model,
        "weights": evaluation.weights,
        "versions": package_versions(),
        "device": device_name(state.device),
        "num_processes": state.num_processes,
        "num_threads": torch.get_num_threads(),
        "images_made": made,  # the others were there from an earlier call
        "images_per_second": round(made / seconds, 3) if made else None,  # text to pixels, all processes
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(report, folder / REPORT)
    if store.keep_images:
        write_pictures(store, report, sampling)
    print_summary(report, folder / REPORT)
    return report


def write_pictures(store: ImageStore, report: dict[str, Any], sampling: SamplingConfig) -> None:
    """samples.png and gallery.html of the first images."""
    shown = range(min(PICTURES, store.num_images))
    files, captions = [store.image_file(i) for i in shown], [store.caption(i).text for i in shown]
    groups = [store.read_images(group) for group in range(-(-len(shown) // store.protocol.group_size))]
    if any(group is None for group in groups):
        raise ValueError(f"{store.folder / 'images'} holds a damaged image among the first {len(shown)}: delete those")
    images = torch.cat(groups)[: len(shown)].float() / 255
    save_png(caption_grid(images, captions, columns=8), store.folder / "samples.png")
    settings = {**asdict(sampling), "seed": store.protocol.seed, "checkpoint": report["model"]["checkpoint"]}
    settings |= {name: value for name, value in report["metrics"].items() if value is not None}
    labels = [f"{number}: {caption}" for number, caption in zip(shown, captions)]
    pictures = [(file.read_bytes(), label) for file, label in zip(files, labels)]
    write_gallery(store.folder / "gallery.html", store.folder.name, pictures, settings)


def print_summary(report: dict[str, Any], path: Path) -> None:
    """What was found, in a few lines."""
    found = ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items() if value is not None)
    rate = f", {report['images_per_second']:.1f} images/s" if report["images_made"] else ""
    print(
        f"{path}: {report['num_images']} images, {report['images_made']} made now{rate}{': ' if found else ''}{found}"
    )
    for name, reason in report["missing"].items():
        print(f"  no {name}: {reason}")


def main(args: argparse.Namespace) -> None:
    """Evaluate each point."""
    evaluation = prepare(args)
    output = args.output or args.run / "evaluation" / Path(args.protocol).stem
    sweep = points(args, evaluation.protocol)
    reports = []
    for point in sweep:
        sampling = point.sampling(evaluation.default)
        name = f"guidance_{sampling.guidance:g}_steps_{sampling.steps}"
        reports.append(evaluate(evaluation, point, output / name if len(sweep) > 1 else output))
    if len(sweep) > 1 and evaluation.state.is_main_process:
        write_sweep(output, reports)


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
