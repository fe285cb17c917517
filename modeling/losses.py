"""Every loss term as a function of tensors; weights are applied by the stages (paper, Sec. 3.2-3.3, Eq. of L).

All terms are computed in float32 whatever the autocast precision, and are scalars.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from modeling.text_projector import TextProjector, flatten_normalize

KLForm = Literal["gaussian", "wall", "variance"]
KLReduction = Literal["sample", "batch", "mean"]
AlignmentForm = Literal["contrastive", "cosine_margin"]


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, B x K x C."""
    return F.mse_loss(velocity.float(), target.float())


def kl_loss(
    mean: Tensor, logvar: Tensor, form: KLForm = "gaussian", reduction: KLReduction = "sample"
) -> Tensor:
    """KL of N(mean, exp(logvar)) to N(0, 1), mean and logvar B x K x C.

    form "gaussian": -1/2 (1 + logvar - mean^2 - exp(logvar)). form "wall": the release's (0.3 mean)^6 for mean^2, a
    wall around |mean| = 3 more than a KL. form "variance": nothing for mean^2, the deviation alone is drawn to 1.
    reduction "sample": sum over tokens and channels, mean over the batch; "batch": sum over everything (the release;
    its weight then depends on the batch size); "mean": mean over everything.
    """
    mean, logvar = mean.float(), logvar.float()
    if form == "variance":
        square = torch.zeros_like(mean)
    else:
        square = mean.square() if form == "gaussian" else (0.3 * mean).pow(6)
    kl = -0.5 * (1 + logvar - square - logvar.exp())
    if reduction == "mean":
        return kl.mean()
    return kl.sum() / (len(mean) if reduction == "sample" else 1)


def contrastive_loss(latents: Tensor, targets: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric cross-entropy between text latents and alignment targets, both B x L x C (paper, Sec. 3.3).

    Rows are flattened and normalised; the negatives are the rows of all processes, with gradient. Each process scores
    its own rows against all, so that DDP's average of gradients is the gradient of the global loss.
    """
    with torch.autocast(latents.device.type, enabled=False):
        z, a = flatten_normalize(latents), flatten_normalize(targets)  # B x LC
        z_all, a_all = gather_rows(z), gather_rows(a)  # (processes * B) x LC
        rank = dist.get_rank() if dist.is_initialized() else 0
        labels = torch.arange(len(z), device=z.device) + rank * len(z)
        scale = log_temperature.float().exp()
        return (
            F.cross_entropy(scale * z @ a_all.T, labels)
            + F.cross_entropy(scale * a @ z_all.T, labels)
        ) / 2


def cosine_margin_loss(latents: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Mean over the batch of max(0, 1 - margin - cos) between flattened latents and targets, both B x L x C.

    Pairs above a similarity of 1 - margin are left alone; there are no negatives (paper, Sec. 5.3, loss ablation).
    """
    similarity = (flatten_normalize(latents) * flatten_normalize(targets)).sum(-1)  # B
    return F.relu(1 - margin - similarity).mean()


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, B x D -> (processes * B) x D; the gradient of each row comes back summed to its owner."""

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


def latent_regression_loss(text_mean: Tensor, image_mean: Tensor) -> Tensor:
    """Mean squared error of z_T's mean to z_I's mean, B x K x C: the flow starts near its target (not in the paper)."""
    return F.mse_loss(text_mean.float(), image_mean.float())


def reconstruction_losses(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """L2, L1 and the L1 of horizontal and vertical pixel differences, for B x 3 x R x R in [0, 1]."""
    difference = reconstructions.float() - images.float()
    horizontal, vertical = (
        difference.diff(dim=-1).abs().mean(),
        difference.diff(dim=-2).abs().mean(),
    )
    return {
        "l2": difference.square().mean(),
        "l1": difference.abs().mean(),
        "gradient": (horizontal + vertical) / 2,
    }


def latent_statistics(mean: Tensor) -> dict[str, Tensor]:
    """Deviation of z_T's mean over everything, and between captions: B x L x C -> scalars.

    `between` is the root of the variance over the batch at each token and channel, averaged. Near 0 means that z_T is
    the same for every caption: the collapse that the flow loss does not show.
    """
    mean = mean.detach().float()
    between = mean.var(dim=0, correction=0).mean().sqrt()
    return {"z_text_std": mean.std(correction=0), "z_text_between_captions_std": between}


@dataclass
class SourceLossConfig:
    """Losses on the source of the flow, z_T (stages 2 and 3)."""

    alignment_weight: float = 1.0  # z_T to MLP(text states), or to projector.alignment_target
    alignment_form: AlignmentForm = (
        "contrastive"  # or cosine_margin, without negatives (paper, Sec. 5.3)
    )
    alignment_margin: float = (
        0.5  # of cosine_margin; the paper gives no value, 0.5 is VA-VAE's, which it follows
    )
    kl_weight: float = 1e-4
    kl_form: KLForm = "gaussian"
    kl_reduction: KLReduction = "sample"
    # Regression of z_T's mean onto z_I's mean. 0 in the paper; starting the flow near its target speeds small runs up
    # much (README, "The demo's recipe").
    image_regression_weight: float = 0.0
    image_alignment_weight: float = (
        0.0  # contrastive, z_T's mean to z_I's: tells captions apart, not where images lie
    )

    def __post_init__(self):
        for name in (
            "alignment_weight",
            "kl_weight",
            "image_regression_weight",
            "image_alignment_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"losses.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.alignment_margin < 2:
            raise ValueError(
                f"losses.alignment_margin must be in [0, 2), got {self.alignment_margin}"
            )


def freeze_unused_alignment(projector: TextProjector, config: SourceLossConfig) -> None:
    """Freeze what no alignment gives a gradient, or DDP waits for it: the MLP at weight 0, tau without negatives."""
    if not config.alignment_weight:
        projector.alignment.requires_grad_(False)
    contrasts = config.alignment_weight and config.alignment_form == "contrastive"
    projector.alignment.log_temperature.requires_grad_(
        bool(contrasts or config.image_alignment_weight)
    )


def source_losses(
    config: SourceLossConfig,
    text: Tensor,
    mean: Tensor,
    logvar: Tensor,
    alignment: Tensor,
    log_temperature: Tensor,
    image_mean: Tensor,
) -> dict[str, Tensor]:
    """The terms of weight > 0, unweighted, and "source", their weighted sum. Latents B x K x C; image_mean scaled."""
    terms: dict[str, Tensor] = {}
    if config.alignment_weight:
        if config.alignment_form == "contrastive":
            terms["alignment"] = contrastive_loss(text, alignment, log_temperature)
        else:
            terms["alignment"] = cosine_margin_loss(text, alignment, config.alignment_margin)
    if config.kl_weight:
        terms["kl"] = kl_loss(mean, logvar, config.kl_form, config.kl_reduction)
    if config.image_regression_weight:
        terms["image_regression"] = latent_regression_loss(mean, image_mean)
    if config.image_alignment_weight:
        terms["image_alignment"] = contrastive_loss(mean, image_mean, log_temperature)
    weights = {
        "alignment": config.alignment_weight,
        "kl": config.kl_weight,
        "image_regression": config.image_regression_weight,
        "image_alignment": config.image_alignment_weight,
    }
    terms["source"] = sum(
        (weights[name] * term for name, term in terms.items()), start=mean.new_zeros(())
    )
    return terms


@dataclass
class ReconstructionLossConfig:
    """Losses of stage 1, but for the adversarial one (modeling/adversarial.py). A term of weight 0 is not computed."""

    l2_weight: float = 1.0
    l1_weight: float = 0.0
    gradient_weight: float = 0.0  # L1 of pixel differences: sharper edges in short runs
    perceptual_weight: float = (
        0.0  # 1.1 in the recipe; its parts and their weights files: `perceptual`
    )
    kl_weight: float = 1e-6  # on the KL summed over tokens and channels, mean over the batch

    def __post_init__(self):
        for name, weight in reconstruction_weights(self).items():
            if weight < 0:
                raise ValueError(f"losses.{name}_weight must not be negative, got {weight}")
        if not (self.l2_weight or self.l1_weight):
            raise ValueError(
                "losses: l2_weight and l1_weight are both 0, nothing would be reconstructed"
            )


def reconstruction_weights(config: ReconstructionLossConfig) -> dict[str, float]:
    """Weight of each term of stage 1 by its name."""
    return {
        "l2": config.l2_weight,
        "l1": config.l1_weight,
        "gradient": config.gradient_weight,
        "perceptual": config.perceptual_weight,
        "kl": config.kl_weight,
    }


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """The terms, those of weight > 0 also as "weighted/NAME", and "loss", the sum of these."""
    weighted = {name: weight * terms[name] for name, weight in weights.items() if weight}
    return (
        terms
        | {f"weighted/{name}": term for name, term in weighted.items()}
        | {"loss": sum(weighted.values())}
    )


def posterior_statistics(mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """How far the latents are used, B x K x C moments -> scalars without gradient: a posterior collapse shows at once.

    `posterior_std/C` is channel C's deviation, averaged; `channels_in_use` the share of channels whose mean varies over
    samples and tokens with a variance above 0.01 (active units, Burda et al. 2016).
    """
    mean, deviation = mean.detach().float(), torch.exp(0.5 * logvar.detach().float())
    per_channel = deviation.mean(dim=(0, 1))  # C
    used = (mean.var(dim=(0, 1), correction=0) > 0.01).float().mean()
    statistics = {
        "latent_std": mean.std(correction=0),
        "posterior_std": per_channel.mean(),
        "channels_in_use": used,
    }
    return statistics | {
        f"posterior_std/{channel}": value for channel, value in enumerate(per_channel.unbind())
    }
