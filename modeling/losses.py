"""Every loss term as a function of tensors, and the weights of each stage (paper, Sec. 3.2-3.3).

All terms are float32 scalars in any autocast precision. To add a loss: a function, its NAME_weight
in the stage's config, and its line in `projector_losses` (on z_T) or `velocity_losses`.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .layers import FlowPass, SourcePass, check_least
from .text_projector import TextProjector

KLForm = Literal["gaussian", "wall", "variance"]
AlignmentForm = Literal["contrastive", "cosine_margin"]
WEIGHT_EPSILON = 0.3  # of a weighted L_fm: smaller errors, as of whole intervals, do not rule it


# Weights


def loss_weights(config: Any) -> dict[str, float]:
    """Weight of each term by its name: the fields NAME_weight of a loss config."""
    names = [field.name for field in fields(config) if field.name.endswith("_weight")]
    return {name.removesuffix("_weight"): getattr(config, name) for name in names}


def weighted_terms(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """weight * term of the terms in use; the loss of a stage is their sum."""
    in_use = [name for name, weight in weights.items() if weight and name in terms]
    return {name: weights[name] * terms[name] for name in in_use}


@dataclass
class ProjectorLossConfig:
    """Losses on the text latents z_T (stages 2 and 3)."""

    alignment_weight: float = 1.0  # z_T to MLP(text states), or to projector.alignment_target
    # cosine_margin has no negatives (paper, Sec. 5.3)
    alignment_form: AlignmentForm = "contrastive"
    # Of cosine_margin; the paper gives no value, 0.5 is VA-VAE's, which it follows
    alignment_margin: float = 0.5
    kl_weight: float = 1e-4
    kl_form: KLForm = "gaussian"
    # Regression of z_T's mean onto z_I's mean. 0 in the paper; starting the flow near its target
    # speeds small runs up a lot (docs/recipe.md).
    image_regression_weight: float = 0.0

    def __post_init__(self):
        check_least(self, 0, *(f"{name}_weight" for name in loss_weights(self)))
        if not 0 <= self.alignment_margin < 2:
            raise ValueError(f"alignment_margin must be in [0, 2), got {self.alignment_margin}")


@dataclass
class FlowLossConfig(ProjectorLossConfig):
    """Losses of stage 3: on z_T, and on the velocity."""

    flow_matching_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.flow_matching_weight:
            raise ValueError("flow_matching_weight is 0: the velocity would learn nothing")


@dataclass
class ReconstructionLossConfig:
    """Losses of stage 1, except the adversarial one (modeling/discriminator.py)."""

    l2_weight: float = 1.0
    l1_weight: float = 0.0
    gradient_weight: float = 0.0  # L1 of pixel differences: sharper edges in short runs
    perceptual_weight: float = 0.0  # 1.1 in the recipe; its parts and weights files: `perceptual`
    kl_weight: float = 1e-6
    # 1 - cosine of what the latents say of a vision model's patch features to these; the model and
    # its weights file: `vision`. Not in the paper; 0.1 in SoftVQ-VAE.
    vision_weight: float = 0.0
    # Contrast of the latents' mean with the caption's: they keep more of what a caption says and
    # less of the rest. Not in the paper; 1e-3 pays in short runs (docs/beyond_the_paper.md).
    contrast_weight: float = 0.0

    def __post_init__(self):
        check_least(self, 0, *(f"{name}_weight" for name in loss_weights(self)))
        if not (self.l2_weight or self.l1_weight):
            raise ValueError("l2_weight and l1_weight are both 0, nothing would be reconstructed")


@dataclass
class DualLossConfig:
    """Losses of a dual tokenizer besides those of the image (modeling/dual_tokenizer.py)."""

    semantic_weight: float = 1.0  # 1 - cosine of predicted features to the teacher's
    codebook_weight: float = 1.0  # draws codes to what the encoders give
    commitment_weight: float = 0.25  # draws the encoders' output to the codes

    def __post_init__(self):
        check_least(self, 0, *(f"{name}_weight" for name in loss_weights(self)))
        for name in ("semantic_weight", "codebook_weight"):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0: a part of the tokenizer would learn nothing")


# Terms


def kl_loss(mean: Tensor, logvar: Tensor, form: KLForm = "gaussian") -> Tensor:
    """KL of N(mean, exp(logvar)) to N(0, 1): B x K x C each, summed per sample, batch mean.

    Args:
        form: gaussian: -1/2 (1 + logvar - mean^2 - exp(logvar)). wall: the release's (0.3 mean)^6
            for mean^2, a wall around |mean| = 3 more than a KL. variance: 0 for mean^2, only the
            deviation is drawn to 1.
    """
    mean, logvar = mean.float(), logvar.float()
    if form == "variance":
        square = torch.zeros_like(mean)
    else:
        square = mean.square() if form == "gaussian" else (0.3 * mean).pow(6)
    kl = -0.5 * (1 + logvar - square - logvar.exp())
    # Differs from the release, whose sum over the batch makes the weight depend on its size.
    return kl.sum() / len(mean)


def flatten_normalize(x: Tensor) -> Tensor:
    """B x L x C -> B x (L C), rows of length 1, float32."""
    return F.normalize(x.float().flatten(1), dim=-1)


def contrastive_loss(latents: Tensor, targets: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric cross-entropy of latents and alignment targets, both B x L x C (Sec. 3.3).

    Rows are flattened and normalised; the negatives are the rows of all processes, with gradient
    (the release has those of one process only).
    """
    with torch.autocast(latents.device.type, enabled=False):
        # Each process scores its own rows against all, so that DDP's average of gradients is the
        # gradient of the global loss.
        z, a = flatten_normalize(latents), flatten_normalize(targets)  # B x LC
        z_all, a_all = gather_rows(z), gather_rows(a)  # (processes * B) x LC

        # The match of row i is the same row of this process's part.
        rank = dist.get_rank() if dist.is_initialized() else 0
        labels = torch.arange(len(z), device=z.device) + rank * len(z)
        scale = log_temperature.float().exp()
        z_to_a = F.cross_entropy(scale * z @ a_all.T, labels)
        a_to_z = F.cross_entropy(scale * a @ z_all.T, labels)
        return (z_to_a + a_to_z) / 2


def cosine_margin_loss(latents: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Mean over the batch of max(0, 1 - margin - cos) of flattened B x L x C pairs.

    Pairs above a similarity of 1 - margin are left alone; there are no negatives (Sec. 5.3).
    """
    similarity = (flatten_normalize(latents) * flatten_normalize(targets)).sum(-1)  # B
    return F.relu(1 - margin - similarity).mean()


def reconstruction_losses(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """L2, L1, and L1 of horizontal and vertical pixel differences; B x 3 x R x R in [0, 1]."""
    difference = reconstructions.float() - images.float()
    horizontal = difference.diff(dim=-1).abs().mean()
    vertical = difference.diff(dim=-2).abs().mean()
    return {
        "l2": difference.square().mean(),
        "l1": difference.abs().mean(),
        "gradient": (horizontal + vertical) / 2,
    }


def semantic_loss(features: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine of features B x N x T to the teacher's, mean over all (SoftVQ-VAE, TokenFlow)."""
    return 1 - F.cosine_similarity(features.float(), targets.float(), dim=-1).mean()


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, B x D -> (processes * B) x D; gradients return to the rows' owner.

    torch.distributed.nn.functional.all_gather does the same and is deprecated from torch 2.14 on.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate x of all processes along the rows; gradients flow back to each process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _GatherRows.apply(x)


# Stages 2 and 3: the terms of weight > 0, unweighted


def projector_losses(
    config: ProjectorLossConfig, source: SourcePass, image_mean: Tensor
) -> dict[str, Tensor]:
    """Terms on z_T (paper, Sec. 3.3). image_mean: the mean of z_I, scaled, B x K x C."""
    terms = {}
    if config.alignment_weight:
        z, target = source.latents, source.alignment
        if config.alignment_form == "contrastive":
            terms["alignment"] = contrastive_loss(z, target, source.log_temperature)
        else:
            terms["alignment"] = cosine_margin_loss(z, target, config.alignment_margin)
    if config.kl_weight:
        terms["kl"] = kl_loss(source.mean, source.logvar, config.kl_form)
    if config.image_regression_weight:
        terms["image_regression"] = F.mse_loss(source.mean.float(), image_mean.float())
    return terms


def has_projector_loss(config: ProjectorLossConfig) -> bool:
    """Whether any loss on z_T is on."""
    return bool(config.alignment_weight or config.kl_weight or config.image_regression_weight)


def velocity_losses(config: FlowLossConfig, output: FlowPass) -> dict[str, Tensor]:
    """L_fm: the squared error of the predicted velocity (paper, Sec. 3.3)."""
    velocity, target = output.velocity.float(), output.target.float()
    if not output.is_weighted:
        return {"flow_matching": F.mse_loss(velocity, target)}
    # A mean flow's outliers would drown the rest (MeanFlow, Sec. 4.3, p = 1).
    errors = (velocity - target).square().mean((1, 2))  # B
    return {"flow_matching": (errors / (errors.detach() + WEIGHT_EPSILON)).mean()}


def freeze_unused_alignment(projector: TextProjector, config: ProjectorLossConfig) -> None:
    """Freeze what no loss gives a gradient, or DDP waits for it: the MLP at weight 0, or tau.

    At weight 0 the alignment is not computed either.
    """
    if not config.alignment_weight:
        projector.alignment.requires_grad_(False)
        projector.gives_alignment = False
    elif config.alignment_form != "contrastive":
        projector.alignment.log_temperature.requires_grad_(False)


# What shows a collapse


def latent_statistics(mean: Tensor) -> dict[str, Tensor]:
    """Deviation of z_T's mean over everything and between captions: B x L x C -> scalars.

    `between` is the root of the variance over the batch at each token and channel, averaged.
    """
    mean = mean.detach().float()
    # Near 0, z_T is the same for every caption: the collapse that the flow loss does not show.
    between = mean.var(dim=0, correction=0).mean().sqrt()
    return {"z_text_std": mean.std(correction=0), "z_text_between_captions_std": between}


def posterior_statistics(mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """How far image latents are used, B x K x C moments -> scalars: shows a posterior collapse.

    `posterior_std/C` is channel C's deviation, averaged; `channels_in_use` the share of channels
    whose mean varies over samples and tokens.
    """
    mean, deviation = mean.detach().float(), torch.exp(0.5 * logvar.detach().float())
    per_channel = deviation.mean(dim=(0, 1))  # C
    # A variance above 0.01 counts as use (active units, Burda et al. 2016).
    used = (mean.var(dim=(0, 1), correction=0) > 0.01).float().mean()
    statistics = {"latent_std": mean.std(correction=0), "posterior_std": per_channel.mean()}
    statistics["channels_in_use"] = used
    for channel, value in enumerate(per_channel):
        statistics[f"posterior_std/{channel}"] = value
    return statistics
