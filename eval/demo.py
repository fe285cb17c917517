"""The report of a small experiment, without downloads: reconstruction and retrieval figures, and pictures.

    python -m eval.demo --config configs/demo/report.yaml [key=value ...]

Retrieval: is the image made for a caption nearest to that caption's true image among all images of the experiment?
Nearest by the tokenizer's latent means, and by 16 x 16 pixels. Pixel-identical images count as the same image.
Writes EXPERIMENT/report.json, report_train.png and report_heldout.png (true image left, generated right).
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.load import exit_on_error, parse_stage_args
from configs.schema import ReportStage
from data.image_text import ImageTextConfig, read_images
from eval.loading import fingerprint, load_pipeline
from eval.pictures import caption_grid, pair_rows, save_png
from eval.reconstruction_metrics import psnr
from modeling.pipeline import SamplingConfig, TextToImage

PIXEL_SIZE = 16  # side to which images are shrunk for retrieval by pixels
PICTURE_SAMPLES = 48


def main(config: ReportStage) -> None:
    """Measure and write; deterministic, a few minutes on a CPU."""
    experiment = Path(config.experiment_dir)
    parts, sampling = load_pipeline(experiment, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
    distractors = read_all(config, parts, config.distractor_shards) if config.distractor_shards else None
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
    own = {"train": torch.tensor(chosen), "heldout": torch.arange(len(heldout["caption"])) + len(train["caption"])}
    for name, samples in (("train", take(train, chosen)), ("heldout", heldout)):
        for flow, suffix in ((True, ""), (False, "_source_without_flow")):
            images, latents, rate = generate(config, parts, sampling, samples["caption"], flow)
            report[name + suffix] = compare(samples["image"], images, latents, pool, own[name])
            if flow:
                report[name]["images_per_second"] = rate
                save_pairs(samples, images, experiment / f"report_{name}.png")
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(path)
    print(json.dumps({name: value for name, value in report.items() if name != "inputs"}, indent=2))
    print(f"{path}: written, pictures beside it")


def read_all(config: ReportStage, parts: TextToImage, shards: list[str]) -> dict:
    """All images of some shards, in order: image N x 3 x R x R in [0, 1] and captions."""
    size = parts.tokenizer.config.image_size
    data = ImageTextConfig(shards=shards, caption_keys=config.caption_keys, background=config.background)
    batches = list(read_images(data, size, None, config.batch_size))
    captions = [caption for batch in batches for caption in batch["caption"]]
    return {"image": torch.cat([b["image"] for b in batches]).float() / 255, "caption": captions}


def take(samples: dict, indices: list[int]) -> dict:
    """Some of the samples."""
    return {"image": samples["image"][indices], "caption": [samples["caption"][i] for i in indices]}


@torch.no_grad()
def encode(config: ReportStage, parts: TextToImage, images: Tensor) -> Tensor:
    """Latent means N x K x C on the CPU."""
    return torch.cat([parts.tokenizer.encode(x.to(parts.device)).mean.cpu() for x in images.split(config.batch_size)])


def shrink(images: Tensor) -> Tensor:
    """N x 3 x R x R -> N x 3 x 16 x 16 by area."""
    return F.interpolate(images, size=(PIXEL_SIZE, PIXEL_SIZE), mode="area")


def build_pool(config: ReportStage, parts: TextToImage, sets: list[dict]) -> dict:
    """Retrieval pool: latent means, small images, and a group number that pixel-identical images share."""
    images = torch.cat([s["image"] for s in sets])
    numbers: dict[bytes, int] = {}
    groups = [numbers.setdefault(image.numpy().tobytes(), len(numbers)) for image in images]
    return {"latents": encode(config, parts, images), "pixels": shrink(images), "groups": torch.tensor(groups)}


def retrieval(queries: Tensor, pool: Tensor, groups: Tensor, own: Tensor) -> dict[str, float]:
    """Share of queries whose own image (pool index `own`) is the nearest, or among the five nearest, by Euclid."""
    distances = torch.cdist(queries.flatten(1).double(), pool.flatten(1).double())
    nearest = groups[distances.topk(min(5, len(pool)), largest=False).indices]  # N x 5
    hits = nearest == groups[own][:, None]
    return {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(dim=1).double().mean().item()}


@torch.no_grad()
def reconstruction_psnr(config: ReportStage, parts: TextToImage, samples: dict) -> float:
    """Mean PSNR per image of posterior-mean reconstructions with the true captions, dB."""
    values = []
    for start in range(0, len(samples["caption"]), config.batch_size):
        images = samples["image"][start : start + config.batch_size].to(parts.device)
        states = parts.encode_text(samples["caption"][start : start + config.batch_size])
        values.append(psnr(images, parts.decode(parts.tokenizer.encode(images).mean, states)))
    return torch.cat(values).mean().item()


def generate(
    config: ReportStage, parts: TextToImage, sampling: SamplingConfig, captions: list[str], flow: bool
) -> tuple[Tensor, Tensor, float]:
    """Images N x 3 x R x R, latents N x K x C (both on the CPU) and images/s; image i has randomness (seed, i).

    Without `flow`, the start of the flow is decoded as if it were its end: what the projector alone achieves.
    """
    images, latents, start_time = [], [], time.perf_counter()
    for start in range(0, len(captions), config.batch_size):
        chunk = captions[start : start + config.batch_size]
        states = parts.encode_text(chunk)
        source = parts.source(states, sampling, config.seed, list(range(start, start + len(chunk))))
        latent = parts.transport(source, sampling) if flow else source / parts.flow.latent_scale
        images.append(parts.decode(latent, states, sampling.precision).cpu())
        latents.append(latent.cpu())
    rate = len(captions) / (time.perf_counter() - start_time)
    return torch.cat(images), torch.cat(latents), rate


def compare(true: Tensor, images: Tensor, latents: Tensor, pool: dict, own: Tensor) -> dict:
    """Retrieval and PSNR of generated images against the true ones."""
    return {
        "captions": len(images),
        "latent": retrieval(latents, pool["latents"], pool["groups"], own),
        "pixels_16x16": retrieval(shrink(images), pool["pixels"], pool["groups"], own),
        "psnr_db": psnr(true, images).mean().item(),
    }


def save_pairs(samples: dict, images: Tensor, path: Path) -> None:
    """Picture: true image left, generated right; evenly spaced samples."""
    shown = torch.linspace(0, len(images) - 1, min(PICTURE_SAMPLES, len(images))).round().long().tolist()
    pairs = pair_rows(samples["image"][shown], images[shown])
    save_png(caption_grid(pairs, [samples["caption"][i] for i in shown], columns=8), path)


if __name__ == "__main__":
    stage = parse_stage_args("report", __doc__)
    exit_on_error(lambda: main(stage))
