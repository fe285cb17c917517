"""Statistics of real images for eval/generation.py: made once, checked, used as `reference=[FILE.npz]`.

    python scripts/reference_stats.py coco.npz val2014 --image-size 256
    python scripts/reference_stats.py mjhq.npz mjhq30k_imgs --clean --keep-features
    python scripts/reference_stats.py coco.npz val2014 --check

DATA are folders of images or tar shards. The file says what it is of: features and their weights, image size, resize
rule, a hash over the pixels after it. --clean resizes as clean-fid does, for protocols with `resize: clean`; the folder
of each image is kept beside its features, as its category. --check reads a file and says so; with DATA it measures them
again and compares.
"""

import argparse
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

from configs.cli import exit_on_error, printable
from eval.features import Extractor, inception_extractor, inception_reason, measure_images
from eval.frechet import Gaussian, frechet_distance, load_features, load_statistics, save_statistics
from eval.images import CLEAN_RULE, CLEAN_SIZE, ResizeRule
from eval.inception import INCEPTION
from eval.options import add_options, check_options
from eval.reference import categories_of, check_features, describe_images, list_reference
from training.files import check_writable
from training.run import TIMEOUT_MINUTES

TOLERANCE = 1e-3  # of the distance between a file and its images measured again, as a share of the covariance's trace


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.npz")
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="folder of images, or tar shards: paths, braces, globs",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="pixels of the square that an image is resized and cropped to",
    )
    parser.add_argument(
        "--clean", action="store_true", help="clean-fid's rule instead: the whole image to 299 px"
    )
    parser.add_argument(
        "--background", type=int, nargs=3, default=[255] * 3, help="RGB behind transparent pixels"
    )
    parser.add_argument(
        "--keep-features",
        action="store_true",
        help="8 kB an image: KID, precision, recall need them",
    )
    parser.add_argument("--check", action="store_true", help="read FILE instead of writing it")
    parser.add_argument("--inception-precision", choices=("float32", "float64"), default="float32")
    add_options(parser, 64, "images that Inception sees at once")
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't be done before anything is read."""
    if not args.check and not args.data:
        raise ValueError("DATA is missing: a folder of images, or tar shards")
    if args.clean and args.image_size:
        raise ValueError("--clean always resizes to 299 px: leave --image-size out")
    if not (args.check or args.image_size or args.clean):
        raise ValueError(
            "--image-size is missing: the pixels at which generated images will be compared (or --clean)"
        )
    check_options(args, image_size=1)
    if args.file.suffix != ".npz":
        raise ValueError(f"{args.file}: expected a name that ends in .npz")
    if not args.check:
        check_writable(args.file)


def build_extractor(args: argparse.Namespace, rule: ResizeRule, state: PartialState) -> Extractor:
    """Inception.

    Raises:
        ValueError: its weights are absent.
    """
    with state.local_main_process_first():
        weights = INCEPTION.find(args.inception_weights, args.download)
    if weights is None:
        raise ValueError(inception_reason())
    return inception_extractor(weights, args.inception_precision, state.device, rule)


def check(args: argparse.Namespace, state: PartialState) -> None:
    """Read a file, say what it is, and compare it with its images if they are given.

    Raises:
        ValueError: cut short, no covariance, or of other images.
    """
    gaussian, description = load_statistics(args.file)
    asymmetry = (gaussian.covariance - gaussian.covariance.T).abs().max()
    trace = gaussian.covariance.trace()
    lifted = gaussian.covariance + 1e-6 * trace.abs() * torch.eye(
        len(gaussian.mean), dtype=torch.float64
    )
    if (
        asymmetry > 1e-6 * trace.abs() or torch.linalg.cholesky_ex(lifted).info
    ):  # some eigenvalue is below 0
        raise ValueError(f"{args.file}: sigma is no covariance")
    kept = load_features(args.file)
    if args.data:
        compare(args, state, gaussian, description)
    if state.is_main_process:
        shown = {
            "num_images": gaussian.count,
            "width": len(gaussian.mean),
            "keeps_features": kept is not None,
        }
        print(json.dumps({**shown, **description}, indent=2))
        print(f"{args.file}: whole" + (", and of these images" if args.data else ""))


def compare(
    args: argparse.Namespace, state: PartialState, gaussian: Gaussian, description: dict
) -> None:
    """Measure the images again.

    Raises:
        ValueError: another hash, or another distribution.
    """
    rule: ResizeRule = "clean" if args.clean or description.get("resize") == CLEAN_RULE else "crop"
    size = CLEAN_SIZE if rule == "clean" else args.image_size or description.get("image_size")
    if size is None:
        raise ValueError(f"{args.file} does not say its image size: give --image-size, or --clean")
    extractor = build_extractor(args, rule, state)
    check_features(args.file, len(gaussian.mean), description, extractor)
    images = list_reference(args.data, size, description.get("background", args.background), rule)
    share = (state.process_index, state.num_processes)
    found = measure_images(
        images, extractor, False, args.batch_size, args.num_workers, state.device, share
    )
    if "images_sha256" in description:
        if description["images_sha256"] != found.images_sha256:
            raise ValueError(f"{args.file} is of other images: these hash to {found.images_sha256}")
        return
    distance = frechet_distance(gaussian, found.statistics.gaussian())
    if distance > TOLERANCE * gaussian.covariance.trace():
        raise ValueError(
            f"{args.file} is of other images or features: FID {distance:.4g} to {' '.join(args.data)}"
        )


def make(args: argparse.Namespace, state: PartialState) -> None:
    """Measure and write."""
    rule: ResizeRule = "clean" if args.clean else "crop"
    images = list_reference(
        args.data, CLEAN_SIZE if args.clean else args.image_size, args.background, rule
    )
    extractor, share = (
        build_extractor(args, rule, state),
        (state.process_index, state.num_processes),
    )
    found = measure_images(
        images,
        extractor,
        args.keep_features,
        args.batch_size,
        args.num_workers,
        state.device,
        share,
    )
    if not state.is_main_process:
        return
    description = describe_images(args.data, images, extractor, found.images_sha256)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    categories = categories_of(images, found.numbers)
    save_statistics(args.file, found.statistics.gaussian(), description, found.features, categories)
    print(f"{args.file}: {len(found.numbers)} images of {images.image_size} px")
    for name, reason in found.skipped:
        print(printable(f"  skipped {name}: {reason}"))


def main(args: argparse.Namespace) -> None:
    """Make or check."""
    check_args(args)
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(minutes=TIMEOUT_MINUTES))
    torch.backends.cudnn.allow_tf32 = (
        False  # convolutions of float32 would be rounded to 10 bits on a GPU
    )
    (check if args.check else make)(args, state)


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
