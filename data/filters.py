"""Which samples are good enough: size, scores, caption length. For making shards and reading.

Scores come from a sample's JSON, under the names that LAION's tables have and img2dataset passes
on. Sizes come from the image, and from the JSON where it states some; every size that is known must
pass. So an image that img2dataset stored smaller than it was is judged by what we hold (a crop of
256 px needs the pixels), and one that it enlarged, padded or cropped also by its original
(`original_width`, `original_height`): an enlarged thumbnail shows no more than before, and a padded
strip is still a strip.

A filter that is off looks at nothing. Reasons are "filter: {field of FilterConfig}", or "...
missing" for a score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.samples import BadSample, check_fields

# img2dataset: before and after its resizing
SIZE_KEYS = (("original_width", "original_height"), ("width", "height"))
# tried in order: img2dataset's own, LAION's tables
AESTHETIC_KEYS = ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score")
WATERMARK_KEYS = ("pwatermark",)


@dataclass
class FilterConfig:
    """Thresholds include their own value: a score of exactly min_aesthetic_score is kept."""

    # pixels; an image whose longer side is shorter is dropped. 0: off
    min_longer_side: int = 0
    # longer / shorter side; an image above it is dropped. 0: off
    max_aspect_ratio: float = 0.0
    # of the predictor that made the scores, LAION's has 0..10; null: off
    min_aesthetic_score: float | None = None
    # 0..1; null: off
    max_watermark_probability: float | None = None
    # a sample without the score that a filter needs; "fail" stops the run at the first one
    missing_score: Literal["keep", "drop", "fail"] = "fail"
    # of a cleaned caption; a sample that has others keeps those. 0: off
    min_caption_characters: int = 0
    max_caption_characters: int = 0

    def __post_init__(self):
        ratio, score = self.max_aspect_ratio, self.min_aesthetic_score
        watermark, longest = self.max_watermark_probability, self.max_caption_characters
        is_ratio = ratio == 0 or 1 <= ratio < math.inf
        is_longest = longest == 0 or longest >= max(self.min_caption_characters, 1)
        check_fields(
            self,
            min_longer_side=(self.min_longer_side >= 0, "pixels >= 0"),
            max_aspect_ratio=(is_ratio, "0 (off) or a finite number >= 1"),
            min_aesthetic_score=(score is None or math.isfinite(score), "null or a finite number"),
            max_watermark_probability=(watermark is None or 0 <= watermark <= 1, "null or 0..1"),
            min_caption_characters=(self.min_caption_characters >= 0, "characters >= 0"),
            max_caption_characters=(is_longest, "0 (off) or at least min_caption_characters"),
        )

    @property
    def needs_metadata(self) -> bool:
        """False: the JSON cannot change the outcome, and {} may be given for it."""
        scores = (self.min_aesthetic_score, self.max_watermark_probability)
        return scores != (None, None) or self.min_longer_side > 0 or self.max_aspect_ratio > 0

    def caption_fault(self, caption: str) -> str | None:
        """The reason to drop a cleaned caption, and a sample that has no other; None: it stays."""
        if len(caption) < self.min_caption_characters:
            return "filter: min_caption_characters"
        if self.max_caption_characters and len(caption) > self.max_caption_characters:
            return "filter: max_caption_characters"
        return None

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """What is known before the image is decoded; metadata: the sample's JSON, {} without.

        Raises:
            BadSample: the sample is dropped.
            ValueError: a score is missing and missing_score is "fail".
        """
        # a size that is no number, or not positive, is not known
        for keys in SIZE_KEYS:
            width, height = (_number(metadata.get(key)) for key in keys)
            if width is not None and height is not None and width > 0 and height > 0:
                self.check_size(width, height)
        least, most = self.min_aesthetic_score, self.max_watermark_probability
        if least is not None:
            score = self._score("aesthetic score", AESTHETIC_KEYS, metadata)
            if score is not None and score < least:
                raise BadSample("filter: min_aesthetic_score")
        if most is not None:
            score = self._score("watermark probability", WATERMARK_KEYS, metadata)
            if score is not None and score > most:
                raise BadSample("filter: max_watermark_probability")

    def check_size(self, width: float, height: float) -> None:
        """To be called with the pixels of every image, whatever its JSON says.

        Raises:
            BadSample: the sample is dropped.
        """
        shorter, longer = sorted((width, height))
        if longer < self.min_longer_side:
            raise BadSample("filter: min_longer_side")
        if self.max_aspect_ratio and longer > self.max_aspect_ratio * shorter:
            raise BadSample("filter: max_aspect_ratio")

    def _score(self, name: str, keys: Sequence[str], metadata: Mapping[str, Any]) -> float | None:
        """The first finite number under `keys`; without one, what missing_score says."""
        for key in keys:
            if (score := _number(metadata.get(key))) is not None:
                return score
        if self.missing_score == "fail":
            raise ValueError(
                f"filter: {name} missing: expected a finite number under {' or '.join(keys)}; the "
                f"sample's JSON has {', '.join(map(str, metadata)) or 'nothing'}. Keep or drop "
                "such samples by missing_score, or turn the filter off"
            )
        if self.missing_score == "drop":
            raise BadSample(f"filter: {name} missing")
        return None


def _number(value: Any) -> float | None:
    """A finite number, also one written as text (tables without types); None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    # to Python, true is the number 1
    return number if math.isfinite(number) and not isinstance(value, bool) else None
