"""Numbers that TokenFlow's own code computes for small sizes: tests/tokenflow/README.md."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from modeling.dual_quantizer import DualQuantizer, QuantizerConfig

FOLDER = Path(__file__).parent / "tokenflow"


@cache
def arrays():
    return dict(np.load(FOLDER / "vectors.npz"))


def vectors(name):
    """One of them, as a fresh tensor."""
    return torch.from_numpy(np.array(arrays()[name]))


def quantizer_of(group, **changes):
    """The quantiser with the codebooks of a group of the vectors."""
    scales = vectors("pyramid/scales").tolist()
    config = QuantizerConfig(64, 8, 4, scales, drop_scale_probability=0.0, **changes)
    quantizer = DualQuantizer(config)
    quantizer.semantic_codes.data = vectors(f"{group}/semantic_codebook")
    quantizer.pixel_codes.data = vectors(f"{group}/pixel_codebook")
    return quantizer
