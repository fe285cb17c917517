"""rFID, PSNR, SSIM and LPIPS of a trained image tokenizer over image folders or tar shards.

    python -m eval.reconstruction runs/emoji assets/noto_emoji/heldout-000000.tar.gz
    accelerate launch --multi_gpu --num_processes 8 --module eval.reconstruction RUN DATA [DATA ...]

RUN is a stage-1 run folder, or an experiment with one; its EMA weights reconstruct from the
posterior's mean. The decoder gets an image's caption (from its shard, or a same-named .txt beside
it), or the empty caption. Images are cropped to the centre; reconstructions are clamped and rounded
to 8 bits before every metric. A metric whose weights are absent is null, with the reason. The
images are split over the processes; one json also has the protocol. ReconstructionEvaluation gives
PSNR and SSIM while stage 1 trains.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from tqdm import tqdm

from data.files import check_writable, integer, user_path, write_json
from data.images import ImageTextConfig
from eval import programs
from eval.feature_nets import INCEPTION, INCEPTION_WIDTH, VGG16, InceptionFeatures
from eval.features import FeatureStatistics, frechet_distance
from eval.images import RULES, ImageSet, Reading, iterate_images, list_images, to_bytes
from eval.scores import psnr, ssim
from modeling.dual_tokenizer import DualTokenizer
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import check_least, fingerprint
from modeling.perceptual import LPIPS
from modeling.published import file_sha256
from modeling.text_encoder import TextEncoder
from training.checkpoint import EMA_FILE, read_state
from training.errors import exit_on_error
from training.loading import find_text_encoder, load_any_tokenizer, load_newest, read_section
from training.pictures import caption_grid, pair_rows, save_png

WEIGHTS = {"lpips": VGG16, "rfid": INCEPTION}  # of the metrics that need a network
PICTURE, PICTURE_PAIRS = "reconstructions.png", 16
BATCH_SIZE, NUM_WORKERS = 32, 2  # images at a time and process, reading processes of each


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = programs.build_parser(__doc__)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="stage-1 run folder, or an experiment folder")
    add("data", nargs="+", metavar="DATA", help="folders of images, or tar shards")
    add("--output", type=user_path, help="the json; default: reconstruction.json in the run folder")
    add("--limit", type=integer(1), help="only the first images, so many")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the tokenizer")
    add("--vgg-weights", metavar="FILE", help="VGG16 of LPIPS; default: torch's cache")
    add("--save-images", type=user_path, metavar="DIR", help="for a picture of the first pairs")
    programs.add_reading_options(parser, BATCH_SIZE, "images at a time and process")
    programs.add_weights_options(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    # What needs no network is checked first
    run = programs.stage_run(args.run, "tokenizer")
    output = args.output or run / "reconstruction.json"
    programs.check_report(output, args.data)
    if args.save_images:
        check_writable(args.save_images / PICTURE)
    entries = list_images(args.data)[: args.limit]

    # The run's networks, the same in all processes though training may go on; those that measure
    state = programs.start_processes(args.device)
    reconstruct, checkpoint = load_newest(
        run, lambda: load_reconstructor(run, state.device, args.precision == "bf16")
    )
    model = describe_model(run, checkpoint, reconstruct)
    programs.check_same(run, model["tokenizer_fingerprint"])
    # One process a machine downloads, the others find the files
    paths = {"lpips": args.vgg_weights, "rfid": args.inception_weights}
    with state.local_main_process_first():
        files = {name: WEIGHTS[name].find(path, args.download) for name, path in paths.items()}
    lpips = LPIPS(files["lpips"]).to(state.device) if files["lpips"] else None
    inception = InceptionFeatures(files["rfid"]).to(state.device) if files["rfid"] else None

    # The images, shared by the processes
    size = reconstruct.tokenizer.config.image_size
    data = read_section(run, "data", ImageTextConfig)
    images = ImageSet(entries, size, tuple(data.captions.keys), tuple(data.background))
    reading = Reading(args.batch_size, args.num_workers, state)
    start = time.perf_counter()
    metrics, counts, skipped = measure_reconstructions(
        images, reconstruct, reading, lpips, inception
    )
    seconds = time.perf_counter() - start
    skipped = sorted(gather_object(skipped))
    if not state.is_main_process:
        return

    # The report
    report = {
        "metrics": metrics,
        "missing": explain_missing(metrics, files),
        **counts,
        "skipped": [{"image": name, "reason": reason} for name, reason in skipped],
        "protocol": describe_protocol(args, images),
        "model": model,
        "weights": {name: programs.describe_file(file) for name, file in files.items() if file},
        **programs.describe_environment(state),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
    }
    write_json(report, output)
    rate = f" ({seconds:.0f} s, {len(images) / seconds:.1f} images/s)"
    programs.print_metrics(report, f"{output}: {report['num_images']} images", rate)
    for reason, count in Counter(reason for _, reason in skipped).items():
        print(f"  skipped {count}: {reason}")
    if args.save_images:
        save_pairs(images, reconstruct, args.save_images / PICTURE)


# The networks


@dataclass
class Reconstructor:
    """Images and captions -> reconstructions."""

    tokenizer: ImageTokenizer | DualTokenizer
    text_encoder: TextEncoder
    bf16: bool  # autocast

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> Tensor:
        """B x 3 x R x R uint8 -> the same, from the posterior's mean, clamped and rounded.

        FloatingPointError: a reconstruction is not finite.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            text_states = self.text_encoder(self.text_encoder.tokenize(captions).to(images.device))
            latents = self.tokenizer.encode(images.float() / 255).mean
            pixels = self.tokenizer.decode(latents, text_states).float()
        return to_bytes(pixels, "a reconstruction")


def load_reconstructor(run: Path, device: torch.device, bf16: bool) -> Reconstructor:
    """The EMA tokenizer of a run and its text tower.

    ValueError: no checkpoint, or another text tower than the tokenizer's.
    """
    tokenizer = load_any_tokenizer(run).to(device)
    text_encoder = find_text_encoder(run)
    # A converted run may name another tower than its decoder was made for; a dual one reads no text
    if isinstance(tokenizer, ImageTokenizer):
        expected = (tokenizer.config.text_tokens, tokenizer.config.text_width)
        if text_encoder.shape != expected:
            raise ValueError(
                f"the text encoder of {run} gives {text_encoder.shape} tokens x channels, the "
                f"tokenizer expects {expected}"
            )
    return Reconstructor(tokenizer, text_encoder.to(device), bf16)


# The numbers


def measure_reconstructions(
    images: ImageSet,
    reconstruct: Reconstructor,
    reading: Reading,
    lpips: LPIPS | None = None,
    inception: InceptionFeatures | None = None,
) -> tuple[dict[str, float | None], dict[str, int], list[tuple[str, str]]]:
    """Reconstruct and measure a set of images, which the processes share; all must call it.

    Returns metrics (None: not measured, or not defined) and counts over all processes; (name,
    reason) of each of this one's images that could not be read. ValueError: that is all of them.
    """
    # Sums stay on the device, so that nothing waits for them
    state = reading.state
    skipped = []
    sums = torch.zeros(6, dtype=torch.float64, device=state.device)
    width = INCEPTION_WIDTH if inception else 0
    real = FeatureStatistics(width, state.device)
    rebuilt = FeatureStatistics(width, state.device)
    batches = iterate_images(images, reading.batch_size, reading.num_workers, state)
    for batch in tqdm(batches, disable=not state.is_main_process, delay=10, mininterval=10):
        skipped += batch["skipped"]
        if not batch["index"]:
            continue
        originals = batch["image"].to(state.device, non_blocking=True)
        reconstructions = reconstruct(originals, batch["caption"])
        sums += sum_pairs(originals, reconstructions, batch["caption"], lpips)
        if inception:
            real.add(inception(originals))
            rebuilt.add(inception(reconstructions))

    # Over all processes
    total = reduce(sums, reduction="sum").tolist()
    count, captioned, different, psnr_sum, ssim_sum, lpips_sum = total
    if not count:
        raise ValueError("not one image could be read")
    rfid = None
    if inception:
        real, rebuilt = real.over_processes(), rebuilt.over_processes()
        rfid = frechet_distance(real.gaussian(), rebuilt.gaussian()) if count > 1 else None
    # Means over images, not over batches, whose last one is short
    metrics = {
        "rfid": rfid,
        "psnr_db": psnr_sum / different if different else None,
        "ssim": ssim_sum / count,
        "lpips": lpips_sum / count if lpips else None,
    }
    counts = {
        "num_images": int(count),
        "num_identical": int(count - different),
        "num_without_caption": int(count - captioned),
    }
    return metrics, counts, skipped


@torch.no_grad()
def sum_pairs(
    originals: Tensor, reconstructions: Tensor, captions: list[str], lpips: LPIPS | None
) -> Tensor:
    """Of B x 3 x R x R uint8 twice, float64 on their device.

    Number of images, of those with a caption, and of those unlike their reconstruction; sums of
    PSNR (over the last), SSIM and LPIPS.
    """
    # Both are bytes: papers measure what a file would hold
    x, y = originals.double() / 255, reconstructions.double() / 255
    decibels = psnr(x, y)
    differ = decibels.isfinite()  # identical pairs have no PSNR
    distances = lpips(y, x).double().sum() if lpips else decibels.new_zeros(())
    counts = decibels.new_tensor([len(x), sum(map(bool, captions))])
    sums = [differ.sum(), decibels[differ].sum(), ssim(x, y).sum(), distances]
    return torch.stack([*counts, *sums])


# What the report says


def describe_model(run: Path, checkpoint: Path, reconstruct: Reconstructor) -> dict[str, Any]:
    """Which weights are measured; read at once, because training may remove the checkpoint."""
    return {
        "run": str(run),
        "step": read_state(checkpoint)["step"],
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "tokenizer_fingerprint": fingerprint(reconstruct.tokenizer),
        "text_encoder_fingerprint": reconstruct.text_encoder.identity,
    }


def explain_missing(metrics: dict[str, float | None], files: dict[str, Path | None]) -> dict:
    reasons = {
        "psnr_db": "all reconstructions are identical to their images",
        "rfid": "it needs at least 2 images",
    }
    reasons |= {name: WEIGHTS[name].absence for name, file in files.items() if file is None}
    return {name: reasons[name] for name, value in metrics.items() if value is None}


def describe_protocol(args: argparse.Namespace, images: ImageSet) -> dict[str, Any]:
    """What another code must do to get the same numbers."""
    return {
        "data": args.data,
        "limit": args.limit,
        "image_size": images.image_size,
        "crop": RULES["crop"],
        "background": list(images.background),
        "caption_keys": list(images.caption_keys),
        "reconstruction": f"EMA weights, mean of the posterior, {args.precision}, uint8",
        "psnr": "mean over the images that differ from their reconstruction, in RGB",
        "ssim": "11 x 11 Gaussian window, sigma 1.5, data range 1, mirrored borders",
        "lpips": "VGG16, linear heads 0.1",
        "rfid": "InceptionV3 as in torch-fidelity, all originals against all reconstructions",
    }


def save_pairs(images: ImageSet, reconstruct: Reconstructor, path: Path) -> None:
    """Picture of the first images: originals left, reconstructions right."""
    # Made once more, by one process: what the numbers need goes without them
    first = replace(images, entries=images.entries[:PICTURE_PAIRS])
    [batch] = iterate_images(first, PICTURE_PAIRS)
    if batch["index"]:  # none if the first images are unreadable
        device = next(reconstruct.tokenizer.parameters()).device
        rebuilt = reconstruct(batch["image"].to(device), batch["caption"])
        rows = pair_rows(batch["image"] / 255, rebuilt / 255)
        save_png(caption_grid(rows, batch["caption"], columns=4), path)


# While stage 1 trains


@dataclass
class ReconstructionEvaluationConfig:
    """PSNR and SSIM while stage 1 trains."""

    # as often, and at the end; 0: never. One evaluation must end within training.timeout_minutes
    every_steps: int = 0
    shards: list[str] = field(default_factory=list)  # or folders; empty: pictures.shards
    num_images: int = 256  # the first ones; 0: all

    def __post_init__(self):
        check_least(self, 0, "every_steps", "num_images")


@dataclass
class ReconstructionEvaluation:
    """(EMA weights, step) -> PSNR and SSIM of a set of images."""

    images: ImageSet
    text_encoder: TextEncoder
    bf16: bool  # autocast

    def __call__(self, model: ImageTokenizer | DualTokenizer, step: int) -> dict[str, float]:
        """{"eval/psnr_db": ..., "eval/ssim": ...} on every process."""
        reconstruct = Reconstructor(model, self.text_encoder, self.bf16)
        reading = Reading(BATCH_SIZE, NUM_WORKERS, PartialState())
        with programs.undisturbed():
            metrics, _, _ = measure_reconstructions(self.images, reconstruct, reading)
        return {f"eval/{name}": value for name, value in metrics.items() if value is not None}


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
