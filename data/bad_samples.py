"""Samples that cannot be used: counted by reason, and too many of them stop the run.

Reasons that start with "filter: " are drops that the user asked for. All others (an image that does not decode, a
missing caption, a shard that breaks off) are bad samples; a shard counts as one for all that it did not give. What is
recent is not saved with a position: it is counted anew after a resume.
"""

from collections import Counter, deque
from collections.abc import Iterable

DROP = "filter: "
WINDOW = 1000  # samples; the share of bad ones is that among so many recent ones, drops left out,
FEWEST = 100  # and once so many were seen
NAMED = 5  # bad samples that the error names


class BadSample(Exception):
    """A sample that cannot be used. `reason` is counted by the stream, so it names a class of faults, not a sample."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class SampleCounter:
    """What one reader counts. max_bad_share: 0..1, of the recent samples; 1 never stops."""

    def __init__(self, max_bad_share: float, reader: str):
        self.max_bad_share, self.reader = max_bad_share, reader
        self._skipped: Counter[str] = Counter()
        self._recent: deque[tuple[str, str] | None] = deque(
            maxlen=WINDOW
        )  # None: usable; else (name, reason)
        self._num_bad = 0  # in _recent

    def usable(self) -> None:
        """Count a usable sample."""
        self._add(None)

    def skip(self, name: str, reason: str) -> None:
        """Count a sample that is not used. ValueError: too many of the recent ones are bad."""
        self._skipped[reason] += 1
        if not reason.startswith(DROP):
            self._add((name, reason))

    def take_skipped(self) -> dict[str, int]:
        """{reason: count} since the last call."""
        skipped, self._skipped = dict(self._skipped), Counter()
        return skipped

    def describe(self) -> str:
        """What was skipped since the last take_skipped, and the first bad samples of the window."""
        skipped = (
            ", ".join(f"{reason}: {count}" for reason, count in self._skipped.most_common())
            or "nothing"
        )
        names = _first_names(filter(None, self._recent))
        return f"skipped {skipped}" + (f"; the first bad: {names}" if names else "")

    def _add(self, bad: tuple[str, str] | None) -> None:
        recent = self._recent
        if len(recent) == WINDOW and recent[0] is not None:
            self._num_bad -= 1
        recent.append(bad)
        if bad is not None:
            self._num_bad += 1
        if (
            self._num_bad
            and len(recent) >= FEWEST
            and self._num_bad > self.max_bad_share * len(recent)
        ):
            raise ValueError(self._too_many())

    def _too_many(self) -> str:
        bad = list(filter(None, self._recent))
        reasons = ", ".join(
            f"{reason}: {count}" for reason, count in Counter(r for _, r in bad).most_common()
        )
        return (
            f"{self.reader}: {len(bad)} of the last {len(self._recent)} samples are bad, more than max_bad_share = "
            f"{self.max_bad_share} allows ({reasons}); the first: {_first_names(bad)}. "
            "Repair the data, or raise max_bad_share (1 never stops)"
        )


def _first_names(bad: Iterable[tuple[str, str]]) -> str:
    return ", ".join(list(dict.fromkeys(name for name, _ in bad))[:NAMED])
