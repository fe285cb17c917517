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
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.load import exit_on_error, parse_stage_args
from configs.schema import ReportStage
from data.image_text import ImageTextConfig, read_images
from eval.features import number_groups
from eval.fid import fit_gaussian, frechet_distance
from eval.reconstruct import psnr
from eval.scores import retrieval
from modeling.pipeline import ImageGenerator, SamplingConfig
from research.flow_statistics import describe_flow
from training.loading import fingerprint, load_pipeline
from training.pictures import caption_grid, pair_rows, save_png
from training.ridge import fit_ridge

PIXEL_SIZE = 16  # side to which images are shrunk for retrieval by pixels
PICTURE_SAMPLES = 48


def main(config: ReportStage) -> None:
    """Measure and write; deterministic, a few minutes on a CPU."""
    experiment = Path(config.experiment_dir)
    parts, sampling = load_pipeline(
        experiment, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    path = experiment / "report.json"
    inputs = {
        "config": asdict(config),
        "sampling": asdict(sampling),
        "tokenizer_fingerprint": fingerprint(parts.tokenizer),
        "flow_fingerprint": fingerprint(parts.flow),
    }
    if path.is_file() and json.loads(path.read_text()).get("inputs") == inputs:
        print(f"{path}: complete, nothing to do")
        return
    train = read_all(config, parts, config.train_shards)
    heldout = read_all(config, parts, config.heldout_shards)
    distractors = (
        read_all(config, parts, config.distractor_shards) if config.distractor_shards else None
    )
    pool = build_pool(config, parts, [s for s in (train, heldout, distractors) if s is not None])
    number = min(config.num_train_captions, len(train["caption"]))
    chosen = torch.linspace(0, len(train["caption"]) - 1, number).round().long().tolist()
    report = {
        "inputs": inputs,
        "num_train_captions": len(train["caption"]),
        "num_pool_images": len(pool["latents"]),
        "tokenizer": {
            "heldout_psnr_db": reconstruction_psnr(config, parts, heldout),
            "train_psnr_db": reconstruction_psnr(config, parts, take(train, chosen)),
        },
    }
    own = {
        "train": torch.tensor(chosen),
        "heldout": torch.arange(len(heldout["caption"])) + len(train["caption"]),
    }
    ridge = fit_ridge(
        encode_texts(config, parts, train["caption"]), pool["latents"][: len(train["caption"])]
    )
    report["ridge"] = {
        "strength": ridge.strength,
        "left_out_top5": ridge.top5,
        "left_out_mse": ridge.error,
    }
    for name, samples in (("train", take(train, chosen)), ("heldout", heldout)):
        states, start = encode_texts(config, parts, samples["caption"]), time.perf_counter()
        source = parts.source(
            states.to(parts.device), sampling, config.seed, list(range(len(states)))
        )
        latents = in_batches(config, lambda x: parts.transport(x, sampling), source)
        images = decode(config, parts, sampling, latents, states)
        report[name] = compare(samples["image"], images, latents, pool, own[name])
        report[name]["images_per_second"] = len(images) / (time.perf_counter() - start)
        save_pairs(samples, images, experiment / f"report_{name}.png")
        others = {
            "source_without_flow": source.cpu() / parts.flow.latent_scale.cpu(),
            "ridge": ridge(states),
        }
        for suffix, latents in others.items():
            images = decode(config, parts, sampling, latents, states)
            report[f"{name}_{suffix}"] = compare(samples["image"], images, latents, pool, own[name])
        scaled = pool["latents"][own[name]].to(parts.device) * parts.flow.latent_scale
        report[f"{name}_flow"] = describe_flow(
            parts, states.to(parts.device), scaled, sampling, config.seed
        )
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(path)
    print(json.dumps({name: value for name, value in report.items() if name != "inputs"}, indent=2))
    print(f"{path}: written, pictures beside it")


def read_all(config: ReportStage, parts: ImageGenerator, shards: list[str]) -> dict:
    """All images of some shards, in order: image N x 3 x R x R in [0, 1] and captions."""
    size = parts.tokenizer.config.image_size
    data = ImageTextConfig(
        shards=shards, caption_keys=config.caption_keys, background=config.background
    )
    batches = list(read_images(data, size, None, config.batch_size))
    captions = [caption for batch in batches for caption in batch["caption"]]
    return {"image": torch.cat([b["image"] for b in batches]).float() / 255, "caption": captions}


def take(samples: dict, indices: list[int]) -> dict:
    """Some of the samples."""
    return {"image": samples["image"][indices], "caption": [samples["caption"][i] for i in indices]}


@torch.no_grad()
def encode(config: ReportStage, parts: ImageGenerator, images: Tensor) -> Tensor:
    """Latent means N x K x C on the CPU."""
    return torch.cat(
        [
            parts.tokenizer.encode(x.to(parts.device)).mean.cpu()
            for x in images.split(config.batch_size)
        ]
    )


def shrink(images: Tensor) -> Tensor:
    """N x 3 x R x R -> N x 3 x 16 x 16 by area."""
    return F.interpolate(images, size=(PIXEL_SIZE, PIXEL_SIZE), mode="area")


def build_pool(config: ReportStage, parts: ImageGenerator, sets: list[dict]) -> dict:
    """Retrieval pool: latent means, small images, and group numbers of what counts as the same image, or subject."""
    images = torch.cat([s["image"] for s in sets])
    pool = {"latents": encode(config, parts, images), "pixels": shrink(images)}
    pool["groups"] = number_groups([image.numpy().tobytes() for image in images])
    if config.caption_variant:
        subjects = [
            re.sub(config.caption_variant, "", caption) for s in sets for caption in s["caption"]
        ]
        pool["subjects"] = number_groups(subjects)
    return pool


@torch.no_grad()
def reconstruction_psnr(config: ReportStage, parts: ImageGenerator, samples: dict) -> float:
    """Mean PSNR per image of posterior-mean reconstructions with the true captions, dB."""
    values = []
    for start in range(0, len(samples["caption"]), config.batch_size):
        images = samples["image"][start : start + config.batch_size].to(parts.device)
        states = parts.encode_text(samples["caption"][start : start + config.batch_size])
        values.append(psnr(images, parts.decode(parts.tokenizer.encode(images).mean, states)))
    return torch.cat(values).mean().item()


def encode_texts(config: ReportStage, parts: ImageGenerator, captions: list[str]) -> Tensor:
    """Text states N x L x T on the CPU."""
    chunks = [
        captions[i : i + config.batch_size] for i in range(0, len(captions), config.batch_size)
    ]
    return torch.cat([parts.encode_text(chunk).cpu() for chunk in chunks])


def in_batches(config: ReportStage, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Outputs of all rows on the CPU."""
    return torch.cat(
        [function(*rows).cpu() for rows in zip(*(x.split(config.batch_size) for x in tensors))]
    )


def decode(
    config: ReportStage,
    parts: ImageGenerator,
    sampling: SamplingConfig,
    latents: Tensor,
    states: Tensor,
) -> Tensor:
    """Latents in the tokenizer's own scale N x K x C -> images N x 3 x R x R on the CPU."""
    device = parts.device
    return in_batches(
        config,
        lambda z, t: parts.decode(z.to(device), t.to(device), sampling.precision),
        latents,
        states,
    )


def compare(true: Tensor, images: Tensor, latents: Tensor, pool: dict, own: Tensor) -> dict:
    """Retrieval, PSNR and Frechet distance of generated images against the true ones."""
    within = torch.arange(len(own))
    values = {
        "captions": len(images),
        "latent": retrieval(latents, pool["latents"], pool["groups"], own),
        "latent_among_own_set": retrieval(
            latents, pool["latents"][own], pool["groups"][own], within
        ),
        "pixels_16x16": retrieval(shrink(images), pool["pixels"], pool["groups"], own),
        "psnr_db": psnr(true, images).mean().item(),
        "frechet_latent": frechet_distance(
            fit_gaussian(latents.flatten(1)), fit_gaussian(pool["latents"][own].flatten(1))
        ),
    }
    if "subjects" in pool:
        values["latent_same_subject"] = retrieval(latents, pool["latents"], pool["subjects"], own)
    return values


def save_pairs(samples: dict, images: Tensor, path: Path) -> None:
    """Picture: true image left, generated right; evenly spaced samples."""
    shown = (
        torch.linspace(0, len(images) - 1, min(PICTURE_SAMPLES, len(images)))
        .round()
        .long()
        .tolist()
    )
    pairs = pair_rows(samples["image"][shown], images[shown])
    save_png(caption_grid(pairs, [samples["caption"][i] for i in shown], columns=8), path)


if __name__ == "__main__":
    stage = parse_stage_args("report", __doc__)
    exit_on_error(lambda: main(stage))
