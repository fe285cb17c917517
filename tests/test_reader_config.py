"""data/config.py and its parts, typed by OmegaConf as the stages' configs are."""

import pytest
from omegaconf import OmegaConf
from test_shards import make_shards

from configs.load import build
from data.captions import CaptionConfig, check_caption_keys
from data.config import ReaderConfig, SourceConfig, open_sources
from data.filters import FilterConfig
from data.images import ImageTextConfig
from data.readers import TokenTextConfig
from data.samples import BadSample

NAN = float("nan")
TWO = """
captions: {keys: [txt]}
filters: {max_watermark_probability: 0.5, min_longer_side: 256}
sources:
  laion:
    shards: [laion/*.tar]
    weight: 3
    captions: {recaption_keys: [recap_txt], recaption_probability: 0.5}
  journeydb: {shards: [j.tar], filters: {}}
"""


def from_yaml(text, *overrides, schema=ReaderConfig):
    """A config as configs/load.py makes it."""
    parts = (
        OmegaConf.structured(schema),
        OmegaConf.create(text),
        OmegaConf.from_dotlist(list(overrides)),
    )
    return build(schema, OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True))


def test_a_source_has_what_it_says_and_else_what_its_section_says():
    config = from_yaml(TWO)
    config.check()
    laion, journeydb = config.full_sources().values()
    assert laion == SourceConfig(
        ["laion/*.tar"],
        weight=3.0,
        captions=CaptionConfig(["txt", "json:caption"], ["recap_txt"], 0.5),
        filters=config.filters,
    )
    assert journeydb == SourceConfig(["j.tar"], 1.0, config.captions, FilterConfig())
    assert config.all_shards() == ["laion/*.tar", "j.tar"]


def test_the_command_line_changes_adds_and_leaves_out_sources():
    changes = ["sources.laion.weight=0", "sources.cc12m.weight=0.5"]
    changes.append("sources.cc12m.shards=['c-{000..002}.tar',d.tar]")
    config = from_yaml(TWO, *changes, schema=TokenTextConfig)
    config.check()
    weights = {name: source.weight for name, source in config.full_sources().items()}
    assert weights == {"journeydb": 1.0, "cc12m": 0.5}
    assert config.all_shards() == ["j.tar", "c-{000..002}.tar", "d.tar"]
    # the one that is left out has several captions, which nobody reads
    assert from_yaml(TWO).has_several_captions() and not config.has_several_captions()


def test_sources_are_opened_but_for_those_of_weight_zero_or_in_place_of_all_others(tmp_path):
    (path,) = make_shards(tmp_path, [2])
    own, shared = CaptionConfig(keys=["own"]), CaptionConfig(keys=["shared"])
    sources = {"a": SourceConfig([path], 2.0, own), "gone": SourceConfig(["gone.tar"], 0.0)}
    config = ReaderConfig(sources=sources, captions=shared)

    def captions_of(source, sample, draws):
        return source.captions

    (opened,) = open_sources(config, captions_of)
    assert (opened.name, opened.shards, opened.weight) == ("a", (path,), 2.0)
    assert opened.decode({}, None) == own
    (other,) = open_sources(config, captions_of, [path])
    assert (other.name, other.shards, other.decode({}, None)) == ("", (path,), shared)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (ReaderConfig, "max_bad_share", 1.5),
        (ReaderConfig, "shuffle_buffer", -1),
        (ReaderConfig, "num_workers", -1),
        (ImageTextConfig, "flip_probability", 1.5),
        (ImageTextConfig, "background", [0, 0, 256]),
        (TokenTextConfig, "latent_scale", NAN),
        (SourceConfig, "shards", []),
        (SourceConfig, "weight", NAN),
        (CaptionConfig, "keys", "txt"),
        (CaptionConfig, "recaption_probability", 1.5),
        (FilterConfig, "min_longer_side", -1),
        (FilterConfig, "max_aspect_ratio", float("inf")),
        (FilterConfig, "min_aesthetic_score", NAN),
        (FilterConfig, "max_watermark_probability", 1.5),
        (FilterConfig, "max_caption_characters", -1),
    ],
)
def test_a_wrong_field_is_named_with_its_value(config, key, value):
    needed = {"shards": ["a.tar"]} if config is SourceConfig else {}
    with pytest.raises(ValueError) as error:
        config(**{**needed, key: value})
    assert str(error.value).startswith(f"{key}: given {value!r}, expected ")


def test_caption_keys_that_match_nothing_are_refused():
    check_caption_keys(["txt", "json:caption"], "name")
    for key in ("", "txt:caption", ":x", "json:"):
        for name in ("keys", "recaption_keys"):
            with pytest.raises(ValueError, match=f"^{name}: given '{key}'"):
                CaptionConfig(**{name: [key]})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "data.shards, data.sources"),
        ({"shards": ["a"], "sources": {"b": SourceConfig(["b"])}}, "data.shards, data.sources"),
        ({"sources": {"b": SourceConfig(["b"], 0.0)}}, "data.sources: .*weights"),
    ],
)
def test_a_config_that_names_no_data_is_refused_also_where_it_is_opened(options, names):
    for use in (ReaderConfig.check, lambda config: open_sources(config, print)):
        with pytest.raises(ValueError, match=f"^{names}"):
            use(ReaderConfig(**options))


def test_limits_that_contradict_each_other_are_refused_and_a_wrong_field_names_its_source():
    with pytest.raises(ValueError, match="^max_caption_characters: given 4"):
        FilterConfig(min_caption_characters=5, max_caption_characters=4)
    with pytest.raises(ValueError, match=r"^sources\.laion\.filters\.min_longer_side: given -1"):
        from_yaml("sources: {laion: {shards: [a], filters: {min_longer_side: -1}}}")


# which samples the filters drop, and why


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
