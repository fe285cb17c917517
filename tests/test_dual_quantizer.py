"""The dual-codebook quantiser against numbers of the original (tests/tokenflow/README.md)."""

import pytest
import torch
from forks import in_two_processes
from tokenflow_vectors import quantizer_of, vectors
from torch.nn import functional as F

from modeling import dual_quantizer
from modeling.dual_quantizer import DualQuantizer, QuantizerConfig

# The codes' tolerance, the inputs' name, and what the losses' names begin with
NAMES = {"lookup": (1e-6, "z", ""), "pyramid": (1e-5, "features", "train_")}


@pytest.mark.parametrize(("group", "chunk"), [("lookup", 7), ("lookup", 4096), ("pyramid", 4096)])
def test_codes_losses_and_gradients_are_the_originals(group, chunk, monkeypatch):
    monkeypatch.setattr(dual_quantizer, "CHUNK", chunk)
    atol, name, kind = NAMES[group]
    quantizer, inputs = quantizer_of(group), vectors(f"{group}/{name}").requires_grad_()
    found = quantizer.lookup(inputs, quantizer.codes()) if group == "lookup" else quantizer(inputs)
    indices = torch.cat(found.indices, dim=1)
    assert torch.equal(indices.flatten(), vectors(f"{group}/indices").flatten())
    torch.testing.assert_close(found.codes, vectors(f"{group}/quantised"), atol=atol, rtol=0)
    torch.testing.assert_close(found.codebook, vectors(f"{group}/{kind}codebook_loss"))
    commitment = 0.25 * found.commitment
    torch.testing.assert_close(commitment, vectors(f"{group}/{kind}commitment_loss"))
    probed = (vectors(f"{group}/probe") * found.codes).sum()
    (found.codebook + commitment + probed).backward()
    pairs = {name: inputs, "semantic": quantizer.semantic_codes, "pixel": quantizer.pixel_codes}
    for key, tensor in pairs.items():
        expected = vectors(f"{group}/grad_{key}")
        torch.testing.assert_close(tensor.grad, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_scales", [1, 2, 3, 4, None])
def test_indices_decode_to_the_map_they_come_from_or_to_a_coarser_one(num_scales):
    quantizer = quantizer_of("pyramid")
    length = sum(scale**2 for scale in quantizer.config.scales[:num_scales])
    indices = vectors("pyramid/indices")[:, :length]
    name = f"first_{num_scales}_scales" if num_scales else "quantised"
    decoded = quantizer.decode(indices)
    torch.testing.assert_close(decoded, vectors(f"pyramid/{name}"), atol=1e-5, rtol=0)


def test_training_drops_one_scale_of_which_the_first_is_none():
    quantizer = DualQuantizer(QuantizerConfig(64, 8, 4, [1, 2, 3], drop_scale_probability=1.0))
    kept = {tuple(quantizer.draw_scales()) for _ in range(50)}
    assert kept == {(1, 2), (1, 3)}
    assert quantizer.eval().draw_scales() == [1, 2, 3]
    # The grid stays what it is without the last scale
    torch.manual_seed(0)
    assert quantizer.train()(torch.randn(1, 12, 3, 3)).codes.shape == (1, 12, 3, 3)


def test_without_a_weight_of_the_pixel_half_the_semantic_halves_decide():
    features = torch.randn(32, 12, 6, 6, generator=torch.Generator().manual_seed(0))
    found = quantizer_of("pyramid", pixel_distance_weight=0.0)(features).indices[0][:, 0]
    semantic = F.normalize(vectors("pyramid/semantic_codebook"), dim=-1)
    assert torch.equal(found, (features[:, :8].mean((2, 3)) @ semantic.T).argmax(-1))


def test_usage_and_perplexity_are_of_all_processes(tmp_path):
    expected = {"usage": 3 / 64, "usage/1": 3 / 64, "perplexity/1": 3.0, "usage/6": 0.0}
    for found in in_two_processes(count_choices, tmp_path):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5)


def count_choices(rank):
    """Scale 1 chooses 3 codes in both processes together, equally often; the others none."""
    chosen = torch.tensor([[1], [0], [2]] if rank == 0 else [[0], [2], [1]])
    return {name: float(x) for name, x in quantizer_of("pyramid").count([chosen]).items()}


def test_a_code_that_is_not_chosen_any_more_counts_as_unused():
    quantizer = quantizer_of("pyramid")
    quantizer.count([torch.tensor([[5]])])
    usage = [quantizer.count([torch.tensor([[7]])])["usage/1"] for _ in range(101)]
    assert usage[98] == pytest.approx(2 / 64)
    assert usage[100] == pytest.approx(1 / 64)
