"""rFID, PSNR, SSIM and LPIPS of a trained image tokenizer over image folders or tar shards.

    python -m eval.reconstruction runs/demo assets/noto_emoji/heldout-000000.tar.gz
    accelerate launch --multi_gpu --num_processes 8 --module eval.reconstruction RUN DATA [DATA ...]

RUN is a stage-1 run folder, or an experiment with one; its EMA weights reconstruct from the posterior's mean. With text
guidance, the decoder gets an image's caption (from its shard, or a same-named .txt beside it), else the empty caption.
Images are cropped to the centre; reconstructions are clamped and rounded to 8 bits before every metric. A metric whose
weights are absent is null, with the reason. The images are split over the processes; one json has the protocol, too.
"""

import argparse
import time
from collections import Counter
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from configs.load import exit_on_error
from eval.frechet import FeatureStatistics, frechet_distance, sum_over_processes
from eval.images import RESIZE_RULE, ImageSet, iterate_images, list_images
from eval.inception import INCEPTION, INCEPTION_WIDTH, VGG16, InceptionFeatures
from eval.loading import find_text_encoder, fingerprint, load_tokenizer, read_run_config
from eval.pictures import caption_grid, pair_rows, save_png
from eval.report import describe_file, device_name, package_versions, write_json
from modeling.image_tokenizer import ImageTokenizer
from modeling.perceptual import LPIPS, file_sha256
from modeling.text_encoder import TextEncoder, TextTokenizer
from training.checkpoint import EMA_FILE, latest_checkpoint, read_state
from training.run import TIMEOUT_MINUTES

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of images in [0, 1]
PICTURE_PAIRS = 16
PROGRESS_SECONDS = 10


# ---------------------------------------------------------------------------------------------------------- measures


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, dB: B x 3 x R x R in [0, 1] twice -> B. Infinite for equal images."""
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004): B x 3 x R x R in [0, 1] twice -> B. R > 5.

    11 x 11 Gaussian window of sigma 1.5, mean over channels and all positions, images mirrored at their borders: as
    torchmetrics.
    """
    x, y = images.double(), others.double()
    radius = SSIM_WINDOW // 2
    window = torch.exp(-(torch.arange(-radius, radius + 1, device=x.device).double() ** 2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # 5B3 x 1 x R x R
    maps = F.pad(maps, (radius,) * 4, mode="reflect")
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    mean_x, mean_y, xx, yy, xy = maps.view(5, len(x), -1).unbind()
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * (xy - mean_x * mean_y) + SSIM_C2) / (xx - mean_x**2 + yy - mean_y**2 + SSIM_C2)
    return (luminance * structure).mean(dim=1)


class ReconstructionMetrics:
    """Running sums over pairs of images."""

    def __init__(self, lpips: LPIPS | None, inception: InceptionFeatures | None, device: torch.device):
        self.lpips, self.inception = lpips, inception
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.features = [FeatureStatistics(INCEPTION_WIDTH, device) for _ in range(2 if inception else 0)]

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor, captions: list[str]) -> None:
        """Count in pairs of images, B x 3 x R x R uint8 on the device."""
        x, y = originals.double() / 255, reconstructions.double() / 255
        decibels = psnr(x, y)
        differ = decibels.isfinite()
        distances = decibels.new_zeros(()) if self.lpips is None else self.lpips(y, x).double().sum()
        counts = [len(x), sum(map(bool, captions))]
        values = [differ.sum(), decibels[differ].sum(), ssim(x, y).sum(), distances]
        self.sums += torch.stack([*decibels.new_tensor(counts), *values])
        for statistics, images in zip(self.features, (originals, reconstructions)):
            statistics.add(self.inception(images))

    def over_processes(self) -> "ReconstructionMetrics":
        """The sums of all processes; own ones stay as they are. Every process must call it."""
        total = copy(self)
        total.sums = sum_over_processes(self.sums)
        total.features = [statistics.over_processes() for statistics in self.features]
        return total

    def results(self) -> tuple[dict[str, float | None], dict[str, int]]:
        """(metrics, counts of images); None for what was not or cannot be measured.

        Raises:
            ValueError: no image was counted in.
        """
        images, captioned, different, psnr_sum, ssim_sum, lpips_sum = self.sums.tolist()
        if not images:
            raise ValueError("not one image could be read")
        has_rfid = self.features and images > 1
        metrics = {
            "rfid": frechet_distance(*(part.gaussian() for part in self.features)) if has_rfid else None,
            "psnr_db": psnr_sum / different if different else None,
            "ssim": ssim_sum / images,
            "lpips": lpips_sum / images if self.lpips else None,
        }
        counts = {"num_images": images, "num_identical": images - different, "num_without_caption": images - captioned}
        return metrics, {name: int(count) for name, count in counts.items()}


# ------------------------------------------------------------------------------------------------------------- parts


@dataclass
class Reconstructor:
    """Images -> reconstructions; text tower and tokenizer are None without text guidance."""

    tokenizer: ImageTokenizer
    text_encoder: TextEncoder | None
    tokenize: TextTokenizer | None
    bf16: bool  # autocast

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> Tensor:
        """B x 3 x R x R uint8 -> the same, from the posterior's mean, clamped and rounded.

        Raises:
            FloatingPointError: a reconstruction is not finite.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            states = self.text_encoder(self.tokenize(captions).to(images.device)) if self.tokenize else None
            pixels = self.tokenizer.decode(self.tokenizer.encode(images.float() / 255).mean, states).float()
        if not pixels.isfinite().all():
            raise FloatingPointError("a reconstruction is not finite")
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def find_run(folder: Path) -> Path:
    """The stage-1 run at a folder, or in the experiment there.

    Raises:
        ValueError: no run, or one of another stage.
    """
    run = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    stage = read_run_config(run).get("stage")
    if stage != "tokenizer":
        raise ValueError(f"{run} is a run of stage {stage!r}, not of stage 'tokenizer'")
    return run


def load_reconstructor(run: Path, image_size: int | None, device: torch.device, bf16: bool) -> Reconstructor:
    """The EMA tokenizer of a run, at another image size if one is given, and the text tower it was trained with.

    Raises:
        ValueError: no checkpoint, a size that the patches do not divide, or another text tower.
    """
    tokenizer, text_config = load_tokenizer(run)
    if image_size is not None:  # no weight depends on it: RoPE follows the grid
        weights, tokenizer = tokenizer.state_dict(), ImageTokenizer(replace(tokenizer.config, image_size=image_size))
        tokenizer.load_state_dict(weights)
    tokenizer = tokenizer.to(device).eval().requires_grad_(False)
    config = tokenizer.config
    if not config.text_guidance:
        return Reconstructor(tokenizer, None, None, bf16)
    trained_on = read_state(latest_checkpoint(run)[1])["inputs"]  # empty for a converted run
    text_config.model, text_encoder = find_text_encoder(run, text_config, trained_on.get("text_encoder"))
    states = (text_encoder.context_length, text_encoder.width)
    if states != (config.text_tokens, config.text_width):
        raise ValueError(
            f"{text_config.model} gives {states[0]} x {states[1]} text states, the tokenizer expects "
            f"{config.text_tokens} x {config.text_width}"
        )
    return Reconstructor(tokenizer, text_encoder.to(device), TextTokenizer(text_config), bf16)


def find_weights(args: argparse.Namespace, state: PartialState) -> dict[str, Path | None]:
    """Files of LPIPS' and rFID's networks by metric; None where there is none. One process a machine downloads."""
    with state.local_main_process_first():
        return {
            "lpips": VGG16.find(args.vgg_weights, args.download),
            "rfid": INCEPTION.find(args.inception_weights, args.download),
        }


def build_metrics(
    args: argparse.Namespace, files: dict[str, Path | None], device: torch.device
) -> ReconstructionMetrics:
    """The measures whose weights are there.

    Raises:
        ValueError: torch-fidelity is not installed, or a file holds other weights.
    """
    lpips = LPIPS(files["lpips"]).to(device) if files["lpips"] else None
    inception = InceptionFeatures(files["rfid"], args.inception_precision).to(device) if files["rfid"] else None
    return ReconstructionMetrics(lpips, inception, device)


# ----------------------------------------------------------------------------------------------------------- program


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="stage-1 run folder, or an experiment folder")
    parser.add_argument("data", nargs="+", metavar="DATA", help="folder of images, or tar shards: paths, braces, globs")
    parser.add_argument("--output", type=Path, help="the json; default: reconstruction.json in the run folder")
    parser.add_argument("--image-size", type=int, help="pixels; default: the run's")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time and process")
    parser.add_argument("--num-workers", type=int, default=2, help="reading processes of each process; 0: none")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the tokenizer")
    parser.add_argument("--vgg-weights", metavar="FILE", help="VGG16 of LPIPS; default: torch's cache")
    parser.add_argument("--inception-weights", metavar="FILE", help="InceptionV3 of rFID; default: torch's cache")
    parser.add_argument("--inception-precision", choices=("float32", "float64"), default="float32")
    parser.add_argument("--download", action="store_true", help="fetch absent weights into torch's cache")
    parser.add_argument("--save-images", type=Path, metavar="DIR", help="a picture of the first pairs goes there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible values before anything is loaded."""
    for name, smallest in (("image_size", 1), ("limit", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if args.output and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder, expected a file")
    if args.save_images and args.save_images.is_file():
        raise ValueError(f"--save-images {args.save_images} is a file, expected a folder")


def main(args: argparse.Namespace) -> None:
    """Measure and write."""
    check_args(args)
    run = find_run(args.run)
    config = read_run_config(run)
    entries = list_images(args.data)[: args.limit]
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(minutes=TIMEOUT_MINUTES))
    torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 would be rounded to 10 bits on a GPU
    files = find_weights(args, state)
    metrics = build_metrics(args, files, state.device)
    reconstruct = load_reconstructor(run, args.image_size, state.device, args.precision == "bf16")
    size = reconstruct.tokenizer.config.image_size
    images = ImageSet(entries, size, tuple(config.data.caption_keys), tuple(config.data.background))
    start = time.perf_counter()
    pairs, skipped = measure(images, reconstruct, metrics, args, state)
    totals = metrics.over_processes()
    pairs, skipped = sorted(gather_object(pairs), key=lambda pair: pair[0]), sorted(gather_object(skipped))
    if not state.is_main_process:
        return
    values, counts = totals.results()
    seconds = time.perf_counter() - start
    report = {
        "metrics": values,
        "missing": explain_missing(values, files),
        **counts,
        "skipped_by_reason": dict(Counter(reason for _, reason in skipped)),
        "skipped": [{"image": name, "reason": reason} for name, reason in skipped],
        "protocol": describe_protocol(args, images, reconstruct),
        "model": describe_model(run, reconstruct),
        "weights": {name: describe_file(file) for name, file in files.items() if file},
        "versions": package_versions(),
        "device": device_name(state.device),
        "num_processes": state.num_processes,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
    }
    if args.save_images:
        save_pairs(pairs, args.save_images / "reconstructions.png")
    output = args.output or run / "reconstruction.json"
    write_json(report, output)
    print_summary(report, output)


def measure(
    images: ImageSet,
    reconstruct: Reconstructor,
    metrics: ReconstructionMetrics,
    args: argparse.Namespace,
    state: PartialState,
) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Reconstruct and count in this process's images.

    Returns:
        Of the first PICTURE_PAIRS images those of this process, (index, original, reconstruction, caption); and
        (name, reason) of each image that could not be read.
    """
    pairs, skipped, done = [], [], 0
    start = told = time.perf_counter()
    batches = iterate_images(images, args.batch_size, args.num_workers, state.process_index, state.num_processes)
    for batch in batches:
        skipped += batch["skipped"]
        done += len(batch["index"]) + len(batch["skipped"])
        if batch["index"]:
            originals = batch["image"].to(state.device, non_blocking=True)
            reconstructions = reconstruct(originals, batch["caption"])
            metrics.add(originals, reconstructions, batch["caption"])
            rows = zip(batch["index"], batch["image"], reconstructions, batch["caption"])
            pairs += [(i, x, y.cpu(), caption) for i, x, y, caption in rows if i < PICTURE_PAIRS and args.save_images]
        if state.is_main_process and time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            print_progress(min(done * state.num_processes, len(images)), len(images), told - start)
    return pairs, skipped


def print_progress(done: int, total: int, seconds: float) -> None:
    """One line: images of all processes, as far as this one can tell."""
    rate = done / seconds
    print(f"{done}/{total} images, {rate:.1f} images/s, {(total - done) / rate:.0f} s left", flush=True)


def save_pairs(pairs: list[tuple], path: Path) -> None:
    """Picture: originals left, reconstructions right."""
    originals, reconstructions = (torch.stack([pair[column] for pair in pairs]).float() / 255 for column in (1, 2))
    captions = [caption for *_, caption in pairs]
    save_png(caption_grid(pair_rows(originals, reconstructions), captions, columns=4), path)


def explain_missing(values: dict[str, float | None], files: dict[str, Path | None]) -> dict[str, str]:
    """Why a metric is null."""
    reasons = {"psnr_db": "all reconstructions are identical to their images", "rfid": "it needs at least 2 images"}
    for name, published in (("lpips", VGG16), ("rfid", INCEPTION)):
        if files[name] is None:
            reasons[name] = f"{published.title}'s weights are absent: {published.ways_out}"
    return {name: reasons[name] for name, value in values.items() if value is None}


def describe_protocol(args: argparse.Namespace, images: ImageSet, reconstruct: Reconstructor) -> dict[str, Any]:
    """What another code must do to get the same numbers."""
    return {
        "data": args.data,
        "limit": args.limit,
        "image_size": images.image_size,
        "crop": RESIZE_RULE,
        "background": list(images.background),
        "reconstruction": f"EMA weights, mean of the posterior, {args.precision}",
        "text_guidance": "each image's caption, else the empty caption" if reconstruct.tokenize else None,
        "caption_keys": list(images.caption_keys),
        "rounding": "reconstructions clamped to [0, 1] and rounded to uint8 before every metric; originals are uint8",
        "psnr": "of each image in RGB, mean over the images; identical pairs, which have none, are left out",
        "ssim": "of each image, mean; 11 x 11 Gaussian window, sigma 1.5, data range 1, mirrored borders",
        "lpips": "VGG16, linear heads 0.1, mean over the images",
        "rfid": "all originals against all reconstructions; InceptionV3 as in torch-fidelity (uint8, bilinear as in "
        f"TensorFlow 1), {INCEPTION_WIDTH} features in {args.inception_precision}, statistics in float64",
    }


def describe_model(run: Path, reconstruct: Reconstructor) -> dict[str, Any]:
    """Which weights were measured."""
    step, folder = latest_checkpoint(run)
    text_encoder = reconstruct.text_encoder
    return {
        "run": str(run),
        "step": step,
        "ema_sha256": file_sha256(folder / EMA_FILE),
        "tokenizer_fingerprint": fingerprint(reconstruct.tokenizer),
        "text_encoder_fingerprint": fingerprint(text_encoder) if text_encoder else None,
    }


def print_summary(report: dict[str, Any], path: Path) -> None:
    """What was found, in a few lines."""
    numbers = (f"{name} {value:.4f}" for name, value in report["metrics"].items() if value is not None)
    rate = f"{report['seconds']:.0f} s, {report['images_per_second']:.1f} images/s"
    print(f"{path}: {report['num_images']} images, {', '.join(numbers)} ({rate})")
    for name, reason in report["missing"].items():
        print(f"  no {name}: {reason}")
    for reason, count in report["skipped_by_reason"].items():
        print(f"  skipped {count}: {reason}")


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
