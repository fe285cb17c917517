"""What every evaluation's json has beside its numbers: library versions, files by hash, the device."""

from importlib import metadata
from pathlib import Path

import torch

from modeling.published import file_sha256

PACKAGES = (
    "torch",
    "torchvision",
    "torch-fidelity",
    "lpips",
    "numpy",
    "pillow",
    "accelerate",
    "open_clip_torch",
)


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
