"""Which samples are good enough to train on: size, scores, caption length. One config for making shards and reading.

Scores come from a sample's JSON, under the names that LAION's tables have and img2dataset passes on. Sizes come from
the image, and from the JSON where it states some; every size that is known must pass. So an image that img2dataset
stored smaller than it was is judged by what we hold (a crop of 256 px needs the pixels), and one that it enlarged,
padded or cropped also by its original (`original_width`, `original_height`): an enlarged thumbnail shows no more than
before, and a padded strip is still a strip.

A filter that is off looks at nothing. Reasons are "filter: {field of FilterConfig}", or "... missing" for a score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data.shards import BadSample

SIZE_KEYS = (
    ("original_width", "original_height"),
    ("width", "height"),
)  # img2dataset: before and after its resizing


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
    # where the scores lie in a sample's JSON, tried in order
    aesthetic_keys: list[str] = field(
        default_factory=lambda: ["aesthetic", "AESTHETIC_SCORE", "aesthetic_score"]
    )
    watermark_keys: list[str] = field(default_factory=lambda: ["pwatermark"])
    # a sample without the score that a filter needs; "fail" stops the run at the first one
    missing_score: Literal["keep", "drop", "fail"] = "fail"
    # of the cleaned caption; 0: off
    min_caption_characters: int = 0
    max_caption_characters: int = 0

    def validate(self) -> None:
        """ValueError naming the field, the value and what is expected."""
        score, watermark = self.min_aesthetic_score, self.max_watermark_probability
        longest = self.max_caption_characters
        expected = {
            "min_longer_side": (self.min_longer_side >= 0, "pixels >= 0"),
            "max_aspect_ratio": (
                self.max_aspect_ratio == 0 or 1 <= self.max_aspect_ratio < math.inf,
                "0 (off) or a finite number >= 1",
            ),
            "min_aesthetic_score": (
                score is None or math.isfinite(score),
                "null (off) or a finite number",
            ),
            "max_watermark_probability": (
                watermark is None or 0 <= watermark <= 1,
                "null (off) or 0..1",
            ),
            "aesthetic_keys": (
                score is None or _are_names(self.aesthetic_keys),
                "a list of names in the JSON",
            ),
            "watermark_keys": (
                watermark is None or _are_names(self.watermark_keys),
                "a list of names in the JSON",
            ),
            "missing_score": (self.missing_score in ("keep", "drop", "fail"), "keep, drop or fail"),
            "min_caption_characters": (self.min_caption_characters >= 0, "characters >= 0"),
            "max_caption_characters": (
                longest == 0 or longest >= max(self.min_caption_characters, 1),
                "0 (off) or at least min_caption_characters",
            ),
        }
        for name, (holds, meaning) in expected.items():
            if not holds:
                raise ValueError(f"{name}: given {getattr(self, name)!r}, expected {meaning}")


@dataclass(frozen=True)
class SampleFilter:
    """Raises BadSample for a sample that its config drops. Picklable."""

    config: FilterConfig

    @property
    def needs_metadata(self) -> bool:
        """False: the JSON cannot change the outcome, and {} may be given for it."""
        has_score = (
            self.config.min_aesthetic_score is not None
            or self.config.max_watermark_probability is not None
        )
        return has_score or self.config.min_longer_side > 0 or self.config.max_aspect_ratio > 0

    def check_metadata(self, caption: str, metadata: Mapping[str, Any]) -> None:
        """What can be known before the image is decoded; metadata is the sample's JSON, {} if it has none.

        ValueError: a score is missing and missing_score is "fail".
        """
        config, length = self.config, len(caption)
        if length < config.min_caption_characters:
            raise BadSample("filter: min_caption_characters")
        if config.max_caption_characters and length > config.max_caption_characters:
            raise BadSample("filter: max_caption_characters")
        for keys in SIZE_KEYS:
            width, height = (_number(metadata.get(key)) for key in keys)
            if width is not None and height is not None and width > 0 and height > 0:
                self.check_size(width, height)
        if config.min_aesthetic_score is not None:
            score = self._score("aesthetic score", config.aesthetic_keys, metadata)
            if score is not None and score < config.min_aesthetic_score:
                raise BadSample("filter: min_aesthetic_score")
        if config.max_watermark_probability is not None:
            probability = self._score("watermark probability", config.watermark_keys, metadata)
            if probability is not None and probability > config.max_watermark_probability:
                raise BadSample("filter: max_watermark_probability")

    def check_size(self, width: float, height: float) -> None:
        """Pixels > 0 of the image itself; to be called for every image, whatever its JSON says."""
        shorter, longer = sorted((width, height))
        if longer < self.config.min_longer_side:
            raise BadSample("filter: min_longer_side")
        if self.config.max_aspect_ratio and longer > self.config.max_aspect_ratio * shorter:
            raise BadSample("filter: max_aspect_ratio")

    def _score(self, name: str, keys: Sequence[str], metadata: Mapping[str, Any]) -> float | None:
        """The first finite number under `keys`; without one None, BadSample or ValueError, as missing_score says."""
        for key in keys:
            if (score := _number(metadata.get(key))) is not None:
                return score
        if self.config.missing_score == "fail":
            raise ValueError(
                f"filter: {name} missing: expected a finite number under one of {', '.join(keys)}; the sample's JSON "
                f"has {', '.join(map(str, metadata)) or 'nothing'}. Name the right key, or keep or drop such samples"
            )
        if self.config.missing_score == "drop":
            raise BadSample(f"filter: {name} missing")
        return None


def _number(value: Any) -> float | None:
    """A finite number, also one written as text (tables without types); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _are_names(keys: Any) -> bool:
    return (
        bool(keys)
        and not isinstance(keys, str)
        and all(isinstance(key, str) and key for key in keys)
    )
