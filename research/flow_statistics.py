"""What the flow loss alone does not show of a stage-3 run: the loss by time, how far apart the sources of different
captions lie, and how much the images of one caption differ."""

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.flow import interpolate, target_velocity
from modeling.losses import latent_statistics
from modeling.pipeline import ImageGenerator, SamplingConfig

TIMES = tuple((i + 0.5) / 10 for i in range(10))  # middles of the bins of t
SIGMA_MIN = 1e-5  # of the path
DRAWS = 4  # images of a caption for the diversity
SAMPLES = 64  # captions for it


@torch.no_grad()
def describe_flow(
    parts: ImageGenerator,
    text_states: Tensor,
    image_latents: Tensor,
    sampling: SamplingConfig,
    seed: int,
) -> dict:
    """Loss by time of both flows, statistics of the source, diversity.

    Args:
        text_states: N x L x T. image_latents: N x K x C, scaled; both on the device.
    """
    source = parts.source(text_states, sampling, seed, list(range(len(text_states))))
    mean = parts.flow.projector.posterior(text_states).mean
    return {
        "loss_by_time": loss_by_time(parts, source, image_latents, null=False),
        "null_loss_by_time": loss_by_time(parts, source, image_latents.roll(1, dims=0), null=True),
        "source_mse": F.mse_loss(source, image_latents).item(),
        **{name: value.item() for name, value in latent_statistics(mean).items()},
        "diversity": diversity(parts, text_states[:SAMPLES], sampling, seed)
        if sampling.sample_text_latent
        else 0.0,
    }


def loss_by_time(
    parts: ImageGenerator, source: Tensor, image_latents: Tensor, null: bool
) -> dict[str, float]:
    """Mean squared error of the velocity at the middle of each tenth of t: t05, t15, ... t95.

    null: of the unconditional velocity; its image latents are those of other captions, as in training.
    """
    target, indicator = (
        target_velocity(source, image_latents, SIGMA_MIN),
        source.new_full((len(source),), null).bool(),
    )
    losses = {}
    for time in TIMES:
        t = torch.full((len(source),), time, device=source.device)
        velocity = parts.flow.flowtok(
            interpolate(source, image_latents, t, SIGMA_MIN), t, indicator
        )
        losses[f"t{round(100 * time):02d}"] = F.mse_loss(velocity, target).item()
    return losses


def diversity(
    parts: ImageGenerator, text_states: Tensor, sampling: SamplingConfig, seed: int
) -> float:
    """Deviation of the latents over images of one caption, as a share of that over captions' mean images."""
    indices = list(range(len(text_states)))
    draws = [parts.source(text_states, sampling, seed + 1 + draw, indices) for draw in range(DRAWS)]
    latents = torch.stack(
        [parts.transport(source, sampling) for source in draws]
    )  # DRAWS x N x K x C
    within = latents.var(dim=0).mean().sqrt()
    return (within / latents.mean(dim=0).var(dim=0).mean().sqrt()).item()
