"""eval/scores.py: cases whose answer is known, too few images.

That the numbers are torch-fidelity's: tests/test_generation.py, on the images of an evaluation.
"""

import pytest
import torch
from conftest import refusal

from eval.scores import (
    clip_score,
    inception_score,
    kernel_distance,
    precision_recall,
    retrieval,
)


def features(count, seed, shift=0.0, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_kernel_distance_is_unbiased_and_computed_in_float64():
    x, y = features(40, 0), features(40, 0, shift=1)
    assert kernel_distance(x, x, 3, 40)[0] < 0 < kernel_distance(x, y, 3, 20)[0]
    assert kernel_distance(x.double(), y.double(), 3, 20) == kernel_distance(x, y, 3, 20)


@pytest.mark.parametrize("rows", [7, 1024])
def test_what_lies_in_no_ball_is_not_covered_in_any_part_of_the_matrix(rows, monkeypatch):
    monkeypatch.setattr("eval.scores.ROWS", rows)
    real = features(30, 0)
    assert precision_recall(real, real, 3) == (1, 1)
    assert precision_recall(real + 1000, real, 3) == (0, 0)
    assert precision_recall(torch.cat([real, real + 1000]), real, 3) == (0.5, 1)


def test_negative_cosines_count_as_zero():
    assert clip_score(torch.tensor([[-0.5], [0.5]])) == 25


@pytest.mark.parametrize(
    ("compute", "parts"),
    [
        (lambda: kernel_distance(features(9, 0), features(5, 0), 3, 8), ["5", "kid_subset_size"]),
        (lambda: inception_score(features(9, 0), 10), ["9", "inception_splits"]),
        (lambda: precision_recall(features(9, 0), features(3, 0), 3), ["3", "neighbours"]),
        (lambda: clip_score(torch.full((2, 1), torch.nan)), ["cosine"]),
    ],
)
def test_what_cannot_be_computed_is_refused(compute, parts):
    with refusal(*parts):
        compute()


# Retrieval

N = 12
POOL = torch.arange(N).float().view(N, 1, 1) * torch.ones(1, 2, 3)  # |i - j| sqrt(6) apart
UNIQUE = torch.arange(N) + 100  # group numbers are no positions in the pool


@pytest.mark.parametrize(
    ("queries", "own", "top1", "top5"),
    [
        (POOL[[3, 0, 11]] + 0.1, [3, 0, 11], 1, 1),
        (POOL[[11, 10]], [0, 1], 0, 0),  # far from their own
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
    elsewhere = UNIQUE.clone()
    elsewhere[7] = elsewhere[8]  # equal images do not make a far query right
    assert retrieval(POOL[[2]], POOL, elsewhere, torch.tensor([7]))["top5"] == 0
