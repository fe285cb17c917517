"""scripts/make_shards.py and its sources: what comes out, exactly, also of hostile input and of interrupted runs."""

import csv
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from data.image_text import IMAGE_KEYS, ImageTextConfig, read_images
from PIL import Image

from data import packing
from data.entries import clean_key, load_json
from data.filters import FilterConfig
from data.packing import map_in_processes, run_tasks
from data.tar import read_shard, write_shard
from data.transforms import decode_image
from scripts.make_shards import build_parser, filter_config, main


@dataclass
class Sample:
    """What a source holds under one name. data None: no such file; a caption may be bytes that are not UTF-8."""

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
    sixteen_bits = Image.fromarray(
        np.random.default_rng(3).integers(0, 65536, (20, 24), dtype=np.uint16)
    )
    return [
        Sample("plain", encode(noise(0)), "a plain picture"),
        Sample("cmyk", encode(noise(1).convert("CMYK")), "four inks"),
        Sample("deep", encode(sixteen_bits, format="PNG"), "sixteen bits", extension="png"),
        Sample(
            "palette",
            encode(noise(7).quantize(8), format="PNG", transparency=3),
            "alpha",
            extension="png",
        ),
        Sample("turned", encode(noise(2), exif=turned), "  turned\nby its tag "),
        Sample("modern", encode(noise(4), format="WEBP"), "webp", extension="webp"),
        Sample("mislabelled", encode(noise(5), format="PNG"), "a png named jpg"),
        Sample("sub/ünï cödé 犬", encode(noise(6)), "Hündchen 犬 🐕"),
        Sample("do.ts/in..name/a", encode(noise(8)), "dots"),
        Sample("do_ts/in__name/a", encode(noise(9)), "the same key without dots"),
        Sample("plain_copy", encode(noise(0)), "the plain picture again", "duplicate"),
        Sample("cut", encode(noise(10, width=200))[:2000], "cut", "image: unreadable (OSError)"),
        Sample("text", b"this is no image", "text", "image: unreadable (UnidentifiedImageError)"),
        Sample("empty", b"", "nothing", "image: unreadable (UnidentifiedImageError)"),
        Sample("strip", encode(noise(11, width=90)), "a strip", "filter: max_aspect_ratio"),
        Sample("wordless", encode(noise(12)), None, "caption: missing"),
        Sample("silent", encode(noise(13)), " \n", "caption: missing"),
        Sample("latin", encode(noise(14)), b"caf\xe9", "caption: not UTF-8"),
        Sample("gone", None, "no such file", "image: missing"),
        Sample(
            "unrated",
            encode(noise(15)),
            "NaN",
            "filter: aesthetic score missing",
            score=float("nan"),
        ),
        Sample("ugly", encode(noise(16)), "a low score", "filter: min_aesthetic_score", score=4.5),
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


# ------------------------------------------------------------------------------------------------------ round trips


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
        expected = kept.pop(
            image_of(found)
        )  # KeyError: not the bytes of the file, or not to be kept
        caption = " ".join(expected.caption.split())
        content = json.loads(found["json"])
        assert re.sub(r"\+\d+$", "", found["__key__"]) == SOURCES[source] + expected.name.replace(
            ".", "_"
        )
        assert found["txt"].decode() == caption
        assert content["captions"] == [caption]
        assert float(content["aesthetic"]) == expected.score
        assert expected.extension in found
        assert ("recap_txt" in found) == (source is in_tars)
    assert not kept


def test_the_training_reader_reads_what_was_kept(tmp_path):
    samples = hostile_samples()
    run(
        *in_jsonl(tmp_path / "in", samples),
        *STRICT,
        "--output",
        tmp_path / "out",
        "--samples-per-shard",
        5,
    )
    for keys in (["txt"], ["json:captions"]):
        config = ImageTextConfig(shards=[str(tmp_path / "out" / "*.tar")], caption_keys=keys)
        captions = [
            caption for batch in read_images(config, 16, None, 4) for caption in batch["caption"]
        ]
        assert sorted(captions) == sorted(
            " ".join(s.caption.split()) for s in samples if s.reason is None
        )


@pytest.mark.parametrize("source", [in_csv, in_folder, in_tars])
def test_without_filters_all_readable_samples_with_captions_stay(source, tmp_path):
    samples = hostile_samples()
    run(*source(tmp_path / "in", samples), "--output", tmp_path / "out")
    reasons = {
        "filter: max_aspect_ratio",
        "filter: aesthetic score missing",
        "filter: min_aesthetic_score",
        "duplicate",
    }
    expected = [
        sample.data for sample in samples if sample.reason is None or sample.reason in reasons
    ]
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
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(encode(noise(0)))
    absolute = tmp_path / "in" / "images" / "absolute.jpg"
    absolute.write_bytes(encode(noise(1)))
    rows = [
        "path,caption",
        "../../secret.jpg,up",
        f"{absolute},absolute",
        "/dev/zero,endless",
        "\0,nul",
        ",nothing",
    ]
    (tmp_path / "in" / "pairs.csv").write_text("\n".join(rows))
    run(
        "table",
        tmp_path / "in" / "pairs.csv",
        "--images",
        tmp_path / "in" / "images",
        "--output",
        tmp_path / "out",
    )
    keys = sorted(sample["__key__"] for sample in samples_of(tmp_path / "out"))
    assert keys == ["absolute", "secret"]
    assert summary_of(tmp_path / "out")["dropped"] == {"image: missing": 3}


def test_all_captions_of_an_image_are_kept_and_the_first_is_the_text(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 24} for i in range(3)]
    annotations = [
        {"image_id": i, "caption": f"{i} {word}. "} for word in "abcde" for i in range(3)
    ]
    (tmp_path / "captions.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(noise(i)))
    run("coco", tmp_path / "captions.json", "--output", tmp_path / "out")
    for sample in samples_of(tmp_path / "out"):
        key, content = sample["__key__"], json.loads(sample["json"])
        assert content == {
            "id": int(key),
            "file_name": f"{key}.jpg",
            "width": 24,
            "captions": [f"{key} {word}." for word in "abcde"],
        }
        assert sample["txt"].decode() == f"{key} a."


def test_an_image_without_a_usual_extension_gets_that_of_its_format(tmp_path):
    formats = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "PPM": "jpg"}
    names = [f"{name}.v{i}" for i, name in enumerate(formats)]
    for name, image_format in zip(names, formats, strict=True):
        (tmp_path / name).write_bytes(encode(noise(0), format=image_format))
    (tmp_path / "pairs.csv").write_text(
        "\n".join(["path,caption", *(f"{name},a caption" for name in names)])
    )
    run("table", tmp_path / "pairs.csv", "--output", tmp_path / "out")
    found = {
        sample["__key__"]: [key for key in IMAGE_KEYS if key in sample]
        for sample in samples_of(tmp_path / "out")
    }
    assert found == {f"{name}_v{i}": [key] for i, (name, key) in enumerate(formats.items())}


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


def test_gzipped_tars_are_read_in_any_order(tmp_path):
    import gzip

    command = in_tars(tmp_path / "in", hostile_samples())
    for path in sorted((tmp_path / "in").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    run(*command, *STRICT, "--output", tmp_path / "plain")
    run(*command[:1], f"{command[1]}.gz", *STRICT, "--output", tmp_path / "gz")
    assert outcome(tmp_path / "gz") == outcome(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "expected"), [((), 4), (("--no-restval",), 2), (("--split", "val"), 1)]
)
def test_restval_counts_as_train_unless_it_is_not_wanted(options, expected, tmp_path):
    samples = [Sample(str(i), encode(noise(i)), "a caption") for i in range(6)]
    splits = ("train", "restval", "train", "restval", "val", "test")
    run(*in_karpathy(tmp_path / "in", samples, splits), *options, "--output", tmp_path / "out")
    assert summary_of(tmp_path / "out")["read"] == expected


def test_json_that_is_none_loses_its_fields_and_not_its_sample(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    contents = [
        b"{",
        b"[" * 5000,
        b'{"a":' * 970 + b"1" + b"}" * 970,
        b"[1]",
        b'{"caption": "\\ud83d", "x": 1e999}',
    ]
    for i, content in enumerate(contents):
        (root / f"{i}.jpg").write_bytes(encode(noise(i)))
        (root / f"{i}.txt").write_text("a caption")
        (root / f"{i}.json").write_bytes(content)
    run("folder", root, "--output", tmp_path / "out", "--no-shuffle")
    written = {
        sample["__key__"]: json.loads(sample["json"]) for sample in samples_of(tmp_path / "out")
    }
    assert {"0", "1", "3", "4"} <= written.keys()
    assert written["0"] == written["1"] == written["3"] == {"captions": ["a caption"]}
    assert written["4"] == {"caption": "?", "x": None, "captions": ["a caption"]}
    dropped = summary_of(tmp_path / "out")["dropped"]
    assert dropped in ({}, {"json: nested too deeply": 1})  # as deep as the interpreter takes


def test_caption_keys_choose_and_order_where_captions_are_looked_for(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode(noise(0)))
    (tmp_path / "in" / "a.txt").write_text("from the text")
    (tmp_path / "in" / "a.json").write_text(
        '{"caption": "from the field", "alt": ["", "first", "second"]}'
    )
    cases = {
        (): "from the text",
        ("json:caption", "txt"): "from the field",
        ("json:no", "json:alt"): "first",
    }
    for number, (keys, expected) in enumerate(cases.items()):
        options = ["--caption-keys", *keys] if keys else []
        run("folder", tmp_path / "in", "--output", tmp_path / str(number), *options)
        assert [sample["txt"].decode() for sample in samples_of(tmp_path / str(number))] == [
            expected
        ]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").mkdir()
    for name in ("in/a", "elsewhere/b"):
        (tmp_path / f"{name}.jpg").write_bytes(encode(noise(0)))
        (tmp_path / f"{name}.txt").write_text("a caption")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    run("folder", tmp_path / "in", "--output", tmp_path / "out")
    assert sorted(sample["__key__"] for sample in samples_of(tmp_path / "out")) == ["a", "link/b"]


# ----------------------------------------------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 images of two sizes with captions of several lengths; every tenth one is a copy of the one before."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(60):
        size = (40, 30) if i % 3 else (120, 96)
        (root / f"{i:03d}.jpg").write_bytes(
            encode(noise(i - (i % 10 == 9), *((40, 30) if i % 10 > 7 else size)))
        )
        content = {"caption": "word " * (i % 5 + 1), "pwatermark": i / 60} | (
            {"odd": 0.5} if i % 2 else {}
        )
        (root / f"{i:03d}.json").write_text(json.dumps(content))
    return root


FILTERS = {
    "--min-longer-side 100": "filter: min_longer_side",
    "--max-aspect-ratio 1.3": "filter: max_aspect_ratio",
    "--max-watermark-probability 0.5": "filter: max_watermark_probability",
    "--min-aesthetic-score 0.5 --aesthetic-keys pwatermark": "filter: min_aesthetic_score",
    "--max-watermark-probability 1 --watermark-keys odd --missing-score drop": "filter: watermark probability missing",
    "--min-caption-characters 10": "filter: min_caption_characters",
    "--max-caption-characters 10": "filter: max_caption_characters",
    "--drop-duplicates": "duplicate",
}


@pytest.mark.parametrize("options", FILTERS)
def test_every_filter_drops_some_and_only_for_its_reason(options, photos, tmp_path):
    run("folder", photos, "--output", tmp_path / "out", *options.split())
    summary = summary_of(tmp_path / "out")
    assert summary["dropped"].keys() == {FILTERS[options]}
    assert 0 < summary["kept"] == 60 - summary["dropped"][FILTERS[options]]


def test_a_missing_score_can_be_kept(photos, tmp_path):
    options = "--max-watermark-probability 1 --watermark-keys odd --missing-score keep"
    run("folder", photos, "--output", tmp_path / "out", *options.split())
    assert summary_of(tmp_path / "out")["kept"] == 60


def test_there_is_a_flag_for_every_field_of_the_filters():
    assert (
        filter_config(build_parser().parse_args(["folder", "x", "--output", "y"])) == FilterConfig()
    )
    given = FilterConfig(256, 2.0, 5.0, 0.5, ["a", "b"], ["c"], "drop", 3, 300)
    flags = []
    for field in fields(FilterConfig):
        value = getattr(given, field.name)
        flags += [
            f"--{field.name.replace('_', '-')}",
            *map(str, value if isinstance(value, list) else [value]),
        ]
    assert (
        filter_config(build_parser().parse_args(["folder", "x", "--output", "y", *flags])) == given
    )


def test_resize_shrinks_the_larger_images_only(photos, tmp_path):
    run("folder", photos, "--output", tmp_path / "out", "--resize", 48)
    run("folder", photos, "--output", tmp_path / "low", "--resize", 48, "--quality", 30)
    for sample in samples_of(tmp_path / "out"):
        source, content = (
            (photos / f"{sample['__key__']}.jpg").read_bytes(),
            json.loads(sample["json"]),
        )
        if decode_image(source).size == (40, 30):
            assert sample["jpg"] == source
            assert "width" not in content
        else:
            assert decode_image(sample["jpg"]).size == (60, 48)
            sizes = [
                content[name] for name in ("original_width", "original_height", "width", "height")
            ]
            assert sizes == [120, 96, 60, 48]
    assert sum(len(s["jpg"]) for s in samples_of(tmp_path / "low")) < sum(
        len(s["jpg"]) for s in samples_of(tmp_path / "out")
    )


def test_resize_puts_transparent_images_on_the_background(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (64, 64)).save(tmp_path / "in" / "clear.png")
    (tmp_path / "in" / "clear.txt").write_text("nothing")
    run(
        "folder",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        *["--resize", "16", "--background", "0", "200", "0"],
    )
    pixel = decode_image(samples_of(tmp_path / "out")[0]["jpg"]).getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (0, 200, 0))).max() < 4


def test_the_shuffle_is_a_permutation_and_a_function_of_the_seed(photos, tmp_path):
    orders = {}
    for name, options in {
        "0": [],
        "again": ["--seed", 0],
        "1": ["--seed", 1],
        "none": ["--no-shuffle"],
    }.items():
        run("folder", photos, "--output", tmp_path / name, "--samples-per-shard", 7, *options)
        orders[name] = [sample["__key__"] for sample in samples_of(tmp_path / name)]
        assert [
            len(list(read_shard(path))) for path in sorted((tmp_path / name).glob("*.tar"))
        ] == [7] * 8 + [4]
    in_order = sorted(orders["none"])
    assert orders["none"] == in_order == sorted(orders["0"]) == sorted(orders["1"])
    assert orders["0"] == orders["again"]
    assert len({tuple(order) for order in orders.values()}) == 3


# ------------------------------------------------------------------------------------------- processes, parts, stops


BUSY = ["--samples-per-shard", "5", "--drop-duplicates", "--max-watermark-probability", "0.8"]


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    run("folder", photos, *BUSY, "--output", output)
    assert summary_of(output)["dropped"].keys() == {
        "duplicate",
        "filter: max_watermark_probability",
    }
    return outcome(output)


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_processes_changes_nothing(workers, photos, undisturbed, tmp_path):
    run("folder", photos, *BUSY, "--output", tmp_path / "out", workers=workers)
    assert outcome(tmp_path / "out") == undisturbed


def test_indexing_tars_in_several_processes_changes_nothing(tmp_path):
    command = in_tars(tmp_path / "in", hostile_samples())
    for workers in (1, 2):
        run(*command, *STRICT, "--output", tmp_path / str(workers), workers=workers)
    assert outcome(tmp_path / "1") == outcome(tmp_path / "2")


@pytest.mark.parametrize("num_parts", [2, 5])
def test_the_parts_of_an_array_together_are_the_whole(num_parts, photos, undisturbed, tmp_path):
    for part in np.random.default_rng(num_parts).permutation(num_parts):
        assert not (tmp_path / "out" / "summary.json").exists()
        run(
            "folder",
            photos,
            *BUSY,
            "--output",
            tmp_path / "out",
            "--num-shards",
            num_parts,
            "--shard-index",
            part,
        )
    assert outcome(tmp_path / "out") == undisturbed


def test_parts_may_run_side_by_side(photos, undisturbed, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = [
        "folder",
        photos,
        *BUSY,
        "--output",
        tmp_path / "out",
        "--num-shards",
        3,
        "--shard-index",
    ]
    parts = [context.Process(target=run, args=(*arguments, part)) for part in range(3)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert outcome(tmp_path / "out") == undisturbed


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the workers by Linux's /proc"
)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(photos, undisturbed, tmp_path):
    """SIGKILL once so many files are there, of the index, the digests, the shards and their records."""
    output, kills = tmp_path / "out", 0
    arguments = ("folder", photos, *BUSY, "--output", output)
    for num_files in (0, 1, 3, 4, 6, 9, 13, 16, 17, 20, 23, 26, 33, 37, 39):
        process = multiprocessing.get_context("fork").Process(
            target=run, args=arguments, kwargs={"workers": 2}
        )
        process.start()
        while process.is_alive() and sum(path.is_file() for path in output.rglob("*")) < num_files:
            time.sleep(0.001)
        if process.is_alive():
            kills += 1
            kill_and_see_workers_end(process)
    assert kills >= 8
    run(*arguments, workers=2)
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


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the workers by Linux's /proc"
)
def test_a_run_whose_worker_is_killed_ends_and_goes_on_later(photos, undisturbed, tmp_path):
    arguments = ("folder", photos, *BUSY, "--output", tmp_path / "out")
    process = multiprocessing.get_context("fork").Process(
        target=run, args=arguments, kwargs={"workers": 2}
    )
    process.start()
    while not (found := workers_of(process)) and process.is_alive():
        time.sleep(0.001)
    os.kill(int(found[0]), signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    run(*arguments)
    assert outcome(tmp_path / "out") == undisturbed


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_half_an_answer(item):
    def send_half(connection, data):
        os.write(connection.fileno(), bytes(data[: len(data) // 2]))
        die()

    Connection._send = send_half  # in this process alone
    return "x" * 100_000


def die_unless_first(item):
    return time.sleep(0.2) if item == 0 else die()


@pytest.mark.parametrize("function", [die, die_after_half_an_answer, die_unless_first])
def test_a_worker_that_is_killed_at_whatever_moment_holds_nobody_up(function):
    with pytest.raises(ChildProcessError, match="a worker was killed"):
        list(map_in_processes([function] * 3, range(20)))
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_before_it_begins_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(packing, "_serve", die)
    with pytest.raises(ChildProcessError, match="a worker was killed"):
        list(map_in_processes([abs] * 3, range(20)))


def count_and_die(task, tick):
    tick(1)
    die() if task == 5 else tick(1)


def test_a_worker_that_is_killed_between_its_counts_ends_the_run():
    with pytest.raises(ChildProcessError, match="a worker was killed"):
        run_tasks(count_and_die, iter(range(8)), 16, 2, "counting")


def give_back_later(seconds):
    time.sleep(seconds)
    return 1 / seconds


def test_processes_give_back_the_results_in_order_and_the_error_of_their_function():
    items = [0.02, 0.001, 0.01, 0.002, 0.003]
    assert list(map_in_processes([give_back_later] * 2, items)) == [1 / item for item in items]
    with pytest.raises(ZeroDivisionError):
        list(map_in_processes([give_back_later] * 2, [*items, 0]))
    assert list(map_in_processes([abs] * 3, [])) == []
    assert not multiprocessing.active_children()


def test_finished_shards_stay_and_lost_ones_are_made_again(photos, undisturbed, tmp_path):
    output = tmp_path / "out"
    run("folder", photos, *BUSY, "--output", output)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    (output / "000003.tar").unlink()
    (output / "summary.json").unlink()
    run("folder", photos, *BUSY, "--output", output)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert {name for name in before if before[name] != after[name]} == {"000003.tar"}
    assert outcome(output) == undisturbed


def test_a_shard_of_which_nothing_is_left_is_not_written(photos, tmp_path):
    options = ["--samples-per-shard", "1", "--no-shuffle", "--max-caption-characters", "4"]
    run("folder", photos, "--output", tmp_path / "out", *options)
    assert summary_of(tmp_path / "out")["shards"] == {f"{i:06d}.tar": 1 for i in range(0, 60, 5)}
    assert len(list((tmp_path / "out").glob("*.tar"))) == 12
    run("folder", photos, "--output", tmp_path / "out", *options)


# ------------------------------------------------------------------------------------------------------------ errors


def fails(capsys, *arguments):
    """The message of a run that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


BAD = {
    "folder none": "none is not a folder",
    "folder empty": "empty holds no image",
    "folder texts": "files there: .heic (2), .txt (1)",
    "table none.csv": "none.csv does not exist",
    "table pairs.xlsx": "expected a file with one of the extensions .csv, .tsv, .parquet, .jsonl",
    "table pairs.csv": "no column path and no column caption; it has file, words, score",
    "table pairs.csv --path-column file --caption-column text": "no column text; it has file, words, score",
    "table empty.csv": "it has none",
    "table header.csv": "no row",
    "table open.csv": "open.csv line 3: unexpected end of data",
    "table list.jsonl": "list.jsonl line 2: expected a JSON object, given '[1]'",
    "table broken.parquet": "broken.parquet",
    "table header.csv --images none": "none is not a folder",
    "coco none.json": "none.json cannot be read: No such file",
    "coco split.json": "expected a list of objects under 'annotations'; it has images",
    "coco list.jsonl": "expected a JSON object with images, annotations",
    "karpathy split.json --split dev": "given 'dev', expected one of test, train",
    "mjhq split.json": "'images' is",
    "mjhq broken.json": "expected a JSON object",
    "shards none/*.tar": "matches no file",
    "shards cut.tar": "truncated",
    "shards text.tar": "text.tar",
    "shards nothing.tar": "no sample",
    "shards pipe:cat": "is not a local file",
    "shards http://host/x.tar": "is not a local file",
    "folder photos --shard-index 2 --num-shards 2": "shard_index: given 2, expected 0..1",
    "folder photos --samples-per-shard 0": "samples_per_shard: given 0",
    "folder photos --resize -1": "resize: given -1",
    "folder photos --quality 0": "quality: given 0",
    "folder photos --background 0 0 256": "background: given [0, 0, 256]",
    "folder photos --seed -1": "seed: given -1",
    "folder photos --max-aspect-ratio 0.5": "max_aspect_ratio: given 0.5",
    "folder photos --caption-keys json:": "caption_keys",
}


@pytest.mark.parametrize("command", BAD)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(
    command, tmp_path, monkeypatch, capsys
):
    tar = tmp_path / "whole.tar"
    write_shard(tar, [{"__key__": str(i), "txt": "x"} for i in range(9)])
    write_shard(tmp_path / "nothing.tar", [])
    write_files(
        tmp_path,
        {
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
            "cut.tar": tar.read_bytes()[:1024],
            "text.tar": "this is no tar " * 100,
        },
    )
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert BAD[command] in fails(capsys, *command.split(), "--output", "new/out")
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in fails(
        capsys, "table", tmp_path / "pairs.parquet", "--output", tmp_path / "out"
    )


def test_other_settings_need_another_folder(photos, tmp_path, capsys):
    run("folder", photos, "--output", tmp_path / "out")
    before = outcome(tmp_path / "out")
    changes = {
        "--seed 1": "seed was 0, is 1",
        "--min-longer-side 50": "min_longer_side was 0, is 50",
    }
    for options, message in changes.items():
        assert message in fails(
            capsys, "folder", photos, "--output", tmp_path / "out", *options.split()
        )
    assert outcome(tmp_path / "out") == before


def test_tars_of_something_else_are_not_overwritten(photos, tmp_path, capsys):
    run("folder", photos, "--output", tmp_path / "once", "--samples-per-shard", 30)
    (tmp_path / "once" / "source.json").unlink()
    before = outcome(tmp_path / "once")
    command = ["shards", tmp_path / "once" / "*.tar", "--output", tmp_path / "once"]
    assert "holds tars, but not of this script" in fails(capsys, *command)
    assert outcome(tmp_path / "once") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_score_stops_the_run_naming_the_sample_and_its_keys(
    workers, photos, tmp_path, capsys
):
    command = [
        "folder",
        photos,
        "--output",
        tmp_path / "out",
        "--min-aesthetic-score",
        5,
        "--samples-per-shard",
        9,
    ]
    with pytest.raises(SystemExit) as stop:
        run(*command, workers=workers)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "aesthetic score missing" in message
    assert "caption, pwatermark" in message
    assert re.search(r"sample \d{3} of ", message)
    assert not list((tmp_path / "out").glob("*.t*"))


def test_a_source_of_which_nothing_is_kept_is_an_error(photos, tmp_path, capsys):
    message = fails(
        capsys, "folder", photos, "--output", tmp_path / "out", "--min-longer-side", 999
    )
    assert "none of the 60 samples was kept; dropped: filter: min_longer_side: 60" in message


def test_numbers_that_are_none_are_null(tmp_path):
    assert load_json('{"a": NaN, "b": [-Infinity, 1e999, 1.5]}') == {
        "a": None,
        "b": [None, None, 1.5],
    }
