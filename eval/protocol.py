"""What an evaluation of generated images is: one small YAML that another code could follow, and the captions it names.

A number such as a FID depends on captions, reference, resize, rounding, weights, guidance, steps and sampler; here each
is a field. eval/protocols holds those that papers report. Captions come from a text file, jsonl, COCO's or MJHQ-30K's
json, or from the samples of folders and shards.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.bad_samples import BadSample
from data.captions import captions_of, strings
from data.entries import load_json, read_parts
from eval.images import ResizeRule, image_name, list_images
from eval.inception import Precision
from modeling.clip_weights import ClipConfig
from modeling.pipeline import SamplingConfig

FOLDER = Path(__file__).parent / "protocols"
INCEPTION_ONLY = ("inception_score",)
METRICS = (
    "frechet",
    "frechet_by_category",
    "kid",
    "inception_score",
    "precision_recall",
    "retrieval",
    "clip_score",
)


@dataclass
class Protocol:
    """Captions, reference, sampling and measures of one evaluation."""

    # a .txt (one a line), a .jsonl, COCO's captions_*.json, MJHQ-30K's meta_data.json; or folders, or tar shards
    captions: list[str] = field(default_factory=list)
    caption_keys: list[str] = field(
        default_factory=lambda: ["txt", "json:caption"]
    )  # of folders and shards
    caption_field: str = "prompt"  # of the rows of a .jsonl
    num_captions: int = 0  # how many; 0: as many as there are
    # all: num_captions must be what is there; first; random: without repeats, by choice_seed, in their order; spread
    choice: Literal["all", "first", "random", "spread"] = "all"
    choice_seed: int = 0
    images_per_caption: int = 1
    seed: int = 0  # an image is a function of (seed, its number)
    # Images that the networks make together, whatever --batch-size is: the sums of floats depend on it.
    group_size: int = 32
    steps: int | None = None  # None, also below: as the run's config says
    guidance: float | None = None
    sampler: str | None = None
    autocast: bool = False  # networks in bf16 where that is safe; False: float32
    rounding: Literal["round", "truncate"] = "round"  # of [0, 1] to uint8
    image_size: int = (
        0  # pixels before features: resized by Pillow, bicubic, antialiased; 0: as generated
    )
    # How images come to the feature network, generated and real ones: crop: at image_size, the real ones' centre;
    # clean: clean-fid's rule, whole images to 299 px without rounding (eval/images.py), for features=inception
    resize: ResizeRule = "crop"
    layout: Literal["flat", "geneval"] = (
        "flat"  # of the images; geneval: the folders that GenEval's scorer reads
    )
    # one statistics file (.npz), or folders, or shards, whose images are cropped to the centre; []: none
    reference: list[str] = field(default_factory=list)
    background: list[int] = field(
        default_factory=lambda: [255, 255, 255]
    )  # RGB behind transparent reference images
    features: Literal["inception", "dinov2", "tokenizer"] = (
        "inception"  # tokenizer: the run's own latent means
    )
    precision: Precision = "float32"  # of the Inception network
    metrics: list[str] = field(
        default_factory=lambda: ["frechet", "kid", "inception_score", "precision_recall"]
    )
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # images
    inception_splits: int = 10
    neighbours: int = 3  # of precision and recall
    clip: ClipConfig = field(default_factory=ClipConfig)  # of the CLIP score

    def __post_init__(self):
        positive = (
            "images_per_caption",
            "group_size",
            "kid_subsets",
            "kid_subset_size",
            "inception_splits",
        )
        for name in (*positive, "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"protocol: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_captions", "choice_seed", "seed", "image_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"protocol: {name} must be at least 0, got {getattr(self, name)}")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(
                f"protocol: unknown metrics {', '.join(unknown)}; valid: {', '.join(METRICS)}"
            )
        wrong = [
            name for name in self.metrics if name in INCEPTION_ONLY and self.features != "inception"
        ]
        if wrong:
            raise ValueError(
                f"protocol: {', '.join(wrong)} needs features=inception, got features={self.features}"
            )
        if self.resize == "clean" and (self.features != "inception" or self.image_size):
            raise ValueError("protocol: resize=clean goes with features=inception and image_size=0")
        if self.choice in ("first", "random", "spread") and not self.num_captions:
            raise ValueError(f"protocol: choice={self.choice} needs num_captions")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(
                f"protocol: background must be 3 numbers in 0..255, got {self.background}"
            )

    @property
    def feature_metrics(self) -> list[str]:
        """Those that need the feature network."""
        return [name for name in self.metrics if name != "clip_score"]

    def sampling(self, default: SamplingConfig) -> SamplingConfig:
        """The run's sampling with what the protocol changes.

        Raises:
            ValueError: unknown sampler, or no step.
        """
        given = {name: getattr(self, name) for name in ("steps", "guidance", "sampler")}
        return replace(
            default, **{name: value for name, value in given.items() if value is not None}
        )


@dataclass(frozen=True)
class Caption:
    """A caption and where it is from."""

    text: str
    source: str | None = None  # name of the image it belongs to, as eval.images.image_name says it
    record: dict[str, Any] = field(
        default_factory=dict
    )  # its row of a jsonl, or of MJHQ-30K's meta_data.json

    @property
    def category(self) -> str:
        """Of MJHQ-30K; "" of others."""
        category = self.record.get("category")
        return category if isinstance(category, str) else ""


def protocol_file(name: str) -> Path:
    """The file of a protocol: a path, or a name among our own.

    Raises:
        ValueError: neither.
    """
    ours = FOLDER / f"{name}.yaml"
    path = ours if ours.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"protocol {name} is neither a YAML file nor one of {names}")
    return path


def choose_captions(protocol: Protocol) -> list[Caption]:
    """The captions of a protocol, in order.

    Raises:
        ValueError: none named, no such file, an empty caption, or not as many as the protocol wants.
    """
    if not protocol.captions:
        raise ValueError(
            "protocol: no captions are named: add captions=[FILE] (its file says which)"
        )
    captions = read_captions(protocol)
    there, wanted = len(captions), protocol.num_captions or len(captions)
    names = " ".join(protocol.captions)
    if protocol.choice == "all" and wanted != there:
        raise ValueError(
            f"{names} has {there} captions, the protocol wants all of exactly {wanted}: another file is meant, or set "
            "choice=first, random or spread"
        )
    if wanted > there:
        raise ValueError(f"{names} has {there} captions, the protocol wants {wanted}")
    return [captions[index] for index in chosen_indices(protocol, there)]


def chosen_indices(protocol: Protocol, there: int) -> list[int]:
    """Which of so many captions, ascending."""
    wanted = protocol.num_captions or there
    if protocol.choice == "random":
        return sorted(
            np.random.default_rng(protocol.choice_seed).permutation(there)[:wanted].tolist()
        )
    if protocol.choice == "spread":
        return np.linspace(0, there - 1, wanted).round().astype(int).tolist()
    return list(range(wanted))


def read_captions(protocol: Protocol) -> list[Caption]:
    """All captions that a protocol's sources hold."""
    files = [Path(name) for name in protocol.captions if name.endswith((".txt", ".jsonl", ".json"))]
    if not files:
        captions = captions_of_images(protocol.captions, protocol.caption_keys)
    elif len(protocol.captions) > 1:
        raise ValueError(
            f"protocol: captions is one file or several folders and shards, got {protocol.captions}"
        )
    elif not files[0].is_file():
        raise ValueError(f"captions file {files[0]} does not exist")
    else:
        captions = captions_of_file(files[0], protocol.caption_field)
    for number, caption in enumerate(captions):
        if not caption.text.strip():
            raise ValueError(
                f"{' '.join(protocol.captions)}: caption {number} (from 0 on) is empty"
            )
    if not captions:
        raise ValueError(f"{' '.join(protocol.captions)} has no caption")
    return captions


def captions_of_file(path: Path, field_name: str) -> list[Caption]:
    """Captions of a text file, a jsonl, COCO's captions_*.json (every annotation) or MJHQ-30K's meta_data.json.

    Raises:
        ValueError: not of that form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    lines = text.split(
        "\n"
    )  # splitlines would also split at what a caption can hold, such as U+2028
    if path.suffix == ".txt":
        return [Caption(line.strip()) for line in lines if line.strip()]
    if path.suffix == ".jsonl":
        rows = [
            (number, load_json(line)) for number, line in enumerate(lines, start=1) if line.strip()
        ]
        for number, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get(field_name), str):
                raise ValueError(
                    f"{path} line {number}: expected a JSON object with a text under {field_name!r}"
                )
        return [Caption(row[field_name], record=row) for _, row in rows]
    content = load_json(text)
    rows = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return [Caption(*strings(row.get("caption"))[:1] or [""]) for row in rows]
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(row, dict) for row in content.values())
    ):
        return [
            Caption(str(row.get("prompt") or ""), record={"id": name, **row})
            for name, row in content.items()
        ]
    raise ValueError(
        f"{path}: expected COCO's captions (a list under 'annotations') or MJHQ-30K's meta_data.json"
    )


def captions_of_images(data: Sequence[str], keys: Sequence[str]) -> list[Caption]:
    """The first caption of each image of folders and shards.

    Raises:
        ValueError: an image without one.
    """
    captions = []
    for entry in list_images(data):
        name = image_name(entry)
        try:
            texts = captions_of(read_parts(entry), tuple(keys))
        except BadSample as error:
            raise ValueError(f"{name}: {error.reason}") from error
        if not texts:
            raise ValueError(
                f"{name} has no caption under {', '.join(keys)} (protocol: caption_keys)"
            )
        captions.append(Caption(texts[0], source=name))
    return captions


def captions_hash(captions: Sequence[Caption]) -> str:
    """SHA-256 over the texts in order, as hex digits."""
    return hashlib.sha256("\n".join(caption.text for caption in captions).encode()).hexdigest()
