"""What only a GPU can prove, run by scripts/gpu_check.sh; here on whatever device there is."""

import pytest
import torch
from tiny_experiment import metrics, weights
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling.layers import Attention, rotation_tables
from training.checkpoint import EMA_FILE, MODEL_FILE

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("stage", ["tokenizer", "text_projector", "flowtok"])
def test_bf16_has_the_losses_and_gradients_of_fp32(chain, tmp_path, stage):
    folder = chain.run_in(tmp_path, stage, "training.precision=bf16")
    for file in (MODEL_FILE, EMA_FILE):
        assert {x.dtype for x in weights(folder, file).values()} == {torch.float32}
    runs = [metrics(chain.folder / stage), metrics(folder)]
    assert runs[0] != runs[1]
    for plain, half in zip(*runs, strict=True):
        assert half["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert half["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=0.1)


@pytest.mark.parametrize("tokens", [77, 410])  # of the flow, of the tokenizer's decoder
@pytest.mark.parametrize("head_dim", [64, 72])  # of B and the tokenizer, of XL
def test_attention_runs_by_a_flash_kernel_forward_and_backward(tokens, head_dim):
    attention = Attention(2 * head_dim, 2).to(DEVICE)
    rope = [table.to(DEVICE) for table in rotation_tables(torch.rand(tokens, head_dim // 2))]
    x = torch.randn(2, tokens, 2 * head_dim, device=DEVICE, requires_grad=True)
    with (
        torch.autocast(DEVICE.type, torch.bfloat16),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),  # an error where it can't serve
    ):
        attention(x, rope).float().square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.any()
