"""scripts/make_shards.py and its sources: what comes out, exactly, also of hostile input and of
interrupted runs.
"""

import csv
import gzip
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from data import processes
from data.captions import CaptionConfig
from data.entries import clean_key, load_json
from data.filters import FilterConfig
from data.images import ImageTextConfig, image_reader
from data.processes import map_in_processes
from data.tar import read_shard, write_shard
from data.transforms import IMAGE_KEYS, decode_image
from scripts.make_shards import build_parser, main, sample_config

# tqdm's own lock is shared with forked runs: one that is killed with it would hold up the others
tqdm.set_lock(threading.RLock())


@dataclass
class Sample:
    """What a source holds under one name. data None: no such file; captions may be any bytes."""

    name: str
    data: bytes | None
    caption: str | bytes | None
    reason: str | None = None  # why it is dropped under STRICT
    score: float = 6.0
    extension: str = "jpg"


STRICT = [
    "--drop-duplicates",
    "--max-aspect-ratio",
    "4",
    "--min-aesthetic-score",
    "5",
    "--missing-score",
    "drop",
]


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **options})
    return buffer.getvalue()


def noise(seed, width=24, height=20):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def hostile_samples():
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = np.random.default_rng(3).integers(0, 65536, (20, 24), dtype=np.uint16)
    sixteen_bits = encode(Image.fromarray(grey), format="PNG")
    palette = encode(noise(7).quantize(8), format="PNG", transparency=3)
    no_image = "image: unreadable (UnidentifiedImageError)"
    unrated = "filter: aesthetic score missing"
    ugly = "filter: min_aesthetic_score"
    strip = "filter: max_aspect_ratio"
    return [
        Sample("plain", encode(noise(0)), "a plain picture"),
        Sample("cmyk", encode(noise(1).convert("CMYK")), "four inks"),
        Sample("deep", sixteen_bits, "sixteen bits", extension="png"),
        Sample("palette", palette, "alpha", extension="png"),
        Sample("turned", encode(noise(2), exif=turned), "  turned\nby its tag "),
        Sample("modern", encode(noise(4), format="WEBP"), "webp", extension="webp"),
        Sample("mislabelled", encode(noise(5), format="PNG"), "a png named jpg"),
        Sample("sub/ünï cödé 犬", encode(noise(6)), "Hündchen 犬 🐕"),
        Sample("do.ts/in..name/a", encode(noise(8)), "dots"),
        Sample("do_ts/in__name/a", encode(noise(9)), "the same key without dots"),
        Sample("plain_copy", encode(noise(0)), "the plain picture again", "duplicate"),
        Sample("cut", encode(noise(10, width=200))[:2000], "cut", "image: unreadable (OSError)"),
        Sample("text", b"this is no image", "text", no_image),
        Sample("empty", b"", "nothing", no_image),
        Sample("strip", encode(noise(11, width=90)), "a strip", strip),
        Sample("wordless", encode(noise(12)), None, "caption: missing"),
        Sample("silent", encode(noise(13)), " \n", "caption: missing"),
        Sample("latin", encode(noise(14)), b"caf\xe9", "caption: not UTF-8"),
        Sample("gone", None, "no such file", "image: missing"),
        Sample("unrated", encode(noise(15)), "NaN", unrated, score=float("nan")),
        Sample("ugly", encode(noise(16)), "a low score", ugly, score=4.5),
        Sample("rated", encode(noise(17)), "a score just high enough", score=5),
    ]


def file_name(sample):
    return f"{sample.name}.{sample.extension}"


def as_json(content):
    """JSON bytes; a string given as bytes goes into it as it is, valid or not."""
    raw = []
    text = json.dumps(
        content, default=lambda data: f"<{raw.append(data) or len(raw) - 1}>"
    ).encode()
    for number, data in enumerate(raw):
        text = text.replace(f"<{number}>".encode(), data)
    return text


def write_images(folder, samples):
    for sample in samples:
        path = folder / file_name(sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        if sample.data is not None:
            path.write_bytes(sample.data)


def as_bytes(caption):
    return caption if isinstance(caption, bytes) else caption.encode()


# Each of these writes samples in the layout of one source and returns the command line for it.


def in_folder(root, samples):
    """Every second caption lies in the .json, the others in a .txt."""
    write_images(root, samples)
    (root / "notes.md").write_text("no image")
    (root / "._plain.jpg").write_bytes(b"what macOS leaves behind")
    for number, sample in enumerate(samples):
        content = {"aesthetic": sample.score}
        if sample.caption is not None and number % 2:
            content["caption"] = sample.caption
        elif sample.caption is not None:
            (root / f"{sample.name}.txt").write_bytes(as_bytes(sample.caption))
        (root / f"{sample.name}.json").write_bytes(as_json(content))
    return ["folder", root]


def in_csv(root, samples, delimiter=","):
    write_images(root / "images", samples)
    path, text = root / ("pairs.csv" if delimiter == "," else "pairs.tsv"), io.StringIO(newline="")
    table = csv.writer(text, delimiter=delimiter)
    table.writerow(["file", "words", "aesthetic"])
    for sample in samples:
        caption = as_bytes(sample.caption or "").decode("utf-8", "surrogateescape")
        table.writerow([f"images/{file_name(sample)}", caption, sample.score])
    path.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))
    return ["table", path, "--path-column", "file", "--caption-column", "words"]


def in_tsv(root, samples):
    return in_csv(root, samples, "\t")


def rows_of(samples):
    return [
        {"path": file_name(s), "caption": s.caption, "aesthetic": float(s.score)} for s in samples
    ]


def in_jsonl(root, samples):
    write_images(root / "images", samples)
    (root / "pairs.jsonl").write_bytes(b"\n".join(map(as_json, rows_of(samples))))
    return ["table", root / "pairs.jsonl", "--images", root / "images"]


def in_parquet(root, samples):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    samples.remove(
        next(sample for sample in samples if sample.name == "latin")
    )  # its strings are UTF-8
    write_images(root, samples)
    parquet.write_table(
        pyarrow.Table.from_pylist(rows_of(samples)), root / "pairs.parquet", row_group_size=5
    )
    return ["table", root / "pairs.parquet"]


def in_coco(root, samples):
    write_images(root / "train2017", samples)
    images = [
        {"id": i, "file_name": file_name(s), "aesthetic": s.score}
        for i, s in enumerate(samples, 100)
    ]
    annotations = [
        {"image_id": i, "id": 1000 - i, "caption": s.caption}
        for i, s in enumerate(samples, 100)
        if s.caption is not None
    ]
    content = {"images": images, "annotations": annotations[::-1]}
    (root / "captions_train2017.json").write_bytes(as_json(content))
    return ["coco", root / "captions_train2017.json", "--images", root / "train2017"]


def in_karpathy(root, samples, splits=("train", "restval")):
    write_images(root / "val2014", samples)
    images = [
        {
            "filepath": "val2014",
            "filename": file_name(sample),
            "split": splits[i % len(splits)],
            "sentences": [] if sample.caption is None else [{"raw": sample.caption, "tokens": []}],
            "aesthetic": sample.score,
        }
        for i, sample in enumerate(samples)
    ]
    (root / "dataset_coco.json").write_bytes(as_json({"images": images, "dataset": "coco"}))
    return ["karpathy", root / "dataset_coco.json", "--split", "train"]


def in_mjhq(root, samples):
    for sample in samples:
        sample.extension = "jpg"
    write_images(root / "people", samples)
    content = {
        s.name: {"category": "people", "prompt": s.caption, "aesthetic": s.score} for s in samples
    }
    (root / "meta_data.json").write_bytes(as_json(content))
    return ["mjhq", root / "meta_data.json"]


def in_tars(root, samples):
    """Two tars as img2dataset writes them, with one member more per sample."""
    root.mkdir()
    for number, part in enumerate((samples[:9], samples[9:])):
        with tarfile.open(root / f"{number:05d}.tar", "w") as tar:
            for sample in part:
                members = {
                    "json": as_json({"aesthetic": sample.score, "key": "0"}),
                    "recap_txt": b"a new caption",
                }
                if sample.data is not None:
                    members[sample.extension] = sample.data
                if sample.caption is not None:
                    members["txt"] = as_bytes(sample.caption)
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{sample.name}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return ["shards", root / "{00000..00001}.tar"]


SOURCES = {
    in_folder: "",
    in_csv: "images/",
    in_tsv: "images/",
    in_jsonl: "",
    in_parquet: "",
    in_coco: "",
    in_karpathy: "val2014/",
    in_mjhq: "people/",
    in_tars: "",
}


def run(*arguments, workers=1):
    main([*map(str, arguments), "--workers", str(workers)])


def outcome(output):
    """{name: bytes} of the shards and the summary."""
    return {
        path.name: path.read_bytes() for path in [*output.glob("*.tar"), output / "summary.json"]
    }


def samples_of(output):
    return [sample for path in sorted(output.glob("*.tar")) for sample in read_shard(path)]


def image_of(sample):
    return next(sample[key] for key in IMAGE_KEYS if key in sample)


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


# -------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("source", SOURCES)
def test_counts_are_exact_and_nothing_else_is_lost(source, tmp_path):
    samples = hostile_samples()
    command = source(tmp_path / "in", samples)
    if source is in_folder:
        samples = [sample for sample in samples if sample.data is not None]
    run(*command, *STRICT, "--output", tmp_path / "out", "--samples-per-shard", 4)

    kept = {sample.data: sample for sample in samples if sample.reason is None}
    summary = summary_of(tmp_path / "out")
    assert summary["dropped"] == Counter(sample.reason for sample in samples if sample.reason)
    assert (summary["read"], summary["kept"]) == (len(samples), len(kept))
    written = samples_of(tmp_path / "out")
    assert sum(summary["shards"].values()) == len(written) == len(kept)
    assert len({sample["__key__"] for sample in written}) == len(written)
    for found in written:
        # KeyError: not the bytes of the file, or not to be kept
        expected = kept.pop(image_of(found))
        caption = " ".join(expected.caption.split())
        content = json.loads(found["json"])
        key = SOURCES[source] + expected.name.replace(".", "_")
        assert re.sub(r"\+\d+$", "", found["__key__"]) == key
        assert (found["txt"].decode(), content["captions"]) == (caption, [caption])
        assert float(content["aesthetic"]) == expected.score
        assert expected.extension in found
        assert ("recap_txt" in found) == (source is in_tars)
    assert not kept


def test_the_training_reader_reads_what_was_kept(tmp_path):
    samples = hostile_samples()
    run(*in_jsonl(tmp_path / "in", samples), *STRICT, "--output", tmp_path / "out")
    expected = sorted(" ".join(s.caption.split()) for s in samples if s.reason is None)
    for key in ("txt", "json:captions"):
        config = ImageTextConfig([str(tmp_path / "out/*.tar")], captions=CaptionConfig([key]))
        batches = image_reader(config, 16, None).once(4)
        assert sorted(caption for batch in batches for caption in batch["caption"]) == expected


@pytest.mark.parametrize("source", [in_csv, in_folder, in_tars])
def test_without_filters_all_readable_samples_with_captions_stay(source, tmp_path):
    samples = hostile_samples()
    run(*source(tmp_path / "in", samples), "--output", tmp_path / "out")
    stay = re.compile("filter: |duplicate|$")
    expected = [sample.data for sample in samples if stay.match(sample.reason or "")]
    assert sorted(map(image_of, samples_of(tmp_path / "out"))) == sorted(expected)


def test_a_key_that_is_taken_gets_the_number_of_its_sample(tmp_path):
    samples = [Sample(f"do{dot}ts", encode(noise(i)), str(i)) for i, dot in enumerate("_.+_")]
    run(*in_jsonl(tmp_path / "in", samples), "--output", tmp_path / "out", "--no-shuffle")
    keys = [(sample["__key__"], sample["txt"]) for sample in samples_of(tmp_path / "out")]
    # the last row names the file of the first again
    assert keys == [("do_ts", b"0"), ("do_ts+1", b"1"), ("do_ts+2", b"2"), ("do_ts+3", b"3")]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("/etc/passwd", "etc/passwd"),
        ("../../up", "up"),
        ("a/./../b", "a/b"),
        ("c:\\x\\y", "c:/x/y"),
        ("a.b.c", "a_b_c"),
        ("__meta__", "_meta__"),
        ("a\n\x00b\udcff", "a__b_"),
        ("..", "_"),
        ("", "_"),
        ("ünï 犬/🐕", "ünï 犬/🐕"),
    ],
)
def test_keys_are_harmless_and_come_back_from_the_tar(name, key, tmp_path):
    assert clean_key(name) == clean_key(key) == key
    write_shard(tmp_path / "x.tar", [{"__key__": key, "txt": "x"}])
    assert [sample["__key__"] for sample in read_shard(tmp_path / "x.tar")] == [key]


def test_names_from_a_table_do_not_leave_the_output(tmp_path):
    images = tmp_path / "in" / "images"
    images.mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(encode(noise(0)))
    (images / "absolute.jpg").write_bytes(encode(noise(1)))
    paths = ("../../secret.jpg", f"{images}/absolute.jpg", "/dev/zero", "\0", "")
    table = "\n".join(["path,caption", *(f"{path},words" for path in paths)])
    (tmp_path / "in" / "pairs.csv").write_text(table)
    command = ["table", tmp_path / "in" / "pairs.csv", "--images", images]
    run(*command, "--output", tmp_path / "out")
    keys = sorted(sample["__key__"] for sample in samples_of(tmp_path / "out"))
    assert keys == ["absolute", "secret"]
    assert summary_of(tmp_path / "out")["dropped"] == {"image: missing": 3}


def test_all_captions_of_an_image_are_kept_and_the_first_is_the_text(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 24} for i in range(3)]
    annotations = [{"image_id": i, "caption": f"{i} {w}. "} for w in "abcde" for i in range(3)]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(noise(i)))
    run("coco", tmp_path / "captions.json", "--output", tmp_path / "out")
    for sample in samples_of(tmp_path / "out"):
        key = sample["__key__"]
        captions = [f"{key} {word}." for word in "abcde"]
        assert json.loads(sample["json"]) == {**images[int(key)], "captions": captions}
        assert sample["txt"].decode() == captions[0]


def test_an_image_without_a_usual_extension_gets_that_of_its_format(tmp_path):
    formats = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "PPM": "jpg"}
    rows = ["path,caption"]
    for number, name in enumerate(formats):
        rows.append(f"{name}.v{number},a caption")
        (tmp_path / f"{name}.v{number}").write_bytes(encode(noise(0), format=name))
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    run("table", tmp_path / "pairs.csv", "--output", tmp_path / "out")
    found = {s["__key__"]: set(s) & set(IMAGE_KEYS) for s in samples_of(tmp_path / "out")}
    assert found == {f"{name}_v{i}": {key} for i, (name, key) in enumerate(formats.items())}


def test_odd_members_of_a_tar_cost_at_most_their_sample(tmp_path):
    names = [
        "a.jpg",
        "a.txt",
        "a.",
        "__meta__.json",
        "noextension",
        "b.jpg",
        "b.txt",
        "b.JPG",
        "c.JPG",
        "c.TXT",
    ]
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name in names:
            data = b"words" if "t" in name.lower() else encode(noise(0))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run("shards", tmp_path / "odd.tar", "--output", tmp_path / "out")
    kept = {sample["__key__"]: sorted(sample) for sample in samples_of(tmp_path / "out")}
    assert kept == {key: ["__key__", "jpg", "json", "txt"] for key in "ac"}
    assert summary_of(tmp_path / "out")["dropped"] == {"sample: a member occurs twice": 1}


def test_packing_shards_again_keeps_everything(tmp_path):
    run(*in_jsonl(tmp_path / "in", hostile_samples()), *STRICT, "--output", tmp_path / "once")
    run("shards", tmp_path / "once" / "*.tar", "--no-shuffle", "--output", tmp_path / "twice")
    before, after = samples_of(tmp_path / "once"), samples_of(tmp_path / "twice")
    renamed = [{**sample, "__key__": sample["__key__"].replace("+", "_")} for sample in before]
    assert renamed == after


def test_compressed_tars_and_several_processes_change_nothing(tmp_path):
    command = in_tars(tmp_path / "in", hostile_samples())
    for path in sorted((tmp_path / "in").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    run(*command, *STRICT, "--output", tmp_path / "plain")
    run(*command, *STRICT, "--output", tmp_path / "two", workers=2)
    run("shards", f"{command[1]}.gz", *STRICT, "--output", tmp_path / "gz")
    expected = outcome(tmp_path / "plain")
    assert outcome(tmp_path / "two") == outcome(tmp_path / "gz") == expected


@pytest.mark.parametrize(
    ("options", "expected"), [((), 4), (("--no-restval",), 2), (("--split", "val"), 1)]
)
def test_restval_counts_as_train_unless_it_is_not_wanted(options, expected, tmp_path):
    samples = [Sample(str(i), encode(noise(i)), "a caption") for i in range(6)]
    splits = ("train", "restval", "train", "restval", "val", "test")
    run(*in_karpathy(tmp_path / "in", samples, splits), *options, "--output", tmp_path / "out")
    assert summary_of(tmp_path / "out")["read"] == expected


def test_json_that_is_none_loses_its_fields_and_not_its_sample(tmp_path):
    deep = b'{"a":' * 970 + b"1" + b"}" * 970
    contents = [b"{", b"[" * 5000, deep, b"[1]", b'{"caption": "\\ud83d", "x": 1e999}']
    files = {}
    for i, content in enumerate(contents):
        files |= {f"{i}.jpg": encode(noise(i)), f"{i}.txt": "a caption", f"{i}.json": content}
    write_files(tmp_path / "in", files)
    run("folder", tmp_path / "in", "--output", tmp_path / "out", "--no-shuffle")
    written = {s["__key__"]: json.loads(s["json"]) for s in samples_of(tmp_path / "out")}
    assert written["0"] == written["1"] == written["3"] == {"captions": ["a caption"]}
    assert written["4"] == {"caption": "?", "x": None, "captions": ["a caption"]}
    dropped = summary_of(tmp_path / "out")["dropped"]
    assert dropped in ({}, {"json: nested too deeply": 1})  # as deep as the interpreter takes


def test_numbers_that_are_none_are_null():
    found = load_json('{"a": NaN, "b": [-Infinity, 1e999, 1.5]}')
    assert found == {"a": None, "b": [None, None, 1.5]}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), b"from the text"),
        (("json:caption", "txt"), b"from the field"),
        (("json:no", "json:alt"), b"first"),
    ],
)
def test_caption_keys_choose_and_order_where_captions_are_looked_for(keys, expected, tmp_path):
    content = {"caption": "from the field", "alt": ["", "first", "second"]}
    files = {"a.jpg": encode(noise(0)), "a.txt": "from the text", "a.json": json.dumps(content)}
    write_files(tmp_path / "in", files)
    options = ["--caption-keys", *keys] if keys else []
    run("folder", tmp_path / "in", "--output", tmp_path / "out", *options)
    assert [sample["txt"] for sample in samples_of(tmp_path / "out")] == [expected]


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("in/a", "elsewhere/b"):
        write_files(tmp_path, {f"{name}.jpg": encode(noise(0)), f"{name}.txt": "a caption"})
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    run("folder", tmp_path / "in", "--output", tmp_path / "out")
    assert sorted(sample["__key__"] for sample in samples_of(tmp_path / "out")) == ["a", "link/b"]


# ------------------------------------------------------------------------------------------ options


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 images of two sizes, captions of several lengths; every tenth copies the one before."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(60):
        is_large = i % 3 == 0 and i % 10 < 8
        image = noise(i - (i % 10 == 9), *((120, 96) if is_large else (40, 30)))
        content = {"caption": "word " * (i % 5 + 1), "pwatermark": i / 60}
        content |= {"aesthetic": i / 6} if i % 2 else {}
        files = {f"{i:03d}.jpg": encode(image), f"{i:03d}.json": json.dumps(content)}
        write_files(root, files)
    return root


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


def test_there_is_a_flag_for_every_field_of_the_filters():
    command = ["folder", ".", "--output", "y"]
    assert sample_config(build_parser().parse_args(command)).filters == FilterConfig()
    given = FilterConfig(256, 2.0, 5.0, 0.5, "drop", 3, 300)
    for field in fields(FilterConfig):
        command += [f"--{field.name.replace('_', '-')}", str(getattr(given, field.name))]
    assert sample_config(build_parser().parse_args(command)).filters == given


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
    pixel = decode_image(samples_of(tmp_path / "out")[0]["jpg"]).getpixel((8, 8))
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


# -------------------------------------------------------------------------- processes, parts, stops


BUSY = ["--samples-per-shard", "5", "--drop-duplicates", "--max-watermark-probability", "0.8"]
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the workers by Linux's /proc"
)


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    run("folder", photos, *BUSY, "--output", output)
    expected = {"duplicate", "filter: max_watermark_probability"}
    assert summary_of(output)["dropped"].keys() == expected
    return outcome(output)


@pytest.fixture
def busy(photos, tmp_path):
    """Arguments of that run, into another folder."""
    return ["folder", photos, *BUSY, "--output", tmp_path / "out"]


def start(arguments, **options):
    process = multiprocessing.get_context("fork").Process(
        target=run, args=arguments, kwargs=options
    )
    process.start()
    return process


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_processes_changes_nothing(workers, busy, undisturbed, tmp_path):
    run(*busy, workers=workers)
    assert outcome(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("num_parts", [2, 5])
def test_the_parts_of_an_array_together_are_the_whole(num_parts, busy, undisturbed, tmp_path):
    for part in np.random.default_rng(num_parts).permutation(num_parts):
        assert not (tmp_path / "out" / "summary.json").exists()
        run(*busy, "--num-shards", num_parts, "--shard-index", part)
    assert outcome(tmp_path / "out") == undisturbed


def test_parts_may_run_side_by_side(busy, undisturbed, tmp_path):
    parts = [start([*busy, "--num-shards", 3, "--shard-index", part]) for part in range(3)]
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert outcome(tmp_path / "out") == undisturbed


@needs_proc
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(busy, undisturbed, tmp_path):
    """SIGKILL once so many files of the index, digests, shards and records are there."""
    output, kills = tmp_path / "out", 0
    for num_files in (0, 1, 3, 4, 6, 9, 13, 16, 17, 20, 23, 26, 33, 37, 39):
        process = start(busy, workers=2)
        while process.is_alive() and sum(path.is_file() for path in output.rglob("*")) < num_files:
            time.sleep(0.001)
        if process.is_alive():
            kills += 1
            kill_and_see_workers_end(process)
    assert kills >= 8
    run(*busy, workers=2)
    assert outcome(output) == undisturbed
    assert not list(output.glob("*.tmp"))


def kill_and_see_workers_end(process):
    """They end with it, but not at once."""
    os.kill(process.pid, signal.SIGSTOP)  # it starts no more
    workers = workers_of(process)
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def workers_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return path.read_text().split() if path.is_file() else []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_proc
@pytest.mark.parametrize("is_worker", [True, False])
def test_a_run_that_is_interrupted_ends_and_continues_later(is_worker, busy, undisturbed, tmp_path):
    """A worker is killed, or Ctrl-C reaches the run and its workers."""
    process = start(busy, workers=2)
    while process.is_alive() and not list((tmp_path / "out").glob("*.tar")):
        time.sleep(0.001)
    number = signal.SIGKILL if is_worker else signal.SIGINT
    for pid in workers_of(process)[:1] if is_worker else [process.pid, *workers_of(process)]:
        with suppress(ProcessLookupError):
            os.kill(int(pid), number)
    process.join(60)
    # 0: it was through before
    assert process.exitcode in (1 if is_worker else 130, 0)
    run(*busy)
    assert outcome(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out").rglob("*.tmp"))


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class HalfAnAnswer:
    """Its bytes end in the death of the process that makes them."""

    def __reduce__(self):
        die()


def die_in_an_answer(item):
    return ["x" * 100_000, HalfAnAnswer()]


def die_unless_first(item):
    return time.sleep(0.2) if item == 0 else die()


@pytest.mark.parametrize("function", [die, die_in_an_answer, die_unless_first])
def test_a_worker_that_is_killed_at_whatever_moment_holds_nobody_up(function):
    with pytest.raises(BrokenProcessPool):
        list(map_in_processes(function, range(20), workers=3))
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_before_it_begins_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(processes, "_start_worker", die)
    with pytest.raises(BrokenProcessPool):
        list(map_in_processes(abs, range(20), workers=3))


def give_back_later(seconds):
    time.sleep(seconds)
    return 1 / seconds


def test_processes_give_back_the_results_in_order_and_the_error_of_their_function():
    items = [0.02, 0.001, 0.01, 0.002, 0.003]
    for workers in (1, 2):
        results = map_in_processes(give_back_later, items, workers)
        assert list(results) == [1 / item for item in items]
        with pytest.raises(ZeroDivisionError):
            list(map_in_processes(give_back_later, [*items, 0], workers))
    assert list(map_in_processes(abs, [], workers=3)) == []
    assert not multiprocessing.active_children()


def test_finished_shards_stay_and_lost_ones_are_made_again(busy, undisturbed, tmp_path):
    output = tmp_path / "out"
    run(*busy)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    (output / "000003.tar").unlink()
    (output / "summary.json").unlink()
    run(*busy)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert {name for name in before if before[name] != after[name]} == {"000003.tar"}
    assert outcome(output) == undisturbed


def test_a_shard_of_which_nothing_is_left_is_not_written(photos, tmp_path):
    options = ["--samples-per-shard", "1", "--no-shuffle", "--max-caption-characters", "4"]
    for _ in range(2):
        run("folder", photos, "--output", tmp_path / "out", *options)
        shards = {f"{i:06d}.tar": 1 for i in range(0, 60, 5)}
        assert summary_of(tmp_path / "out")["shards"] == shards
        assert len(list((tmp_path / "out").glob("*.tar"))) == 12


# ------------------------------------------------------------------------------------------- errors


def fails(capsys, *arguments, workers=1):
    """The message of a run that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, workers=workers)
    assert stop.value.code == 2
    return capsys.readouterr().err


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


BAD_INPUTS = {
    "empty/.hidden.jpg": "",
    "texts/a.txt": "",
    "texts/b.heic": "",
    "texts/c.heic": "",
    "photos/a.jpg": encode(noise(0)),
    "photos/a.txt": "a caption",
    "pairs.xlsx": "",
    "pairs.csv": "file,words,score\na.jpg,a,1\n",
    "empty.csv": "",
    "header.csv": "path,caption\n",
    "open.csv": 'path,caption\na.jpg,"a caption\nb.jpg,b\n',
    "list.jsonl": '{"path": "a.jpg", "caption": "a"}\n[1]\n',
    "broken.parquet": "PAR1",
    "split.json": '{"images": [{"split": "test"}, {"split": "train"}]}',
    "broken.json": "{",
    "text.tar": "this is no tar " * 100,
}


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("folder none", ["folder", "none"]),
        ("folder empty", ["empty"]),
        ("folder texts", ["texts", ".heic (2), .txt (1)"]),
        ("table none.csv", ["none.csv"]),
        ("table pairs.xlsx", ["pairs.xlsx", ".csv, .tsv, .parquet, .jsonl"]),
        ("table pairs.csv", ["path", "caption", "file, words, score"]),
        ("table pairs.csv --path-column file --caption-column text", ["text", "words"]),
        ("table empty.csv", ["empty.csv", "none"]),
        ("table header.csv", ["header.csv"]),
        ("table open.csv", ["open.csv line 3"]),
        ("table list.jsonl", ["list.jsonl line 2", "'[1]'"]),
        ("table broken.parquet", ["broken.parquet"]),
        ("table header.csv --images none", ["--images", "none"]),
        ("coco none.json", ["none.json", "No such file"]),
        ("coco split.json", ["split.json", "'annotations'", "images"]),
        ("coco list.jsonl", ["list.jsonl", "images, annotations"]),
        ("karpathy split.json --split dev", ["split", "'dev'", "test, train"]),
        ("mjhq split.json", ["split.json", "'images'"]),
        ("mjhq broken.json", ["broken.json"]),
        ("shards none/*.tar", ["none/*.tar"]),
        ("shards cut.tar", ["cut.tar"]),
        ("shards text.tar", ["text.tar"]),
        ("shards nothing.tar", ["nothing.tar"]),
        ("shards http://host/x.tar", ["http://host/x.tar"]),
        ("folder photos --shard-index 2 --num-shards 2", ["shard_index", "2", "0..1"]),
        ("folder photos --samples-per-shard 0", ["--samples-per-shard", "0"]),
        ("folder photos --resize -1", ["--resize", "-1"]),
        ("folder photos --quality 0", ["--quality", "0", "1..100"]),
        ("folder photos --background 0 0 256", ["--background", "256", "0..255"]),
        ("folder photos --seed -1", ["--seed", "-1"]),
        ("folder photos --max-aspect-ratio 0.5", ["max_aspect_ratio", "0.5"]),
        ("folder photos --caption-keys json:", ["caption_keys", "json:"]),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(
    command, named, tmp_path, monkeypatch, capsys
):
    write_files(tmp_path, BAD_INPUTS)
    write_shard(tmp_path / "nothing.tar", [])
    write_shard(tmp_path / "cut.tar", [{"__key__": str(i), "txt": "x"} for i in range(9)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:1024])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    message = fails(capsys, *command.split(), "--output", "new/out")
    assert all(name in message.splitlines()[-1] for name in named)
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    command = ["table", tmp_path / "pairs.parquet", "--output", tmp_path / "out"]
    assert "pip install pyarrow" in fails(capsys, *command)


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("min_longer_side", 50)])
def test_other_settings_need_another_folder(key, value, photos, tmp_path, capsys):
    run("folder", photos, "--output", tmp_path / "out")
    before = outcome(tmp_path / "out")
    option = f"--{key.replace('_', '-')}"
    message = fails(capsys, "folder", photos, "--output", tmp_path / "out", option, value)
    assert f"{key} was 0, is {value}" in message
    assert outcome(tmp_path / "out") == before


def test_tars_of_something_else_are_not_overwritten(photos, tmp_path, capsys):
    run("folder", photos, "--output", tmp_path / "once", "--samples-per-shard", 30)
    (tmp_path / "once" / "source.json").unlink()
    before = outcome(tmp_path / "once")
    command = ["shards", tmp_path / "once" / "*.tar", "--output", tmp_path / "once"]
    assert "source.json" in fails(capsys, *command)
    assert outcome(tmp_path / "once") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_score_stops_the_run_naming_the_sample_and_its_keys(
    workers, photos, tmp_path, capsys
):
    options = ["--min-aesthetic-score", 5, "--samples-per-shard", 9]
    command = ["folder", photos, "--output", tmp_path / "out", *options]
    message = fails(capsys, *command, workers=workers)
    assert "aesthetic score missing" in message and "caption, pwatermark" in message
    assert re.search(r"sample \d{3} of ", message)
    assert not list((tmp_path / "out").glob("*.t*"))


def test_a_source_of_which_nothing_is_kept_is_an_error(photos, tmp_path, capsys):
    options = ["--output", tmp_path / "out", "--min-longer-side", 999]
    assert "filter: min_longer_side: 60" in fails(capsys, "folder", photos, *options)
