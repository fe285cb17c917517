"""modeling/activation_checkpointing.py: the same gradients with less memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.activation_checkpointing import set_activation_checkpointing
from modeling.flowtok import FlowTok, FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize


def saved_bytes(run) -> int:
    """Bytes of distinct tensors that autograd keeps while `run` runs, weights included."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run().sum().backward()
    return sum(kept.values())


def make_flow():
    torch.manual_seed(0)
    model = FlowTok(FlowTokConfig(num_tokens=9, token_channels=4, width=32, depth=3, num_heads=2))
    # Modulation starts at zero, where most gradients are zero.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, null = torch.randn(4, 9, 4), torch.rand(4), torch.tensor([True, False, False, True])
    return model, lambda: model(x, t, null)


def make_tokenizer():
    torch.manual_seed(0)
    size = TransformerSize(32, 2, 2)
    config = ImageTokenizerConfig(16, 4, 6, 4, size, size, text_tokens=5, text_width=8)
    model = ImageTokenizer(config)
    images, states = torch.rand(2, 3, 16, 16), torch.randn(2, 5, 8)
    return model, lambda: model.decode(model.encode(images).mean, states)


@pytest.mark.parametrize("make", [make_flow, make_tokenizer])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_mode_gives_the_same_output_and_gradients_bit_for_bit(make, precision):
    results = {}
    for mode in ("none", "selective", "full"):
        model, run = make()
        set_activation_checkpointing(model, mode)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = run()
        output.float().square().sum().backward()
        results[mode] = [output.detach(), *(p.grad for p in model.parameters())]
    for mode in ("selective", "full"):
        assert all(map(torch.equal, results["none"], results[mode]))


@pytest.mark.parametrize("make", [make_flow, make_tokenizer])
def test_full_keeps_less_than_none_and_selective_computes_no_matrix_product_again(make):
    kept, flops = {}, {}
    for mode in ("none", "selective", "full"):
        model, run = make()
        set_activation_checkpointing(model, mode)
        with FlopCounterMode(display=False) as counter:
            kept[mode] = saved_bytes(run)
        flops[mode] = counter.get_total_flops()
    assert kept["full"] < 0.7 * kept["none"]
    assert flops["selective"] == flops["none"] < flops["full"]
