"""The dual-codebook quantiser against numbers of the original (tests/tokenflow/README.md)."""

import pytest
import torch
from forks import in_two_processes
from tokenflow_vectors import vectors
from torch.nn import functional as F

from modeling import dual_quantizer
from modeling.dual_quantizer import DualQuantizer, QuantizerConfig

SMALL = QuantizerConfig(num_codes=64, semantic_channels=8, pixel_channels=4, scales=[1, 2, 3, 5, 6])


def quantizer_of(group, **changes):
    """The quantiser with the codebooks of a group of the vectors."""
    config = QuantizerConfig(**{**vars(SMALL), "drop_scale_probability": 0.0, **changes})
    quantizer = DualQuantizer(config)
    quantizer.semantic_codes.data = vectors(f"{group}/semantic_codebook")
    quantizer.pixel_codes.data = vectors(f"{group}/pixel_codebook")
    return quantizer


@pytest.mark.parametrize("chunk", [7, 4096])
def test_a_lookup_and_its_gradients_are_the_originals(chunk, monkeypatch):
    monkeypatch.setattr(dual_quantizer, "CHUNK", chunk)
    quantizer = quantizer_of("lookup")
    z = vectors("lookup/z").requires_grad_()
    found = quantizer.lookup(z, quantizer.codes())
    assert torch.equal(found.indices[0].flatten(), vectors("lookup/indices"))
    torch.testing.assert_close(found.codes, vectors("lookup/quantised"), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.codebook, vectors("lookup/codebook_loss"))
    torch.testing.assert_close(0.25 * found.commitment, vectors("lookup/commitment_loss"))
    (
        found.codebook + 0.25 * found.commitment + (vectors("lookup/probe") * found.codes).sum()
    ).backward()
    compare_gradients(quantizer, z, "lookup", "z")
    # Theirs counts the zeros with which its buffer starts
    used = {*found.indices[0].flatten().tolist(), 0}
    assert len(used) / 64 == vectors("lookup/usage").item()


def compare_gradients(quantizer, inputs, group, name):
    pairs = {name: inputs, "semantic": quantizer.semantic_codes, "pixel": quantizer.pixel_codes}
    for key, tensor in pairs.items():
        torch.testing.assert_close(
            tensor.grad, vectors(f"{group}/grad_{key}"), atol=1e-6, rtol=1e-5
        )


def test_the_pyramid_and_its_gradients_are_the_originals():
    quantizer = quantizer_of("pyramid")
    features = vectors("pyramid/features").requires_grad_()
    found = quantizer(features)
    assert torch.equal(torch.cat(found.indices, dim=1), vectors("pyramid/indices"))
    torch.testing.assert_close(found.codes, vectors("pyramid/quantised"), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.codebook, vectors("pyramid/train_codebook_loss"))
    torch.testing.assert_close(0.25 * found.commitment, vectors("pyramid/train_commitment_loss"))
    (
        found.codebook + 0.25 * found.commitment + (vectors("pyramid/probe") * found.codes).sum()
    ).backward()
    compare_gradients(quantizer, features, "pyramid", "features")


@pytest.mark.parametrize("num_scales", [1, 2, 3, 4, None])
def test_indices_decode_to_the_map_they_come_from_or_to_a_coarser_one(num_scales):
    quantizer = quantizer_of("pyramid")
    name = f"first_{num_scales}_scales" if num_scales else "quantised"
    indices = vectors("pyramid/indices")
    if num_scales:
        indices = indices[:, : sum(s**2 for s in SMALL.scales[:num_scales])]
    decoded = quantizer.decode(indices, num_scales)
    torch.testing.assert_close(decoded, vectors(f"pyramid/{name}"), atol=1e-5, rtol=0)


def test_training_drops_one_scale_of_which_the_first_is_none():
    quantizer = DualQuantizer(QuantizerConfig(64, 8, 4, [1, 2, 3], drop_scale_probability=1.0))
    kept = {tuple(quantizer.draw_scales()) for _ in range(50)}
    assert kept == {(1, 2), (1, 3)}
    assert quantizer.eval().draw_scales() == [1, 2, 3]
    # The grid stays what it is without the last scale
    torch.manual_seed(0)
    assert quantizer.train()(torch.randn(1, 12, 3, 3)).codes.shape == (1, 12, 3, 3)


def test_the_pixel_weight_changes_which_pair_is_nearest():
    features = torch.randn(2, 12, 6, 6, generator=torch.Generator().manual_seed(0))
    same, other = (quantizer_of("pyramid", pixel_distance_weight=w)(features) for w in (1.0, 0.0))
    assert not torch.equal(same.indices[-1], other.indices[-1])
    # Without it the semantic halves alone decide
    found = features[:, :8].mean((2, 3))
    semantic = F.normalize(vectors("pyramid/semantic_codebook"), dim=-1)
    assert torch.equal(other.indices[0][:, 0], (found @ semantic.T).argmax(-1))


def test_usage_and_perplexity_are_of_all_processes(tmp_path):
    expected = {"usage": 3 / 64, "usage/1": 3 / 64, "perplexity/1": 3.0, "usage/6": 0.0}
    for found in in_two_processes(count_choices, tmp_path):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5)


def count_choices(rank):
    """Scale 1 chooses 3 codes in both processes together, equally often; the others none."""
    chosen = torch.tensor([[1], [0], [2]] if rank == 0 else [[0], [2], [1]])
    return {name: float(value) for name, value in DualQuantizer(SMALL).count([chosen]).items()}


def test_a_code_that_is_not_chosen_any_more_counts_as_unused():
    quantizer = DualQuantizer(SMALL)
    quantizer.count([torch.tensor([[5]])])
    usage = [quantizer.count([torch.tensor([[7]])])["usage/1"] for _ in range(101)]
    assert usage[98] == pytest.approx(2 / 64)
    assert usage[100] == pytest.approx(1 / 64)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_codes": 0}, "num_codes"),
        ({"scales": [2, 1]}, "scales"),
        ({"scales": []}, "scales"),
        ({"drop_scale_probability": 2.0}, "drop_scale_probability"),
    ],
)
def test_sizes_that_can_not_be_are_refused(changes, key):
    with pytest.raises(ValueError, match=key):
        QuantizerConfig(**changes)
