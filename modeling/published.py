"""Weights that are published as files: at a path, or in torch's cache, downloaded to it if allowed.

A name that ends in the first digits of a SHA-256 (torch.hub's custom) is checked against it.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class PublishedWeights:
    """One such file."""

    title: str
    url: str
    option: str  # key or command-line option that names a path
    more: str = ""  # another way to get it

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps the file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name

    @property
    def absence(self) -> str:
        """What is not there, and what to do without it."""
        return f"{self.title}'s weights are absent: {self.ways_out}"

    @property
    def ways_out(self) -> str:
        return (
            f"fetch {self.url} and put it into {self.cached.parent} ($TORCH_HOME/hub/checkpoints) "
            f"or name it with {self.option}{self.more}"
        )

    def find(self, path: str | None, download: bool) -> Path | None:
        """The file at `path` or in torch's cache, downloaded to it if allowed; None if absent.

        Raises:
            ValueError: no file at `path`, a failed download, or a file that is not what its name
                says.
        """
        # A path that was given is never replaced by a download
        file = Path(path).expanduser() if path else self.cached
        if path and not file.is_file():
            raise ValueError(f"{self.option}: no file {file}; {self.ways_out}")
        # Hashing takes a second: only names that promise a hash are checked
        expected = hash_prefix(file)
        if not file.is_file() and download:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(file), hash_prefix=expected or None)
            except (OSError, RuntimeError) as error:  # no network, no disk, broken transfer
                raise ValueError(
                    f"{self.title} was not downloaded ({error}); {self.ways_out}"
                ) from error
        if not file.is_file():
            return None
        found = file_sha256(file) if expected else ""
        if not found.startswith(expected):
            named_by = f"{self.option}: " if path else ""
            raise ValueError(
                f"{named_by}{file} is damaged or another file: by its name, its SHA-256 starts "
                f"with {expected}, but it is {found}; {self.ways_out}"
            )
        return file


def hash_prefix(file: Path) -> str:
    """The digits of a SHA-256 that a file's name carries, or ""."""
    # As torchvision and torch-fidelity name their files: vgg16-397923af.pth.
    digits = re.search(r"-([0-9a-f]{8,})\.", file.name)
    return digits[1] if digits else ""


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
