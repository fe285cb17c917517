"""eval/frechet.py: closed forms, scipy and numpy as references, sums over batches and processes, statistics files."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from eval.frechet import (
    FeatureStatistics,
    Gaussian,
    frechet_distance,
    load_statistics,
    save_statistics,
)

WIDTH = 12


def features(count, seed, width=WIDTH):
    """Correlated features whose mean is far larger than their deviation."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(
        50 + generator.standard_normal((count, width)) @ generator.standard_normal((width, width))
    )


def statistics(*batches):
    found = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        found.add(batch)
    return found


def gaussian(*batches):
    return statistics(*batches).gaussian()


def test_mean_and_covariance_are_numpys():
    x = features(100, seed=0)
    found = gaussian(x)
    assert found.count == 100 and found.mean.dtype == found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.mean, x.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_batches_of_any_size_and_float32_features_add_up():
    x = features(100, seed=0).float()
    whole, parts = gaussian(x), gaussian(x[:1], x[1:64], x[64:64], x[64:])
    assert parts.count == 100
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-9)


def test_the_distance_of_diagonal_gaussians_is_its_closed_form():
    means, deviations = torch.rand(2, WIDTH).double(), torch.rand(2, WIDTH).double()
    first, second = (Gaussian(m, torch.diag(d**2), 10) for m, d in zip(means, deviations))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("count", [100, 5])  # 5: covariances of rank 4
def test_the_distance_is_that_by_the_matrix_root(count):
    first, second = gaussian(features(count, seed=1)), gaussian(features(count, seed=2))
    root = scipy.linalg.sqrtm(
        first.covariance.numpy() @ second.covariance.numpy() + 1e-12 * np.eye(WIDTH)
    ).real
    traces = (
        np.trace(first.covariance.numpy())
        + np.trace(second.covariance.numpy())
        - 2 * np.trace(root)
    )
    expected = (first.mean - second.mean).square().sum().item() + traces
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(second, first) == pytest.approx(
        frechet_distance(first, second), rel=1e-6
    )


@pytest.mark.parametrize("count", [100, 5])
def test_the_distance_of_a_set_to_itself_is_zero(count):
    one = gaussian(features(count, seed=3))
    assert abs(frechet_distance(one, one)) < 1e-3
    assert frechet_distance(one, Gaussian(one.mean + 1, one.covariance, count)) == pytest.approx(
        WIDTH, abs=1e-3
    )


def test_other_widths_too_few_images_and_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="features of widths 12 and 3 have no distance"):
        frechet_distance(gaussian(features(9, seed=0)), gaussian(features(9, seed=0, width=3)))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        gaussian(features(1, seed=0))
    with pytest.raises(ValueError, match="not finite"):
        gaussian(features(9, seed=0), torch.full((1, WIDTH), torch.nan))
    with pytest.raises(
        ValueError, match=r"mean \(3,\) and covariance \(4, 4\), expected D and D x D"
    ):
        Gaussian(torch.zeros(3).double(), torch.eye(4).double(), 5)


def run_one_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    own = statistics(features(7, seed=0)[rank * 3 :][: 3 + rank])  # 3 and 4 of them
    total = own.over_processes()
    torch.save(
        [own.count, own.over_processes().sum, total.count, total.sum, total.outer],
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_processes_sum_up_to_one_and_keep_their_own_sums(tmp_path):
    start_processes(run_one_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    whole = statistics(features(7, seed=0))
    for rank in range(2):
        own_count, again, count, total, outer = torch.load(tmp_path / f"{rank}.pt")
        assert (own_count, count) == (3 + rank, 7)
        assert torch.equal(again, total)  # summing up twice doubles nothing
        torch.testing.assert_close(total, whole.sum, rtol=1e-12, atol=0)
        torch.testing.assert_close(outer, whole.outer, rtol=1e-12, atol=0)


def test_one_process_alone_is_its_own_sum():
    own = statistics(features(7, seed=0))
    total = own.over_processes()
    total.add(features(2, seed=1))
    assert (own.count, total.count) == (7, 9)


def test_a_statistics_file_gives_back_what_was_saved(tmp_path):
    saved, description = (
        gaussian(features(30, seed=0)),
        {"features": "InceptionV3", "image_size": 256},
    )
    save_statistics(tmp_path / "a.npz", saved, description)
    found, text = load_statistics(tmp_path / "a.npz")
    assert torch.equal(found.mean, saved.mean) and torch.equal(found.covariance, saved.covariance)
    assert (found.count, text) == (30, description)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_of_another_code_has_no_count(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.ones(3, np.float32), sigma=np.eye(3))
    found, description = load_statistics(tmp_path / "a.npz")
    assert (found.mean.dtype, found.count, description) == (torch.float64, None, {})
    save_statistics(tmp_path / "b.npz", found, description)
    assert load_statistics(tmp_path / "b.npz")[0].count is None


def broken_files():
    good = {"mu": np.ones(3), "sigma": np.eye(3)}
    return {
        "no covariance": {"mu": np.ones(3)},
        "of another width": good | {"sigma": np.eye(4)},
        "not finite": good | {"mu": np.full(3, np.nan)},
        "text": good | {"mu": np.array(["a", "b", "c"])},
        "objects": good | {"mu": np.array([1, None, {}], dtype=object)},
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_file_of_another_form_is_refused(tmp_path, name):
    np.savez(tmp_path / "a.npz", **broken_files()[name])
    with pytest.raises(ValueError, match="a.npz is no statistics file, or cut short"):
        load_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0, 100, -1000, -30])
def test_a_truncated_file_is_refused(tmp_path, kept):
    save_statistics(tmp_path / "a.npz", gaussian(features(30, seed=0)), {})
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:kept])
    with pytest.raises(ValueError, match="a.npz is no statistics file, or cut short"):
        load_statistics(tmp_path / "a.npz")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="statistics file .*b.npz does not exist"):
        load_statistics(tmp_path / "b.npz")


def test_a_description_that_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        save_statistics(tmp_path / "a.npz", gaussian(features(30, seed=0)), {"path": object()})
    assert not list(tmp_path.iterdir())
