"""The report of a small experiment, without downloads: reconstruction and retrieval figures, and pictures.

    python -m eval.report --config configs/demo/report.yaml [key=value ...]

Retrieval: is the image made for a caption nearest to that caption's true image among all images of the experiment?
Nearest by the tokenizer's latent means, and by 16 x 16 pixels. Pixel-identical images count as the same image; under
`same_subject` so do images whose captions differ only in what `caption_variant` matches. `among_own_set`: the pool is
the set itself, not the whole experiment.
Beside the flow stand its source, decoded without it, and a kernel ridge from the same text states (training/ridge.py).
Writes EXPERIMENT/report.json, report_train.png and report_heldout.png (true image left, generated right).
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.cli import exit_on_error, parse_stage_args
from data.captions import CaptionConfig
from data.readers import ImageTextConfig, image_reader
from eval.features import number_groups
from eval.fid import fit_gaussian, frechet_distance
from eval.reconstruct import psnr
from eval.scores import retrieval
from modeling.fingerprint import fingerprint
from modeling.pipeline import ImageGenerator
from training.files import write_json
from training.loading import load_pipeline
from training.pictures import caption_grid, pair_rows, save_png
from training.ridge import fit_ridge
from training.stage import StageConfig

PIXEL_SIZE = 16  # side to which images are shrunk for retrieval by pixels
PICTURE_SAMPLES = 48
SEED = 0  # of the generated images


@dataclass
class ReportStage(StageConfig):
    """What can be set in report.yaml."""

    train_shards: list[str] = field(default_factory=list)  # images whose captions were trained on
    heldout_shards: list[str] = field(default_factory=list)  # images never trained on
    distractor_shards: list[str] = field(default_factory=list)  # more images in the retrieval pool
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    # RGB behind transparent pixels
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    # regular expression of what may differ in captions of the same subject; empty: nothing
    caption_variant: str = ""
    # how many of them get an image, evenly spaced over the shards
    num_train_captions: int = 256
    batch_size: int = 64

    stage = "report"

    def check(self) -> None:
        """Refuse a report without images."""
        super().check()
        if not self.train_shards or not self.heldout_shards:
            raise ValueError("train_shards and heldout_shards must name image shards")

    def image_shards(self) -> list[str]:
        return self.train_shards + self.heldout_shards + self.distractor_shards


class Samples(NamedTuple):
    """Images N x 3 x R x R in [0, 1] on the CPU, and their captions."""

    images: Tensor
    captions: list[str]

    def take(self, indices: list[int]) -> "Samples":
        """Some of the samples."""
        return Samples(self.images[indices], [self.captions[index] for index in indices])


class Pool(NamedTuple):
    """What is retrieved from: M images."""

    latents: Tensor  # M x K x C, means
    pixels: Tensor  # M x 3 x 16 x 16
    groups: Tensor  # M numbers, equal for pixel-identical images
    subjects: Tensor | None  # M numbers, equal for images of one subject


def main(config: ReportStage) -> None:
    """Measure and write; deterministic, a few minutes on a CPU."""
    experiment = Path(config.experiment_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator, sampling = load_pipeline(experiment, device)
    path = experiment / "report.json"
    inputs = {
        "config": asdict(config),
        "sampling": asdict(sampling),
        "tokenizer_fingerprint": fingerprint(generator.tokenizer),
        "flow_fingerprint": fingerprint(generator.flow),
    }
    if path.is_file() and json.loads(path.read_text()).get("inputs") == inputs:
        print(f"{path}: complete, nothing to do")
        return

    # The images: training captions first in the pool, then the held-out ones
    train = read_all(config, generator, config.train_shards)
    heldout = read_all(config, generator, config.heldout_shards)
    sets = [train, heldout]
    if config.distractor_shards:
        sets.append(read_all(config, generator, config.distractor_shards))
    pool = build_pool(config, generator, sets)
    chosen = spread(len(train.captions), config.num_train_captions)
    own = {
        "train": torch.tensor(chosen),
        "heldout": torch.arange(len(heldout.captions)) + len(train.captions),
    }
    compared = {"train": train.take(chosen), "heldout": heldout}

    # The tokenizer, and the ridge
    report = {
        "inputs": inputs,
        "num_train_captions": len(train.captions),
        "num_pool_images": len(pool.latents),
        "tokenizer": {
            f"{name}_psnr_db": reconstruction_psnr(config, generator, samples)
            for name, samples in compared.items()
        },
    }
    states = encode_texts(config, generator, train.captions)
    ridge = fit_ridge(states, pool.latents[: len(train.captions)])
    report["ridge"] = {
        "strength": ridge.strength,
        "left_out_top5": ridge.top5,
        "left_out_mse": ridge.error,
    }

    # What the flow, its start and the ridge make of the captions
    for name, samples in compared.items():
        states = encode_texts(config, generator, samples.captions)
        started = time.perf_counter()
        indices = list(range(len(states)))
        start = generator.start(states.to(device), sampling, SEED, indices)
        scale = generator.flow.latent_scale.cpu()
        latents = in_batches(
            config, lambda x, t: generator.transport(x, t.to(device), sampling), start, states
        )
        made = {"": latents, "_source_without_flow": start.cpu() / scale, "_ridge": ridge(states)}
        for suffix, latents in made.items():
            images = in_batches(
                config,
                lambda z, t: generator.decode(z.to(device), t.to(device), sampling.precision),
                latents,
                states,
            )
            seconds = time.perf_counter() - started
            found = compare(samples.images, images, latents, pool, own[name])
            report[f"{name}{suffix}"] = found
            if not suffix:
                found["images_per_second"] = len(images) / seconds
                save_pairs(samples, images, experiment / f"report_{name}.png")
    write_json(report, path)
    shown = {name: value for name, value in report.items() if name != "inputs"}
    print(json.dumps(shown, indent=2))
    print(f"{path}: written, pictures beside it")


def read_all(config: ReportStage, generator: ImageGenerator, shards: list[str]) -> Samples:
    """All images of some shards, in order, with their captions."""
    captions, background = config.captions, config.background
    data = ImageTextConfig(shards=shards, captions=captions, background=background)
    reader = image_reader(data, generator.tokenizer.config.image_size, tokenize=None)
    batches = list(reader.once(config.batch_size))
    images = torch.cat([batch["image"] for batch in batches]).float() / 255
    return Samples(images, [caption for batch in batches for caption in batch["caption"]])


def spread(available: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced indices, or all if there are fewer."""
    number = min(wanted, available)
    return torch.linspace(0, available - 1, number).round().long().tolist()


def in_batches(config: ReportStage, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Outputs of all rows on the CPU."""
    batches = zip(*(tensor.split(config.batch_size) for tensor in tensors))
    return torch.cat([function(*rows).cpu() for rows in batches])


@torch.no_grad()
def encode(config: ReportStage, generator: ImageGenerator, images: Tensor) -> Tensor:
    """Latent means N x K x C on the CPU."""
    encode_images = generator.tokenizer.encode
    return in_batches(config, lambda x: encode_images(x.to(generator.device)).mean, images)


def encode_texts(config: ReportStage, generator: ImageGenerator, captions: list[str]) -> Tensor:
    """Text states N x L x T on the CPU."""
    size = config.batch_size
    chunks = [captions[first : first + size] for first in range(0, len(captions), size)]
    return torch.cat([generator.encode_text(chunk).cpu() for chunk in chunks])


@torch.no_grad()
def reconstruction_psnr(config: ReportStage, generator: ImageGenerator, samples: Samples) -> float:
    """Mean PSNR per image of posterior-mean reconstructions with the true captions, dB."""
    device = generator.device

    def decibels(images: Tensor, states: Tensor) -> Tensor:
        images = images.to(device)
        latents = generator.tokenizer.encode(images).mean
        return psnr(images, generator.decode(latents, states.to(device)))

    states = encode_texts(config, generator, samples.captions)
    return in_batches(config, decibels, samples.images, states).mean().item()


def shrink(images: Tensor) -> Tensor:
    """N x 3 x R x R -> N x 3 x 16 x 16 by area."""
    return F.interpolate(images, size=(PIXEL_SIZE, PIXEL_SIZE), mode="area")


def build_pool(config: ReportStage, generator: ImageGenerator, sets: list[Samples]) -> Pool:
    """All images of some sets as a retrieval pool."""
    images = torch.cat([samples.images for samples in sets])
    groups = number_groups([image.numpy().tobytes() for image in images])
    subjects = None
    if config.caption_variant:
        captions = [caption for samples in sets for caption in samples.captions]
        variant = re.compile(config.caption_variant)
        subjects = number_groups([variant.sub("", caption) for caption in captions])
    return Pool(encode(config, generator, images), shrink(images), groups, subjects)


def compare(true: Tensor, images: Tensor, latents: Tensor, pool: Pool, own: Tensor) -> dict:
    """Retrieval, PSNR and Frechet distance of generated images against the true ones.

    Args:
        own: N indices of the true images in the pool.
    """
    own_latents, own_groups = pool.latents[own], pool.groups[own]
    within = torch.arange(len(own))
    gaussians = [fit_gaussian(x.flatten(1)) for x in (latents, own_latents)]
    values = {
        "captions": len(images),
        "latent": retrieval(latents, pool.latents, pool.groups, own),
        "latent_among_own_set": retrieval(latents, own_latents, own_groups, within),
        "pixels_16x16": retrieval(shrink(images), pool.pixels, pool.groups, own),
        "psnr_db": psnr(true, images).mean().item(),
        "frechet_latent": frechet_distance(*gaussians),  # depends on N: compare equal numbers
    }
    if pool.subjects is not None:
        values["latent_same_subject"] = retrieval(latents, pool.latents, pool.subjects, own)
    return values


def save_pairs(samples: Samples, images: Tensor, path: Path) -> None:
    """Picture: true image left, generated right; evenly spaced samples."""
    shown = spread(len(images), PICTURE_SAMPLES)
    pairs = pair_rows(samples.images[shown], images[shown])
    captions = [samples.captions[index] for index in shown]
    save_png(caption_grid(pairs, captions, columns=8), path)


if __name__ == "__main__":
    stage = parse_stage_args(ReportStage, __doc__)
    exit_on_error(lambda: main(stage))
