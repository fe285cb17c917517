"""data/filters.py: which samples are dropped, and why."""

import pytest

from data.filters import FilterConfig
from data.samples import BadSample


def reason_of(config, caption="a caption", metadata=None, size=None):
    """Why a sample with this one caption is dropped, None if it is kept."""
    if fault := config.caption_fault(caption):
        return fault
    try:
        config.check_metadata(metadata or {})
        if size is not None:
            config.check_size(*size)
    except BadSample as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    ("original", "stored", "kept"),
    [
        ((None, None), (None, None), True),
        ((900, 600), (512, 341), True),
        # enlarged: what we hold has pixels, but no more detail than the original had
        ((90, 60), (512, 341), False),
        # padded or cropped to a square
        ((900, 300), (512, 512), False),
        # stored smaller than it was
        ((900, 600), (200, 133), False),
        ((None, None), (200, 133), False),
        ((None, None), ("200", "133"), False),
        ((float("nan"), 1), (None, None), True),
        ((None, None), (True, 10**400), True),
    ],
)
def test_every_size_that_the_json_states_must_pass_before_the_image_is_decoded(
    original, stored, kept
):
    names = ("original_width", "original_height", "width", "height")
    metadata = dict(zip(names, (*original, *stored), strict=True))
    config = FilterConfig(min_longer_side=256, max_aspect_ratio=2)
    assert (reason_of(config, metadata=metadata) is None) == kept


AESTHETIC, WATERMARK = "min_aesthetic_score", "max_watermark_probability"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"aesthetic": 5, "pwatermark": 0.5}, None),
        ({"aesthetic": 4.99}, f"filter: {AESTHETIC}"),
        ({"aesthetic": "4.99"}, f"filter: {AESTHETIC}"),
        ({"aesthetic": None, "aesthetic_score": 4.99}, f"filter: {AESTHETIC}"),
        ({"aesthetic": 5.01, "AESTHETIC_SCORE": 4.99, "pwatermark": 0}, None),
        ({"aesthetic": float("nan")}, "filter: aesthetic score missing"),
        ({"aesthetic": [9]}, "filter: aesthetic score missing"),
        ({"aesthetic": 5, "pwatermark": 0.51}, f"filter: {WATERMARK}"),
        ({"aesthetic": 5, "other": 0.1}, "filter: watermark probability missing"),
    ],
)
def test_a_score_is_the_first_finite_number_under_its_names(metadata, reason):
    limits = {AESTHETIC: 5, WATERMARK: 0.5}
    assert reason_of(FilterConfig(**limits, missing_score="drop"), metadata=metadata) == reason


@pytest.mark.parametrize(("length", "reason"), [(4, "min"), (5, None), (9, None), (10, "max")])
def test_the_length_of_the_caption_lies_between_its_limits(length, reason):
    config = FilterConfig(min_caption_characters=5, max_caption_characters=9)
    assert reason_of(config, "犬" * length) == (reason and f"filter: {reason}_caption_characters")


def test_metadata_are_needed_only_for_what_they_can_state():
    assert not FilterConfig(min_caption_characters=1, max_caption_characters=9).needs_metadata
    for name in ("min_longer_side", "max_aspect_ratio", AESTHETIC, WATERMARK):
        assert FilterConfig(**{name: 1}).needs_metadata
