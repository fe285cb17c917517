"""Statistics of real images for eval/generation.py: made once, used as `reference=[FILE.npz]`.

    python scripts/reference_stats.py coco.npz val2014 --image-size 256
    python scripts/reference_stats.py mjhq.npz mjhq30k_imgs --clean --keep-features

DATA are folders of images or tar shards. The file says what it is of: features and their weights,
image size, resize rule, a hash over the resized pixels. --clean resizes as clean-fid does, for
protocols with `resize: clean`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from data.files import check_writable, integer, user_path
from eval.feature_nets import INCEPTION, InceptionFeatures
from eval.features import measure_reference
from eval.images import CLEAN_SIZE, ImageSet, Reading, list_images
from eval.programs import add_reading_options, add_weights_options, build_parser, start_processes
from training.errors import exit_on_error, printable


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("file", type=user_path, metavar="FILE.npz")
    add("data", nargs="+", metavar="DATA", help="folder of images, or tar shards")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--image-size", type=integer(1), help="side of the centre square, pixels")
    help_text = "clean-fid's rule instead: the whole image to 299 px"
    size.add_argument("--clean", action="store_true", help=help_text)
    help_text = "RGB behind transparent pixels"
    add("--background", type=integer(0, 255), nargs=3, default=[255] * 3, help=help_text)
    help_text = "8 kB an image: KID, precision and recall need them"
    add("--keep-features", action="store_true", help=help_text)
    add_reading_options(parser, 64, "images that Inception sees at once")
    add_weights_options(parser)
    args = parser.parse_args(arguments)
    if args.file.suffix != ".npz":
        parser.error(f"{args.file}: expected a name that ends in .npz")
    return args


def main(args: argparse.Namespace) -> None:
    # The images are listed, and the weights found, before anything is measured
    check_writable(args.file)
    rule = "clean" if args.clean else "crop"
    size = CLEAN_SIZE if args.clean else args.image_size
    images = ImageSet(list_images(args.data), size, (), tuple(args.background), rule)
    state = start_processes(args.device)
    with state.local_main_process_first():
        weights = INCEPTION.find(args.inception_weights, args.download)
    if weights is None:
        raise ValueError(INCEPTION.absence)

    net = InceptionFeatures(weights).to(state.device)
    reading = Reading(args.batch_size, args.num_workers, state)
    found = measure_reference(args.data, images, net, reading, args.keep_features)
    # Unreadable images are not in the statistics; a terminal must not obey their names
    if state.is_main_process:
        found.save(args.file)
        print(f"{args.file}: {found.gaussian.count} images of {size} px")
        for name, reason in found.skipped:
            print(printable(f"  skipped {name}: {reason}"))


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
