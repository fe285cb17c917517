"""The flow between text and image latents: path, time sampling, guidance by indicator (paper, Sec. 3.1 and 3.3).

Pure functions on tensors; no networks here. z_T and z_I are B x K x C, t is B in [0, 1]; t = 0 is text, t = 1 is image.
Path z_t = (1 - (1 - s) t) z_T + t z_I with s = sigma_min, velocity v = z_I - (1 - s) z_T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, float], Tensor]  # (x B x K x C, t in [0, 1]) -> velocity B x K x C
# (x B x K x C, t, null indicators of G branches) -> velocity of each branch at the same points, G B x K x C
BranchesFn = Callable[[Tensor, float, tuple[bool, ...]], Tensor]


@dataclass
class FlowConfig:
    """How the flow is trained. The defaults are the paper's; each departure says why it exists."""

    sigma_min: float = 1e-5
    time_distribution: Literal["uniform", "logit_normal", "power"] = (
        "uniform"  # logit_normal(0, 1) in the release
    )
    time_power: float = (
        3.0  # of "power": t = u^time_power looks more at low t, where the caption decides (demo)
    )
    null_probability: float = 0.1  # share of samples that train the unconditional flow
    # z_T and z_I drawn from their posteriors; False takes the means: one image a caption, less noise.
    sample_text_latent: bool = True
    sample_image_latent: bool = True
    # joint: the flow's gradient reaches the projector (paper). detached: the projector learns from its other losses
    # only. frozen: it does not learn. Joint training at small scale lets z_T collapse, see the README.
    projector: Literal["joint", "detached", "frozen"] = "joint"
    # Of joint: the factor on the flow's gradient into z_T, and the largest t of the samples that have one. Both lie
    # between joint and detached, in effect too (docs/recipe.md).
    gradient_into_text: float = 1.0
    gradient_until: float = 1.0
    # What flows into what. image_to_text: z_I at t = 0, z_T at t = 1 (paper, Sec. 4.1; captions). joint: one network
    # for both, each sample of a batch draws its direction, which flowtok.two_way tells the network (not in the paper).
    direction: Literal["text_to_image", "image_to_text", "joint"] = "text_to_image"

    def __post_init__(self):
        if not 0 <= self.null_probability < 1:
            raise ValueError(
                f"flow.null_probability must be in [0, 1), got {self.null_probability}"
            )
        if self.time_power <= 0:
            raise ValueError(f"flow.time_power must be positive, got {self.time_power}")
        for name in ("gradient_into_text", "gradient_until"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"flow.{name} must be in (0, 1], got {getattr(self, name)}; no gradient: projector=detached"
                )
            if getattr(self, name) < 1 and self.projector != "joint":
                raise ValueError(
                    f"flow.{name}={getattr(self, name)} is read with flow.projector=joint alone"
                )


def check_guidance(guidance: float, null_probability: float) -> None:
    """Refuse guidance away from an unconditional flow that was never trained.

    Raises:
        ValueError: guidance is not 1 and null_probability is 0.
    """
    if guidance != 1 and not null_probability:
        raise ValueError(
            f"guidance {guidance:g} needs an unconditional flow; flow.null_probability=0 trains none: use guidance 1"
        )


def interpolate(text: Tensor, image: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """Point z_t on the path: B x K x C."""
    t = t.view(-1, 1, 1)
    return (1 - (1 - sigma_min) * t) * text + t * image


def target_velocity(text: Tensor, image: Tensor, sigma_min: float) -> Tensor:
    """Velocity of the path, constant in t: B x K x C."""
    return image - (1 - sigma_min) * text


def sample_times(config: FlowConfig, batch_size: int, device: torch.device) -> Tensor:
    """Draw t in [0, 1] for each sample: B, float32."""
    if config.time_distribution == "logit_normal":
        return torch.randn(batch_size, device=device).sigmoid()
    t = torch.rand(batch_size, device=device)
    return t**config.time_power if config.time_distribution == "power" else t


def drop_to_null(image: Tensor, null_probability: float) -> tuple[Tensor, Tensor]:
    """Choose the samples that train the unconditional flow and give each of them another sample's image latent.

    Each chosen sample takes the latent of a uniformly drawn other sample of the batch, so that it works with any batch
    size from 2 on. Differs from the release, which rolls the targets among the chosen ones: with one chosen sample
    nothing changes there. Needs no device sync.

    Returns:
        (null indicator B bool, targets B x K x C).
    """
    batch_size, device = len(image), image.device
    null = torch.rand(batch_size, device=device) < null_probability
    own = torch.arange(batch_size, device=device)
    if batch_size == 1:
        return null, image
    other = (own + torch.randint(1, batch_size, (batch_size,), device=device)) % batch_size
    return null, image[torch.where(null, other, own)]


def guided_velocity(
    branches: BranchesFn, guidance: float, interval: tuple[float, float] = (0.0, 1.0)
) -> VelocityFn:
    """v = v_null + guidance * (v_cond - v_null) for t inside the interval; both branches in one batched pass.

    One branch where one is enough, at half the work: guidance 1 (v_cond alone) and 0 (v_null alone), and v_cond outside
    the interval (Kynkaanniemi et al. 2024: guidance helps in the middle of the way only).
    """
    start, end = interval

    def velocity(x: Tensor, time: float) -> Tensor:
        if not start <= time <= end:
            return branches(x, time, (False,))
        if guidance in (0, 1):
            return branches(x, time, (guidance == 0,))
        conditional, unconditional = branches(x, time, (False, True)).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    return velocity
