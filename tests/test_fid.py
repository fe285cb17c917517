"""eval/features.py: batches that add up, equal and shifted sets, statistics files.

That the numbers are torch-fidelity's: tests/test_generation.py.
"""

import numpy as np
import pytest
import torch

from eval.features import FeatureSet, FeatureStatistics, Gaussian, fit_gaussian, frechet_distance

WIDTH = 12


def features(count, seed):
    """Correlated features whose mean is far larger than their deviation."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((WIDTH, WIDTH))
    return torch.from_numpy(50 + generator.standard_normal((count, WIDTH)) @ mixing)


def statistics(*batches):
    found = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        found.add(batch)
    return found


def test_batches_of_any_size_and_float32_features_add_up():
    x = features(100, seed=0).float()
    whole, parts = fit_gaussian(x), statistics(x[:1], x[1:64], x[64:64], x[64:]).gaussian()
    assert parts.count == 100
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [100, 5])
def test_the_distance_of_a_set_to_itself_is_zero(count):
    one = fit_gaussian(features(count, seed=3))
    shifted = Gaussian(one.mean + 1, one.covariance, count)
    assert abs(frechet_distance(one, one)) < 1e-3
    assert frechet_distance(one, shifted) == pytest.approx(WIDTH, abs=1e-3)


def test_too_few_images_and_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="got 1"):
        fit_gaussian(features(1, seed=0))
    with pytest.raises(ValueError, match="finite"):
        statistics(features(9, seed=0), torch.full((1, WIDTH), torch.nan)).gaussian()
    with pytest.raises(ValueError, match=r"\(3,\).*\(4, 4\)"):
        Gaussian(torch.zeros(3).double(), torch.eye(4).double(), 5)


def test_a_statistics_file_gives_back_what_was_saved(tmp_path):
    x = features(30, seed=0).float()
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
    "no covariance": {"mu": np.ones(3)},
    "of another width": GOOD | {"sigma": np.eye(4)},
    "not finite": GOOD | {"mu": np.full(3, np.nan)},
    "text": GOOD | {"mu": np.array(["a", "b", "c"])},
    "objects": GOOD | {"mu": np.array([1, None, {}], dtype=object)},
    "features of another number": GOOD | {"count": 5, "features": np.ones((4, 3))},
}


@pytest.mark.parametrize("name", [*BROKEN, "empty", "cut"])
def test_a_file_of_another_form_or_a_truncated_one_is_refused(tmp_path, name):
    file = tmp_path / "a.npz"
    np.savez(file, **BROKEN.get(name, GOOD))
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": content[:-100]}.get(name, content))
    with pytest.raises(ValueError, match=str(file)):
        FeatureSet.load(file)
