"""data/captions.py: where captions lie, which is taken, how they are cleaned."""

import json
from collections import Counter

import pytest

from data.bad_samples import BadSample
from data.captions import CaptionChoice, captions_of, check_caption_keys, clean_caption, metadata_of
from data.draws import SampleDraws

KEYS = ("txt", "json:caption")


def with_json(**fields):
    return {"json": json.dumps(fields).encode()}


def drawn(choice, sample, number=2000):
    """How often each caption is taken over epochs, as shares to one decimal."""
    counts = Counter(choice(sample, SampleDraws(0, epoch, "key")) for epoch in range(number))
    return {caption: round(count / number, 1) for caption, count in counts.items()}


# where they lie


def test_keys_are_tried_in_order():
    sample = {"txt": b"plain", **with_json(caption="other", n=3)}
    assert captions_of(sample, ["txt", "json:caption"]) == ["plain"]
    assert captions_of(sample, ["json:caption", "txt"]) == ["other"]
    assert captions_of(sample, ["recap", "json:n", "json:absent", "txt"]) == ["plain"]


def test_a_list_gives_all_its_usable_captions():
    sample = {"txt": b"x", **with_json(captions=["one", " ", 3, "two\n", None], empty=[" "])}
    assert captions_of(sample, ["json:captions", "txt"]) == ["one", "two"]
    assert captions_of(sample, ["json:empty", "txt"]) == ["x"]


@pytest.mark.parametrize(
    "sample",
    [
        {},
        {"txt": b""},
        {"txt": b"\x00\n"},
        {"txt": b"\xff\xfe\xfa"},
        {"json": b"[1]"},
        {"json": b"{"},
    ]
    + [
        {"json": b"[" * 100000},
        {"json": b'{"caption": null}'},
        {"json": b'{"caption": "\\ud83d"}'},
    ],
)
def test_a_sample_without_a_readable_caption_is_bad(sample):
    with pytest.raises(BadSample, match="^caption: missing$"):
        CaptionChoice(KEYS)(sample, None)


def test_metadata_is_told_apart_from_none_and_from_broken():
    assert metadata_of({"txt": b"x"}) == {}
    assert metadata_of(with_json(a=1)) == {"a": 1}
    assert metadata_of({"json": b"{"}) is None and metadata_of({"json": b"[1]"}) is None


# which is taken


def test_one_of_several_captions_is_drawn_evenly_and_the_first_without_draws():
    sample, choice = with_json(caption=["one", "two", "three", "four", "five"]), CaptionChoice(KEYS)
    assert drawn(choice, sample) == dict.fromkeys(["one", "two", "three", "four", "five"], 0.2)
    assert choice(sample, None) == "one"
    again = [choice(sample, SampleDraws(0, 7, "key")) for _ in range(3)]
    assert len(set(again)) == 1


def test_recaptioned_text_is_taken_with_its_probability():
    sample = {"txt": b"short", "recap_txt": b"long"}
    for probability in (0.0, 0.3, 1.0):
        shares = drawn(CaptionChoice(KEYS, ("recap_txt",), probability), sample)
        assert shares.get("long", 0.0) == probability and shares.get("short", 0.0) == pytest.approx(
            1 - probability
        )


def test_in_order_the_ordinary_caption_is_taken_unless_all_are_recaptioned():
    sample = {"txt": b"short", "recap_txt": b"long"}
    taken = [CaptionChoice(KEYS, ("recap_txt",), p)(sample, None) for p in (0.0, 0.95, 1.0)]
    assert taken == ["short", "short", "long"]


def test_without_recaptioned_text_the_ordinary_caption_is_taken():
    choice = CaptionChoice(KEYS, ("recap_txt", "json:recaption"), 1.0)
    assert choice({"txt": b"short"}, None) == "short"
    assert choice({"txt": b"short", "recap_txt": b" The image shows \n"}, None) == "short"
    assert choice({"txt": b"short", **with_json(recaption=["", "long"])}, None) == "long"
    with pytest.raises(BadSample):
        choice({"recap_txt": b""}, None)


def test_recaptioned_text_alone_is_enough_when_it_is_taken():
    choice = CaptionChoice(KEYS, ("recap_txt",), 1.0)
    assert choice({"recap_txt": b"long"}, SampleDraws(0, 0, "key")) == "long"


@pytest.mark.parametrize("verb", ["depicts", "displays", "showcases", "features", "shows"])
def test_recaptioned_text_loses_its_opening_once(verb):
    choice = CaptionChoice(KEYS, ("recap_txt",), 1.0)
    sample = {"recap_txt": f" The image {verb} a cat.\nThe image {verb} no dog.".encode()}
    assert choice(sample, None) == f"a cat. The image {verb} no dog."


@pytest.mark.parametrize(
    "text", ["The image showed a cat", "In it, The image shows a cat", "The picture shows a cat"]
)
def test_other_openings_stay_and_ordinary_captions_keep_theirs(text):
    assert CaptionChoice(KEYS, ("recap_txt",), 1.0)({"recap_txt": text.encode()}, None) == text
    assert CaptionChoice(KEYS)({"txt": b"The image shows a cat"}, None) == "The image shows a cat"


# cleaning, keys


def test_captions_lose_control_characters_and_outer_space():
    assert clean_caption("  a\x00dog\t on\r\n the \x7f beach \n") == "a dog on the beach"
    assert clean_caption("\ufeffünï 犬 🐕") == "ünï 犬 🐕"
    assert clean_caption("half \ud83d pair").encode() == b"half pair"


def test_caption_keys_that_match_nothing_are_refused():
    check_caption_keys(["txt", "json:caption"])
    for keys in ([], "txt", [""], ["txt:caption"], [":x"]):
        with pytest.raises(ValueError, match="recaption_keys"):
            check_caption_keys(keys, "recaption_keys")
