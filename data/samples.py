"""A sample: what is drawn for it, what makes it bad, and how many bad ones stop the run.

The numbers drawn for a sample are a pure function of (seed, epoch, key), whoever reads it, when;
each use has its own, so that one option does not change what another draws. Reasons that start with
"filter: " are drops that the user asked for; all others are bad samples, whose recent share is no
part of a saved position: after a resume it starts empty.
"""

import zlib
from collections import Counter, deque
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

DROP = "filter: "
WINDOW = 1000  # recent samples, without drops, among which the share of bad ones is taken
MIN_SAMPLES_FOR_SHARE = 100
NUM_NAMED_IN_ERROR = 5


class SampleDraws:
    """Numbers in [0, 1), made when the first is asked for: it takes 10 us, and tokens need none."""

    def __init__(self, seed: int, epoch: int, key: str):
        # Philox is keyed directly: no seed has to be hashed
        self._key = (seed, epoch << 32 | zlib.crc32(key.encode("utf-8", "surrogateescape")))

    @cached_property
    def _numbers(self) -> list[float]:
        return np.random.Generator(np.random.Philox(key=self._key)).random(6).tolist()

    crop_x = property(lambda self: self._numbers[0])  # where the crop lies along the width
    crop_y = property(lambda self: self._numbers[1])  # and along the height
    flip = property(lambda self: self._numbers[2])  # flipped if below flip_probability
    recaption = property(lambda self: self._numbers[3])  # if below recaption_probability
    caption = property(lambda self: self._numbers[4])  # which of several captions
    window = property(lambda self: self._numbers[5])  # which sentences of one that is too long


class BadSample(Exception):
    """A sample that cannot be used. `reason`: the kind of fault, by which the stream counts."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class SampleCounter:
    """What one reader counts. max_bad_share: 0..1, of the recent samples; 1 never stops."""

    def __init__(self, max_bad_share: float, reader: str):
        self.max_bad_share = max_bad_share
        self.reader = reader
        self.skipped: Counter[str] = Counter()  # by reason
        # the first sample of each reason, with what lay there instead
        self.first: dict[str, str] = {}
        self._told: Counter[str] = Counter()  # what of `skipped` was told
        # None for a usable sample, (name, reason) for a bad one
        self._recent: deque[tuple[str, str] | None] = deque(maxlen=WINDOW)
        self._num_bad = 0  # in _recent

    def skip(self, name: str, reason: str, found: str = "") -> None:
        """Count a sample that is not used. found: what lay there instead, as members_of says it.

        Raises:
            ValueError: too many of the recent ones are bad.
        """
        self.skipped[reason] += 1
        self.first.setdefault(reason, f"{name} ({found})" if found else name)
        if not reason.startswith(DROP):
            self._add((name, reason))

    def usable(self) -> None:
        self._add(None)

    def _add(self, bad: tuple[str, str] | None) -> None:
        recent = self._recent
        # kept as a running sum: this is asked for each sample
        if len(recent) == WINDOW and recent[0] is not None:
            self._num_bad -= 1
        recent.append(bad)
        self._num_bad += bad is not None
        allowed = self.max_bad_share * len(recent)
        if self._num_bad > allowed and len(recent) >= MIN_SAMPLES_FOR_SHARE:
            bad_ones = [each for each in recent if each is not None]
            reasons = self._counts(Counter(reason for _, reason in bad_ones))
            names = list(dict.fromkeys(name for name, _ in bad_ones))[:NUM_NAMED_IN_ERROR]
            raise ValueError(
                f"{self.reader}: {len(bad_ones)} of the last {len(recent)} samples are bad, more "
                f"than max_bad_share = {self.max_bad_share} allows ({reasons}); the first: "
                f"{', '.join(names)}. Repair the data, or raise max_bad_share (1 never stops)"
            )

    def tell(self) -> dict[str, dict]:
        """What a batch says of the samples that were skipped since the one before it.

        "skipped": {reason: count}, and "first_skipped" of each reason that is new.
        """
        skipped = dict(self.skipped - self._told)
        new = {reason: self.first[reason] for reason in skipped if reason not in self._told}
        self._told = self.skipped.copy()
        return {"skipped": skipped, **({"first_skipped": new} if new else {})}

    def describe(self) -> str:
        """What was skipped since the last `tell`, and the first case of each reason."""
        return f"skipped {self._counts(self.skipped - self._told)}"

    def _counts(self, counter: Counter[str]) -> str:
        reasons = [f"{name}: {n}, first {self.first[name]}" for name, n in counter.most_common()]
        return "; ".join(reasons) or "nothing"


def members_of(sample: Mapping[str, Any]) -> str:
    """What a raw sample of a tar holds, for messages about what it lacks."""
    names = [name for name in sample if not name.startswith("__")]
    text = f"members {' '.join(names) or 'none'}"
    is_cut = any("." in name for name in names if not name.endswith("npy"))
    return f"{text}: keys end at the first dot" if is_cut else text


def check_fields(config: object, **expected: tuple[bool, str]) -> None:
    """Refuse the first field that does not hold; expected: field=(whether it does, what would).

    Raises:
        ValueError: naming the field, what was given and what is expected.
    """
    for name, (holds, meaning) in expected.items():
        if not holds:
            raise ValueError(f"{name}: given {getattr(config, name)!r}, expected {meaning}")
