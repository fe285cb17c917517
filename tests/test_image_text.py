"""data/image_text.py: batches of images with captions, filters, hostile samples, resuming."""

import io
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from data.image_text import ImageTextConfig, build_image_loader, read_images
from data.mixture import SourceConfig
from PIL import Image

from data.filters import FilterConfig
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
            {
                "__key__": f"{index}{i}",
                "jpg": jpeg(20 + i, 24, seed=10 * index + i),
                "txt": f"photo {index}{i}",
            }
            for i in range(10)
        ]
        write_shard(tmp_path / f"{index}.tar", samples)
    return str(tmp_path / "{0..1}.tar")


def config(*shards, **options):
    return ImageTextConfig(
        shards=list(shards), **{"num_workers": 0, "shuffle_buffer": 8, **options}
    )


def same(left, right):
    assert (
        left["key"] == right["key"]
        and left["caption"] == right["caption"]
        and left["skipped"] == right["skipped"]
    )
    assert torch.equal(left["image"], right["image"]) and torch.equal(
        left["token_ids"], right["token_ids"]
    )


def test_batches_have_the_documented_keys_shapes_and_types(shards):
    batch = next(iter(build_image_loader(config(shards), 16, tokenize, batch_size=3, seed=0)))
    assert set(batch) == {"image", "token_ids", "caption", "key", "skipped"}
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["token_ids"].shape == (3, 4) and batch["token_ids"].dtype == torch.int64
    assert batch["caption"] == [f"photo {key}" for key in batch["key"]] and batch["skipped"] == {}
    assert torch.equal(batch["token_ids"], tokenize(batch["caption"]))


def test_without_a_tokenizer_there_are_no_token_ids(shards):
    assert "token_ids" not in next(
        iter(build_image_loader(config(shards), 16, None, batch_size=3, seed=0))
    )


def test_each_image_once_per_epoch_over_two_ranks_and_two_workers(shards):
    keys = Counter()
    for rank in range(2):
        cfg = config(shards, num_workers=2)
        loader = iter(
            build_image_loader(cfg, 8, None, batch_size=5, seed=0, rank=rank, world_size=2)
        )
        for _ in range(2):
            keys.update(next(loader)["key"])
    assert keys == {f"{index}{i}": 1 for index in range(2) for i in range(10)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_and_flips_resume_bit_for_bit(shards, num_workers):
    def loader():
        return build_image_loader(
            config(shards, num_workers=num_workers), 16, tokenize, batch_size=3, seed=5
        )

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
    batches = iter(
        build_image_loader(config(shards, flip_probability=0.0), 16, None, batch_size=20, seed=0)
    )
    first, second = (
        {k: image for k, image in zip(b["key"], b["image"], strict=True)}
        for b in map(next, [batches] * 2)
    )
    assert set(first) == set(second)
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_crop_and_flip_options_change_the_images(shards):
    def images(**options):
        batch = next(
            iter(build_image_loader(config(shards, **options), 16, None, batch_size=20, seed=0))
        )
        return batch["image"]

    base = images(random_crop=False, flip_probability=0.0)
    assert not torch.equal(images(random_crop=True, flip_probability=0.0), base)
    assert torch.equal(images(random_crop=False, flip_probability=1.0), base.flip(-1))


def test_one_pass_is_in_order_centre_cropped_and_ends_short(shards):
    batches = list(read_images(config(shards), 16, tokenize, batch_size=8))
    assert [len(batch["key"]) for batch in batches] == [8, 8, 4]
    assert [key for batch in batches for key in batch["key"]] == [
        f"{i}{j}" for i in range(2) for j in range(10)
    ]
    same(next(read_images(config(shards), 16, tokenize, 8)), batches[0])
    for resize in ("exact", "fast"):
        plain = config(
            shards, random_crop=False, flip_probability=0.0, shuffle_buffer=1, resize=resize
        )
        stream = next(iter(build_image_loader(plain, 16, tokenize, 20, seed=0)))
        order = sorted(range(20), key=lambda i: stream["key"][i])
        (batch,) = read_images(config(shards), 16, tokenize, 20, resize=resize)
        assert torch.equal(batch["image"], stream["image"][order])


def test_reading_in_order_is_exact_and_training_fast_unless_it_is_asked_otherwise(tmp_path):
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "jpg": jpeg(200, 200), "txt": "x"}])
    options = {"random_crop": False, "flip_probability": 0.0}
    plain, exact = (
        config(str(tmp_path / "0.tar"), **options, **more) for more in ({}, {"resize": "exact"})
    )

    def trained(cfg):
        return next(iter(build_image_loader(cfg, 32, None, 1, seed=0)))["image"]

    (ordered,) = read_images(plain, 32, None, 1)
    assert torch.equal(ordered["image"], trained(exact))
    assert not torch.equal(ordered["image"], trained(plain))
    assert (ordered["image"].int() - trained(plain)).abs().float().mean() < 1.5


# captions and sources


def test_a_caption_is_drawn_anew_in_each_epoch_and_leaves_the_crops_alone(tmp_path):
    texts = {"json": {"captions": ["one", "two", "three"], "recap": "long"}}
    samples = [{"__key__": f"{i}", "jpg": jpeg(60, 24, seed=i), **texts} for i in range(8)]
    write_shard(tmp_path / "0.tar", samples)

    def two_epochs(**options):
        batches = iter(
            build_image_loader(config(str(tmp_path / "0.tar"), **options), 16, None, 8, seed=0)
        )
        return [next(batches) for _ in range(2)]

    several = two_epochs(caption_keys=["json:captions"])
    assert set(several[0]["caption"]) == {"one", "two", "three"}
    captions = [dict(zip(batch["key"], batch["caption"], strict=True)) for batch in several]
    assert captions[0] != captions[1]
    assert [batch["caption"] for batch in two_epochs(caption_keys=["json:captions"])] == [
        batch["caption"] for batch in several
    ]
    recaptioned = two_epochs(
        caption_keys=["json:captions"], recaption_keys=["json:recap"], recaption_probability=0.5
    )
    for batch, other in zip(several, recaptioned, strict=True):
        assert torch.equal(batch["image"], other["image"])  # one draw does not change another
        pairs = list(zip(batch["caption"], other["caption"], strict=True))
        assert {after for _, after in pairs} > {"long"}
        assert all(after in (before, "long") for before, after in pairs)


def test_each_source_has_its_own_captions_and_filters(tmp_path):
    for name in "ab":
        samples = [
            {
                "__key__": f"{name}{i}",
                "jpg": jpeg(20 + i, 20, seed=i),
                "txt": "plain",
                "alt": "other",
            }
            for i in range(9)
        ]
        write_shard(tmp_path / f"{name}.tar", samples)
    sources = {
        "first": SourceConfig([str(tmp_path / "a.tar")]),
        "second": SourceConfig(
            [str(tmp_path / "b.tar")], caption_keys=["alt"], filters=FilterConfig()
        ),
    }
    cfg = ImageTextConfig(sources=sources, num_workers=0, filters=FilterConfig(min_longer_side=24))
    batch = next(iter(build_image_loader(cfg, 16, None, 60, seed=0)))
    found = set(zip(batch["key"], batch["caption"], strict=True))
    assert found == {(f"a{i}", "plain") for i in range(4, 9)} | {
        (f"b{i}", "other") for i in range(9)
    }
    batches = list(read_images(cfg, 16, None, 20))
    assert batches[0]["key"] == [f"a{i}" for i in range(4, 9)] + [f"b{i}" for i in range(9)]


def test_scores_are_looked_at_before_the_image(tmp_path):
    samples = [
        {"__key__": "low", "jpg": b"no image", "txt": "x", "json": {"aesthetic": 4.0}},
        {"__key__": "high", "jpg": jpeg(20, 20), "txt": "x", "json": {"aesthetic": 6.0}},
    ]
    write_shard(tmp_path / "0.tar", samples)
    cfg = config(str(tmp_path / "0.tar"), filters=FilterConfig(min_aesthetic_score=5.0))
    (batch,) = read_images(cfg, 16, None, 8)
    assert batch["key"] == ["high"] and batch["skipped"] == {"filter: min_aesthetic_score": 1}


def test_one_pass_can_be_limited_and_given_other_shards(shards, tmp_path):
    batches = list(
        read_images(config(shards), 16, None, 4, shards=[str(tmp_path / "1.tar")], limit=6)
    )
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
    assert sum(skipped.values()) == 2 and all(
        reason.startswith("image: unreadable") for reason in skipped
    )


def test_small_and_elongated_images_are_filtered_at_their_limits(tmp_path):
    sizes = {"small": (31, 31), "atside": (32, 20), "atratio": (80, 40), "long": (40, 81)}
    write_shard(
        tmp_path / "0.tar", ({"__key__": k, "jpg": jpeg(*s), "txt": k} for k, s in sizes.items())
    )
    path = str(tmp_path / "0.tar")
    filters = FilterConfig(min_longer_side=32, max_aspect_ratio=2.0)
    (batch,) = read_images(config(path, filters=filters), 16, None, 8)
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
        ({"filters": FilterConfig(max_aspect_ratio=0.5)}, "filters.max_aspect_ratio: given 0.5"),
        ({"resize": "slow"}, "resize: given 'slow', expected fast or exact"),
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
