"""Metrics: of the features of generated and real images, and of pairs of images.

Kernel distance, inception score, precision and recall are torch-fidelity's functions on our
features, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.signal.windows import gaussian

from eval.feature_nets import Networks
from eval.features import FeatureSet, fit_gaussian, frechet_distance
from eval.programs import INSTALL
from eval.protocol import Caption, Protocol

ROWS = 1024  # of a distance matrix at a time
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of images in [0, 1]

# Of a protocol


@dataclass(frozen=True)
class Measured:
    """What metrics are computed from."""

    protocol: Protocol
    captions: Sequence[Caption]  # N: of each generated image
    networks: Networks
    reference: FeatureSet | None
    features: Tensor | None = None  # N x D; None: their network is absent
    cosines: Tensor | None = None  # N x 1, of image and caption


def compute_scores(measured: Measured) -> tuple[dict[str, float | None], dict[str, str]]:
    """(metrics by name, why one is null)."""
    # What can't be computed is null, and the others are there all the same: hours went into them
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for metric in measured.protocol.metrics:
        names = result_names(metric, measured.protocol)
        try:
            values |= zip(names, compute_score(metric, measured))
        except ValueError as error:
            values |= dict.fromkeys(names)
            reasons |= dict.fromkeys(names, str(error))
    return values, reasons


def result_names(metric: str, protocol: Protocol) -> tuple[str, ...]:
    # Only Inception's Frechet distance is FID; clean-fid's resize gives another number
    inception = "clean_fid" if protocol.resize == "clean" else "fid"
    return {
        "frechet": (inception if protocol.features == "inception" else "frechet_distance",),
        "kid": ("kid", "kid_std"),
        "inception_score": ("inception_score", "inception_score_std"),
        "precision_recall": ("precision", "recall"),
        "retrieval": ("retrieval_top1", "retrieval_top5"),
        "clip_score": ("clip_score",),
    }[metric]


def compute_score(metric: str, measured: Measured) -> tuple[float, ...]:
    """One metric's results, in the order of their names; ValueError: why it can't be computed."""
    protocol, reference = measured.protocol, measured.reference
    features, absent = measured.features, measured.networks.absent

    # Without a reference
    if metric == "clip_score":
        if measured.cosines is None:
            raise ValueError(absent["clip"])
        return (clip_score(measured.cosines),)
    if features is None:
        raise ValueError(absent["features"])
    if metric == "inception_score":
        logits = [measured.networks.features.logits(rows) for rows in features.split(ROWS)]
        return inception_score(torch.cat(logits), protocol.inception_splits)

    # Against its mean and covariance
    if reference is None:
        raise ValueError("no reference: add reference=[FILE.npz] (scripts/reference_stats.py)")
    if metric == "frechet":
        return (frechet_distance(fit_gaussian(features), reference.gaussian),)

    # Against its single images
    if reference.features is None:
        file = reference.description["file"]
        raise ValueError(f"{file} was made without --keep-features (scripts/reference_stats.py)")
    if metric == "retrieval":
        own = torch.tensor([reference.rows[caption.source] for caption in measured.captions])
        found = retrieval(features.cpu(), reference.features, reference.groups, own)
        return (found["top1"], found["top5"])
    real = reference.features.to(features)
    if metric == "kid":
        return kernel_distance(features, real, protocol.kid_subsets, protocol.kid_subset_size)
    return precision_recall(features, real, protocol.neighbours)


# Of features: generated N x D, real M x D, on one device; ValueError of too few images


def clip_score(cosines: Tensor) -> float:
    """N cosines -> 100 times their mean, negative ones counting as 0."""
    if not cosines.isfinite().all():
        raise ValueError("a cosine is not finite")
    return 100 * cosines.double().clamp(min=0).mean().item()


def kernel_distance(
    generated: Tensor, real: Tensor, subsets: int, subset_size: int
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (xy/D + 1)^3.

    Returns mean and deviation over subsets.
    """
    metric = fidelity().metric_kid
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "verbose": False}
    # Sums of cubes lose digits in float32
    found = metric.kid_features_to_metric(generated.double(), real.double(), **options)
    return found[metric.KEY_METRIC_KID_MEAN], found[metric.KEY_METRIC_KID_STD]


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """exp(E KL(p(y|x) | p(y))) (Salimans et al. 2016) of N x classes.

    Returns mean and deviation over splits of shuffled rows.
    """
    # A split without a row would make the mean no number, without a word
    refuse_few(logits, least=splits, key="inception_splits")
    metric = fidelity().metric_isc
    found = metric.isc_features_to_metric(logits.cpu(), splits)
    return found[metric.KEY_METRIC_ISC_MEAN], found[metric.KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Share of generated images inside the real ones' balls, and of real ones inside theirs.

    Kynkaanniemi et al. 2019: an image's ball reaches to its `neighbours`-th nearest of its own set.
    """
    refuse_few(generated, real, least=neighbours + 1, key="neighbours + 1")
    metric = fidelity().metric_prc
    options = {"prc_neighborhood": neighbours, "prc_batch_size": ROWS}
    options |= {"save_cpu_ram": True, "verbose": False}
    found = metric.prc_features_to_metric(generated.double(), real.double(), **options)
    return found[metric.KEY_METRIC_PRECISION], found[metric.KEY_METRIC_RECALL]


def refuse_few(*sets: Tensor, least: int, key: str) -> None:
    """ValueError if a set has fewer images than a metric needs."""
    smallest = min(map(len, sets))
    if smallest < least:
        raise ValueError(f"{smallest} images, expected at least {least} ({key})")


def fidelity() -> ModuleType:
    """torch-fidelity with the modules of its metrics; ValueError if it is not installed."""
    try:
        import torch_fidelity.metric_isc
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
    except ImportError as error:
        raise ValueError(f"it needs torch-fidelity ({error}): {INSTALL}") from error
    return torch_fidelity


def retrieval(queries: Tensor, pool: Tensor, groups: Tensor, own: Tensor) -> dict[str, float]:
    """Share of queries whose own image is the nearest of the pool, or among the five nearest.

    queries: N x ..., pool: M x ..., own: N indices into it. groups: M numbers, equal for images
    that count as the same.
    """
    # Rows of the distance matrix a few at a time
    pool, nearest = pool.flatten(1).double(), []
    for rows in queries.flatten(1).double().split(ROWS):
        nearest.append(torch.cdist(rows, pool).topk(min(5, len(pool)), largest=False).indices)
    hits = groups[torch.cat(nearest)] == groups[own][:, None]  # N x 5
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    return {"top1": top1, "top5": top5}


# Of pairs of images


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, infinite for equal images.

    B x 3 x R x R in [0, 1] twice -> B.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004): B x 3 x R x R in [0, 1] twice -> B.

    R > 5. 11 x 11 Gaussian window of sigma 1.5, mean over channels and all positions, images
    mirrored at their borders: as torchmetrics.
    """
    # The window, normalised
    x, y = images.double(), others.double()
    window = gaussian(SSIM_WINDOW, std=SSIM_SIGMA, dtype=torch.float64, device=x.device)
    window = window / window.sum()
    # Local means of x, y and their products, by two passes of the separable window
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # 5B3 x 1 x R x R
    maps = F.pad(maps, (SSIM_WINDOW // 2,) * 4, mode="reflect")
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    mean_x, mean_y, xx, yy, xy = maps.view(5, len(x), -1).unbind()
    # Wang et al. 2004, eq. 13
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * (xy - mean_x * mean_y) + SSIM_C2) / (xx - mean_x**2 + yy - mean_y**2 + SSIM_C2)
    return (luminance * structure).mean(dim=1)
