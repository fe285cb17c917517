"""Pixel nets of the dual tokenizer."""

import zlib

import numpy as np
import pytest
import torch

from modeling.image_tokenizer import TransformerSize
from modeling.pixel_nets import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    ConvolutionSize,
    PatchDecoder,
    PatchEncoder,
)

SMALL = ConvolutionSize(32, [1, 2], blocks=1, decoder_channels=32, decoder_blocks=1)
# The first values of what the nets give for the weights and inputs below. With other weights they
# were compared with the original's (tests/tokenflow/README.md).
ENCODED = [-0.016271, -0.220909, -0.169197, 0.360487, 0.238573, 0.040379, -0.177867, 0.395557]
DECODED = [-0.003923, -0.460103, -0.048255, -0.141783, -0.507784, -0.144063, -1.283891, -1.140182]


def drawn(name, shape):
    """Normal numbers that depend on a name only."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def fill(net):
    """Weights by their names, of a size that keeps every part in sight."""
    state = {}
    for name, tensor in net.state_dict().items():
        values = drawn(name, tensor.shape)
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
        is_gain = tensor.ndim == 1 and name.endswith("weight")
        state[name] = is_gain + scale * values
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize(
    ("net", "shape", "expected"),
    [
        (ConvolutionalEncoder(SMALL, 8), (1, 3, 16, 16), ENCODED),
        (ConvolutionalDecoder(SMALL, 8), (1, 8, 8, 8), DECODED),
    ],
    ids=["encoder", "decoder"],
)
@torch.no_grad()
def test_convolutional_nets_are_vqgans(net, shape, expected):
    out = fill(net)(drawn("input", shape))
    assert out.shape == ((1, 8, 8, 8) if shape[1] == 3 else (1, 3, 16, 16))
    found = out.flatten()[:: out.numel() // len(expected)][: len(expected)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_patches_keep_their_places():
    size = TransformerSize(16, 1, 2)
    encoder, decoder = PatchEncoder(size, 3, 4, 2), PatchDecoder(size, 3, 4, 2)
    images = torch.zeros(1, 3, 12, 12)
    with torch.no_grad():
        # Without blocks a cell sees only itself
        encoder.transformer.forward = decoder.transformer.forward = lambda x, kept: x
        torch.nn.init.dirac_(decoder.smooth.weight)
        blank, changed = encoder(images), images.clone()
        changed[..., 4:8, 8:12] = 1
        moved = (encoder(changed) - blank).abs().sum((0, 1))
        assert moved.nonzero().tolist() == [[1, 2]]
        codes = torch.zeros(1, 2, 3, 3)
        empty = decoder(codes)
        codes[..., 2, 0] = 1
        cells = (decoder(codes) - empty).abs().sum(1)[0].unflatten(0, (3, 4)).unflatten(2, (3, 4))
        assert cells.sum((1, 3)).nonzero().tolist() == [[2, 0]]
