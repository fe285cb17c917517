"""The random numbers of one sample: a pure function of (seed, epoch, key), whoever reads the sample and when.

Each use has its own number, so that one option does not change what another draws.
"""

import zlib

import numpy as np


class SampleDraws:
    """Numbers in [0, 1), made when the first is asked for: most stored tokens need none, and it takes 10 us."""

    __slots__ = ("_key", "_numbers")

    def __init__(self, seed: int, epoch: int, key: str):
        # Philox is keyed directly: no seed has to be hashed
        self._key = (seed, epoch << 32 | zlib.crc32(key.encode("utf-8", "surrogateescape")))
        self._numbers: list[float] | None = None

    def _number(self, index: int) -> float:
        if self._numbers is None:
            self._numbers = np.random.Generator(np.random.Philox(key=self._key)).random(5).tolist()
        return self._numbers[index]

    @property
    def crop_x(self) -> float:
        """Where the crop lies along the width."""
        return self._number(0)

    @property
    def crop_y(self) -> float:
        """Where the crop lies along the height."""
        return self._number(1)

    @property
    def flip(self) -> float:
        """Flipped if below flip_probability."""
        return self._number(2)

    @property
    def recaption(self) -> float:
        """Re-captioned if below recaption_probability."""
        return self._number(3)

    @property
    def caption(self) -> float:
        """Which of several captions."""
        return self._number(4)
