"""What evaluations share: options, start, a place beside training, environment, what is printed."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from data.files import check_writable, integer, load_json
from data.storage import is_remote
from modeling.layers import exact_products
from modeling.published import file_sha256
from training.run import TIMEOUT_MINUTES, refuse_engines

INSTALL = "pip install -r requirements-eval.txt"
PACKAGES = ["torch", "torchvision", "torch-fidelity", "lpips", "open_clip_torch"]
PACKAGES += ["numpy", "pillow", "accelerate"]

# Options


def different(kind: type) -> Callable[[str], list]:
    """An argparse type: numbers separated by commas, none twice."""

    def parse(text: str) -> list:
        values = [kind(word) for word in text.split(",")]
        if len({*values}) != len(values):
            raise argparse.ArgumentTypeError(f"{text} names a value twice")
        return values

    # What argparse calls it where a word is no number
    parse.__name__ = f"list of {kind.__name__}"
    return parse


def usable_device(text: str) -> torch.device:
    """An argparse type: a device that torch can use on this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # the latter: a torch built without CUDA
        reason = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r} here: {reason}") from None
    return torch.device(text)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the program's docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_text = "as in 1,1.5,2: one evaluation each"
    add("--guidance", type=different(float), metavar="LIST", help=help_text)
    add("--steps", type=different(int), metavar="LIST", help="solver steps, as in 10,20,50")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)


def add_reading_options(parser: argparse.ArgumentParser, batch_size: int, help_text: str) -> None:
    add = parser.add_argument
    add("--batch-size", type=integer(1), default=batch_size, help=help_text)
    add("--num-workers", type=integer(0), default=2, help="reading processes of each process")
    add_device_option(parser)


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Inception's weights, and whether absent weights may be downloaded."""
    add = parser.add_argument
    add("--inception-weights", metavar="FILE", help="InceptionV3 of FID; default: torch's cache")
    add("--download", action="store_true", help="fetch absent weights into the packages' caches")


# Before the work


def start_processes(device: str) -> PartialState:
    """Join the launcher's processes.

    ValueError: a GPU is wanted and there is none, or another engine than DDP.
    """
    refuse_engines()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    torch.backends.cudnn.allow_tf32 = False  # it rounds convolutions to 10 bits
    return PartialState(cpu=device == "cpu", timeout=timedelta(minutes=TIMEOUT_MINUTES))


def stage_run(run: Path, stage: str) -> Path:
    """The run of a stage if an experiment is named, else what is named."""
    return run / stage if (run / stage).is_dir() else run


def check_report(path: Path, data: list[str] | dict[str, list[str]]) -> None:
    """Refuse a path that can't be written, or has a report of other data, before the work."""
    check_writable(path)
    found = load_json(path.read_bytes()) if path.is_file() else None
    before = found.get("protocol") if isinstance(found, dict) else None
    if isinstance(before, dict) and located(before.get("data")) != located(data):
        raise ValueError(f"{path} has the numbers of other data: delete it, or write elsewhere")


def located(data: Any) -> Any:
    """Nested patterns, each from the root on: one folder has many relative names."""
    if isinstance(data, dict):
        return {name: located(patterns) for name, patterns in data.items()}
    if isinstance(data, list):
        return [located(pattern) for pattern in data]
    is_local = isinstance(data, str) and not is_remote(data)
    return os.path.abspath(data) if is_local else data


def check_same(run: Path, fingerprint: str) -> None:
    """Refuse processes that loaded different checkpoints, by the fingerprints of their networks."""
    if len({*gather_object([fingerprint])}) > 1:
        raise ValueError(
            f"{run} is being trained, and the processes loaded different checkpoints: start again"
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without touching training's random numbers, and without its lossy speed settings."""
    # A resumed run, or one without evaluations, must train the same bit for bit
    convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.random.fork_rng(devices=[]), convolutions, exact_products():
        yield


# Reports


def describe_environment(state: PartialState, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Versions (None: not installed), device and processes, on which a number can depend."""
    is_cuda = state.device.type == "cuda"
    return {
        "versions": {name: package_version(name) for name in [*PACKAGES, *packages]},
        "device": torch.cuda.get_device_name(state.device) if is_cuda else "cpu",
        "num_processes": state.num_processes,
    }


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_file(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": file_sha256(file)}


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells, the first line its head."""
    head, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def print_metrics(report: dict[str, Any], head: str, tail: str = "") -> None:
    """A line with the metrics that have a value, and one for each that is null."""
    metrics = {name: value for name, value in report["metrics"].items() if value is not None}
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{head}{': ' if values else ''}{values}{tail}")
    for name, reason in report["missing"].items():
        print(f"  no {name}: {reason}")
