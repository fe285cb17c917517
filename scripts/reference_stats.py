"""Statistics of real images for eval/generation.py: made once, used as `reference=[FILE.npz]`.

    python scripts/reference_stats.py coco.npz val2014 --image-size 256
    python scripts/reference_stats.py mjhq.npz mjhq30k_imgs --clean --keep-features
    python scripts/reference_stats.py coco.npz val2014 --check

DATA are folders of images or tar shards. The file says what it is of: features and their weights,
image size, resize rule, a hash over the resized pixels. --clean resizes as clean-fid does, for
protocols with `resize: clean`; the folder of each image is kept beside its features, as its
category. --check reads a file and describes it; with DATA it also measures them again and compares.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

from data.files import check_writable, user_path
from eval.feature_nets import INCEPTION, InceptionFeatures, explain_absence
from eval.features import FeatureSet, check_features, frechet_distance, measure_reference
from eval.images import CLEAN_SIZE, RULES, ImageSet, Reading, list_images
from eval.programs import (
    add_reading_options,
    add_weights_options,
    build_parser,
    integer,
    start_processes,
)
from training.errors import exit_on_error, printable

TOLERANCE = (
    1e-3  # of the distance between a file and its images measured again, by the covariance's trace
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; refuses what can't go together."""
    parser = build_parser(__doc__)
    parser.add_argument("file", type=user_path, metavar="FILE.npz")
    help_text = "folder of images, or tar shards: paths, braces, globs"
    parser.add_argument("data", nargs="*", metavar="DATA", help=help_text)
    help_text = "pixels of the square that an image is resized and cropped to"
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--image-size", type=integer(1), help=help_text)
    help_text = "clean-fid's rule instead: the whole image to 299 px"
    size.add_argument("--clean", action="store_true", help=help_text)
    help_text = "RGB behind transparent pixels"
    parser.add_argument("--background", type=int, nargs=3, default=[255] * 3, help=help_text)
    help_text = "8 kB an image: KID, precision, recall and categories need them"
    parser.add_argument("--keep-features", action="store_true", help=help_text)
    parser.add_argument("--check", action="store_true", help="read FILE instead of writing it")
    add_reading_options(parser, 64, "images that Inception sees at once")
    add_weights_options(parser)
    args = parser.parse_args(arguments)
    if args.file.suffix != ".npz":
        parser.error(f"{args.file}: expected a name that ends in .npz")
    if not args.check and not args.data:
        parser.error("DATA is missing: a folder of images, or tar shards")
    if not (args.check or args.image_size or args.clean):
        parser.error("--image-size (at which images will be compared) or --clean is missing")
    return args


def main(args: argparse.Namespace) -> None:
    """Make or check."""
    if not args.check:
        check_writable(args.file)
    reading = Reading(args.batch_size, args.num_workers, start_processes(args.device))
    (check if args.check else make)(args, reading)


def make(args: argparse.Namespace, reading: Reading) -> None:
    """Measure and write."""
    found = measure(args, None, reading)
    if not reading.state.is_main_process:
        return
    found.save(args.file)
    size = found.description["image_size"]
    print(f"{args.file}: {found.gaussian.count} images of {size} px")
    for name, reason in found.skipped:
        print(printable(f"  skipped {name}: {reason}"))


def measure(args: argparse.Namespace, file: FeatureSet | None, reading: Reading) -> FeatureSet:
    """Features of DATA, resized as the file to compare with says, else as the command line says."""
    description = file.description if file else {}
    # How images are resized
    is_clean = args.clean or description.get("resize") == RULES["clean"]
    size = CLEAN_SIZE if is_clean else args.image_size or description.get("image_size")
    if size is None:
        raise ValueError(f"{args.file} does not say its image size: give --image-size, or --clean")
    background = tuple(description.get("background", args.background))
    rule = "clean" if is_clean else "crop"
    images = ImageSet(list_images(args.data), size, (), background, rule)
    # The network, which must be the file's
    with reading.state.local_main_process_first():
        weights = INCEPTION.find(args.inception_weights, args.download)
    if weights is None:
        raise ValueError(explain_absence(INCEPTION))
    net = InceptionFeatures(weights).to(reading.state.device)
    if file:
        check_features(args.file, file, net, images)
    return measure_reference(args.data, images, net, reading, args.keep_features)


def check(args: argparse.Namespace, reading: Reading) -> None:
    """Read a file, describe it, and compare it with its images if they are given.

    Raises:
        ValueError: truncated, no covariance, or of other images.
    """
    # A covariance is symmetric and has no negative eigenvalue
    file = FeatureSet.load(args.file)
    gaussian, trace = file.gaussian, file.gaussian.covariance.trace().abs()
    asymmetry = (gaussian.covariance - gaussian.covariance.T).abs().max()
    eigenvalues = torch.linalg.eigvalsh(gaussian.covariance)
    if asymmetry > 1e-6 * trace or eigenvalues.min() < -1e-6 * trace:
        raise ValueError(f"{args.file}: sigma is no covariance")
    # Its images, by their pixels; of another code's file, by the distance
    if args.data:
        found = measure(args, file, reading)
        expected = file.description.get("images_sha256")
        digest = found.description["images_sha256"]
        if expected and expected != digest:
            raise ValueError(f"{args.file} is of other images: these have the hash {digest}")
        distance = 0.0 if expected else frechet_distance(gaussian, found.gaussian)
        if distance > TOLERANCE * trace:
            raise ValueError(f"{args.file} is of other images or features: FID {distance:.4g}")
    if reading.state.is_main_process:
        shown = {"num_images": gaussian.count, "width": len(gaussian.mean)}
        shown["keeps_features"] = file.features is not None
        print(json.dumps({**shown, **file.description}, indent=2))
        print(f"{args.file}: whole" + (", and of these images" if args.data else ""))


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
