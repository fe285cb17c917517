"""scripts/make_shards.py: the same samples come out of every source, and what each option does."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sources import (
    SOURCES,
    STRICT,
    TABLES,
    captions_of,
    encode,
    fails,
    hostile_samples,
    image_of,
    in_folder,
    run,
    samples_of,
    summary_of,
    write_files,
    write_photos,
)

from data.captions import CaptionConfig
from data.entries import clean_key
from data.files import load_json
from data.images import ImageTextConfig, image_reader
from data.tar import read_shard, write_shard
from data.transforms import decode_image

# ------------------------------------------------------------------------------------ every source


@pytest.mark.parametrize("source", SOURCES)
def test_counts_are_exact_and_nothing_else_is_lost(source, tmp_path):
    samples = hostile_samples()
    command = SOURCES[source](tmp_path / "in", samples)
    reasons = Counter(sample.reason for sample in samples if sample.reason)
    if source == "folder":  # where an image is gone, its texts are there
        del reasons["image: missing"]
        reasons |= {"no image: .txt": 1, "no image: .json": 1}
    run(*command, *STRICT.split(), "--output", tmp_path / "out", "--samples-per-shard", 4)

    kept = {sample.data: sample for sample in samples if sample.reason is None}
    summary = summary_of(tmp_path / "out")
    assert summary["dropped"] == reasons and summary["first"].keys() == reasons.keys()
    assert (summary["read"], summary["kept"]) == (len(kept) + reasons.total(), len(kept))
    written = samples_of(tmp_path / "out")
    assert sum(summary["shards"].values()) == len(written) == len(kept)
    assert len({sample["__key__"] for sample in written}) == len(written)
    folder = {"karpathy": "val2014/", "mjhq": "people/"}.get(source, "")
    for found in written:
        # KeyError: not the bytes of the file, or not to be kept
        expected = kept.pop(image_of(found))
        # of equal images one stays, with the captions of both
        captions = [" ".join(s.caption.split()) for s in samples if s.data == expected.data]
        assert captions_of(found) == captions
        key = folder + expected.name.replace(".", "_")
        assert re.sub(r"\+\d+$", "", found["__key__"]) == key
        assert float(json.loads(found["json"])["aesthetic"]) == expected.score
        assert expected.extension in found
        assert ("recap_txt" in found) == (source == "tars")
    assert not kept


def test_the_training_reader_reads_what_was_kept(tmp_path):
    samples = hostile_samples()
    run(*TABLES["jsonl"](tmp_path / "in", samples), *STRICT.split(), "--output", tmp_path / "out")
    expected = sorted(" ".join(s.caption.split()) for s in samples if s.reason is None)
    for key in ("txt", "json:captions"):
        config = ImageTextConfig([str(tmp_path / "out/*.tar")], captions=CaptionConfig([key]))
        batches = image_reader(config, 16, None).once(4)
        assert sorted(caption for batch in batches for caption in batch["caption"]) == expected


def test_packing_shards_again_keeps_everything(tmp_path):
    run(*in_folder(tmp_path / "in", hostile_samples()), *STRICT.split(), "--output", tmp_path / "1")
    run("shards", tmp_path / "1" / "*.tar", "--no-shuffle", "--output", tmp_path / "2")
    before, after = samples_of(tmp_path / "1"), samples_of(tmp_path / "2")
    renamed = [{**sample, "__key__": sample["__key__"].replace("+", "_")} for sample in before]
    assert renamed == after


# ---------------------------------------------------------------------------------- names and JSON


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("/etc/../b", "etc/b"),
        ("c:\\x.y", "c:/x_y"),
        ("__meta__", "_meta__"),
        ("a\n\x00b\udcff", "a__b_"),
        ("..", "_"),
        ("ünï 犬/🐕", "ünï 犬/🐕"),
    ],
)
def test_keys_are_harmless_and_come_back_from_the_tar(name, key, tmp_path):
    assert clean_key(name) == clean_key(key) == key
    write_shard(tmp_path / "x.tar", [{"__key__": key, "txt": "x"}])
    assert [sample["__key__"] for sample in read_shard(tmp_path / "x.tar")] == [key]


def test_json_that_is_nested_too_deeply_costs_at_most_its_sample(tmp_path):
    deep = b'{"a":' * 970 + b"1" + b"}" * 970
    write_files(tmp_path / "in", {"a.jpg": 0, "a.txt": "a caption", "a.json": deep})
    write_files(tmp_path / "in", {"b.jpg": 1, "b.txt": "a caption"})
    run("folder", tmp_path / "in", "--output", tmp_path / "out")
    dropped = summary_of(tmp_path / "out")["dropped"]
    assert dropped in ({}, {"json: nested too deeply": 1})  # as deep as the interpreter takes


def test_metadata_stays_numbers_that_are_none_are_null(tmp_path):
    found = load_json('{"a": NaN, "b": [-Infinity, 1e999, 1.5]}')
    assert found == {"a": None, "b": [None, None, 1.5]}
    rows = [
        '{"path": "a.jpg", "caption": "one", "x": 1e999, "y": [1]}',
        '{"path": "a.jpg", "x": 2}',
    ]
    write_files(tmp_path, {"a.jpg": 0, "t.jsonl": "\n".join(rows)})
    run("table", tmp_path / "t.jsonl", "--output", tmp_path / "out")
    (sample,) = samples_of(tmp_path / "out")
    assert json.loads(sample["json"]) == {"x": None, "y": [1], "captions": ["one"]}


# ------------------------------------------------------------------------------------------ options


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--min-longer-side 100", "filter: min_longer_side"),
        ("--max-aspect-ratio 1.3", "filter: max_aspect_ratio"),
        ("--max-watermark-probability 0.5", "filter: max_watermark_probability"),
        ("--min-aesthetic-score 5 --missing-score keep", "filter: min_aesthetic_score"),
        ("--min-aesthetic-score 0 --missing-score drop", "filter: aesthetic score missing"),
        ("--min-caption-characters 10", "filter: min_caption_characters"),
        ("--max-caption-characters 10", "filter: max_caption_characters"),
        ("--drop-duplicates", "duplicate"),
        ("--min-aesthetic-score 0 --missing-score keep", None),
    ],
)
def test_every_filter_drops_some_and_only_for_its_reason(options, reason, photos, tmp_path):
    run("folder", photos, "--output", tmp_path / "out", *options.split())
    summary = summary_of(tmp_path / "out")
    assert summary["dropped"].keys() == ({reason} if reason else set())
    assert 0 < summary["kept"] == 60 - summary["dropped"].get(reason, 0)


def test_resize_shrinks_the_larger_images_only(photos, tmp_path):
    sizes = {}
    for quality in (95, 30):
        output = tmp_path / str(quality)
        run("folder", photos, "--output", output, "--resize", 48, "--quality", quality)
        sizes[quality] = sum(len(sample["jpg"]) for sample in samples_of(output))
    assert sizes[30] < sizes[95]
    for sample in samples_of(tmp_path / "95"):
        original = (photos / f"{sample['__key__']}.jpg").read_bytes()
        content = json.loads(sample["json"])
        if decode_image(original).size == (40, 30):
            assert sample["jpg"] == original and "width" not in content
        else:
            names = ("original_width", "original_height", "width", "height")
            assert [content[name] for name in names] == [120, 96, 60, 48]
            assert decode_image(sample["jpg"]).size == (60, 48)


def test_resize_puts_transparent_images_on_the_background(tmp_path):
    image = encode(Image.new("RGBA", (64, 64)), format="PNG")
    write_files(tmp_path / "in", {"clear.png": image, "clear.txt": "nothing"})
    options = ["--resize", "16", "--background", "0", "200", "0"]
    run("folder", tmp_path / "in", "--output", tmp_path / "out", *options)
    (sample,) = samples_of(tmp_path / "out")
    assert "png" not in sample  # the large one
    pixel = decode_image(sample["jpg"]).getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (0, 200, 0))).max() < 4


def test_the_shuffle_is_a_permutation_and_a_function_of_the_seed(photos, tmp_path):
    options = {"0": [], "again": ["--seed", 0], "1": ["--seed", 1], "none": ["--no-shuffle"]}
    orders = {}
    for name, more in options.items():
        run("folder", photos, "--output", tmp_path / name, "--samples-per-shard", 7, *more)
        orders[name] = [sample["__key__"] for sample in samples_of(tmp_path / name)]
        assert list(summary_of(tmp_path / name)["shards"].values()) == [7] * 8 + [4]
    in_order = sorted(orders["none"])
    assert orders["none"] == in_order == sorted(orders["0"]) == sorted(orders["1"])
    assert orders["0"] == orders["again"]
    assert len({tuple(order) for order in orders.values()}) == 3


@pytest.mark.parametrize("shuffle", ["--shuffle", "--no-shuffle"])
def test_held_out_samples_are_in_no_other_shard(shuffle, tmp_path):
    """Of 30 images with two rows and a copy each, and as many files that are none."""
    names = [f"{i:02d}{copy}.jpg" for i in range(30) for copy in ("", "_copy")]
    files = {name: int(name[:2]) for name in names}
    files["t.csv"] = "\n".join(["path,caption", *(f"{name},{i}" for i in "ab" for name in names)])
    write_files(tmp_path, files)
    options = ["--drop-duplicates", "--samples-per-shard", 8, shuffle, "--output", tmp_path / "out"]
    run("table", tmp_path / "t.csv", "--holdout", 20, *options)
    train, held_out = samples_of(tmp_path / "out"), samples_of(tmp_path / "out" / "holdout")
    images = [image_of(sample) for sample in [*train, *held_out]]
    assert len({*images}) == len(images) == 30 == summary_of(tmp_path / "out")["kept"]
    assert 0 < len(held_out) <= 20
    assert [captions_of(sample) for sample in [*train, *held_out]] == [["a", "b"]] * 30
    shards = summary_of(tmp_path / "out")["shards"]
    assert {f"holdout/{i:06d}.tar" for i in range(3)} <= shards.keys()


def test_files_that_are_no_images_are_not_held_out(tmp_path, capsys):
    files = {f"{i}.jpg": i for i in range(9)} | {f"{i}.txt": "words" for i in range(9)}
    write_files(tmp_path / "in", files | {f"{i}.mov": "" for i in range(9)})
    command = ["folder", tmp_path / "in", "--output", tmp_path / "out", "--holdout"]
    assert "holdout: given 9" in fails(capsys, *command, 9)
    run(*command, 8)
    assert len(samples_of(tmp_path / "out" / "holdout")) == 8
    assert len(samples_of(tmp_path / "out")) == 1
