"""Weights that are published as files: a path or torch's cache, where they are downloaded to if that is allowed.

The name of such a file ends in the first digits of its SHA-256 (torch.hub's custom), which is checked.
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
    option: str  # of the command line or a config, for a path
    more: str = ""  # a further way to get it

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps the file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name

    @property
    def ways_out(self) -> str:
        """What to do without the file."""
        return (
            f"fetch {self.url} and put it into {self.cached.parent} ($TORCH_HOME/hub/checkpoints) or name it with "
            f"{self.option}{self.more}"
        )

    def find(self, path: str | None, download: bool) -> Path | None:
        """The file at `path`, or in torch's cache, downloaded to it if that is allowed; None if it is not there.

        Raises:
            ValueError: no file at `path`, a download that failed, or a file that is not what its name says.
        """
        file = Path(path).expanduser() if path else self.cached
        if path and not file.is_file():
            raise ValueError(f"{self.option}: no file {file}; {self.ways_out}")
        if not file.is_file() and download:
            self._download()
        if not file.is_file():
            return None
        expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
        if expected and not (found := file_sha256(file)).startswith(expected[1]):
            raise ValueError(
                f"{f'{self.option}: ' if path else ''}{file} is damaged or another file: by its name, its SHA-256 "
                f"starts with {expected[1]}, but it is {found}; {self.ways_out}"
            )
        return file

    def _download(self) -> None:
        digits = re.search(r"-([0-9a-f]{8,})\.", self.cached.name)
        try:
            self.cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                self.url, str(self.cached), hash_prefix=digits and digits[1]
            )
        except (OSError, RuntimeError) as error:  # no network, no disk, broken transfer
            raise ValueError(
                f"{self.title} was not downloaded ({error}); {self.ways_out}"
            ) from error


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
