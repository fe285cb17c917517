"""eval/features.py and eval/scores.py: cases whose answer is known, statistics files, refusals.

That the numbers are torch-fidelity's: tests/test_generation.py, on the images of an evaluation.
"""

import numpy as np
import pytest
import torch
from conftest import refusal

from eval.features import FeatureSet, FeatureStatistics, Gaussian, fit_gaussian, frechet_distance
from eval.scores import (
    clip_score,
    inception_score,
    kernel_distance,
    precision_recall,
    retrieval,
)

WIDTH = 12


def features(count, seed, shift=0.0, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def correlated(count, seed):
    """Features whose mean is far larger than their deviation."""
    return 50 + features(count, seed).double() @ features(WIDTH, seed + 1).double()


# Gaussians


def test_batches_of_any_size_and_float32_features_add_up():
    x = correlated(100, seed=0).float()
    whole, parts = fit_gaussian(x), FeatureStatistics(WIDTH)
    for batch in (x[:1], x[1:64], x[64:64], x[64:]):
        parts.add(batch)
    parts = parts.gaussian()
    assert parts.count == 100
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [100, 5])
def test_the_distance_of_a_set_to_itself_is_zero(count):
    one = fit_gaussian(correlated(count, seed=3))
    shifted = Gaussian(one.mean + 1, one.covariance, count)
    assert abs(frechet_distance(one, one)) < 1e-3
    assert frechet_distance(one, shifted) == pytest.approx(WIDTH, abs=1e-3)


def test_a_statistics_file_gives_back_what_was_saved(tmp_path):
    x = correlated(30, seed=0).float()
    saved = FeatureSet(fit_gaussian(x), {"image_size": 256}, x)
    saved.save(tmp_path / "a.npz")
    found = FeatureSet.load(tmp_path / "a.npz")
    assert torch.equal(found.gaussian.mean, saved.gaussian.mean)
    assert torch.equal(found.gaussian.covariance, saved.gaussian.covariance)
    assert torch.equal(found.features, x)
    assert (found.gaussian.count, found.description) == (30, {"image_size": 256})
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_of_another_code_has_neither_count_nor_features(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.ones(3, np.float32), sigma=np.eye(3))
    found = FeatureSet.load(tmp_path / "a.npz")
    assert (found.gaussian.mean.dtype, found.gaussian.count) == (torch.float64, None)
    assert (found.description, found.features) == ({}, None)


GOOD = {"mu": np.ones(3), "sigma": np.eye(3)}
BROKEN = {
    "of another width": GOOD | {"sigma": np.eye(4)},
    "not finite": GOOD | {"mu": np.full(3, np.nan)},
    "objects": GOOD | {"mu": np.array([1, None, {}], dtype=object)},
    "features of another number": GOOD | {"count": 5, "features": np.ones((4, 3))},
}


@pytest.mark.parametrize("name", [*BROKEN, "absent", "cut"])
def test_a_file_of_another_form_or_a_truncated_one_is_refused(tmp_path, name):
    file = tmp_path / "a.npz"
    if name != "absent":
        np.savez(file, **BROKEN.get(name, GOOD))
    if name == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(file)):
        FeatureSet.load(file)


# Scores


def test_kernel_distance_is_unbiased_and_computed_in_float64():
    x, y = features(40, 0), features(40, 0, shift=1)
    assert kernel_distance(x, x, 3, 40)[0] < 0 < kernel_distance(x, y, 3, 20)[0]
    assert kernel_distance(x.double(), y.double(), 3, 20) == kernel_distance(x, y, 3, 20)


@pytest.mark.parametrize("rows", [7, 1024])
def test_what_lies_in_no_ball_is_not_covered_in_any_part_of_the_matrix(rows, monkeypatch):
    monkeypatch.setattr("eval.scores.ROWS", rows)
    real = features(30, 0)
    assert precision_recall(real, real, 3) == (1, 1)
    assert precision_recall(torch.cat([real, real + 1000]), real, 3) == (0.5, 1)


@pytest.mark.parametrize(
    ("compute", "parts"),
    [
        (lambda: kernel_distance(features(9, 0), features(5, 0), 3, 8), ["5", "kid_subset_size"]),
        (lambda: inception_score(features(9, 0), 10), ["9", "inception_splits"]),
        (lambda: precision_recall(features(9, 0), features(3, 0), 3), ["3", "neighbours"]),
        (lambda: clip_score(torch.full((2, 1), torch.nan)), ["cosine"]),
        (lambda: fit_gaussian(features(1, 0)), ["got 1"]),
    ],
)
def test_what_cannot_be_computed_is_refused(compute, parts):
    with refusal(*parts):
        compute()
    assert clip_score(torch.tensor([[-0.5], [0.5]])) == 25  # negative ones count as zero


# Retrieval

N = 12
POOL = torch.arange(N).float().view(N, 1, 1) * torch.ones(1, 2, 3)  # |i - j| sqrt(6) apart
UNIQUE = torch.arange(N) + 100  # group numbers are no positions in the pool


@pytest.mark.parametrize(
    ("queries", "own", "top1", "top5"),
    [
        (POOL[[3, 0, 11]] + 0.1, [3, 0, 11], 1, 1),
        (POOL[[0, 11, 2, 4]], [0, 1, 2, 3], 0.5, 0.75),  # right, far off, right, next to it
        (POOL[:1] - 1, [4], 0, 1),  # the fifth nearest
        (POOL[:1] - 1, [5], 0, 0),  # the sixth
    ],
)
def test_retrieval_is_the_share_of_queries_whose_own_image_is_near(queries, own, top1, top5):
    found = retrieval(queries, POOL, UNIQUE, torch.tensor(own))
    assert found == {"top1": top1, "top5": top5}


def test_retrieval_counts_equal_images_as_one():
    real = torch.tensor([[0.0], [0.0], [1.0], [2.0], [3.0], [4.0], [9.0]])
    groups = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    queries = torch.tensor([[0.1], [8.9], [0.1], [0.1]])
    found = retrieval(queries, real, groups, torch.tensor([1, 6, 2, 6]))
    assert found == {"top1": 0.5, "top5": 0.75}
