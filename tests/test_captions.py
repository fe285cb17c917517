"""data/captions.py and data/samples.py: where captions lie, which is taken, cleaning."""

import json
from collections import Counter

import pytest
import torch

from data.captions import (
    CaptionConfig,
    captions_of,
    clean_caption,
    collate_text,
    is_cut,
    sentences_that_fit,
)
from data.filters import FilterConfig
from data.samples import BadSample, SampleDraws

DRAWS = ("crop_x", "crop_y", "flip", "recaption", "caption", "window")


def with_json(**fields):
    return {"json": json.dumps(fields).encode()}


def choice(recaption_keys=(), probability=1.0):
    return CaptionConfig(["txt", "json:caption"], list(recaption_keys), probability)


def drawn(config, sample, number=2000):
    """How often each caption is taken over epochs, as shares to one decimal."""
    counts = Counter(config.choose(sample, SampleDraws(0, epoch, "key")) for epoch in range(number))
    return {caption: round(count / number, 1) for caption, count in counts.items()}


# where they lie


@pytest.mark.parametrize(
    ("keys", "captions"),
    [
        (["json:caption", "txt"], ["other"]),
        (["recap", "json:n", "json:absent", "json:empty", "txt"], ["plain"]),
        (["json:captions", "txt"], ["one", "two"]),
    ],
)
def test_keys_are_tried_in_order_and_a_list_gives_all_its_usable_captions(keys, captions):
    several = ["one", " ", 3, "two\n", None]
    sample = {"txt": b"plain", **with_json(caption="other", n=3, captions=several, empty=[" "])}
    assert captions_of(sample, keys) == captions


@pytest.mark.parametrize(
    "sample",
    [
        {"txt": b"\x00\n", "recap_txt": b""},
        {"txt": b"\xff\xfe\xfa", "json": b"[1]"},
        {"json": b"[" * 100000},
        {"json": b'{"caption": "\\ud83d"}'},
    ],
)
def test_a_sample_without_a_readable_caption_is_bad(sample):
    with pytest.raises(BadSample, match="^caption: missing$"):
        choice(["recap_txt"]).choose(sample, None)


# which is taken


def test_only_wanted_captions_are_drawn_and_a_sample_without_one_says_why():
    sample = {"recap_txt": b"short", **with_json(caption=["one", "two", "longer", "longest"])}
    fault = FilterConfig(min_caption_characters=6).caption_fault
    config = CaptionConfig(["json:caption"], ["recap_txt"], 0.5)
    taken = {config.choose(sample, SampleDraws(0, epoch, "key"), fault) for epoch in range(50)}
    assert taken == {"longer", "longest"}
    assert config.choose(sample, None, fault) == "longer"
    with pytest.raises(BadSample, match="^filter: min_caption_characters$"):
        config.choose(with_json(caption=["one", "two"]), None, fault)


def test_one_of_several_captions_is_drawn_evenly_and_the_first_without_draws():
    sample = with_json(caption=["one", "two", "three", "four", "five"])
    assert drawn(choice(), sample) == dict.fromkeys(["one", "two", "three", "four", "five"], 0.2)
    assert choice().choose(sample, None) == "one"
    assert len({choice().choose(sample, SampleDraws(0, 7, "key")) for _ in range(3)}) == 1


@pytest.mark.parametrize(("probability", "in_order"), [(0.3, "short"), (1.0, "long")])
def test_recaptioned_text_is_taken_with_its_probability_and_in_order_if_all_are(
    probability, in_order
):
    sample, config = {"txt": b"short", "recap_txt": b"long"}, choice(["recap_txt"], probability)
    shares = drawn(config, sample)
    assert abs(shares.get("long", 0.0) - probability) <= 0.051
    assert config.choose(sample, None) == in_order


@pytest.mark.parametrize(
    ("sample", "caption"),
    [
        ({"txt": b"short", "recap_txt": b" The image shows \n"}, "short"),
        ({"recap_txt": b"", **with_json(recaption=["", "long"])}, "long"),
        ({"recap_txt": b"The image depicts a. The image shows b."}, "a. The image shows b."),
        ({"recap_txt": b"In it, The image shows a cat"}, "In it, The image shows a cat"),
        ({"txt": b"The image shows a cat"}, "The image shows a cat"),
    ],
)
def test_recaptioned_text_is_enough_and_the_ordinary_caption_is_taken_where_there_is_none(
    sample, caption
):
    assert choice(["recap_txt", "json:recaption"]).choose(sample, None) == caption


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\x00dog\t on\r\n the \x7f beach \n", "a dog on the beach"),
        ("\ufeffünï 犬 🐕", "ünï 犬 🐕"),
        ("half \ud83d pair", "half pair"),
    ],
)
def test_captions_lose_control_characters_and_outer_space(text, clean):
    assert clean_caption(text) == clean


# the text tower's context


class Words:
    """A tokenizer with a start and an end token, for which each word is a token."""

    context_length = 6

    def __call__(self, captions):
        return torch.zeros(len(captions), self.context_length)

    def num_tokens(self, caption):
        return len(caption.split()) + 2


def runs_of(caption):
    """All that can be drawn of a caption, in the order of the draws."""
    return list(dict.fromkeys(sentences_that_fit(caption, i / 50, Words()) for i in range(50)))


@pytest.mark.parametrize(
    ("caption", "runs"),
    [
        ("a b c. d. e f.", ["a b c. d.", "d. e f."]),
        ('a "b c!" d e. Is 1.5 f? g', ['a "b c!"', "d e.", "Is 1.5 f? g"]),
        ("a b c d e f. g. h i.", ["a b c d e f.", "g. h i."]),
        ("a b c d e", ["a b c d e"]),
    ],
)
def test_a_caption_that_is_too_long_gives_runs_of_whole_sentences_that_fit(caption, runs):
    assert runs_of(caption) == runs
    draws = [sentences_that_fit(caption, i / 300, Words()) for i in range(300)]
    assert max(Counter(draws).values()) - min(Counter(draws).values()) <= 1


def test_sentences_without_spaces_between_them_are_told_apart():
    class Letters(Words):
        def num_tokens(self, caption):
            return len(caption) + 2

    runs = [sentences_that_fit("猫。犬。鳥。", draw, Letters()) for draw in (0, 0.9)]
    assert runs == ["猫。犬。", "犬。鳥。"]


def test_the_share_of_cut_captions_is_that_of_what_the_tower_is_given():
    long = "a b c. d e f. g"
    assert is_cut(long, Words()) and not is_cut("a b c d", Words())
    samples = [{"key": str(i), "caption": caption} for i, caption in enumerate([long, "a", "b"])]
    batch = collate_text(samples, Words())
    assert batch["captions_cut"].item() == pytest.approx(1 / 3) and batch["caption"][0] == long
    samples[0]["window"] = 0.9
    batch = collate_text(samples, Words())
    assert batch["captions_cut"] == 0 and batch["caption"][0] == "d e f. g"
    assert collate_text(samples, None).keys() == {"key", "caption"}


# the random numbers of a sample


def numbers(*arguments):
    return [getattr(SampleDraws(*arguments), name) for name in DRAWS]


def test_each_use_has_its_own_number_and_seed_epoch_and_key_each_change_all():
    base = numbers(3, 1, "key")
    assert len(set(base)) == 6 and all(0 <= number < 1 for number in base)
    assert [getattr(SampleDraws(3, 1, "key"), name) for name in reversed(DRAWS)] == base[::-1]
    for other in ((4, 1, "key"), (3, 2, "key"), (3, 1, "kez"), (3, 1, "\udcff")):
        assert not set(numbers(*other)) & set(base)
