"""Sources for scripts/make_shards.py as tests make them up, the program, what it wrote."""

import csv
import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.tar import read_shard
from data.transforms import IMAGE_KEYS
from scripts.make_shards import main


@dataclass
class Sample:
    """What a source holds under one name. data None: no such file; captions may be any bytes."""

    name: str
    data: bytes | None
    caption: str | bytes | None
    reason: str | None = None  # why it is dropped under STRICT
    score: float = 6.0
    extension: str = "jpg"

    @property
    def file(self):
        return f"{self.name}.{self.extension}"


STRICT = "--drop-duplicates --max-aspect-ratio 4 --min-aesthetic-score 5 --missing-score drop"


def encode(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
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


# ------------------------------------------------------------------------------------------- files


def as_bytes(content):
    """A file's bytes: of an int the picture of that number, of a text its UTF-8."""
    if isinstance(content, int):
        return encode(noise(content))
    return content if isinstance(content, bytes) else content.encode()


def as_json(content):
    """JSON bytes; a string given as bytes goes into it as it is, valid or not."""
    raw = []
    text = json.dumps(content, default=lambda data: f"<{raw.append(data) or len(raw) - 1}>")
    text = text.encode()
    for number, data in enumerate(raw):
        text = text.replace(f"<{number}>".encode(), data)
    return text


def write_files(root, files):
    """{name: content}: bytes, text, the number of a picture, a list: a tar's members, or a Path: a
    link to it.
    """
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            (root / name).symlink_to(content)
        elif isinstance(content, list):
            (root / name).write_bytes(tar_of(content))
        elif content is not None:
            (root / name).write_bytes(as_bytes(content))


def tar_of(members):
    """Bytes of a tar. Members are (name, content), where a Path is a link's target, or (name,
    content, kind of member), or names of pictures and of texts.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            if isinstance(member, str):
                member = member, 0 if "jp" in member.lower() else "text"
            name, content, *kind = member
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (kind or [tarfile.REGTYPE])[0], "../../../etc/passwd"
            if isinstance(content, Path):
                info.type, info.linkname = tarfile.SYMTYPE, str(content)
            data = as_bytes(content) if info.isreg() else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def with_size(data, field):
    """The first header of a tar with another size, spelled like this, and a checksum that fits."""
    header = bytearray(data[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


class Evil:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self):
        return open, ("pwned", "w")


def write_photos(root):
    """60 images of two sizes, captions of several lengths; every tenth copies the one before."""
    for i in range(60):
        is_large = i % 3 == 0 and i % 10 < 8
        image = noise(i - (i % 10 == 9), *((120, 96) if is_large else (40, 30)))
        content = {"caption": "word " * (i % 5 + 1), "pwatermark": i / 60}
        content |= {"aesthetic": i / 6} if i % 2 else {}
        write_files(root, {f"{i:03d}.jpg": encode(image), f"{i:03d}.json": json.dumps(content)})
    return root


# ------------------------------------- samples in the layout of a source, and its command line


def in_folder(root, samples):
    """Every second caption lies in the .json, the others in a .txt."""
    files = {sample.file: sample.data for sample in samples}
    for number, sample in enumerate(samples):
        content = {"aesthetic": sample.score}
        if sample.caption is not None and number % 2:
            content["caption"] = sample.caption
        elif sample.caption is not None:
            files[f"{sample.name}.txt"] = sample.caption
        files[f"{sample.name}.json"] = as_json(content)
    write_files(root, files)
    return ["folder", root]


def drop_latin(samples):
    """One file with all captions is UTF-8, or refused."""
    samples.remove(next(sample for sample in samples if sample.name == "latin"))


def in_table(ending, root, samples):
    drop_latin(samples)
    write_files(root / "images", {sample.file: sample.data for sample in samples})
    path = root / f"pairs.{ending}"
    rows = [
        {"file": sample.file, "words": sample.caption, "aesthetic": float(sample.score)}
        for sample in samples
    ]
    if ending == "parquet":
        write_parquet(path, rows, row_group_size=5)
    elif ending == "jsonl":
        path.write_bytes(b"\n".join(map(as_json, rows)))
    else:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, rows[0], delimiter="," if ending == "csv" else "\t")
        table.writeheader()
        table.writerows(rows)
        path.write_bytes(text.getvalue().encode())
    columns = ["--path-column", "file", "--caption-column", "words"]
    return ["table", path, *columns, "--images", root / "images"]


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def in_coco(root, samples):
    drop_latin(samples)
    images, notes = [], []
    for i, sample in enumerate(samples, 100):
        images.append({"id": i, "file_name": sample.file, "aesthetic": sample.score})
        if sample.caption is not None:
            notes.insert(0, {"image_id": i, "id": 1000 - i, "caption": sample.caption})
    write_files(root / "train2017", {sample.file: sample.data for sample in samples})
    write_files(root, {"captions.json": as_json({"images": images, "annotations": notes})})
    return ["coco", root / "captions.json", "--images", root / "train2017"]


def in_karpathy(root, samples):
    drop_latin(samples)
    images = [
        {
            "filepath": "val2014",
            "filename": sample.file,
            "split": ("train", "restval")[i % 2],
            "sentences": [] if sample.caption is None else [{"raw": sample.caption, "tokens": []}],
            "aesthetic": sample.score,
        }
        for i, sample in enumerate(samples)
    ]
    write_files(root / "val2014", {sample.file: sample.data for sample in samples})
    write_files(root, {"coco.json": as_json({"images": images, "dataset": "coco"})})
    return ["karpathy", root / "coco.json", "--split", "train"]


def in_mjhq(root, samples):
    drop_latin(samples)
    for sample in samples:
        sample.extension = "jpg"
    content = {
        s.name: {"category": "people", "prompt": s.caption, "aesthetic": s.score} for s in samples
    }
    write_files(root / "people", {sample.file: sample.data for sample in samples})
    write_files(root, {"meta_data.json": as_json(content)})
    return ["mjhq", root / "meta_data.json"]


def in_tars(root, samples):
    """Two tars as img2dataset writes them, one compressed, with one member more per sample."""
    for number, part in enumerate((samples[:9], samples[9:])):
        members = []
        for sample in part:
            members += [
                (f"{sample.name}.json", as_json({"aesthetic": sample.score, "key": "0"})),
                (f"{sample.name}.recap_txt", "a new caption"),
                (sample.file, sample.data),
                (f"{sample.name}.txt", sample.caption),
            ]
        there = [(name, content) for name, content in members if content is not None]
        tar = tar_of(there)
        files = {"00001.tar.gz": gzip.compress(tar)} if number else {"00000.tar": tar}
        write_files(root, files)
    return ["shards", root / "0000{0.tar,1.tar.gz}"]


TABLES = {ending: partial(in_table, ending) for ending in ("csv", "tsv", "jsonl", "parquet")}
SOURCES = {
    **{"folder": in_folder, **TABLES, "coco": in_coco},
    **{"karpathy": in_karpathy, "mjhq": in_mjhq, "tars": in_tars},
}


# ------------------------------------------------------------------- the program, and what it wrote


def run(*arguments, workers=1):
    main([*map(str, arguments), "--workers", str(workers)])


def fails(capsys, *arguments, workers=1):
    """The message of a run that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, workers=workers)
    assert stop.value.code == 2
    return capsys.readouterr().err


def outcome(output):
    """{name: bytes} of the shards and the summary."""
    files = [*output.rglob("*.tar"), output / "summary.json"]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def samples_of(output):
    return [sample for path in sorted(Path(output).glob("*.tar")) for sample in read_shard(path)]


def image_of(sample):
    return next(sample[key] for key in IMAGE_KEYS if key in sample)


def captions_of(sample):
    captions = json.loads(sample["json"])["captions"]
    assert sample["txt"].decode() == captions[0]
    return captions


def summary_of(output):
    return json.loads((Path(output) / "summary.json").read_text())
