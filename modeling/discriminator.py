"""The PatchGAN discriminator of stage 1 and its losses: hinge and LeCam (public TA-TiTok recipe).

In: images B x 3 x R x R in [0, 1], taken as they are (the recipe does not scale them either). Out:
one logit per patch, B x 1 x 16 x 16 whatever R is, high for real. No layer mixes samples, so
`net(cat([real, fake])).chunk(2)` scores both in one pass. The order of a step is the recipe's: the
tokenizer's update through a discriminator that gets no gradient; then the discriminator's, on the
same images and detached reconstructions; then `LeCam.update`. There is no adaptive weight.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import check_least

NUM_GROUPS = 32  # of GroupNorm
SLOPE = 0.1  # of LeakyReLU
LOGIT_GRID = 16  # patches along each side


@dataclass
class AdversarialConfig:
    """When and how much the discriminator counts; its learning rate has its own section."""

    weight: float = 0.0  # of the generator loss, 0.1 in the recipe; 0: no discriminator is built
    start_step: int = 200_000  # the discriminator's training and the generator loss start here
    lecam_weight: float = 0.001  # of the penalty in the discriminator's loss

    def __post_init__(self):
        check_least(self, 0, "weight", "start_step", "lecam_weight")


class BlurPool(nn.Module):
    """Halve the resolution after blurring with (1, 3, 3, 1) / 8; zeros around, odd sizes up."""

    # Not timm's BlurPool2d: with four taps it pads by two on each side and returns a row and a
    # column too many.
    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = (taps[:, None] * taps)[None, None]  # 1 x 1 x 4 x 4
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2))
        kernel = self.kernel.expand(c, -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=c)  # B x C x H/2 x W/2


class LeCam(nn.Module):
    """Penalty on logits far from the other side's running average (Tseng et al., arXiv 2104.03310).

    penalty = max(0, mean real - ema_fake)^2 + max(0, ema_real - mean fake)^2,
    ema <- decay ema + (1 - decay) mean, both from 0 without bias correction: the recipe's form,
    where the paper squares each logit's distance. Differs from the recipe: means are over all
    processes, which must all call both methods.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty with the averages as they are; its gradient reaches both logits."""
        means = torch.stack([real_logits.float().mean(), fake_logits.float().mean()])
        # The value of all processes, the gradient of this one: DDP averages the gradients.
        means = means + (average_over_processes(means) - means).detach()
        return F.relu(means[0] - self.ema_fake).square() + F.relu(self.ema_real - means[1]).square()

    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the averages towards this step's mean logits (scalars); after `penalty`."""
        means = average_over_processes(torch.stack([real_mean, fake_mean]).float())
        self.ema_real.lerp_(means[0], 1 - self.decay)
        self.ema_fake.lerp_(means[1], 1 - self.decay)


class Discriminator(nn.Module):
    """Stem, stages of (conv, blur-pool, GroupNorm, LeakyReLU), max-pool to 16 x 16, head.

    1.91M weights; padding is "same" throughout.

    Args:
        width: channels of the first stage, doubled from stage to stage; a multiple of 32.
        num_stages: each halves the resolution.
    """

    def __init__(self, width: int = 128, num_stages: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(SLOPE))
        self.stages = nn.Sequential()
        last = width
        for stage in range(num_stages):
            channels = width * 2**stage
            convolution = nn.Conv2d(last, channels, 3, padding=1)
            norm = nn.GroupNorm(NUM_GROUPS, channels)
            self.stages.append(nn.Sequential(convolution, BlurPool(), norm, nn.LeakyReLU(SLOPE)))
            last = channels
        self.pool = nn.AdaptiveMaxPool2d(LOGIT_GRID)
        self.head = nn.Sequential(
            nn.Conv2d(last, last, 1), nn.LeakyReLU(SLOPE), nn.Conv2d(last, 1, 5, padding=2)
        )
        self.lecam = LeCam()  # here, so that its averages are in the checkpoint
        self.init_weights()

    def init_weights(self) -> None:
        """Convs uniform in +-fan_in^-0.5 (PyTorch's own, as in the recipe), norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.stem(images))  # B x C x R/8 x R/8 with three stages
        # In half precision the logits would be too coarse for LeCam's averages; stem and stages,
        # nearly all of the cost, run in the caller's (differs from the recipe: all in float32).
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.head[0].weight.dtype)
            return self.head(self.pool(x))  # B x 1 x 16 x 16, repeated where R/8 < 16


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2; 1 at logits of 0."""
    real = F.relu(1 - real_logits.float()).mean()
    fake = F.relu(1 + fake_logits.float()).mean()
    return (real + fake) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean fake, the generator's side of the hinge loss."""
    return -fake_logits.float().mean()


def average_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient."""
    values = values.detach()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
