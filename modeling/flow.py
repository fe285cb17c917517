"""The flow between two latents: path, times, guidance by a null indicator (paper, Sec. 3.1, 3.3).

Pure functions on tensors, no networks. Start and end are B x K x C, t is B in [0, 1]. In FlowTok
the start is the text latent z_T and the end the image latent z_I; captioning flows the other way.
Path z_t = (1 - (1 - s) t) start + t end with s = sigma_min, velocity v = end - (1 - s) start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .layers import check_share

VelocityFn = Callable[[Tensor, float], Tensor]  # (x B x K x C, t in [0, 1]) -> velocity B x K x C
# (x B x K x C, t, null indicators of G branches) -> velocity of each branch at x, G B x K x C
VelocityBranches = Callable[[Tensor, float, tuple[bool, ...]], Tensor]


@dataclass
class FlowConfig:
    """How the flow is trained. The defaults are the paper's; each departure says why it exists."""

    # text: the flow starts at z_T (paper). noise: at unit noise, and flowtok.condition reads the
    # text: ordinary flow matching, to compare with.
    source: Literal["text", "noise"] = "text"
    sigma_min: float = 1e-5
    # logit_normal: t = sigmoid(time_mean + unit noise), the release's with 0; below it, more low t.
    # power: t = u^time_power, more low t, where the caption decides (emoji).
    time_distribution: Literal["uniform", "logit_normal", "power"] = "uniform"
    time_mean: float = 0.0
    time_power: float = 3.0
    null_probability: float = 0.1  # share of samples that train the unconditional flow
    # z_T and z_I drawn from their posteriors; False: the means, one image a caption, less noise
    sample_text_latent: bool = True
    sample_image_latent: bool = True
    # joint: the flow's gradient reaches the projector (paper). detached: the projector learns from
    # its other losses only. frozen: it does not learn. Joint training at small scale lets z_T
    # collapse (docs/recipe.md).
    projector: Literal["joint", "detached", "frozen"] = "joint"
    # image_to_text: z_I at t = 0, z_T at t = 1, for captions (paper, Sec. 4.1).
    direction: Literal["text_to_image", "image_to_text"] = "text_to_image"
    # mean_flow: the network learns average velocities over intervals, for a few Euler steps; its
    # training step has about twice the work (modeling/mean_flow.py).
    objective: Literal["velocity", "mean_flow"] = "velocity"
    # Of mean_flow: the guided flow is what is averaged, and sampling.guidance is 1. Guidance of
    # averages over long steps would add the difference of two finished images (MeanFlow, Sec. 4.2).
    guidance: float = 1.0

    def __post_init__(self):
        check_share(self, "null_probability")
        if self.time_power <= 0:
            raise ValueError(f"time_power must be positive, got {self.time_power}")
        if self.source == "noise" and self.direction == "image_to_text":
            raise ValueError("direction=image_to_text ends at z_T: it needs source=text")
        check_guidance(self.guidance, self.null_probability)
        if self.guidance != 1 and self.objective != "mean_flow":
            raise ValueError(
                f"flow.guidance={self.guidance:g} needs flow.objective=mean_flow; a velocity is "
                "guided when it is sampled (sampling.guidance)"
            )


def check_guidance(guidance: float, null_probability: float) -> None:
    """Refuse guidance away from an unconditional flow that was never trained."""
    if guidance != 1 and not null_probability:
        raise ValueError(
            f"guidance {guidance:g} needs an unconditional flow; flow.null_probability=0 trains "
            "none: use guidance 1"
        )


def interpolate(start: Tensor, end: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """Point z_t on the path: B x K x C."""
    t = t.view(-1, 1, 1)
    return (1 - (1 - sigma_min) * t) * start + t * end


def target_velocity(start: Tensor, end: Tensor, sigma_min: float) -> Tensor:
    """Velocity of the path, constant in t: B x K x C."""
    return end - (1 - sigma_min) * start


def sample_times(config: FlowConfig, batch_size: int, device: torch.device) -> Tensor:
    """Draw t in [0, 1] for each sample: B, float32."""
    if config.time_distribution == "logit_normal":
        return (config.time_mean + torch.randn(batch_size, device=device)).sigmoid()
    t = torch.rand(batch_size, device=device)
    return t**config.time_power if config.time_distribution == "power" else t


def draw_null(batch_size: int, null_probability: float, device: torch.device) -> Tensor:
    """Choose the samples that train the unconditional flow: B bool."""
    return torch.rand(batch_size, device=device) < null_probability


def swap_targets(end: Tensor, null: Tensor) -> Tensor:
    """Give each sample whose indicator is on another sample's latent: B x K x C.

    A start that says what the text is would say it to the unconditional flow, too; with another
    sample's target it says nothing (Sec. 3.3).
    """
    batch_size = len(end)
    if batch_size == 1:
        return end
    # Drawn from the whole batch. Differs from the release, which rolls the targets among the chosen
    # samples: with one chosen sample nothing changes there.
    own = torch.arange(batch_size, device=end.device)
    offset = torch.randint(1, batch_size, (batch_size,), device=end.device)
    other = (own + offset) % batch_size
    return end[torch.where(null, other, own)]


def guided_velocity(
    branches: VelocityBranches, guidance: float, interval: tuple[float, float] = (0.0, 1.0)
) -> VelocityFn:
    """v = v_null + guidance * (v_cond - v_null) for t inside the interval, in one batched pass."""
    start, end = interval

    def velocity(x: Tensor, time: float) -> Tensor:
        # Guidance helps in the middle only (Kynkaanniemi et al. 2024).
        if not start <= time <= end:
            return branches(x, time, (False,))
        # One branch where one is enough, at half the work.
        if guidance in (0, 1):
            return branches(x, time, (guidance == 0,))
        conditional, unconditional = branches(x, time, (False, True)).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    return velocity
