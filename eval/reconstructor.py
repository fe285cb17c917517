"""An image tokenizer and its text tower: images -> reconstructions, and the sums over the pairs of a set of images."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from eval.images import ImageSet, iterate_images
from eval.reconstruction_metrics import ReconstructionMetrics
from modeling.image_tokenizer import ImageTokenizer
from modeling.text_encoder import TextEncoder, TextTokenizer
from training.checkpoint import latest_checkpoint, read_state
from training.loading import find_text_encoder, load_tokenizer, read_run_config

PROGRESS_SECONDS = 10


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
            states = (
                self.text_encoder(self.tokenize(captions).to(images.device))
                if self.tokenize
                else None
            )
            pixels = self.tokenizer.decode(
                self.tokenizer.encode(images.float() / 255).mean, states
            ).float()
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


def load_reconstructor(
    run: Path, image_size: int | None, device: torch.device, bf16: bool
) -> Reconstructor:
    """The EMA tokenizer of a run, at another image size if one is given, and the text tower it was trained with.

    Raises:
        ValueError: no checkpoint, a size that the patches do not divide, or another text tower.
    """
    tokenizer, text_config = load_tokenizer(run)
    if image_size is not None:  # no weight depends on it: RoPE follows the grid
        weights, tokenizer = (
            tokenizer.state_dict(),
            ImageTokenizer(replace(tokenizer.config, image_size=image_size)),
        )
        tokenizer.load_state_dict(weights)
    tokenizer = tokenizer.to(device).eval().requires_grad_(False)
    config = tokenizer.config
    if not config.text_guidance:
        return Reconstructor(tokenizer, None, None, bf16)
    trained_on = read_state(latest_checkpoint(run)[1])["inputs"]  # empty for a converted run
    text_config.model, text_encoder = find_text_encoder(
        run, text_config, trained_on.get("text_encoder")
    )
    states = (text_encoder.context_length, text_encoder.width)
    if states != (config.text_tokens, config.text_width):
        raise ValueError(
            f"{text_config.model} gives {states[0]} x {states[1]} text states, the tokenizer expects "
            f"{config.text_tokens} x {config.text_width}"
        )
    return Reconstructor(tokenizer, text_encoder.to(device), TextTokenizer(text_config), bf16)


def measure(
    images: ImageSet,
    reconstruct: Reconstructor,
    metrics: ReconstructionMetrics,
    batch_size: int,
    num_workers: int,
    state: PartialState,
    num_pairs: int = 0,
) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Reconstruct and count in this process's images.

    Returns:
        Of the first num_pairs images those of this process, (index, original, reconstruction, caption); and (name,
        reason) of each image that could not be read.
    """
    pairs, skipped, done = [], [], 0
    start = told = time.perf_counter()
    for batch in iterate_images(
        images, batch_size, num_workers, state.process_index, state.num_processes
    ):
        skipped += batch["skipped"]
        done += len(batch["index"]) + len(batch["skipped"])
        if batch["index"]:
            originals = batch["image"].to(state.device, non_blocking=True)
            reconstructions = reconstruct(originals, batch["caption"])
            metrics.add(originals, reconstructions, batch["caption"])
            rows = zip(batch["index"], batch["image"], reconstructions, batch["caption"])
            pairs += [(i, x, y.cpu(), caption) for i, x, y, caption in rows if i < num_pairs]
        if state.is_main_process and time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            print_progress(min(done * state.num_processes, len(images)), len(images), told - start)
    return pairs, skipped


def print_progress(done: int, total: int, seconds: float) -> None:
    """One line: images of all processes, as far as this one can tell."""
    rate = done / seconds
    print(
        f"{done}/{total} images, {rate:.1f} images/s, {(total - done) / rate:.0f} s left",
        flush=True,
    )
