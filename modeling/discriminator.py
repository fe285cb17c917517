"""The PatchGAN discriminator of stage 1, as the public TA-TiTok recipe and MaskBit's VQGAN+ have it.

In: images B x 3 x R x R in [0, 1], taken as they are (the public recipe does not scale them either). Out: one logit
per patch, B x 1 x 16 x 16 whatever R is, high for real. Losses: modeling/adversarial.py.

The stem and the stages, nearly all of the cost, run in the caller's autocast precision; pooling and head run in
float32, so that logits are float32 (differs from the public recipe, where all of it is float32). No layer mixes
samples: `net(cat([real, fake])).chunk(2)` scores both in one pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GROUPS = 32  # of GroupNorm
SLOPE = 0.1  # of LeakyReLU
LOGIT_GRID = 16  # patches along each side


@dataclass
class DiscriminatorConfig:
    """Size of the discriminator; 1.91M weights as it stands."""

    hidden_channels: int = (
        128  # of the stem and the first stage, doubled from stage to stage; a multiple of 32
    )
    num_stages: int = 3  # each halves the resolution

    def __post_init__(self):
        if self.hidden_channels < 1 or self.hidden_channels % NUM_GROUPS:
            raise ValueError(
                f"discriminator.hidden_channels must be a multiple of 32, got {self.hidden_channels}"
            )
        if self.num_stages < 1:
            raise ValueError(f"discriminator.num_stages must be at least 1, got {self.num_stages}")


class BlurPool(nn.Module):
    """Halve the resolution after blurring with (1, 3, 3, 1) / 8 along rows and columns; zeros around, odd sizes up.

    Not timm's BlurPool2d: with four taps it pads by two on each side and returns a row and a column too many.
    """

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer(
            "kernel", (taps[:, None] * taps)[None, None], persistent=False
        )  # 1 x 1 x 4 x 4

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2))
        return F.conv2d(
            x, self.kernel.expand(c, -1, -1, -1), stride=2, groups=c
        )  # B x C x H/2 x W/2


class Discriminator(nn.Module):
    """Stem, stages of (conv, blur-pool, GroupNorm, LeakyReLU), max-pool to 16 x 16, head. "Same" padding throughout."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        channels = [config.hidden_channels * 2**stage for stage in range(config.num_stages)]
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 5, padding=2), nn.LeakyReLU(SLOPE))
        self.stages = nn.Sequential(
            *(
                self._stage(inside, outside)
                for inside, outside in zip([channels[0], *channels], channels)
            )
        )
        self.pool = nn.AdaptiveMaxPool2d(LOGIT_GRID)
        self.head = nn.Sequential(
            nn.Conv2d(channels[-1], channels[-1], 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels[-1], 1, 5, padding=2),
        )
        self.init_weights()

    @staticmethod
    def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            BlurPool(),
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.LeakyReLU(SLOPE),
        )

    def init_weights(self) -> None:
        """Weights and biases of the convs uniform in +-fan_in^-0.5 (PyTorch's own, as in the recipe), norms 1 and 0."""
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
        with torch.autocast(x.device.type, enabled=False):
            x = self.pool(
                x.to(self.head[0].weight.dtype)
            )  # B x C x 16 x 16, repeated where R/8 < 16
            return self.head(x)  # B x 1 x 16 x 16
