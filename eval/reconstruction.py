"""How close two images are."""

import torch
from torch import Tensor


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, dB: B x 3 x R x R in [0, 1] twice -> B. Infinite for equal images."""
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)
