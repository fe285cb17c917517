"""How like its image a reconstruction is: PSNR, SSIM, LPIPS and rFID as running sums over pairs and processes."""

from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.frechet import FeatureStatistics, frechet_distance, sum_over_processes
from eval.inception import INCEPTION_WIDTH, InceptionFeatures
from modeling.perceptual import LPIPS

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of images in [0, 1]


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
    window = torch.exp(
        -(torch.arange(-radius, radius + 1, device=x.device).double() ** 2) / (2 * SSIM_SIGMA**2)
    )
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

    def __init__(
        self, lpips: LPIPS | None, inception: InceptionFeatures | None, device: torch.device
    ):
        self.lpips, self.inception = lpips, inception
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.features = [
            FeatureStatistics(INCEPTION_WIDTH, device) for _ in range(2 if inception else 0)
        ]

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor, captions: list[str]) -> None:
        """Count in pairs of images, B x 3 x R x R uint8 on the device."""
        x, y = originals.double() / 255, reconstructions.double() / 255
        decibels = psnr(x, y)
        differ = decibels.isfinite()
        distances = (
            decibels.new_zeros(()) if self.lpips is None else self.lpips(y, x).double().sum()
        )
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
            "rfid": frechet_distance(*(part.gaussian() for part in self.features))
            if has_rfid
            else None,
            "psnr_db": psnr_sum / different if different else None,
            "ssim": ssim_sum / images,
            "lpips": lpips_sum / images if self.lpips else None,
        }
        counts = {
            "num_images": images,
            "num_identical": images - different,
            "num_without_caption": images - captioned,
        }
        return metrics, {name: int(count) for name, count in counts.items()}
