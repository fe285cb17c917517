"""rFID, PSNR, SSIM and LPIPS of a trained image tokenizer over image folders or tar shards.

    python -m eval.reconstruction runs/demo assets/noto_emoji/heldout-000000.tar.gz
    accelerate launch --multi_gpu --num_processes 8 --module eval.reconstruction RUN DATA [DATA ...]

RUN is a stage-1 run folder, or an experiment with one; its EMA weights reconstruct from the
posterior's mean. The decoder gets an image's caption (from its shard, or a same-named .txt beside
it), or the empty caption. Images are cropped to the centre; reconstructions are clamped and rounded
to 8 bits before every metric. A metric whose weights are absent is null, with the reason. The
images are split over the processes; one json also has the protocol.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

# Run as a file, Python looks into eval/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import check_writable, write_json
from data.images import ImageTextConfig
from eval.feature_nets import INCEPTION, INCEPTION_WIDTH, VGG16, InceptionFeatures
from eval.images import RULES, ImageSet, Reading, list_images
from eval.programs import (
    add_reading_options,
    add_weights_options,
    build_parser,
    describe_environment,
    describe_file,
    integer,
    start_processes,
)
from eval.protocol import Precision
from eval.reconstruct import (
    ReconstructionMetrics,
    Reconstructor,
    load_reconstructor,
    measure_reconstructions,
)
from modeling.layers import fingerprint
from modeling.perceptual import LPIPS
from modeling.published import file_sha256
from training.checkpoint import EMA_FILE, read_state
from training.errors import exit_on_error
from training.loading import load_newest, read_section
from training.pictures import caption_grid, pair_rows, save_png

PICTURE_PAIRS = 16


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="stage-1 run folder, or an experiment folder"
    )
    help_text = "folder of images, or tar shards: paths, braces, globs"
    parser.add_argument("data", nargs="+", metavar="DATA", help=help_text)
    help_text = "the json; default: reconstruction.json in the run folder"
    parser.add_argument("--output", type=Path, help=help_text)
    parser.add_argument("--image-size", type=integer(1), help="pixels; default: the run's")
    parser.add_argument("--limit", type=integer(1), help="only the first images, so many")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the tokenizer"
    )
    help_text = "VGG16 of LPIPS; default: torch's cache"
    parser.add_argument("--vgg-weights", metavar="FILE", help=help_text)
    parser.add_argument("--inception-precision", choices=("float32", "float64"), default="float32")
    help_text = "folder for a picture of the first pairs"
    parser.add_argument("--save-images", type=Path, metavar="DIR", help=help_text)
    add_reading_options(parser, 32, "images at a time and process")
    add_weights_options(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Measure and write."""
    # What needs no network is checked first
    run = args.run / "tokenizer" if (args.run / "tokenizer").is_dir() else args.run
    output = args.output or run / "reconstruction.json"
    check_writable(output)
    if args.save_images:
        check_writable(args.save_images / "reconstructions.png")
    entries = list_images(args.data)[: args.limit]

    # The run's networks, then those that measure
    state = start_processes(args.device)
    bf16 = args.precision == "bf16"
    reconstruct, checkpoint = load_newest(
        run, lambda: load_reconstructor(run, args.image_size, state.device, bf16)
    )
    model = describe_model(run, checkpoint, reconstruct)
    files = find_weights(args, state)
    sums = build_metrics(files, args.inception_precision, state.device)

    # The images, shared by the processes
    size = reconstruct.tokenizer.config.image_size
    data = read_section(run, "data", ImageTextConfig)
    images = ImageSet(entries, size, tuple(data.captions.keys), tuple(data.background))
    start = time.perf_counter()
    reading = Reading(args.batch_size, args.num_workers, state)
    num_pairs = PICTURE_PAIRS if args.save_images else 0
    pairs, skipped = measure_reconstructions(images, reconstruct, sums, reading, num_pairs)
    sums = sums.over_processes()
    pairs = sorted(gather_object(pairs), key=lambda pair: pair[0])
    skipped = sorted(gather_object(skipped))
    if not state.is_main_process:
        return

    # The report
    values, counts = sums.results()
    seconds = time.perf_counter() - start
    report = {
        "metrics": values,
        "missing": explain_missing(values, files),
        **counts,
        "skipped_by_reason": dict(Counter(reason for _, reason in skipped)),
        "skipped": [{"image": name, "reason": reason} for name, reason in skipped],
        "protocol": describe_protocol(args, images),
        "model": model,
        "weights": {name: describe_file(file) for name, file in files.items() if file},
        **describe_environment(state),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
    }
    write_json(report, output)
    print_summary(report, output)
    if pairs:  # none if the first images are unreadable
        save_pairs(pairs, args.save_images / "reconstructions.png")


def find_weights(args: argparse.Namespace, state: PartialState) -> dict[str, Path | None]:
    """Files of LPIPS' and rFID's networks, None where there is none; a process a machine downloads."""
    with state.local_main_process_first():
        return {
            "lpips": VGG16.find(args.vgg_weights, args.download),
            "rfid": INCEPTION.find(args.inception_weights, args.download),
        }


def build_metrics(
    files: dict[str, Path | None], precision: Precision, device: torch.device
) -> ReconstructionMetrics:
    """The metrics whose weights are there; precision: of Inception."""
    lpips, inception = None, None
    if files["lpips"]:
        lpips = LPIPS(files["lpips"]).to(device)
    if files["rfid"]:
        inception = InceptionFeatures(files["rfid"], precision).to(device)
    return ReconstructionMetrics(lpips, inception, device)


def save_pairs(pairs: list[tuple], path: Path) -> None:
    """Picture: originals left, reconstructions right."""
    _, originals, reconstructions, captions = zip(*pairs)
    rows = pair_rows(torch.stack(originals) / 255, torch.stack(reconstructions) / 255)
    save_png(caption_grid(rows, [*captions], columns=4), path)


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


def describe_protocol(args: argparse.Namespace, images: ImageSet) -> dict[str, Any]:
    """What another code must do to get the same numbers."""
    return {
        "data": args.data,
        "limit": args.limit,
        "image_size": images.image_size,
        "crop": RULES["crop"],
        "background": list(images.background),
        "reconstruction": f"EMA weights, mean of the posterior, {args.precision}",
        "text_guidance": "each image's caption, else the empty caption",
        "caption_keys": list(images.caption_keys),
        "rounding": "reconstructions clamped to [0, 1] and rounded to uint8 before every metric; "
        "originals are uint8",
        "psnr": "of each image in RGB, mean over the images; identical pairs, which have none, are "
        "left out",
        "ssim": "of each image, mean; 11 x 11 Gaussian window, sigma 1.5, data range 1, mirrored "
        "borders",
        "lpips": "VGG16, linear heads 0.1, mean over the images",
        "rfid": "all originals against all reconstructions; InceptionV3 as in torch-fidelity (uint8, "
        f"bilinear as in TensorFlow 1), {INCEPTION_WIDTH} features in {args.inception_precision}, "
        "statistics in float64",
    }


def describe_model(run: Path, checkpoint: Path, reconstruct: Reconstructor) -> dict[str, Any]:
    """Which weights are measured; read at once, because training may remove the checkpoint."""
    return {
        "run": str(run),
        "step": read_state(checkpoint)["step"],
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "tokenizer_fingerprint": fingerprint(reconstruct.tokenizer),
        "text_encoder_fingerprint": reconstruct.text_encoder.identity,
    }


def print_summary(report: dict[str, Any], path: Path) -> None:
    """A line of metrics, and one for each that is null and for each reason of skipped images."""
    metrics = {name: value for name, value in report["metrics"].items() if value is not None}
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    rate = f"{report['seconds']:.0f} s, {report['images_per_second']:.1f} images/s"
    print(f"{path}: {report['num_images']} images, {numbers} ({rate})")
    for name, reason in report["missing"].items():
        print(f"  no {name}: {reason}")
    for reason, count in report["skipped_by_reason"].items():
        print(f"  skipped {count}: {reason}")


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
