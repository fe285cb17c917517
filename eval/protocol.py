"""An evaluation of generated images as a small YAML that other code could follow.

eval/protocols holds the protocols that papers report. Captions come from a text file, a jsonl,
COCO's or MJHQ-30K's json, or from the samples of folders and shards.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.captions import strings
from data.files import load_json, read_text_file
from data.sources import is_tar_name
from eval import images
from modeling.clip_weights import ClipConfig
from modeling.layers import check_least
from modeling.pipeline import SamplingConfig

FOLDER = Path(__file__).parent / "protocols"
METRICS = ["frechet", "kid", "inception_score", "precision_recall", "retrieval", "clip_score"]


@dataclass
class Protocol:
    """Captions, reference, sampling and metrics of one evaluation.

    A FID depends on captions, reference, resize, weights, guidance, steps and sampler: all are
    fields.
    """

    # a .txt (one a line), a .jsonl of {"prompt": ...}, COCO's captions_*.json, MJHQ-30K's
    # meta_data.json; or folders, or tar shards
    captions: list[str] = field(default_factory=list)
    # where the captions of folders and shards are
    caption_keys: list[str] = field(default_factory=lambda: ["txt", "json:caption"])
    num_captions: int = 0  # 0: all
    # all: num_captions must be what is there; first; random: without repeats, by choice_seed, in
    # file order; spread: evenly
    choice: Literal["all", "first", "random", "spread"] = "all"
    choice_seed: int = 0
    images_per_caption: int = 1
    seed: int = 0  # an image is a function of (seed, its number)
    # images that the networks make together, whatever --batch-size is: float sums depend on it
    group_size: int = 32
    steps: int | None = None  # None, also below: as the run's config says
    guidance: float | None = None
    sampler: str | None = None
    # pixels before the features, resized by Pillow, bicubic, antialiased; 0: as generated
    image_size: int = 0
    # how generated and real images are resized. crop: the centre, at image_size; clean: clean-fid's
    # rule, the whole image to 299 px without rounding (eval/images.py), for features=inception
    resize: images.ResizeRule = "crop"
    # geneval: the folders that GenEval's scorer reads
    layout: Literal["flat", "geneval"] = "flat"
    # one statistics file (.npz), or folders and shards of images; []: none
    reference: list[str] = field(default_factory=list)
    # RGB behind transparent pixels of reference images
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    # tokenizer: the latent means of the run's own
    features: Literal["inception", "dinov2", "tokenizer"] = "inception"
    metrics: list[str] = field(
        default_factory=lambda: ["frechet", "kid", "inception_score", "precision_recall"]
    )
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # images
    inception_splits: int = 10
    neighbours: int = 3  # of precision and recall
    clip: ClipConfig = field(default_factory=ClipConfig)  # of the CLIP score

    def __post_init__(self):
        # Ranges
        check_least(self, 0, "num_captions", "choice_seed", "seed", "image_size")
        check_least(self, 1, "images_per_caption", "group_size", "kid_subsets")
        check_least(self, 1, "inception_splits", "neighbours")
        check_least(self, 2, "kid_subset_size")
        if unknown := {*self.metrics} - {*METRICS}:
            valid = ", ".join(METRICS)
            raise ValueError(f"metrics {', '.join(sorted(unknown))}: valid are {valid}")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background must be 3 numbers in 0..255, got {self.background}")
        # Combinations
        if "inception_score" in self.metrics and self.features != "inception":
            raise ValueError(
                f"inception_score needs features=inception, got features={self.features}"
            )
        if self.resize == "clean" and (self.features != "inception" or self.image_size):
            raise ValueError("resize=clean goes with features=inception and image_size=0")
        if self.features == "tokenizer" and self.image_size:
            raise ValueError("features=tokenizer goes with image_size=0")
        if self.choice != "all" and not self.num_captions:
            raise ValueError(f"choice={self.choice} needs num_captions")

    @property
    def statistics_file(self) -> Path | None:
        """The reference if it is a statistics file; ValueError of one among other references."""
        files = [name for name in self.reference if name.endswith(".npz")]
        if files and len(self.reference) > 1:
            given = self.reference
            raise ValueError(f"reference is one .npz, or folders and shards, got {given}")
        return Path(files[0]) if files else None

    def feature_size(self, generated: int) -> int:
        """Pixels at which the features of `generated`-pixel images are taken."""
        return images.CLEAN_SIZE if self.resize == "clean" else self.image_size or generated

    def sampling(self, default: SamplingConfig) -> SamplingConfig:
        """The run's sampling with what the protocol changes; ValueError of impossible values."""
        return default.but(steps=self.steps, guidance=self.guidance, sampler=self.sampler)


@dataclass(frozen=True)
class Caption:
    """A caption and where it is from."""

    text: str
    source: str | None = None  # image_name of the image that it belongs to
    record: dict[str, Any] = field(default_factory=dict)  # its row of a jsonl


def protocol_file(name: str) -> Path:
    """The file of a protocol: a path, or a name among our own; ValueError if it is neither."""
    ours = FOLDER / f"{name}.yaml"
    path = ours if ours.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"protocol {name} is neither a YAML file nor one of {names}")
    return path


def read_captions(protocol: Protocol) -> list[Caption]:
    """The captions of a protocol, in order.

    ValueError: none named, no such file, an empty one, not as many as the protocol wants, or such
    that its layout or its metrics can't use them.
    """
    if not protocol.captions:
        raise ValueError("no captions: add captions=[FILE] (the protocol says which)")
    # All that are there
    captions, names = _all_captions(protocol), " ".join(protocol.captions)
    for number, caption in enumerate(captions):
        if not caption.text.strip():
            raise ValueError(f"{names}: caption {number} (counted from 0) is empty")
    # As many as the protocol says: by default exactly those, so that another file is noticed
    wanted = protocol.num_captions or len(captions)
    if not captions or wanted > len(captions):
        raise ValueError(f"{names} has {len(captions)} captions, expected {wanted or 'some'}")
    if protocol.choice == "all" and wanted != len(captions):
        raise ValueError(
            f"{names} has {len(captions)} captions, expected exactly {wanted}: take another file, "
            "or set choice=first, random or spread"
        )
    numbers = list(range(wanted))
    if protocol.choice == "random":
        order = np.random.default_rng(protocol.choice_seed).permutation(len(captions))
        numbers = sorted(order[:wanted].tolist())
    elif protocol.choice == "spread":
        numbers = images.spread_evenly(len(captions), wanted)
    chosen = [captions[number] for number in numbers]
    # What the layout or the metrics can't use
    if protocol.layout == "geneval" and not all(caption.record for caption in chosen):
        raise ValueError("layout=geneval needs captions from a .jsonl: rows are the metadata")
    if "retrieval" in protocol.metrics:
        if not all(caption.source for caption in chosen):
            raise ValueError("metric retrieval needs captions of images in folders or shards")
        if not protocol.reference or protocol.statistics_file:
            raise ValueError("metric retrieval needs a reference of folders or shards")
    return chosen


def _all_captions(protocol: Protocol) -> list[Caption]:
    names = protocol.captions
    files = [Path(name) for name in names if name.endswith((".txt", ".jsonl", ".json"))]
    if not files:
        if other := [name for name in names if not os.path.isdir(name) and not is_tar_name(name)]:
            raise ValueError(
                f"captions {other[0]}: expected a .txt, .jsonl or .json, or folders, or tars"
            )
        captions = []
        for entry in images.list_images(names):
            texts = images.entry_captions(entry, protocol.caption_keys, "protocol: caption_keys")
            captions.append(Caption(texts[0], images.image_name(entry)))
        return captions
    if len(names) > 1:
        raise ValueError(f"captions is one file, or folders and shards, got {names}")
    path = files[0]
    text = read_text_file(path)
    if path.suffix == ".json":
        return _from_json(path, load_json(text))
    # splitlines would also split at what a caption may hold, such as U+2028
    captions = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and path.suffix == ".txt":
            captions.append(Caption(line.strip()))
        elif line.strip():
            row = load_json(line)
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path} line {number}: expected an object with a text at prompt")
            captions.append(Caption(row["prompt"], record=row))
    return captions


def _from_json(path: Path, content: Any) -> list[Caption]:
    """COCO's captions_*.json (every annotation), or MJHQ-30K's meta_data.json."""
    # Told apart by their form: files are renamed, and both end in .json
    if isinstance(content, dict):
        rows = content.get("annotations")
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return [Caption(*strings(row.get("caption"))[:1] or [""]) for row in rows]
        if content and all(isinstance(row, dict) for row in content.values()):
            return [Caption(str(row.get("prompt") or "")) for row in content.values()]
    raise ValueError(f"{path}: expected COCO's captions ('annotations') or MJHQ-30K's meta_data")


def captions_hash(captions: Sequence[Caption]) -> str:
    """SHA-256 over the texts in order, as hex digits."""
    return hashlib.sha256("\n".join(caption.text for caption in captions).encode()).hexdigest()
