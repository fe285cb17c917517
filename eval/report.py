"""The report of a small experiment, without downloads: reconstruction, retrieval, pictures.

    python -m eval.report --config configs/emoji/report.yaml [key=value ...]

Retrieval: is the image made for a caption nearest to that caption's true image among all images of
the experiment? Nearest by the tokenizer's latent means, and by 16 x 16 pixels. Pixel-identical
images count as the same image; under `same_subject` so do images whose captions differ only in what
`caption_variant` matches. `among_own_set`: the pool is the set itself, not the whole experiment.
Beside the flow stand its source, decoded without it, and a kernel ridge from the same text states
(training/ridge.py). Of stage next_scale, whose latents are sums of codes, there is no source, and
the ridge also stands there quantised. Writes EXPERIMENT/report.json, report_train.png and
report_heldout.png (true image left, generated right).
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.load import parse_stage_args
from data.files import write_json
from data.filters import FilterConfig
from data.images import ImageTextConfig, image_reader
from data.storage import shard_states
from data.tar import expand_shards
from eval.features import fit_gaussian, frechet_distance, number_groups
from eval.images import spread_evenly
from eval.scores import psnr, retrieval
from modeling.layers import fingerprint
from modeling.next_scale import NextScaleGenerator
from modeling.pipeline import Generator, Precision, Sampling
from training.errors import exit_on_error
from training.loading import read_section
from training.pictures import caption_grid, pair_rows, save_png
from training.pipelines import load_generator, network_of
from training.ridge import Ridge, fit_ridge
from training.stage import StageConfig

BATCH_SIZE = 64
SEED = 0
PIXEL_SIZE = 16  # side to which images are shrunk for retrieval by pixels
PICTURE_SAMPLES = 48


@dataclass
class ReportStage(StageConfig):
    """What can be set in report.yaml."""

    train_shards: list[str] = field(default_factory=list)  # images whose captions were trained on
    heldout_shards: list[str] = field(default_factory=list)  # images never trained on
    distractor_shards: list[str] = field(default_factory=list)  # more images for the pool
    # Regular expression of what may differ in captions of the same subject; empty: nothing
    caption_variant: str = ""
    # How many of them are drawn as images, evenly spaced over the shards
    num_train_captions: int = 256

    stage = "report"

    def check(self) -> None:
        if not (self.train_shards and self.heldout_shards):
            raise ValueError("train_shards and heldout_shards: expected shards in both")

    def image_shards(self) -> list[str]:
        return self.train_shards + self.heldout_shards + self.distractor_shards


def main(config: ReportStage) -> None:
    """Measure and write; deterministic, a few minutes on a CPU."""
    experiment = Path(config.experiment_dir)
    path = experiment / "report.json"
    pictures = {name: experiment / f"report_{name}.png" for name in ("train", "heldout")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts, sampling = load_generator(experiment, device)
    # A report of the same inputs is not made again: the launcher runs this stage each time
    inputs = {
        "config": asdict(config),
        "sampling": asdict(sampling),
        "tokenizer_fingerprint": fingerprint(parts.tokenizer),
        "flow_fingerprint": fingerprint(network_of(parts)),
        "images": shard_states(expand_shards(config.image_shards())),
    }
    is_whole = all(file.is_file() for file in (path, *pictures.values()))
    if is_whole and json.loads(path.read_text()).get("inputs") == inputs:
        print(f"{path}: complete, nothing to do")
        return

    # Images and captions, and what is retrieved from: training images come first in the pool
    named = (config.train_shards, config.heldout_shards, config.distractor_shards)
    sets = [read_all(config, parts, shards) for shards in named if shards]
    train, heldout = sets[:2]
    pool = build_pool(config, parts, sets)
    num_train = len(train["caption"])
    chosen = spread_evenly(num_train, config.num_train_captions)
    shown_train = {"image": train["image"][chosen]}
    shown_train["caption"] = [train["caption"][index] for index in chosen]

    # The tokenizer, the ridge, and the flow on both sets
    train_states = encode_texts(parts, train["caption"])
    ridge = fit_ridge(train_states, pool["latents"][:num_train])
    report = {
        "inputs": inputs,
        "num_train_captions": num_train,
        "num_pool_images": len(pool["latents"]),
        "tokenizer": {
            "heldout_psnr_db": reconstruction_psnr(parts, heldout),
            "train_psnr_db": reconstruction_psnr(parts, shown_train),
        },
        "ridge": {
            "strength": ridge.strength,
            "left_out_top5": ridge.top5,
            "left_out_mse": ridge.error,
        },
    }
    own_heldout = torch.arange(len(heldout["caption"])) + num_train
    for name, samples, own in (
        ("train", shown_train, torch.tensor(chosen)),
        ("heldout", heldout, own_heldout),
    ):
        for suffix, values, images in measure_set(parts, sampling, ridge, samples, pool, own):
            report[name + suffix] = values
            if not suffix:
                save_pairs(samples, images, pictures[name])

    write_json(report, path)
    print(json.dumps({name: value for name, value in report.items() if name != "inputs"}, indent=2))
    print(f"{path}: written, pictures beside it")


def measure_set(
    parts: Generator, sampling: Sampling, ridge: Ridge, samples: dict, pool: dict, own: Tensor
) -> Iterator[tuple[str, dict, Tensor]]:
    """(suffix, figures, images) of the run, of its source alone, and of the ridge.

    samples: image N x 3 x R x R and captions; own: their N places in the pool.
    """
    # The run, from text states on
    states = encode_texts(parts, samples["caption"])
    others, numbers = {"_ridge": ridge(states)}, list(range(len(states)))
    started = time.perf_counter()
    if isinstance(parts, NextScaleGenerator):

        def draw(states: Tensor, numbers: Tensor) -> Tensor:
            return parts.make_latents(states, sampling, SEED, numbers.tolist())

        latents = in_batches(parts, draw, states, torch.tensor(numbers))
        others["_ridge_quantised"] = in_batches(parts, parts.quantise, others["_ridge"])
    else:
        start = parts.start(states.to(parts.device), sampling, SEED, numbers)
        latents = in_batches(parts, lambda x, t: parts.transport(x, t, sampling), start, states)
        source = start.cpu() / parts.flow.latent_scale.cpu()
        others = {"_source_without_flow": source} | others
    images = decode(parts, latents, states, sampling.precision)
    values = compare(samples["image"], images, latents, pool, own)
    values["images_per_second"] = len(images) / (time.perf_counter() - started)
    yield "", values, images
    # What it starts from, and the ridge, decoded alike
    for suffix, latents in others.items():
        images = decode(parts, latents, states, sampling.precision)
        yield suffix, compare(samples["image"], images, latents, pool, own), images


def compare(true: Tensor, images: Tensor, latents: Tensor, pool: dict, own: Tensor) -> dict:
    """Retrieval, PSNR and Frechet distance of generated images against the true ones."""
    # Within its own set a query has fewer images to be mistaken for
    own_latents, own_groups = pool["latents"][own], pool["groups"][own]
    within = torch.arange(len(own))
    gaussians = [fit_gaussian(x.flatten(1)) for x in (latents, own_latents)]
    values = {
        "captions": len(images),
        "latent": retrieval(latents, pool["latents"], pool["groups"], own),
        "latent_among_own_set": retrieval(latents, own_latents, own_groups, within),
        "pixels_16x16": retrieval(shrink(images), pool["pixels"], pool["groups"], own),
        "psnr_db": mean_psnr(true, images),
        "frechet_latent": frechet_distance(*gaussians),  # only equal numbers of captions compare
    }
    if "subjects" in pool:
        values["latent_same_subject"] = retrieval(latents, pool["latents"], pool["subjects"], own)
    return values


# Images and captions


def read_all(config: ReportStage, parts: Generator, shards: list[str]) -> dict:
    """All images of some shards, in order: image N x 3 x R x R in [0, 1] and captions.

    Captions and backgrounds are as the experiment's tokenizer was trained on them.
    """
    size = parts.tokenizer.config.image_size
    trained_on = read_section(f"{config.experiment_dir}/tokenizer", "data", ImageTextConfig)
    data = replace(trained_on, shards=shards, sources={}, filters=FilterConfig())
    captions, images = join_batches(image_reader(data, size, None).once(BATCH_SIZE), "image")
    return {"image": images.float() / 255, "caption": captions}


def join_batches(batches: Iterable[dict], name: str) -> tuple[list[str], Tensor]:
    """Captions of all batches, and one of their tensors."""
    captions, parts = [], []
    for batch in batches:
        captions += batch["caption"]
        parts.append(batch[name])
    return captions, torch.cat(parts)


def build_pool(config: ReportStage, parts: Generator, sets: list[dict]) -> dict:
    """Retrieval pool: latent means, small images, numbers of what counts as the same image."""
    images = torch.cat([s["image"] for s in sets])
    pool = {"latents": encode(parts, images), "pixels": shrink(images)}
    pool["groups"] = number_groups([image.numpy().tobytes() for image in images])
    if config.caption_variant:
        captions = [caption for s in sets for caption in s["caption"]]
        subjects = [re.sub(config.caption_variant, "", caption) for caption in captions]
        pool["subjects"] = number_groups(subjects)
    return pool


def shrink(images: Tensor) -> Tensor:
    """N x 3 x R x R -> N x 3 x 16 x 16 by area."""
    return F.interpolate(images, size=(PIXEL_SIZE, PIXEL_SIZE), mode="area")


# The networks, a batch at a time


@torch.no_grad()
def in_batches(parts: Generator, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Outputs of all rows on the CPU; the function gets them on the device."""
    batches = zip(*(x.split(BATCH_SIZE) for x in tensors))
    return torch.cat([function(*(x.to(parts.device) for x in rows)).cpu() for rows in batches])


def encode(parts: Generator, images: Tensor) -> Tensor:
    """Latent means N x K x C on the CPU."""
    return in_batches(parts, lambda x: parts.tokenizer.encode(x).mean, images)


def encode_texts(parts: Generator, captions: list[str]) -> Tensor:
    """Text states N x L x T on the CPU."""
    size = BATCH_SIZE
    chunks = [captions[i : i + size] for i in range(0, len(captions), size)]
    return torch.cat([parts.encode_text(chunk).cpu() for chunk in chunks])


def decode(
    parts: Generator, latents: Tensor, states: Tensor, precision: Precision = "fp32"
) -> Tensor:
    """Latents in the tokenizer's own scale N x K x C -> images N x 3 x R x R on the CPU."""
    return in_batches(parts, lambda z, t: parts.decode(z, t, precision), latents, states)


def reconstruction_psnr(parts: Generator, samples: dict) -> float | None:
    """Mean PSNR per image of posterior-mean reconstructions with the true captions, dB."""
    states = encode_texts(parts, samples["caption"])
    reconstructions = decode(parts, encode(parts, samples["image"]), states)
    return mean_psnr(samples["image"], reconstructions)


def mean_psnr(images: Tensor, others: Tensor) -> float | None:
    """Over the pairs that differ, dB; None if all are equal: a white image can be met exactly."""
    decibels = psnr(images, others)
    different = decibels[decibels.isfinite()]
    return different.mean().item() if len(different) else None


def save_pairs(samples: dict, images: Tensor, path: Path) -> None:
    """Picture: true image left, generated right; evenly spaced samples."""
    shown = spread_evenly(len(images), PICTURE_SAMPLES)
    pairs = pair_rows(samples["image"][shown], images[shown])
    save_png(caption_grid(pairs, [samples["caption"][i] for i in shown], columns=8), path)


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(ReportStage, __doc__)))
