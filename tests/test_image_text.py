"""data/image_text.py and data/captions.py: batches of images with captions, filters, hostile samples, resuming."""

import io
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data.captions import caption_of, check_caption_keys, clean_caption
from data.image_text import ImageTextConfig, build_image_loader, read_images
from data.shards import BadSample
from data.tar import write_shard

torch.set_num_threads(1)


def tokenize(captions):
    """B captions -> B x 4: their first four code points."""
    return torch.tensor([[ord(c) for c in caption[:4].ljust(4)] for caption in captions])


def jpeg(width, height, seed=0, format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Two shards of ten images of several sizes."""
    for index in range(2):
        samples = [
            {"__key__": f"{index}{i}", "jpg": jpeg(20 + i, 24, seed=10 * index + i), "txt": f"photo {index}{i}"}
            for i in range(10)
        ]
        write_shard(tmp_path / f"{index}.tar", samples)
    return str(tmp_path / "{0..1}.tar")


def config(*shards, **options):
    return ImageTextConfig(shards=list(shards), **{"num_workers": 0, "shuffle_buffer": 8, **options})


def same(left, right):
    assert left["key"] == right["key"] and left["caption"] == right["caption"] and left["skipped"] == right["skipped"]
    assert torch.equal(left["image"], right["image"]) and torch.equal(left["token_ids"], right["token_ids"])


def test_batches_have_the_documented_keys_shapes_and_types(shards):
    batch = next(iter(build_image_loader(config(shards), 16, tokenize, batch_size=3, seed=0)))
    assert set(batch) == {"image", "token_ids", "caption", "key", "skipped"}
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["token_ids"].shape == (3, 4) and batch["token_ids"].dtype == torch.int64
    assert batch["caption"] == [f"photo {key}" for key in batch["key"]] and batch["skipped"] == {}
    assert torch.equal(batch["token_ids"], tokenize(batch["caption"]))


def test_without_a_tokenizer_there_are_no_token_ids(shards):
    assert "token_ids" not in next(iter(build_image_loader(config(shards), 16, None, batch_size=3, seed=0)))


def test_each_image_once_per_epoch_over_two_ranks_and_two_workers(shards):
    keys = Counter()
    for rank in range(2):
        cfg = config(shards, num_workers=2)
        loader = iter(build_image_loader(cfg, 8, None, batch_size=5, seed=0, rank=rank, world_size=2))
        for _ in range(2):
            keys.update(next(loader)["key"])
    assert keys == {f"{index}{i}": 1 for index in range(2) for i in range(10)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_and_flips_resume_bit_for_bit(shards, num_workers):
    def loader():
        return build_image_loader(config(shards, num_workers=num_workers), 16, tokenize, batch_size=3, seed=5)

    whole = loader()
    batches = iter(whole)
    for _ in range(3):
        next(batches)
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    expected = [next(batches) for _ in range(6)]
    resumed = loader()
    resumed.load_state_dict(state)
    for batch, other in zip(expected, iter(resumed), strict=False):
        same(batch, other)


def test_an_image_is_cropped_anew_in_each_epoch(shards):
    batches = iter(build_image_loader(config(shards, flip_probability=0.0), 16, None, batch_size=20, seed=0))
    first, second = (
        {k: image for k, image in zip(b["key"], b["image"], strict=True)} for b in map(next, [batches] * 2)
    )
    assert set(first) == set(second)
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_crop_and_flip_options_change_the_images(shards):
    def images(**options):
        batch = next(iter(build_image_loader(config(shards, **options), 16, None, batch_size=20, seed=0)))
        return batch["image"]

    base = images(random_crop=False, flip_probability=0.0)
    assert not torch.equal(images(random_crop=True, flip_probability=0.0), base)
    assert torch.equal(images(random_crop=False, flip_probability=1.0), base.flip(-1))


def test_one_pass_is_in_order_centre_cropped_and_ends_short(shards):
    batches = list(read_images(config(shards), 16, tokenize, batch_size=8))
    assert [len(batch["key"]) for batch in batches] == [8, 8, 4]
    assert [key for batch in batches for key in batch["key"]] == [f"{i}{j}" for i in range(2) for j in range(10)]
    plain = build_image_loader(
        config(shards, random_crop=False, flip_probability=0.0, shuffle_buffer=1), 16, tokenize, 20, seed=0
    )
    stream = next(iter(plain))
    order = sorted(range(20), key=lambda i: stream["key"][i])
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), stream["image"][order])
    same(next(read_images(config(shards), 16, tokenize, 8)), batches[0])


def test_one_pass_can_be_limited_and_given_other_shards(shards, tmp_path):
    batches = list(read_images(config(shards), 16, None, 4, shards=[str(tmp_path / "1.tar")], limit=6))
    assert [key for batch in batches for key in batch["key"]] == [f"1{i}" for i in range(6)]


def test_hostile_samples_are_counted_by_reason_and_the_others_read(tmp_path):
    bomb = bytearray(jpeg(8, 8, format="BMP"))
    bomb[18:26] = (60000).to_bytes(4, "little") * 2
    samples = [
        {"__key__": "good0", "jpg": jpeg(20, 20), "txt": "fine"},
        {"__key__": "truncated", "jpg": jpeg(90, 90)[:300], "txt": "x"},
        {"__key__": "empty", "jpg": b"", "txt": "x"},
        {"__key__": "noimage", "txt": "x"},
        {"__key__": "nocaption", "jpg": jpeg(20, 20)},
        {"__key__": "blank", "jpg": jpeg(20, 20), "txt": " \n"},
        {"__key__": "bomb", "bmp": bytes(bomb), "txt": "x"},
        {"__key__": "good1", "png": jpeg(20, 20, format="PNG"), "json": {"caption": "from json"}},
    ]
    write_shard(tmp_path / "0.tar", samples)
    (batch,) = read_images(config(str(tmp_path / "0.tar")), 16, None, batch_size=8)
    assert batch["key"] == ["good0", "good1"] and batch["caption"] == ["fine", "from json"]
    skipped = batch["skipped"]
    assert skipped.pop("caption: missing") == 2 and skipped.pop("image: missing") == 1
    assert skipped.pop("image: too many pixels") == 1
    assert sum(skipped.values()) == 2 and all(reason.startswith("image: unreadable") for reason in skipped)


def test_small_and_elongated_images_are_filtered_at_their_limits(tmp_path):
    sizes = {"small": (31, 31), "atside": (32, 20), "atratio": (80, 40), "long": (40, 81)}
    write_shard(tmp_path / "0.tar", ({"__key__": k, "jpg": jpeg(*s), "txt": k} for k, s in sizes.items()))
    path = str(tmp_path / "0.tar")
    (batch,) = read_images(config(path, min_longer_side=32, max_aspect_ratio=2.0), 16, None, 8)
    assert batch["key"] == ["atside", "atratio"]
    assert batch["skipped"] == {"filter: min_longer_side": 1, "filter: max_aspect_ratio": 1}
    assert len(next(read_images(config(path), 16, None, 8))["key"]) == 4


def test_transparency_shows_the_configured_background(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(buffer, "PNG")
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": buffer.getvalue(), "txt": "x"}])
    (batch,) = read_images(config(str(tmp_path / "0.tar"), background=[1, 2, 3]), 16, None, 8)
    assert batch["image"][0, :, 5, 5].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": []}, "shards"),
        ({"flip_probability": 1.5}, "flip_probability: given 1.5, expected 0..1"),
        ({"min_longer_side": -1}, "min_longer_side"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio"),
        ({"background": [0, 0]}, "background"),
        ({"shuffle_buffer": -1}, "shuffle_buffer"),
        ({"num_workers": -1}, "num_workers"),
        ({"caption_keys": []}, "caption_keys"),
        ({"caption_keys": ["json:"]}, "json:"),
    ],
)
def test_a_wrong_field_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImageTextConfig(**{"shards": ["a.tar"], **options}).validate()


# captions


def test_caption_keys_are_tried_in_order():
    sample = {"txt": b"plain", "json": json.dumps({"caption": "other", "n": 3}).encode()}
    assert caption_of(sample, ["txt", "json:caption"]) == "plain"
    assert caption_of(sample, ["json:caption", "txt"]) == "other"
    assert caption_of(sample, ["recap", "json:n", "json:absent", "txt"]) == "plain"


@pytest.mark.parametrize(
    "sample",
    [{}, {"txt": b""}, {"txt": b"\x00\n"}, {"txt": b"\xff\xfe\xfa"}, {"json": b"[1]"}, {"json": b"{"}]
    + [{"json": b"[" * 100000}, {"json": b'{"caption": null}'}, {"json": b'{"caption": "\\ud83d"}'}],
)
def test_a_sample_without_a_readable_caption_is_bad(sample):
    with pytest.raises(BadSample, match="^caption: missing$"):
        caption_of(sample, ["txt", "json:caption"])


def test_captions_lose_control_characters_and_outer_space():
    assert clean_caption("  a\x00dog\t on\r\n the \x7f beach \n") == "a dog on the beach"
    assert clean_caption("\ufeffünï 犬 🐕") == "ünï 犬 🐕"
    assert clean_caption("half \ud83d pair").encode() == b"half pair"


def test_caption_keys_that_match_nothing_are_refused():
    check_caption_keys(["txt", "json:caption"])
    for keys in ([], "txt", [""], ["txt:caption"], [":x"]):
        with pytest.raises(ValueError, match="caption_keys"):
            check_caption_keys(keys)
