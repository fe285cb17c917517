"""Images -> reconstructions by a tokenizer; PSNR, SSIM, LPIPS and rFID of the pairs.

The metrics are running sums over pairs of images and over processes.
"""

from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from eval.feature_nets import INCEPTION_WIDTH, InceptionFeatures
from eval.fid import FeatureStatistics, frechet_distance, sum_over_processes
from eval.images import ImageSet, Reading, iterate_images
from modeling.image_tokenizer import ImageTokenizer
from modeling.perceptual import LPIPS
from modeling.text_encoder import TextEncoder
from training.loading import find_text_encoder, load_tokenizer

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of images in [0, 1]


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, infinite for equal images.

    B x 3 x R x R in [0, 1] twice -> B.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004): B x 3 x R x R in [0, 1] twice -> B.

    R > 5. 11 x 11 Gaussian window of sigma 1.5, mean over channels and all positions, images
    mirrored at their borders: as torchmetrics.
    """
    # The window, normalised
    x, y = images.double(), others.double()
    radius = SSIM_WINDOW // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device).double()
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    # Local means of x, y and their products, by two passes of the separable window
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # 5B3 x 1 x R x R
    maps = F.pad(maps, (radius,) * 4, mode="reflect")
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    mean_x, mean_y, xx, yy, xy = maps.view(5, len(x), -1).unbind()
    # Wang et al. 2004, eq. 13
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * (xy - mean_x * mean_y) + SSIM_C2) / (xx - mean_x**2 + yy - mean_y**2 + SSIM_C2)
    return (luminance * structure).mean(dim=1)


class ReconstructionMetrics:
    """Running sums over pairs of images."""

    def __init__(
        self, lpips: LPIPS | None, inception: InceptionFeatures | None, device: torch.device
    ):
        self.lpips, self.inception = lpips, inception
        # images, with a caption, different from their reconstruction; sums of PSNR, SSIM, LPIPS
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        sets = 2 if inception else 0
        self.features = [FeatureStatistics(INCEPTION_WIDTH, device) for _ in range(sets)]

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor, captions: list[str]) -> None:
        """Count in pairs of images, B x 3 x R x R uint8 on the device."""
        # Of each pair; identical pairs have no PSNR
        x, y = originals.double() / 255, reconstructions.double() / 255
        decibels = psnr(x, y)
        differ = decibels.isfinite()
        lpips = self.lpips(y, x).double().sum() if self.lpips else decibels.new_zeros(())
        # Sums stay on the device, so that nothing waits for it
        counts = decibels.new_tensor([len(x), sum(map(bool, captions))])
        sums = [differ.sum(), decibels[differ].sum(), ssim(x, y).sum(), lpips]
        self.sums += torch.stack([*counts, *sums])
        for statistics, images in zip(self.features, (originals, reconstructions)):
            statistics.add(self.inception(images))

    def over_processes(self) -> "ReconstructionMetrics":
        """The sums of all processes, in a new object. Every process must call it."""
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
        rfid = None
        if self.features and images > 1:
            rfid = frechet_distance(*(statistics.gaussian() for statistics in self.features))
        metrics = {
            "rfid": rfid,
            "psnr_db": psnr_sum / different if different else None,
            "ssim": ssim_sum / images,
            "lpips": lpips_sum / images if self.lpips else None,
        }
        counts = {
            "num_images": int(images),
            "num_identical": int(images - different),
            "num_without_caption": int(images - captioned),
        }
        return metrics, counts


@dataclass
class Reconstructor:
    """Images and captions -> reconstructions."""

    tokenizer: ImageTokenizer
    text_encoder: TextEncoder
    bf16: bool  # autocast

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> Tensor:
        """B x 3 x R x R uint8 -> the same, from the posterior's mean, clamped and rounded.

        Raises:
            FloatingPointError: a reconstruction is not finite.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            text_states = self.text_encoder(self.text_encoder.tokenize(captions).to(images.device))
            latents = self.tokenizer.encode(images.float() / 255).mean
            pixels = self.tokenizer.decode(latents, text_states).float()
        if not pixels.isfinite().all():
            raise FloatingPointError("a reconstruction is not finite")
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def load_reconstructor(
    run: Path, image_size: int | None, device: torch.device, bf16: bool
) -> Reconstructor:
    """The EMA tokenizer of a run and its text tower, at another image size if one is given.

    Raises:
        ValueError: no checkpoint, a size that the patches do not divide, or another text tower.
    """
    tokenizer = load_tokenizer(run)
    # No weight depends on the image size: RoPE follows the grid
    if image_size is not None:
        resized = ImageTokenizer(replace(tokenizer.config, image_size=image_size))
        resized.load_state_dict(tokenizer.state_dict())
        tokenizer = resized
    tokenizer = tokenizer.to(device).eval().requires_grad_(False)
    # A converted run may name another tower than its decoder was made for
    text_encoder = find_text_encoder(run)
    expected = (tokenizer.config.text_tokens, tokenizer.config.text_width)
    if text_encoder.shape != expected:
        raise ValueError(
            f"the text encoder of {run} gives {text_encoder.shape} tokens x channels, the tokenizer "
            f"expects {expected}"
        )
    return Reconstructor(tokenizer, text_encoder.to(device), bf16)


def measure_reconstructions(
    images: ImageSet,
    reconstruct: Reconstructor,
    metrics: ReconstructionMetrics,
    reading: Reading,
    num_pairs: int = 0,
) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Reconstruct and count in this process's images.

    Returns:
        Of the first num_pairs images those of this process, (index, original, reconstruction,
        caption); and (name, reason) of each image that could not be read.
    """
    pairs, skipped = [], []
    state = reading.state
    batches = iterate_images(images, reading.batch_size, reading.num_workers, state)
    for batch in tqdm(batches, disable=not state.is_main_process, delay=10, mininterval=10):
        skipped += batch["skipped"]
        if batch["index"]:
            originals = batch["image"].to(state.device, non_blocking=True)
            reconstructions = reconstruct(originals, batch["caption"])
            metrics.add(originals, reconstructions, batch["caption"])
            rows = zip(batch["index"], batch["image"], reconstructions, batch["caption"])
            pairs += [(i, x, y.cpu(), caption) for i, x, y, caption in rows if i < num_pairs]
    return pairs, skipped
