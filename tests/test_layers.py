"""modeling/layers.py: rotary angles, attention, SwiGLU and sinusoids against closed forms; wrong sizes are refused."""

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat
from torch import nn
from torch.nn import functional as F

from modeling.layers import (
    Attention,
    SwiGLU,
    axial_rope_table,
    init_linear_,
    rotate_pairs,
    sincos_position_table,
    timestep_sinusoids,
)

GRID, HEAD_DIM = 3, 16


def grid_positions(size=GRID):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return rows.flatten(), columns.flatten()


def rope(head_dim=HEAD_DIM):
    angles = axial_rope_table(*grid_positions(), head_dim)
    return angles.cos(), angles.sin()


def test_rope_angle_is_position_times_frequency_with_the_rows_in_the_first_half():
    half = HEAD_DIM // 2
    table = axial_rope_table(torch.tensor([2]), torch.tensor([5]), HEAD_DIM)
    expected = [2 * 10000 ** (-2 * i / half) for i in range(half // 2)]
    expected += [5 * 10000 ** (-2 * i / half) for i in range(half // 2)]
    torch.testing.assert_close(table, torch.tensor([expected]))


def test_rope_takes_positions_between_patches():
    middle = axial_rope_table(torch.tensor([0.5]), torch.tensor([1.5]), HEAD_DIM)
    ends = axial_rope_table(torch.tensor([0, 1]), torch.tensor([1, 2]), HEAD_DIM)
    torch.testing.assert_close(middle, ends.mean(dim=0, keepdim=True))


def test_rotation_equals_timms_rotary_embedding():
    timm_rope = RotaryEmbeddingCat(HEAD_DIM, in_pixels=False, feat_shape=[GRID, GRID])
    x = torch.randn(2, 4, GRID**2, HEAD_DIM)
    torch.testing.assert_close(
        rotate_pairs(x, *rope()), apply_rot_embed_cat(x, timm_rope.get_embed())
    )


def test_rotation_of_a_pair_is_the_plane_rotation():
    angle = torch.tensor([[math.pi / 2]])
    turned = rotate_pairs(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), angle.cos(), angle.sin())
    torch.testing.assert_close(turned.flatten(), torch.tensor([-4.0, 3.0]))


def test_rotated_scores_depend_on_the_offset_only():
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, dtype=torch.float64)

    def score(query_at, key_at):
        angles = [
            axial_rope_table(torch.tensor([r]), torch.tensor([c]), HEAD_DIM).double()
            for r, c in (query_at, key_at)
        ]
        turned = [rotate_pairs(x, a.cos(), a.sin()) for x, a in zip((q, k), angles)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score((0, 1), (2, 4)), score((5, 6), (7, 9)), rtol=0, atol=1e-5)
    assert (score((0, 1), (2, 4)) - score((0, 1), (4, 2))).abs() > 1e-3


def test_angle_zero_leaves_a_token_as_it_is():
    x = torch.randn(1, 2, 5, HEAD_DIM)
    assert torch.equal(
        rotate_pairs(x, torch.ones(5, HEAD_DIM // 2), torch.zeros(5, HEAD_DIM // 2)), x
    )


@pytest.mark.parametrize("with_rope", [False, True])
def test_attention_equals_softmax_by_hand(with_rope):
    width, heads, tokens = 32, 2, GRID**2
    attention = Attention(width, heads).double()
    x = torch.randn(2, tokens, width, dtype=torch.float64)
    tables = tuple(table.double() for table in rope()) if with_rope else None
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).split(width, dim=-1)
    outputs = []
    for head in range(heads):
        channels = slice(head * width // heads, (head + 1) * width // heads)
        qh, kh, vh = q[..., channels], k[..., channels], v[..., channels]
        if with_rope:
            qh, kh = (rotate_pairs(y[:, None], *tables)[:, 0] for y in (qh, kh))
        weights = torch.softmax(qh @ kh.mT / math.sqrt(width // heads), dim=-1)
        outputs.append(weights @ vh)
    expected = F.linear(torch.cat(outputs, dim=-1), attention.out.weight, attention.out.bias)
    torch.testing.assert_close(attention(x, tables), expected)


def test_attention_without_positions_is_equivariant_to_the_order_and_with_them_is_not():
    attention = Attention(32, 2)
    nn.init.normal_(attention.qkv.weight)
    x, order = torch.randn(1, GRID**2, 32), torch.arange(GRID**2).flip(0)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])
    assert not torch.allclose(
        attention(x[:, order], rope()), attention(x, rope())[:, order], atol=1e-3
    )


@pytest.mark.parametrize("width", [24, 32])
def test_swiglu_equals_its_formula_and_its_hidden_size_is_two_thirds_of_four_widths(width):
    layer = SwiGLU(width).double()
    hidden = 8 * width // 3
    assert layer.out.in_features == hidden
    x = torch.randn(2, 3, width, dtype=torch.float64)
    packed = x @ layer.gate_value.weight.T + layer.gate_value.bias
    gate, value = packed[..., :hidden], packed[..., hidden:]
    expected = (gate / (1 + torch.exp(-gate)) * value) @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("width", "hidden"), [(512, 1365), (768, 2048), (1024, 2730)])
def test_swiglu_of_the_papers_widths_has_the_papers_hidden_size(width, hidden):
    with torch.device("meta"):
        assert SwiGLU(width).out.in_features == hidden


def test_position_table_is_sines_then_cosines():
    width = 8
    table = sincos_position_table(5, width)
    for position in range(5):
        for i in range(width // 2):
            angle = position * 10000 ** (-2 * i / width)
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, width // 2 + i].item() == pytest.approx(
                math.cos(angle), abs=1e-6
            )


def test_time_sinusoids_are_cosines_then_sines_of_the_unscaled_time():
    t = torch.tensor([0.0, 0.25, 1.0])
    table = timestep_sinusoids(t, 256)
    i = torch.arange(128, dtype=torch.float64)
    angles = t.double()[:, None] * 10000 ** (-i / 128)
    torch.testing.assert_close(
        table, torch.cat([angles.cos(), angles.sin()], dim=1).float(), rtol=0, atol=1e-6
    )


def test_time_sinusoids_stay_float32_for_half_precision_times():
    assert timestep_sinusoids(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("head_dim", [6, 10, 15])
def test_rope_refuses_head_sizes_that_are_no_multiple_of_four(head_dim):
    with pytest.raises(ValueError, match=f"multiple of 4, got {head_dim}"):
        axial_rope_table(*grid_positions(), head_dim)


def test_attention_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="width 32 is not divisible by num_heads 5"):
        Attention(32, 5)


def test_init_is_xavier_or_a_cut_normal_with_zero_biases():
    layer = nn.Linear(300, 200)
    init_linear_(layer)
    bound = math.sqrt(6 / 500)
    assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    init_linear_(layer, std=0.02)
    assert layer.weight.abs().max() <= 0.04 and layer.weight.std().item() == pytest.approx(
        0.88 * 0.02, rel=0.05
    )


def test_init_of_a_convolution_counts_all_its_inputs():
    convolution = nn.Conv2d(3, 64, 4)
    init_linear_(convolution)
    bound = math.sqrt(6 / (3 * 4 * 4 + 64))
    assert 0.99 * bound < convolution.weight.abs().max() <= bound and not convolution.bias.any()


def test_init_leaves_other_modules_alone():
    norm = nn.LayerNorm(4)
    init_linear_(norm)
    assert torch.equal(norm.weight, torch.ones(4))
