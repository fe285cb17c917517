"""Numbers that TokenFlow's own code computes for small sizes: tests/tokenflow/README.md."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "tokenflow"


@cache
def arrays():
    return dict(np.load(FOLDER / "vectors.npz"))


def vectors(name):
    """One of them, as a fresh tensor."""
    return torch.from_numpy(np.array(arrays()[name]))


def weights(prefix):
    """The tensors under a prefix, by the rest of their names."""
    names = [name for name in arrays() if name.startswith(prefix)]
    return {name.removeprefix(prefix): vectors(name) for name in names}
