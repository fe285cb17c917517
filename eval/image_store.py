"""Where an evaluation keeps what it made: images as PNG, features by group; each file is whole or not there.

A group is the `group_size` consecutive images that the networks make together. On several machines the folder must be
one that all of them see.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from eval.protocol import Caption, Protocol
from training.files import write_bytes
from training.pictures import encode_png

FEATURES = "features"  # folder


@dataclass(frozen=True)
class ImageStore:
    """Folder of one evaluation. Image i is of caption i // images_per_caption."""

    folder: Path
    protocol: Protocol
    captions: Sequence[Caption]
    keep_images: bool
    measures: tuple[str, ...]  # what is kept of each image: names of features

    @property
    def num_images(self) -> int:
        return len(self.captions) * self.protocol.images_per_caption

    @property
    def num_groups(self) -> int:
        return -(-self.num_images // self.protocol.group_size)

    def numbers(self, group: int) -> list[int]:
        """Images of a group."""
        start = group * self.protocol.group_size
        return list(range(start, min(start + self.protocol.group_size, self.num_images)))

    def caption(self, number: int) -> Caption:
        """The caption of an image."""
        return self.captions[number // self.protocol.images_per_caption]

    def image_file(self, number: int) -> Path:
        """images/000012.png; of GenEval's layout images/00003/samples/0000.png."""
        if self.protocol.layout == "flat":
            return self.folder / "images" / f"{number:06d}.png"
        caption, sample = divmod(number, self.protocol.images_per_caption)
        return self.folder / "images" / f"{caption:05d}" / "samples" / f"{sample:04d}.png"

    def features_file(self, measure: str, group: int) -> Path:
        """features/NAME/000012.npy."""
        return self.folder / FEATURES / measure / f"{group:06d}.npy"

    def is_finished(self, group: int) -> bool:
        """Whether nothing of a group is left to do."""
        files = [self.image_file(number) for number in self.numbers(group) if self.keep_images]
        files += [self.features_file(measure, group) for measure in self.measures]
        return bool(files) and all(file.is_file() for file in files)

    def read_images(self, group: int) -> Tensor | None:
        """Images of a group, B x 3 x R x R uint8; None if one is missing or damaged."""
        images = []
        try:
            for number in self.numbers(group):
                with Image.open(self.image_file(number)) as image:
                    images.append(np.asarray(image.convert("RGB")))
        except OSError:
            return None
        return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")

    def write_images(self, group: int, images: Tensor) -> None:
        """B x 3 x R x R uint8; beside them what the layout wants of their captions."""
        for number, image in zip(self.numbers(group), images, strict=True):
            picture = Image.fromarray(rearrange(image, "c h w -> h w c").numpy())
            file = self.image_file(number)
            if self.protocol.layout == "geneval":
                record = json.dumps(self.caption(number).record) + "\n"
                write_bytes(record.encode(), file.parent.parent / "metadata.jsonl")
            write_bytes(encode_png(picture), file)

    def read_features(self, measure: str, group: int) -> Tensor:
        """B x D float32.

        Raises:
            ValueError: naming a damaged file.
        """
        file = self.features_file(measure, group)
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (EOFError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): delete it, and its images are measured again"
            ) from error

    def write_features(self, measure: str, group: int, features: Tensor) -> None:
        """B x D float32 of a group's images."""
        buffer = io.BytesIO()
        np.save(buffer, features.cpu().numpy())
        write_bytes(buffer.getvalue(), self.features_file(measure, group))

    def all_features(self, measure: str) -> Tensor:
        """N x D float32, in the images' order."""
        return torch.cat([self.read_features(measure, group) for group in range(self.num_groups)])
