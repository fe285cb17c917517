"""data/mixture.py: the config of readers, typed by OmegaConf as the stages' configs are, and its sources."""

import pytest
from data.image_text import ImageTextConfig
from data.mixture import ReaderConfig, SourceConfig, check_metadata, open_sources
from data.token_text import TokenTextConfig
from omegaconf import OmegaConf
from test_shards import make_shards

from data.bad_samples import BadSample
from data.filters import FilterConfig, SampleFilter


def from_yaml(text, *overrides, schema=ReaderConfig):
    """A config as configs/load.py makes it."""
    parts = (
        OmegaConf.structured(schema),
        OmegaConf.create(text),
        OmegaConf.from_dotlist(list(overrides)),
    )
    return OmegaConf.to_object(OmegaConf.merge(*parts))


def error_of(config):
    with pytest.raises(ValueError) as error:
        config.validate()
    return str(error.value)


TWO = """
caption_keys: [txt]
filters: {max_watermark_probability: 0.5, min_longer_side: 256}
sources:
  laion: {shards: [laion/*.tar], weight: 3, recaption_keys: [recap_txt], recaption_probability: 0.5}
  journeydb: {shards: [j.tar], filters: {}, caption_keys: ["json:prompt"]}
"""


def test_a_source_has_what_it_says_and_else_what_its_section_says():
    config = from_yaml(TWO)
    config.validate()
    laion, journeydb = config.full_sources().values()
    assert (laion.weight, laion.caption_keys, laion.recaption_keys) == (3.0, ["txt"], ["recap_txt"])
    assert (laion.recaption_probability, laion.filters) == (0.5, config.filters)
    assert (journeydb.weight, journeydb.caption_keys, journeydb.recaption_keys) == (
        1.0,
        ["json:prompt"],
        [],
    )
    assert (journeydb.recaption_probability, journeydb.filters) == (0.95, FilterConfig())
    assert config.all_shards() == ["laion/*.tar", "j.tar"]


@pytest.mark.parametrize("schema", [ImageTextConfig, TokenTextConfig])
def test_the_command_line_changes_adds_and_leaves_out_sources(schema):
    changes = [
        "sources.laion.weight=0",
        "sources.cc12m.shards=['c-{000..002}.tar',d.tar]",
        "sources.cc12m.weight=0.5",
    ]
    config = from_yaml(TWO, *changes, schema=schema)
    config.validate()
    assert [source.weight for source in config.full_sources().values()] == [0.0, 1.0, 0.5]
    assert config.all_shards() == ["j.tar", "c-{000..002}.tar", "d.tar"]


def test_shards_are_one_source_of_the_section():
    config = from_yaml("shards: [a.tar]\ncaption_keys: [cap]\nfilters: {min_caption_characters: 3}")
    config.validate()
    (source,) = config.full_sources().values()
    assert (source.shards, source.caption_keys, source.filters.min_caption_characters) == (
        ["a.tar"],
        ["cap"],
        3,
    )
    assert config.all_shards() == ["a.tar"]


def test_sources_of_weight_zero_are_not_opened(tmp_path):
    (path,) = make_shards(tmp_path, [2])
    config = ReaderConfig(
        sources={"a": SourceConfig([path], 2.0), "gone": SourceConfig(["gone.tar"], 0.0)}
    )
    (source,) = open_sources(config, lambda source: source.shards)
    assert (source.name, source.shards, source.decode, source.weight) == ("a", (path,), [path], 2.0)


def test_other_shards_are_read_with_the_settings_of_the_section(tmp_path):
    (path,) = make_shards(tmp_path, [2])
    config = ReaderConfig(
        sources={"a": SourceConfig(["gone.tar"], caption_keys=["own"])}, caption_keys=["shared"]
    )
    (source,) = open_sources(config, lambda source: source.caption_keys, [path])
    assert (source.name, source.shards, source.decode) == ("", (path,), ["shared"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "shards: given [], expected at least one path or pattern, or sources"),
        (
            {"shards": ["a"], "sources": {"b": SourceConfig(["b"])}},
            "shards, sources: given both, expected one of them",
        ),
        (
            {"sources": {"b": SourceConfig()}},
            "sources.b.shards: given [], expected at least one path or pattern",
        ),
        (
            {"sources": {"b": SourceConfig(["b"], -1.0)}},
            "sources.b.weight: given -1.0, expected a finite number >= 0",
        ),
        (
            {"sources": {"b": SourceConfig(["b"], float("nan"))}},
            "sources.b.weight: given nan, expected a finite",
        ),
        (
            {"sources": {"b": SourceConfig(["b"], 0.0)}},
            "sources: all weights are 0, expected one above it",
        ),
        (
            {"sources": {"b": SourceConfig(["b"], caption_keys=[])}},
            "sources.b.caption_keys: given [], expected a",
        ),
        (
            {"sources": {"b": SourceConfig(["pipe:ls"])}},
            "sources.b.shards: 'pipe:ls' runs a shell command",
        ),
        ({"shards": ["a"], "caption_keys": []}, "caption_keys: given [], expected a list"),
        ({"shards": ["a"], "recaption_keys": ["json:"]}, "recaption_keys: 'json:' is neither"),
        (
            {"shards": ["a"], "recaption_probability": 1.5},
            "recaption_probability: given 1.5, expected 0..1",
        ),
        (
            {"shards": ["a"], "max_bad_share": 0.0},
            "max_bad_share: given 0.0, expected > 0 and <= 1",
        ),
        (
            {"shards": ["a"], "max_bad_share": 1.5},
            "max_bad_share: given 1.5, expected > 0 and <= 1",
        ),
        ({"shards": ["a"], "shuffle_buffer": -1}, "shuffle_buffer: given -1"),
        ({"shards": ["a"], "num_workers": -1}, "num_workers: given -1"),
        (
            {"shards": ["a"], "filters": FilterConfig(min_longer_side=-1)},
            "filters.min_longer_side: given -1",
        ),
        ({"shards": ["pipe:ls"]}, "shards: 'pipe:ls' runs a shell command; if you trust"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_expected(options, message):
    assert error_of(ReaderConfig(**options)).startswith(message)


def test_a_pipe_needs_to_be_allowed(tmp_path):
    (path,) = make_shards(tmp_path, [2])
    ReaderConfig(shards=[f"pipe:cat {path}"], allow_pipe=True).validate()
    (source,) = open_sources(
        ReaderConfig(shards=[f"pipe:cat {path}"], allow_pipe=True), lambda source: None
    )
    assert source.shards == (f"pipe:cat {path}",)
    with pytest.raises(ValueError, match="allow_pipe: true"):
        open_sources(ReaderConfig(shards=[path]), lambda source: None, [f"pipe:cat {path}"])


def test_unreadable_json_is_a_bad_sample_only_where_a_filter_needs_it():
    broken = {"__key__": "a", "json": b"{"}
    check_metadata(SampleFilter(FilterConfig()), broken, "caption")
    check_metadata(SampleFilter(FilterConfig(min_caption_characters=3)), broken, "caption")
    with pytest.raises(BadSample, match="^json: unreadable$"):
        check_metadata(SampleFilter(FilterConfig(max_watermark_probability=0.5)), broken, "caption")
    with pytest.raises(BadSample, match="^filter: min_caption_characters$"):
        check_metadata(SampleFilter(FilterConfig(min_caption_characters=9)), broken, "caption")
