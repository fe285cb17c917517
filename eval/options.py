"""Command-line options that the evaluations share, and their checks."""

import argparse
from collections.abc import Callable

import torch


def numbers(kind: type) -> Callable[[str], list]:
    """A parser of numbers with commas between."""

    def parse(text: str) -> list:
        return [kind(word) for word in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def add_options(parser: argparse.ArgumentParser, batch_size: int, batch_help: str) -> None:
    """Batches, reading processes, Inception's weights, device."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help=batch_help)
    parser.add_argument(
        "--num-workers", type=int, default=2, help="reading processes of each process; 0: none"
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="InceptionV3 of FID; default: torch's cache"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch absent weights into the packages' caches"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )


def check_options(args: argparse.Namespace, **smallest: int) -> None:
    """Refuse impossible values before anything is loaded.

    smallest: least value of further options; None is always allowed.
    """
    for name, least in {"batch_size": 1, "num_workers": 0, **smallest}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
