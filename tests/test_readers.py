"""data/readers.py: batches of images, stored tokens and captions; hostile samples, resuming."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image
from sources import encode, noise, npy

from data.captions import CaptionConfig
from data.config import ReaderConfig, SourceConfig
from data.filters import FilterConfig
from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, caption_reader, token_reader
from data.tar import write_shard

K, C = 6, 4
IN_MEMORY = {"num_workers": 0, "shuffle_buffer": 8}


class Letters:
    """A text tower's tokenizer: B captions -> B x 4, their first four code points."""

    context_length = 4

    def __call__(self, captions):
        return torch.tensor([[ord(c) for c in caption[:4].ljust(4)] for caption in captions])

    def num_tokens(self, caption):
        return len(caption)


tokenize = Letters()


def jpeg(width, height, seed=0, format="JPEG"):
    return encode(noise(seed, 4, 4).resize((width, height)), format)


def floats(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def latent(seed):
    return floats(seed, 2, K, C)


def states(seed, length=5):
    return floats(seed, length, 8)


def token_sample(number, **parts):
    json = {"captions": ["one", f"two {number}"]}
    base = {"latent.npy": latent(number), "txt": f"text {number}", "json": json}
    return {"__key__": f"{number:03d}", **base, **parts}


def write(folder, samples, name="0.tar"):
    write_shard(folder / name, samples)
    return str(folder / name)


def images(*shards, size=16, tokenizer=None, **options):
    return image_reader(ImageTextConfig(list(shards), **IN_MEMORY | options), size, tokenizer)


def tokens(*shards, tokenizer=None, with_states=True, **options):
    config = TokenTextConfig(list(shards), **IN_MEMORY | options)
    return token_reader(config, K, C, tokenizer, with_states)


def captions(*shards, with_states=False, **options):
    config = ReaderConfig(list(shards), **IN_MEMORY | options)
    return caption_reader(config, tokenize, with_states)


def stream(reader, batch_size, **options):
    return iter(reader.stream(batch_size, seed=5, **options))


@pytest.fixture
def image_shards(tmp_path):
    """Two shards of ten images of several sizes."""
    for shard in range(2):
        keys = [f"{shard}{i}" for i in range(10)]
        samples = [
            {"__key__": key, "jpg": jpeg(20 + int(key) % 10, 24, int(key)), "txt": f"photo {key}"}
            for key in keys
        ]
        write(tmp_path, samples, f"{shard}.tar")
    return str(tmp_path / "{0..1}.tar")


# what batches hold


def test_batches_of_images_have_the_documented_keys_shapes_and_types(image_shards):
    batch = next(stream(images(image_shards, tokenizer=tokenize), 3))
    assert set(batch) == {"image", "token_ids", "captions_cut", "caption", "key", "skipped"}
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["caption"] == [f"photo {key}" for key in batch["key"]] and batch["skipped"] == {}
    assert torch.equal(batch["token_ids"], tokenize(batch["caption"]))
    assert "token_ids" not in next(stream(images(image_shards), 3))


def test_stored_tokens_come_back_as_written(tmp_path):
    samples = [token_sample(i, **{"text.npy": states(i)}) for i in range(3)]
    (batch,) = tokens(write(tmp_path, samples), tokenizer=tokenize).once(8)
    text = {"text_states", "token_ids", "captions_cut", "caption", "key", "skipped"}
    assert set(batch) == {"latent_mean", "latent_logvar"} | text
    stored = torch.from_numpy(np.stack([latent(i) for i in range(3)])).float()
    assert torch.equal(batch["latent_mean"], stored[:, 0])
    assert torch.equal(batch["latent_logvar"], stored[:, 1])
    assert batch["latent_mean"].dtype == torch.float32 and batch["latent_logvar"].is_contiguous()
    expected = torch.from_numpy(np.stack([states(i) for i in range(3)]))
    assert torch.equal(batch["text_states"], expected)
    assert batch["text_states"].dtype == torch.float16
    assert batch["caption"] == ["text 0", "text 1", "text 2"]
    for sample, wanted in ((token_sample(0), True), (samples[0], False)):
        (plain,) = tokens(write(tmp_path, [sample]), with_states=wanted).once(8)
        assert set(plain) == {"latent_mean", "latent_logvar", "caption", "key", "skipped"}


def test_headerless_release_tokens_equal_the_same_latents_in_our_format(tmp_path):
    ours = write(tmp_path, [token_sample(i) for i in range(2)], "ours.tar")
    release = []
    for i in range(2):
        flat = latent(i).transpose(0, 2, 1).reshape(2 * C, K)  # mean channels first
        data = flat.astype("<f2").tobytes()
        release.append({"__key__": f"{i:03d}", "token.npy": data, "txt": f"text {i}"})
    (expected,) = tokens(ours).once(8)
    (batch,) = tokens(write(tmp_path, release, "release.tar")).once(8)
    assert batch.keys() == expected.keys() and batch["caption"] == expected["caption"]
    for name in ("latent_mean", "latent_logvar"):
        assert torch.equal(batch[name], expected[name])


def test_captions_are_read_of_any_shards_and_states_where_they_are_wanted(tmp_path, image_shards):
    path = write(tmp_path, [token_sample(i, **{"text.npy": states(i)}) for i in range(3)], "t.tar")
    (batch,) = captions(path, with_states=True).once(8)
    text = {"token_ids", "captions_cut", "caption", "key", "skipped"}
    assert set(batch) == text | {"text_states"}
    assert torch.equal(batch["text_states"][1], torch.from_numpy(states(1)))
    (batch,) = captions(path, image_shards).once(30)
    assert set(batch) == text and len(batch["key"]) == 23
    (batch,) = captions(image_shards, with_states=True).once(8, shards=[path, image_shards])
    assert batch["key"] == ["000", "001", "002"] and batch["skipped"] == {"text: missing": 20}

    # Of several captions, the stored states are of the first
    several = CaptionConfig(keys=["json:captions"])
    for with_states, read in ((True, {"one"}), (False, {"one", "two 0", "two 1", "two 2"})):
        drawn = stream(captions(path, with_states=with_states, captions=several), 12)
        assert set(next(drawn)["caption"]) == read


# order and position


def test_a_part_of_a_long_caption_is_drawn_anew_each_epoch(tmp_path):
    path = write(tmp_path, [token_sample(i, txt="a. b. c.") for i in range(3)])
    reader = tokens(path, tokenizer=tokenize, captions=CaptionConfig(window="sentences"))
    batches = stream(reader, 3)
    drawn = {f"{i:03d}": [] for i in range(3)}
    for batch in (next(batches) for _ in range(24)):
        assert torch.equal(batch["token_ids"], tokenize(batch["caption"]))
        assert batch["captions_cut"] == 0
        for key, caption in zip(batch["key"], batch["caption"], strict=True):
            drawn[key].append(caption)
    assert all({*captions} == {"a.", "b.", "c."} for captions in drawn.values())
    assert len({tuple(captions) for captions in drawn.values()}) == 3
    (ordered,) = reader.once(3)
    assert ordered["caption"] == ["a."] * 3


def test_one_pass_is_in_order_and_ends_short(image_shards):
    batches = list(images(image_shards, tokenizer=tokenize).once(8))
    assert [len(batch["key"]) for batch in batches] == [8, 8, 4]
    keys = [key for batch in batches for key in batch["key"]]
    assert keys == [f"{i}{j}" for i in range(2) for j in range(10)]


def test_training_resizes_fast_unless_asked_otherwise_and_one_pass_is_exact_and_centred(tmp_path):
    samples = [{"__key__": f"{i}", "jpg": jpeg(200 + 60 * i, 200), "txt": "x"} for i in range(2)]
    path = write(tmp_path, samples)
    plain = {"random_crop": False, "flip_probability": 0.0, "size": 32, "shuffle_buffer": 1}
    fast = next(stream(images(path, **plain), 2))["image"]
    exact = next(stream(images(path, **plain, resize="exact"), 2))["image"]
    (ordered,) = images(path, size=32).once(2)
    assert torch.equal(ordered["image"], exact) and not torch.equal(exact, fast)
    assert (exact.int() - fast).abs().float().mean() < 1.5


# what is drawn, and for which source


def test_crop_and_flip_options_change_the_images_and_each_epoch_its_crops(image_shards):
    def epochs(**options):
        batches = stream(images(image_shards, **options), 20)
        two = next(batches), next(batches)
        return [dict(zip(batch["key"], batch["image"], strict=True)) for batch in two]

    (base, again), (cropped, other), (flipped, _) = (
        epochs(random_crop=random_crop, flip_probability=flip)
        for random_crop, flip in ((False, 0.0), (True, 0.0), (False, 1.0))
    )
    assert all(torch.equal(base[key], again[key]) for key in base)
    assert all(torch.equal(base[key].flip(-1), flipped[key]) for key in base)
    assert any(not torch.equal(base[key], cropped[key]) for key in base)
    assert any(not torch.equal(other[key], cropped[key]) for key in base)


def test_a_caption_is_drawn_anew_in_each_epoch_and_leaves_the_crops_alone(tmp_path):
    json = {"captions": ["one", "two", "three"], "recap": "long"}
    samples = [{"__key__": f"{i}", "jpg": jpeg(60, 24, i), "json": json} for i in range(8)]
    path = write(tmp_path, samples)

    def two_epochs(**options):
        config = CaptionConfig(keys=["json:captions"], **options)
        batches = stream(images(path, captions=config), 8)
        return [next(batches) for _ in range(2)]

    several = two_epochs()
    assert set(several[0]["caption"]) == {"one", "two", "three"}
    first, second = (dict(zip(b["key"], b["caption"], strict=True)) for b in several)
    assert first != second
    recaptioned = two_epochs(recaption_keys=["json:recap"], recaption_probability=0.5)
    for batch, other in zip(several, recaptioned, strict=True):
        assert torch.equal(batch["image"], other["image"])  # one draw does not change another
        pairs = list(zip(batch["caption"], other["caption"], strict=True))
        assert {after for _, after in pairs} > {"long"}
        assert all(after in (before, "long") for before, after in pairs)


def test_each_source_has_its_own_captions_filters_and_share(tmp_path):
    first = [token_sample(i, json={"aesthetic": 4 + i % 3}, recap_txt="more") for i in range(12)]
    second = [token_sample(100 + i) for i in range(12)]
    recaptioned = CaptionConfig(recaption_keys=["recap_txt"])
    sources = {
        "first": SourceConfig([write(tmp_path, first, "0.tar")], 3.0, recaptioned),
        "second": SourceConfig([write(tmp_path, second, "1.tar")], filters=FilterConfig()),
    }
    reader = tokens(
        sources=sources,
        captions=CaptionConfig(keys=["json:captions", "txt"]),
        filters=FilterConfig(min_aesthetic_score=5.0),
    )
    batches = stream(reader, 100)
    taken, keys, skipped = Counter(), Counter(), Counter()
    for batch in (next(batches) for _ in range(4)):
        taken.update(caption.partition(" ")[0] for caption in batch["caption"])
        keys.update(batch["key"])
        skipped.update(batch["skipped"])
    assert taken["more"] > 250 and taken["text"] > 0 and min(taken["one"], taken["two"]) > 20
    passing = {f"{i:03d}" for i in range(12) if i % 3}
    assert set(keys) == passing | {f"{100 + i:03d}" for i in range(12)}
    assert set(skipped) == {"filter: min_aesthetic_score"}
    ordered = next(reader.once(100))
    assert (ordered["caption"][0], ordered["caption"][-1]) == ("text 1", "one")


# hostile samples

GOOD = {"jpg": jpeg(20, 20), "txt": "x", "json": {"aesthetic": 6.0, "caption": "from json"}}
# what differs from a good sample (None: it is absent), and its caption, or why it is skipped
HOSTILE = {
    "good": ({"txt": "fine"}, "fine"),
    "other": ({"jpg": None, "png": jpeg(20, 20, format="PNG"), "txt": None}, "from json"),
    "low": ({"jpg": b"no image", "json": {"aesthetic": 4.0}}, "filter: min_aesthetic_score"),
    "broken": ({"json": b"{"}, "json: unreadable"),
    "truncated": ({"jpg": jpeg(90, 90)[:300]}, "image: unreadable (OSError)"),
    "empty": ({"jpg": b""}, "image: unreadable (UnidentifiedImageError)"),
    "imageless": ({"jpg": None}, "image: missing"),
    "raw": ({"jpg": None, "dng": jpeg(20, 20)}, "image: missing"),
    "wordless": ({"txt": None, "json": {"aesthetic": 6.0}}, "caption: missing"),
    "blank": ({"txt": " \n", "json": None}, "caption: missing"),
    "small": ({"jpg": jpeg(17, 11)}, "filter: min_longer_side"),
    "long": ({"jpg": jpeg(41, 20)}, "filter: max_aspect_ratio"),
    "tall": ({"jpg": jpeg(20, 41)}, "filter: max_aspect_ratio"),
    "atlimits": ({"jpg": jpeg(18, 9)}, "x"),
}


def test_hostile_images_are_counted_by_reason_and_the_others_read(tmp_path):
    changed = {key: GOOD | parts for key, (parts, _) in HOSTILE.items()}
    samples = [
        {"__key__": key, **{name: part for name, part in parts.items() if part is not None}}
        for key, parts in changed.items()
    ]
    path = write(tmp_path, samples)
    limits = {"min_longer_side": 18, "max_aspect_ratio": 2.0, "min_aesthetic_score": 5.0}
    (batch,) = images(path, filters=FilterConfig(**limits)).once(20)
    assert batch["key"] == ["good", "other", "atlimits"]
    assert batch["caption"] == [HOSTILE[key][1] for key in batch["key"]]
    reasons = Counter(end for key, (_, end) in HOSTILE.items() if key not in batch["key"])
    assert batch["skipped"] == reasons


def test_unreadable_json_is_no_fault_where_no_filter_needs_it(tmp_path):
    path = write(tmp_path, [GOOD | {"__key__": "a", "json": b"{"}])
    (batch,) = images(path, filters=FilterConfig(max_caption_characters=3)).once(8)
    assert batch["key"] == ["a"]


def test_transparency_shows_the_configured_background(tmp_path):
    image = encode(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")
    path = write(tmp_path, [{"__key__": "a", "png": image, "txt": "x"}])
    (batch,) = images(path, background=[1, 2, 3]).once(8)
    assert batch["image"][0, :, 5, 5].tolist() == [1, 2, 3]


def test_broken_tokens_are_skipped_and_counted(tmp_path):
    endless = latent(0)
    endless[1, 2, 3] = np.inf
    broken = {
        "latent: not an npy file": [
            {"latent.npy": npy(latent(1))[:-2]},
            {"latent.npy": b""},
            {"latent.npy": b"\x93NUMPY\x01\x00\x05\x00{][}(((" + bytes(50)},
            {"latent.npy": npy(latent(1)).replace(b"(2, 6, 4)", b"(9**99,)")},
            {"latent.npy": npy(np.array([{}]))},
        ],
        "latent: not finite": [{"latent.npy": endless}],
        "text: not an npy file": [{"text.npy": npy(states(0))[:-2]}],
        "caption: missing": [{"txt": ""}],
    }
    reasons = [reason for reason, parts in broken.items() for _ in parts]
    parts = [part for several in broken.values() for part in several]
    samples = [token_sample(i + 1, json={}, **part) for i, part in enumerate(parts)]
    imageless = {"__key__": "090", "txt": "no latent"}
    path = write(tmp_path, [token_sample(0), *samples, imageless, token_sample(99)])
    (batch,) = tokens(path).once(30)
    assert batch["key"] == ["000", "099"]
    assert batch["skipped"] == Counter([*reasons, "latent: missing"])


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ([{"latent.npy": np.zeros((2, K, C + 1), np.float16)}], ["000.latent.npy", "(2, 6, 5)"]),
        (
            [{"latent.npy": np.zeros((2, K, C), np.float32)}],
            ["000.latent.npy", "float32 (2, 6, 4)"],
        ),
        ([{"latent.npy": np.asfortranarray(latent(0))}], ["000.latent.npy", "C order"]),
        ([{"latent.npy": np.float16(0)}], ["000.latent.npy", "()"]),
        ([{"text.npy": np.zeros(4, np.float16)}], ["000.text.npy", "(4,)"]),
        ([{"text.npy": states(0)}, {}], ["text.npy", "000", "(5, 8)", "001 has None"]),
        ([{}, {"text.npy": states(0)}], ["text.npy", "000", "None", "001 has (5, 8)"]),
        ([{"text.npy": states(0)}, {"text.npy": states(1, 7)}], ["(5, 8)", "001 has (7, 8)"]),
    ],
)
def test_arrays_that_do_not_fit_the_run_stop_it_naming_key_given_and_expected(
    tmp_path, parts, named
):
    path = write(tmp_path, [token_sample(i, **part) for i, part in enumerate(parts)])
    with refusal("expected", *named):
        list(tokens(path).once(8))
    with refusal(".npy"):
        next(stream(tokens(path), len(parts)))


def test_release_tokens_of_another_length_stop_the_run(tmp_path):
    path = write(tmp_path, [{"__key__": "a", "token.npy": bytes(90), "txt": "x"}])
    with refusal("a.token.npy", "given 90 bytes", "expected 96"):
        list(tokens(path).once(8))
