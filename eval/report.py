"""What every evaluation's json has beside its numbers: library versions, files by hash, the device; writing it."""

import json
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from modeling.published import file_sha256

PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "numpy", "pillow", "accelerate", "open_clip_torch")


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that a number can depend on; None for one that is not installed."""
    return {name: package_version(name) for name in PACKAGES}


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_file(file: Path) -> dict[str, str]:
    """Name and hash."""
    return {"file": file.name, "sha256": file_sha256(file)}


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold; nothing is left there.

    Raises:
        ValueError: it is a folder, or no file can be made where it is to be.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {folder}: {error.strerror}") from error


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write aside, flush and rename."""
    write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write aside, flush and rename; its folder is made. Processes may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
