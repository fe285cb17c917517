"""Adversarial losses of stage 1: hinge losses and the LeCam penalty, with the discriminator's logits as input.

Order within a step, as in the public TA-TiTok recipe: the tokenizer's update, with `generator_loss` through a
discriminator that gets no gradient; then the discriminator's, on the same images and the same detached
reconstructions, with hinge_discriminator_loss + lecam_weight * penalty; then `LeCam.update`. There is no adaptive
weight. Losses are float32 scalars, minimised; logits B x 1 x 16 x 16, or any shape.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.discriminator import Discriminator, DiscriminatorConfig


@dataclass
class AdversarialConfig:
    """When and how much the discriminator counts; its learning rate is in its own optimizer section."""

    weight: float = (
        0.0  # of the generator loss, 0.1 in the recipe; 0: off, and no discriminator is built
    )
    start_step: int = 200_000  # the discriminator's training and the generator loss both start here
    lecam_weight: float = 0.001  # of the penalty in the discriminator's loss
    lecam_decay: float = 0.999  # of the averages of the logits, per step

    def __post_init__(self):
        for name in ("weight", "start_step", "lecam_weight"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"adversarial.{name} must not be negative, got {getattr(self, name)}"
                )
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"adversarial.lecam_decay must be in [0, 1), got {self.lecam_decay}")


def is_active(config: AdversarialConfig, step: int) -> bool:
    """Whether step `step`, counted from 0, trains the discriminator and has the generator loss."""
    return config.weight > 0 and step >= config.start_step


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2: 1 at logits of 0, 0 beyond +1 and -1."""
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean fake, the generator's side of the hinge loss."""
    return -fake_logits.float().mean()


class LeCam(nn.Module):
    """Penalty on logits far from the other side's running average (Tseng et al. 2021, arXiv 2104.03310).

    penalty = max(0, mean real - ema_fake)^2 + max(0, ema_real - mean fake)^2, ema <- decay ema + (1 - decay) mean, both
    from 0 and never corrected for that: the public TA-TiTok recipe's form. The paper squares the distance of each
    logit, then averages. Differs from the recipe: means are over all processes, which so hold equal averages and give,
    once DDP has averaged gradients, the gradient of one process with the joined batch. Every process must call both
    methods.

    The averages are buffers, so that a checkpoint has them. There is no parameter: not for DDP.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty with the averages as they are; its gradient reaches both logits."""
        means = torch.stack([real_logits.float().mean(), fake_logits.float().mean()])
        means = (
            means + (average_over_processes(means) - means).detach()
        )  # value of all processes, gradient of this one
        return F.relu(means[0] - self.ema_fake).square() + F.relu(self.ema_real - means[1]).square()

    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the averages towards this step's mean logits (scalars); after `penalty`, once a step."""
        means = average_over_processes(torch.stack([real_mean, fake_mean]).float())
        self.ema_real.lerp_(means[0], 1 - self.decay)
        self.ema_fake.lerp_(means[1], 1 - self.decay)


def average_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient; the tensor itself where there is one process."""
    values = values.detach()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class Adversary(nn.Module):
    """Discriminator and LeCam's averages in one module, for one checkpoint file and one exchange of gradients."""

    def __init__(self, config: DiscriminatorConfig, lecam_decay: float):
        super().__init__()
        self.discriminator = Discriminator(config)
        self.lecam = LeCam(lecam_decay)

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Real and fake images B x 3 x R x R in [0, 1] -> their logits B x 1 x 16 x 16, in one pass."""
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        return real_logits, fake_logits
