"""modeling/layers.py: SwiGLU against its closed form; the start; errors.

Attention, rotation, sinusoids and positions are those of the release (test_convert_checkpoint.py).
"""

import math

import pytest
import torch
from conftest import full_disk
from torch import nn

from modeling.layers import SwiGLU, init_linear_, save_weights


@pytest.mark.parametrize("width", [32, 48])  # 85 hidden channels, which are padded, and 128
def test_swiglu_equals_its_formula_and_its_hidden_size_is_two_thirds_of_four_widths(width):
    layer, hidden = SwiGLU(width).double(), 8 * width // 3
    assert layer.out.in_features == hidden
    x = torch.randn(2, 3, width, dtype=torch.float64)
    gate, value = layer.gate_value(x).split(hidden, dim=-1)
    expected = layer.out(gate / (1 + torch.exp(-gate)) * value)
    torch.testing.assert_close(layer(x), expected)
    parameters = list(layer.parameters())
    found = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), parameters))


@pytest.mark.parametrize(
    ("layer", "fans"), [(nn.Linear(300, 200), 500), (nn.Conv2d(3, 64, 4), 3 * 4 * 4 + 64)]
)
def test_init_is_xavier_or_a_cut_normal_with_zero_biases(layer, fans):
    init_linear_(layer)
    bound = math.sqrt(6 / fans)
    assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    init_linear_(layer, std=0.02)
    assert layer.weight.abs().max() <= 0.04
    assert layer.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.05)


def test_weights_that_find_no_room_name_their_file(tmp_path):
    weights = {"x": torch.zeros(10_000)}
    save_weights(weights, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    said = r"b\.safetensors cannot be written: .*too large"
    with full_disk(1000), pytest.raises(OSError, match=said):
        save_weights(weights, tmp_path / "b.safetensors")
