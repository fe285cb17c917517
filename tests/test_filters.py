"""data/filters.py: which samples are dropped, why, and which settings are refused."""

import pickle
from dataclasses import fields

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from data.filters import FilterConfig, SampleFilter
from data.shards import BadSample


def reason_of(config, caption="a caption", metadata=None, size=None):
    """Why a sample is dropped, None if it is kept."""
    config.validate()
    sample_filter = SampleFilter(config)
    try:
        sample_filter.check_metadata(caption, metadata or {})
        if size is not None:
            sample_filter.check_size(*size)
    except BadSample as error:
        return error.reason
    return None


def test_by_default_everything_is_kept():
    assert (
        reason_of(FilterConfig(), "", {"width": 1, "height": 999, "pwatermark": 1}, size=(1, 999))
        is None
    )


@pytest.mark.parametrize("size", [(256, 100), (100, 256), (255, 100), (100, 255)])
def test_the_longer_side_counts_and_the_threshold_is_kept(size):
    expected = None if 256 in size else "filter: min_longer_side"
    assert reason_of(FilterConfig(min_longer_side=256), size=size) == expected


@pytest.mark.parametrize(
    ("size", "kept"), [((200, 100), True), ((100, 200), True), ((201, 100), False), ((1, 3), False)]
)
def test_the_aspect_ratio_counts_in_both_directions(size, kept):
    expected = None if kept else "filter: max_aspect_ratio"
    assert reason_of(FilterConfig(max_aspect_ratio=2), size=size) == expected


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ({}, True),
        ({"original_width": 900, "original_height": 600, "width": 512, "height": 341}, True),
        # enlarged: what we hold has pixels, but no more detail than the original had
        ({"original_width": 90, "original_height": 60, "width": 512, "height": 341}, False),
        # padded or cropped to a square
        ({"original_width": 900, "original_height": 300, "width": 512, "height": 512}, False),
        # stored smaller than it was
        ({"original_width": 900, "original_height": 600, "width": 200, "height": 133}, False),
        ({"width": 200, "height": 133}, False),
        ({"width": "200", "height": "133"}, False),
        ({"width": 200}, True),
        (
            {"width": None, "height": None, "original_width": float("nan"), "original_height": 1},
            True,
        ),
        ({"width": 0, "height": 0}, True),
        ({"width": True, "height": 10**400}, True),
    ],
)
def test_every_size_that_the_json_states_must_pass_before_the_image_is_decoded(metadata, kept):
    reason = reason_of(FilterConfig(min_longer_side=256, max_aspect_ratio=2), metadata=metadata)
    assert (reason is None) == kept


def test_the_image_itself_counts_whatever_the_json_says():
    config = FilterConfig(min_longer_side=256)
    stated = {"original_width": 900, "original_height": 600, "width": 900, "height": 600}
    assert reason_of(config, metadata=stated, size=(90, 60)) == "filter: min_longer_side"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"aesthetic": 5}, None),
        ({"aesthetic": 4.99}, "filter: min_aesthetic_score"),
        ({"AESTHETIC_SCORE": 4.99}, "filter: min_aesthetic_score"),
        ({"aesthetic": "4.99"}, "filter: min_aesthetic_score"),
        ({"aesthetic": None, "aesthetic_score": 4.99}, "filter: min_aesthetic_score"),
        ({"aesthetic": 5.01, "AESTHETIC_SCORE": 4.99}, None),
        ({"aesthetic": float("nan")}, "filter: aesthetic score missing"),
        ({"aesthetic": "high"}, "filter: aesthetic score missing"),
        ({"aesthetic": [9]}, "filter: aesthetic score missing"),
        ({}, "filter: aesthetic score missing"),
    ],
)
def test_the_aesthetic_score_is_the_first_finite_number_under_its_keys(metadata, reason):
    assert (
        reason_of(FilterConfig(min_aesthetic_score=5, missing_score="drop"), metadata=metadata)
        == reason
    )


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"pwatermark": 0.5}, None),
        ({"pwatermark": 0.51}, "filter: max_watermark_probability"),
        ({"other": 0.1}, "filter: watermark probability missing"),
    ],
)
def test_the_watermark_probability_is_an_upper_limit(metadata, reason):
    assert (
        reason_of(
            FilterConfig(max_watermark_probability=0.5, missing_score="drop"), metadata=metadata
        )
        == reason
    )


def test_keys_of_the_scores_can_be_named():
    config = FilterConfig(
        min_aesthetic_score=5,
        max_watermark_probability=0.5,
        aesthetic_keys=["a"],
        watermark_keys=["w"],
    )
    assert reason_of(config, metadata={"a": 6, "w": 0.1, "aesthetic": 1, "pwatermark": 1}) is None
    assert reason_of(config, metadata={"a": 6, "w": 0.6}) == "filter: max_watermark_probability"


def test_a_missing_score_is_kept_or_stops_the_run_as_asked():
    for name in ("min_aesthetic_score", "max_watermark_probability"):
        assert (
            reason_of(FilterConfig(**{name: 1}, missing_score="keep"), metadata={"other": 1})
            is None
        )
        with pytest.raises(
            ValueError,
            match=r"missing: expected .* under one of .*; the sample's JSON has url, key",
        ):
            reason_of(FilterConfig(**{name: 1}), metadata={"url": 1, "key": 2})
        with pytest.raises(ValueError, match="has nothing"):
            reason_of(FilterConfig(**{name: 1}))


@pytest.mark.parametrize(("length", "reason"), [(4, "min"), (5, None), (9, None), (10, "max")])
def test_the_length_of_the_caption_lies_between_its_limits(length, reason):
    config = FilterConfig(min_caption_characters=5, max_caption_characters=9)
    assert reason_of(config, "犬" * length) == (reason and f"filter: {reason}_caption_characters")


def test_metadata_are_needed_only_for_what_they_can_state():
    for config, needs in [
        (FilterConfig(min_caption_characters=1, max_caption_characters=9), False),
        (FilterConfig(min_longer_side=1), True),
        (FilterConfig(max_aspect_ratio=1), True),
        (FilterConfig(min_aesthetic_score=0), True),
        (FilterConfig(max_watermark_probability=0), True),
    ]:
        assert SampleFilter(config).needs_metadata == needs


def test_a_filter_survives_pickling():
    sample_filter = SampleFilter(FilterConfig(min_aesthetic_score=5))
    assert pickle.loads(pickle.dumps(sample_filter)) == sample_filter


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_longer_side", -1),
        ("max_aspect_ratio", 0.5),
        ("max_aspect_ratio", float("nan")),
        ("max_aspect_ratio", float("inf")),
        ("min_aesthetic_score", float("nan")),
        ("max_watermark_probability", 1.5),
        ("missing_score", "ignore"),
        ("min_caption_characters", -1),
        ("max_caption_characters", -1),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: given {value!r}, expected "):
        FilterConfig(**{name: value}).validate()


def test_limits_that_contradict_each_other_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match="max_caption_characters"):
        FilterConfig(min_caption_characters=5, max_caption_characters=4).validate()
    for keys in ([], "aesthetic", [""]):
        FilterConfig(aesthetic_keys=keys).validate()  # not looked at
        with pytest.raises(ValueError, match="aesthetic_keys"):
            FilterConfig(min_aesthetic_score=5, aesthetic_keys=keys).validate()
        with pytest.raises(ValueError, match="watermark_keys"):
            FilterConfig(max_watermark_probability=1, watermark_keys=keys).validate()


def test_a_yaml_can_set_every_field():
    values = FilterConfig(256, 2.0, 5.0, 0.5, ["a"], ["w"], "keep", 1, 300)
    given = {field.name: getattr(values, field.name) for field in fields(FilterConfig)}
    merged = OmegaConf.merge(OmegaConf.structured(FilterConfig), OmegaConf.create(given))
    assert OmegaConf.to_object(merged) == values
    with pytest.raises(ValidationError):
        OmegaConf.merge(OmegaConf.structured(FilterConfig), {"missing_score": "ignore"})
