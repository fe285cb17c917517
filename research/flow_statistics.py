"""What the flow loss by itself does not show of a flow from text to image.

    python -m research.flow_statistics --config configs/demo/report.yaml [key=value ...]

The loss by time, how far apart the starts of different captions lie, and how much the images of one
caption differ, on the report's training and held-out captions. Writes
EXPERIMENT/flow_statistics.json.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# Run as a file, Python looks into research/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.load import parse_stage_args
from data.files import write_json
from eval.images import spread_evenly
from eval.report import (
    SEED,
    ReportStage,
    default_device,
    encode,
    encode_texts,
    read_all,
    take,
)
from modeling.flow import interpolate, target_velocity
from modeling.losses import latent_statistics
from modeling.pipeline import ImageGenerator, SamplingConfig
from training.errors import exit_on_error
from training.pipelines import load_pipeline

TIMES = tuple((i + 0.5) / 10 for i in range(10))  # middles of the bins of t
DRAWS = 4  # images of a caption for the diversity
SAMPLES = 64  # captions for it


def main(config: ReportStage) -> None:
    """Measure, print, write."""
    parts, sampling = load_pipeline(config.experiment_dir, default_device())
    train = read_all(config, parts, config.train_shards)
    chosen = spread_evenly(len(train["caption"]), config.num_train_captions)
    heldout = read_all(config, parts, config.heldout_shards)
    report = {}
    for name, samples in (("train", take(train, chosen)), ("heldout", heldout)):
        states = encode_texts(parts, samples["caption"]).to(parts.device)
        latents = encode(parts, samples["image"]).to(parts.device)
        scaled = latents * parts.flow.latent_scale
        report[name] = describe_flow(parts, states, scaled, sampling, SEED)
    path = Path(config.experiment_dir) / "flow_statistics.json"
    write_json(report, path)
    print(json.dumps(report, indent=2))
    print(f"{path}: written")


@torch.no_grad()
def describe_flow(
    parts: ImageGenerator,
    text_states: Tensor,
    image_latents: Tensor,
    sampling: SamplingConfig,
    seed: int,
) -> dict:
    """Loss by time of both flows, statistics of the starts, diversity.

    Args:
        text_states: N x L x T.
        image_latents: N x K x C, scaled.
    """
    start = parts.start(text_states, sampling, seed, list(range(len(text_states))))
    mean = parts.flow.projector.start(text_states, None)
    others = image_latents.roll(1, dims=0)
    statistics = {
        "loss_by_time": loss_by_time(parts, text_states, start, image_latents, null=False),
        "null_loss_by_time": loss_by_time(parts, text_states, start, others, null=True),
        "source_mse": F.mse_loss(start, image_latents).item(),
        "diversity": 0.0,
    }
    statistics |= {name: value.item() for name, value in latent_statistics(mean).items()}
    if sampling.sample_text_latent:
        statistics["diversity"] = diversity(parts, text_states[:SAMPLES], sampling, seed)
    return statistics


def loss_by_time(
    parts: ImageGenerator, text_states: Tensor, start: Tensor, image_latents: Tensor, null: bool
) -> dict[str, float]:
    """Mean squared error of the velocity at the middle of each tenth of t: t05, t15, ... t95.

    null: of the unconditional velocity; its image latents are other captions', as in training.
    """
    flow = parts.flow
    sigma_min = flow.config.sigma_min
    target = target_velocity(start, image_latents, sigma_min)
    indicator = torch.full((len(start),), null, device=start.device)
    context = flow.context(text_states)
    losses = {}
    for time in TIMES:
        t = torch.full((len(start),), time, device=start.device)
        z_t = interpolate(start, image_latents, t, sigma_min)
        velocity = flow.flowtok(z_t, t, indicator, context)
        losses[f"t{round(100 * time):02d}"] = F.mse_loss(velocity, target).item()
    return losses


def diversity(
    parts: ImageGenerator, text_states: Tensor, sampling: SamplingConfig, seed: int
) -> float:
    """Deviation of latents over a caption's images, as a share of that over captions' means."""
    indices = list(range(len(text_states)))
    draws = []
    for draw in range(DRAWS):
        start = parts.start(text_states, sampling, seed + 1 + draw, indices)
        draws.append(parts.transport(start, text_states, sampling))
    latents = torch.stack(draws)  # DRAWS x N x K x C
    within = latents.var(dim=0).mean().sqrt()
    return (within / latents.mean(dim=0).var(dim=0).mean().sqrt()).item()


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(ReportStage, __doc__)))
