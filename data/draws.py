"""The random numbers of one sample: a pure function of (seed, epoch, key), whoever reads it, when.

Each use has its own number, so that one option does not change what another draws.
"""

import zlib
from functools import cached_property

import numpy as np


class SampleDraws:
    """Numbers in [0, 1), made when the first is asked for: it takes 10 us, and tokens need none."""

    def __init__(self, seed: int, epoch: int, key: str):
        # Philox is keyed directly: no seed has to be hashed
        self._key = (seed, epoch << 32 | zlib.crc32(key.encode("utf-8", "surrogateescape")))

    @cached_property
    def _numbers(self) -> list[float]:
        return np.random.Generator(np.random.Philox(key=self._key)).random(5).tolist()

    crop_x = property(lambda self: self._numbers[0])  # where the crop lies along the width
    crop_y = property(lambda self: self._numbers[1])  # and along the height
    flip = property(lambda self: self._numbers[2])  # flipped if below flip_probability
    recaption = property(lambda self: self._numbers[3])  # if below recaption_probability
    caption = property(lambda self: self._numbers[4])  # which of several captions
