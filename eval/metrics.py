"""Measures on features of generated and real images: kernel distance, inception score, precision and recall, retrieval.

Pure functions on N x D features. The first three give torch-fidelity's numbers: its subsets and shuffles (NumPy's
RandomState of 2020), in float64 where it computes in float32. The Frechet distance is in eval/frechet.py.
"""

import numpy as np
import torch
from torch import Tensor

SEED = 2020  # of torch-fidelity
ROWS = 1024  # of a distance matrix at a time


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int, subset_size: int
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (xy/D + 1)^3, mean and deviation over subsets.

    Raises:
        ValueError: fewer samples than a subset takes, or than 2.
    """
    smallest = min(len(first), len(second))
    if subset_size < 2 or smallest < subset_size:
        raise ValueError(
            f"it needs subsets of at least 2 and at most all {smallest} images, got {subset_size}"
        )
    random, values = np.random.RandomState(SEED), []
    for _ in range(subsets):
        x, y = (
            features[
                torch.from_numpy(random.choice(len(features), subset_size, replace=False))
            ].double()
            for features in (first, second)
        )
        values.append(squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of n samples, n x D float64."""
    n = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    own = sum((k.sum() - k.trace()).item() for k in (kernel(x, x), kernel(y, y)))
    return own / (n * (n - 1)) - 2 * kernel(x, y).sum().item() / n**2


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """exp(E KL(p(y|x) | p(y))) (Salimans et al. 2016): N x classes -> mean and deviation over splits of shuffled rows.

    Raises:
        ValueError: fewer samples than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"it needs an image for each of {splits} splits, got {len(logits)}")
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(logits)))
    log_p = logits[order].double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = part.exp()
        scores.append((p * (part - p.mean(dim=0).log())).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Share of generated samples inside the real ones' balls, and of real ones inside the generated ones'.

    Kynkaanniemi et al. 2019: a sample's ball reaches to its `neighbours`-th nearest of its own set.

    Raises:
        ValueError: a set is not larger than `neighbours`.
    """
    smallest = min(len(generated), len(real))
    if smallest <= neighbours:
        raise ValueError(f"it needs more than {neighbours} images (neighbours), got {smallest}")
    generated, real = generated.double(), real.double()
    return covered(generated, real, neighbours), covered(real, generated, neighbours)


def covered(samples: Tensor, others: Tensor, neighbours: int) -> float:
    """Share of samples that lie in a ball of the others."""
    radii = torch.cat(
        [distances(rows, others).kthvalue(neighbours + 1).values for rows in others.split(ROWS)]
    )
    inside = torch.cat(
        [(distances(rows, others) <= radii).any(dim=1) for rows in samples.split(ROWS)]
    )
    return inside.double().mean().item()


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances N x M of N x D and M x D."""
    return torch.cdist(x, y)


def retrieval(generated: Tensor, real: Tensor, groups: Tensor, own: Tensor) -> tuple[float, float]:
    """Share of generated samples whose own real one is the nearest, or among the five nearest.

    Args:
        generated: N x D. real: M x D.
        groups: M numbers, equal for images that are equal and count as one.
        own: N indices into `real`.
    """
    nearest = []
    for rows in generated.double().split(ROWS):
        nearest.append(
            distances(rows, real.double()).topk(min(5, len(real)), largest=False).indices
        )
    hits = groups[torch.cat(nearest)] == groups[own][:, None]  # N x 5
    return hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
