"""rFID, PSNR, SSIM and LPIPS of a trained image tokenizer over image folders or tar shards.

    python -m eval.reconstruction runs/demo assets/noto_emoji/heldout-000000.tar.gz
    accelerate launch --multi_gpu --num_processes 8 --module eval.reconstruction RUN DATA [DATA ...]

RUN is a stage-1 run folder, or an experiment with one; its EMA weights reconstruct from the posterior's mean. With text
guidance, the decoder gets an image's caption (from its shard, or a same-named .txt beside it), else the empty caption.
Images are cropped to the centre; reconstructions are clamped and rounded to 8 bits before every metric. A metric whose
weights are absent is null, with the reason. The images are split over the processes; one json has the protocol, too.
"""

import argparse
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from configs.cli import exit_on_error
from eval.images import RESIZE_RULE, ImageSet, list_images
from eval.inception import INCEPTION, INCEPTION_WIDTH, VGG16, InceptionFeatures
from eval.json_report import describe_file, device_name, package_versions
from eval.options import add_options, check_options
from eval.reconstruction_metrics import ReconstructionMetrics
from eval.reconstructor import Reconstructor, find_run, load_reconstructor, measure
from modeling.perceptual import LPIPS
from modeling.published import file_sha256
from training.checkpoint import EMA_FILE, read_state
from training.files import check_writable, write_json
from training.loading import fingerprint, load_newest, read_run_config
from training.pictures import caption_grid, pair_rows, save_png
from training.run import TIMEOUT_MINUTES

PICTURE_PAIRS = 16


def find_weights(args: argparse.Namespace, state: PartialState) -> dict[str, Path | None]:
    """Files of LPIPS' and rFID's networks by metric; None where there is none. One process a machine downloads."""
    with state.local_main_process_first():
        return {
            "lpips": VGG16.find(args.vgg_weights, args.download),
            "rfid": INCEPTION.find(args.inception_weights, args.download),
        }


def build_metrics(
    args: argparse.Namespace, files: dict[str, Path | None], device: torch.device
) -> ReconstructionMetrics:
    """The measures whose weights are there.

    Raises:
        ValueError: torch-fidelity is not installed, or a file holds other weights.
    """
    lpips = LPIPS(files["lpips"]).to(device) if files["lpips"] else None
    inception = (
        InceptionFeatures(files["rfid"], args.inception_precision).to(device)
        if files["rfid"]
        else None
    )
    return ReconstructionMetrics(lpips, inception, device)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="stage-1 run folder, or an experiment folder"
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="folder of images, or tar shards: paths, braces, globs",
    )
    parser.add_argument(
        "--output", type=Path, help="the json; default: reconstruction.json in the run folder"
    )
    parser.add_argument("--image-size", type=int, help="pixels; default: the run's")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the tokenizer"
    )
    parser.add_argument(
        "--vgg-weights", metavar="FILE", help="VGG16 of LPIPS; default: torch's cache"
    )
    parser.add_argument("--inception-precision", choices=("float32", "float64"), default="float32")
    parser.add_argument(
        "--save-images", type=Path, metavar="DIR", help="a picture of the first pairs goes there"
    )
    add_options(parser, 32, "images at a time and process")
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible values before anything is loaded."""
    check_options(args, image_size=1, limit=1)
    if args.save_images and args.save_images.is_file():
        raise ValueError(f"--save-images {args.save_images} is a file, expected a folder")


def main(args: argparse.Namespace) -> None:
    """Measure and write."""
    check_args(args)
    run = find_run(args.run)
    output = args.output or run / "reconstruction.json"
    check_writable(output)
    config = read_run_config(run)
    entries = list_images(args.data)[: args.limit]
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(minutes=TIMEOUT_MINUTES))
    torch.backends.cudnn.allow_tf32 = (
        False  # convolutions of float32 would be rounded to 10 bits on a GPU
    )
    files = find_weights(args, state)
    metrics = build_metrics(args, files, state.device)
    bf16 = args.precision == "bf16"
    reconstruct, checkpoint = load_newest(
        run, lambda: load_reconstructor(run, args.image_size, state.device, bf16)
    )
    model = describe_model(run, checkpoint, reconstruct)  # now: training may remove it
    size = reconstruct.tokenizer.config.image_size
    images = ImageSet(
        entries, size, tuple(config.data.captions.keys), tuple(config.data.background)
    )
    start = time.perf_counter()
    num_pairs = PICTURE_PAIRS if args.save_images else 0
    pairs, skipped = measure(
        images, reconstruct, metrics, args.batch_size, args.num_workers, state, num_pairs
    )
    totals = metrics.over_processes()
    pairs, skipped = (
        sorted(gather_object(pairs), key=lambda pair: pair[0]),
        sorted(gather_object(skipped)),
    )
    if not state.is_main_process:
        return
    values, counts = totals.results()
    seconds = time.perf_counter() - start
    report = {
        "metrics": values,
        "missing": explain_missing(values, files),
        **counts,
        "skipped_by_reason": dict(Counter(reason for _, reason in skipped)),
        "skipped": [{"image": name, "reason": reason} for name, reason in skipped],
        "protocol": describe_protocol(args, images, reconstruct),
        "model": model,
        "weights": {name: describe_file(file) for name, file in files.items() if file},
        "versions": package_versions(),
        "device": device_name(state.device),
        "num_processes": state.num_processes,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
    }
    write_json(report, output)
    print_summary(report, output)
    if pairs:  # none if the first images are unreadable
        save_pairs(pairs, args.save_images / "reconstructions.png")


def save_pairs(pairs: list[tuple], path: Path) -> None:
    """Picture: originals left, reconstructions right."""
    originals, reconstructions = (
        torch.stack([pair[column] for pair in pairs]).float() / 255 for column in (1, 2)
    )
    captions = [caption for *_, caption in pairs]
    save_png(caption_grid(pair_rows(originals, reconstructions), captions, columns=4), path)


def explain_missing(
    values: dict[str, float | None], files: dict[str, Path | None]
) -> dict[str, str]:
    """Why a metric is null."""
    reasons = {
        "psnr_db": "all reconstructions are identical to their images",
        "rfid": "it needs at least 2 images",
    }
    for name, published in (("lpips", VGG16), ("rfid", INCEPTION)):
        if files[name] is None:
            reasons[name] = f"{published.title}'s weights are absent: {published.ways_out}"
    return {name: reasons[name] for name, value in values.items() if value is None}


def describe_protocol(
    args: argparse.Namespace, images: ImageSet, reconstruct: Reconstructor
) -> dict[str, Any]:
    """What another code must do to get the same numbers."""
    return {
        "data": args.data,
        "limit": args.limit,
        "image_size": images.image_size,
        "crop": RESIZE_RULE,
        "background": list(images.background),
        "reconstruction": f"EMA weights, mean of the posterior, {args.precision}",
        "text_guidance": "each image's caption, else the empty caption"
        if reconstruct.tokenize
        else None,
        "caption_keys": list(images.caption_keys),
        "rounding": "reconstructions clamped to [0, 1] and rounded to uint8 before every metric; originals are uint8",
        "psnr": "of each image in RGB, mean over the images; identical pairs, which have none, are left out",
        "ssim": "of each image, mean; 11 x 11 Gaussian window, sigma 1.5, data range 1, mirrored borders",
        "lpips": "VGG16, linear heads 0.1, mean over the images",
        "rfid": "all originals against all reconstructions; InceptionV3 as in torch-fidelity (uint8, bilinear as in "
        f"TensorFlow 1), {INCEPTION_WIDTH} features in {args.inception_precision}, statistics in float64",
    }


def describe_model(run: Path, checkpoint: Path, reconstruct: Reconstructor) -> dict[str, Any]:
    """Which weights are measured."""
    text_encoder = reconstruct.text_encoder
    return {
        "run": str(run),
        "step": read_state(checkpoint)["step"],
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "tokenizer_fingerprint": fingerprint(reconstruct.tokenizer),
        "text_encoder_fingerprint": fingerprint(text_encoder) if text_encoder else None,
    }


def print_summary(report: dict[str, Any], path: Path) -> None:
    """What was found, in a few lines."""
    numbers = (
        f"{name} {value:.4f}" for name, value in report["metrics"].items() if value is not None
    )
    rate = f"{report['seconds']:.0f} s, {report['images_per_second']:.1f} images/s"
    print(f"{path}: {report['num_images']} images, {', '.join(numbers)} ({rate})")
    for name, reason in report["missing"].items():
        print(f"  no {name}: {reason}")
    for reason, count in report["skipped_by_reason"].items():
        print(f"  skipped {count}: {reason}")


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
