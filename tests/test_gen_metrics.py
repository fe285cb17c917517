"""eval/metrics.py: torch-fidelity's functions as reference, and cases whose answer is known."""

import math

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.metrics import (
    covered,
    inception_score,
    kernel_distance,
    precision_recall,
    retrieval,
    squared_mmd,
)


def features(count, seed, shift=0.0, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("first", "second"), [(40, 40), (31, 57)])
def test_kernel_distance_is_that_of_torch_fidelity(first, second):
    x, y = features(first, 0), features(second, 1, shift=0.4)
    mean, deviation = kernel_distance(x, y, 7, 20)
    expected = kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=20, verbose=False)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)


def test_kernel_distance_has_no_bias():
    values = [
        squared_mmd(features(8, i).double(), features(8, 1000 + i).double()) for i in range(400)
    ]
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values) / len(values)) ** 0.5
    assert abs(mean) < 4 * spread


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_that_of_torch_fidelity(splits):
    logits = 3 * features(47, 0)
    mean, deviation = inception_score(logits, splits)
    expected = isc_features_to_metric(logits, splits=splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-12)


def test_inception_score_lies_between_one_and_the_number_of_classes():
    assert inception_score(torch.zeros(20, 8), 2) == pytest.approx((1, 0))
    certain = torch.eye(8).repeat(5, 1) * 200
    assert inception_score(certain, 1)[0] == pytest.approx(8)
    assert math.isfinite(inception_score(torch.eye(8).repeat(5, 1) * 2000, 1)[0])


@pytest.mark.parametrize("rows", [7, 1024])
def test_precision_and_recall_are_those_of_torch_fidelity(rows, monkeypatch):
    monkeypatch.setattr("eval.metrics.ROWS", rows)
    x, y = features(60, 0) * 0.8, features(45, 1, shift=0.3)
    expected = prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    found = precision_recall(x, y, 3)
    assert found == pytest.approx((expected["precision"], expected["recall"]))
    assert 0 < found[1] < found[0] < 1  # the generated ones are narrower


def test_what_lies_in_no_ball_is_not_covered():
    real = features(30, 0)
    assert covered(real.double(), real.double(), 3) == 1
    assert covered(real.double() + 1000, real.double(), 3) == 0
    assert covered(torch.cat([real, real + 1000]).double(), real.double(), 3) == 0.5


def test_retrieval_counts_equal_images_as_one():
    real = torch.tensor([[0.0], [0.0], [1.0], [2.0], [3.0], [4.0], [9.0]])
    groups = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    queries = torch.tensor([[0.1], [8.9], [0.1], [0.1]])
    top1, top5 = retrieval(queries, real, groups, torch.tensor([1, 6, 2, 6]))
    assert (top1, top5) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (kernel_distance, (features(9, 0), features(5, 0), 3, 8), "at most all 5 images, got 8"),
        (kernel_distance, (features(9, 0), features(5, 0), 3, 1), "subsets of at least 2"),
        (inception_score, (features(9, 0), 10), "an image for each of 10 splits, got 9"),
        (
            precision_recall,
            (features(9, 0), features(3, 0), 3),
            r"more than 3 images \(neighbours\), got 3",
        ),
    ],
)
def test_too_few_images_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
