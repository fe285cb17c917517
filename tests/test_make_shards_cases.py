"""scripts/make_shards.py, case by case: what users' sources look like, and what becomes of them."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from sources import (
    captions_of,
    encode,
    fails,
    noise,
    run,
    samples_of,
    summary_of,
    write_files,
    write_parquet,
)

from data.images import image_bytes
from data.tar import read_shard, write_shard

NFC, NFD = (unicodedata.normalize(form, "ünï") for form in ("NFC", "NFD"))
FIELDS = json.dumps({"caption": "from the field", "alt": ["", "first", "second"]})
PNG, JPEG, TIFF = (encode(noise(20), format=name) for name in ("PNG", "JPEG", "TIFF"))
PREVIEW = encode(noise(0), format="TIFF", tiffinfo={254: 1})  # as camera raws begin
HEIC = b"\0\0\0\x18ftypheic"


def table(*rows):
    """A csv with a path and a caption; a row without a comma gets one."""
    return "\n".join(["path,caption", *(row if "," in row else f"{row},a dog" for row in rows)])


def coco(*images):
    """COCO's json of (name, its captions)."""
    notes = [
        {"image_id": i, "caption": text} for i, (_, *texts) in enumerate(images) for text in texts
    ]
    records = [{"id": i, "file_name": name} for i, (name, *_) in enumerate(images)]
    return json.dumps({"images": records, "annotations": notes})


def karpathy(*splits):
    images = [{"filename": f"{i}.jpg", "split": split} for i, split in enumerate(splits)]
    return json.dumps({"images": [image | {"sentences": [{"raw": "x"}]} for image in images]})


SPLITS = {f"{i}.jpg": i for i in range(6)}
SPLITS["k.json"] = karpathy("train", "restval", "train", "restval", "val", "test")
UMLAUTS = table(f"{NFC}.jpg,ein Hündchen 犬")
UMLAUTS_JSON = f'{{"path": "{NFC}.jpg", "caption": "ein Hündchen 犬"}}\n'
PHONE = {"a.JPG": 0, "b.jfif": 1, "c.jpe": 2, "d.apng": PNG, "e": JPEG, "f.v1": TIFF}
PHONE |= {"g.HEIC": HEIC, "h.jxl": b"\xff\x0a", "i.DNG": PREVIEW}
PHONE |= {f"{name}.txt": name for name in "abcdefghi"}
REST = {"notes.md": "", ".DS_Store": "", "x/._a.jpg": "", "x/a.c d": "", "y.txt": "text"}
NAMED = {"a.v0": JPEG, "b.v1": PNG, "c": TIFF, "e.dng": PREVIEW, "f.md": "# text"}

# name: (files as in write_files, command, {key: captions}, {reason: count})
# fmt: off
KEPT = {
    # rows and files of one image are one sample
    "rows of an image": (
        {"a.jpg": 0, "b.jpg": 1, "x/c.jpg": 2,
         "t.csv": table("a.jpg,1", "b.jpg,", "./a.jpg,2", "a.jpg,1", "b.jpg,4", ",5",
                        "HERE/x/c.jpg"),
         "u.jsonl": '{"path": "x/../a.jpg", "caption": ["3"]}'},
        "table t.csv u.jsonl", {"a": ["1", "2", "3"], "b": ["4"], "x/c": ["a dog"]},
        {"image: missing": 1}),
    "images of COCO": (
        {"a.jpg": 0, "c.json": coco(("a.jpg", "1", "2", "3")).replace('"id": 0', '"id": 7').replace(
            '"annotations": [', '"annotations": [{"image_id": 7, "caption": "x"}, ')},
        "coco c.json", {"a": ["x"]}, {"image: missing": 1}),
    "five captions, of two of COCO's images": (
        {"a.jpg": 0, "c.json": coco(("a.jpg", *"1234"), ("a.jpg", "5"))},
        "coco c.json", {"a": [*"12345"]}, {}),
    "equal files": (
        {"a.jpg": 0, "a.txt": "1", "b.jpg": 0, "b.txt": "2", "c.jpg": 0, "c.json": FIELDS},
        "folder . --drop-duplicates", {"a": ["1", "2", "from the field"]}, {"duplicate": 2}),
    "equal files with rows each": (
        {"a.jpg": 0, "b.jpg": 0, "t.csv": table("b.jpg,1", "a.jpg,2", "b.jpg,3", "a.jpg,4")},
        "table t.csv --drop-duplicates", {"b": ["1", "2", "3", "4"]}, {"duplicate": 1}),
    "equal files that are no image": (
        {"a.jpg": "x", "a.txt": "1", "b.jpg": "x", "b.txt": "2", "c.jpg": 0, "c.txt": "3"},
        "folder . --drop-duplicates", {"c": ["3"]},
        {"image: unreadable (UnidentifiedImageError)": 1, "duplicate": 1}),
    "restval is train": (
        SPLITS, "karpathy k.json --split train", {key: ["x"] for key in "0123"}, {}),
    "no restval": (
        SPLITS, "karpathy k.json --split train --no-restval", {"0": ["x"], "2": ["x"]}, {}),
    # tables
    "another separator": (
        {"a.jpg": 0, "t.csv": "path\tcaption\na.jpg\ta dog, running\n"},
        "table t.csv --separator tab", {"a": ["a dog, running"]}, {}),
    "quotes, and columns that differ in a space": (
        {"a.jpg": 0, "t.csv": 'path,caption,caption \na.jpg,"a ""dog"", \nrunning",two\n'},
        "table t.csv", {"a": ['a "dog", running']}, {}),
    "quotes are text": (
        {"a.jpg": 0, "b.jpg": 1, "t.tsv": 'path\tcaption\na.jpg\t"a dog\nb.jpg\tsay "hi"\n'},
        "table t.tsv --no-quotes", {"a": ['"a dog'], "b": ['say "hi"']}, {}),
    **{f"{name} in {encoding}": (
        {f"{NFC}.jpg": 0, name: text.encode(encoding)},
        f"table {name}", {NFC: ["ein Hündchen 犬"]}, {})
       for encoding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-32")
       for name, text in {"t.csv": UMLAUTS, "t.jsonl": UMLAUTS_JSON}.items()},
    "another encoding": (
        {"a.jpg": 0, "t.csv": table("a.jpg,Hündchen").encode("cp1252")},
        "table t.csv --encoding cp1252", {"a": ["Hündchen"]}, {}),
    "paths out of the folder": (
        {"secret.jpg": 0, "x/t.csv": table("../secret.jpg", "/dev/zero", "\0")},
        "table x/t.csv --images x", {"secret": ["a dog"]}, {"image: missing": 2}),
    "keys that are taken": (
        {"t.jsonl": "\n".join(f'{{"path": "do{c}ts.jpg", "caption": "x"}}' for c in "_.+"),
         "do_ts.jpg": 0, "do.ts.jpg": 1, "do+ts.jpg": 2},
        "table t.jsonl", {"do_ts": ["x"], "do_ts+1": ["x"], "do_ts+2": ["x"]}, {}),
    # one name in two Unicode forms
    "forms in a table": (
        {f"{NFD}.jpg": 0, "t.csv": table(f"{NFC}.jpg,1", f"{NFD}.jpg,2")},
        "table t.csv", {NFC: ["1", "2"]}, {}),
    "two images with a name each": (
        {f"{NFC}.jpg": 0, f"{NFD}.jpg": 1, "t.csv": table(f"{NFC}.jpg,1", f"{NFD}.jpg,2")},
        "table t.csv", {NFC: ["1"], f"{NFD}+1": ["2"]}, {}),
    # text beside images, in other forms of their names and in other encodings
    "texts": (
        {"a.jpg": 0, "a.txt": "犬".encode("utf-16"),
         "b.jpg": 1, "b.json": FIELDS.encode("utf-16-le"),
         "c.jpg": 2, "c.txt": "Hündchen".encode("cp1252"), "D.JPG": 3, "D.TXT": "4",
         "e.jpg": 4, "e.txt": "5", "e.TXT": "6", f"{NFD}.jpg": 5, f"{NFC}.txt": "7",
         "f.jpg": 6, "f.txt": Path("nowhere"), "g.jpg": 7, "g.txt": "8", "g.json": FIELDS},
        "folder .",
        {"a": ["犬"], "b": ["from the field"], "D": ["4"], "e": ["5"], NFD: ["7"], "g": ["8"]},
        {"caption: not UTF-8": 1, "caption: missing": 1, "no image: .txt": 1}),
    "another caption key": (
        {"a.jpg": 0, "a.caption": "1", "a.txt": "2"},
        "folder . --caption-keys caption", {"a": ["1"]}, {}),
    "a list": (
        {"a.jpg": 0, "a.txt": "x", "a.json": FIELDS},
        "folder . --caption-keys json:no json:alt", {"a": ["first", "second"]}, {}),
    "json that is none": (
        {f"{i}{end}": content
         for i, bad in enumerate(["{", "[" * 5000, "[1]", '{"caption": "\\ud83d", "x": 1e999}'])
         for end, content in {".jpg": i, ".txt": "1", ".json": bad}.items()},
        "folder .", {key: ["1"] for key in "0123"}, {}),
    # what is an image, and what is not
    "a phone's folder": (
        PHONE | REST, "folder .", {name: [name] for name in "abcdef"},
        {"no image: .heic": 1, "no image: .jxl": 1, "no image: .dng": 1, "no image: .md": 1,
         "no image: hidden": 2, "no image: unusual ending": 1, "no image: .txt": 1}),
    "files that a table names": (
        NAMED | {"t.csv": table(*NAMED)},
        "table t.csv", {key: ["a dog"] for key in ("a_v0", "b_v1", "c")},
        {"no image: .dng": 1, "no image: .md": 1}),
    "links": (
        {"a.jpg": 0, "a.txt": "1", ".b/c.jpg": 1, ".b/c.txt": "2",
         "b": Path(".b"), ".b/d": Path("..")},
        "folder .", {"a": ["1"], "b/c": ["2"]}, {}),
    "members of tars": (
        {"x.tar": ["./a.jpg", "a.txt", "a.", "__meta__.json", "none", "b.jpg", "b.txt", "b.JPG",
                   "c.JPG", "c.TXT", f"{NFD}.jpg", f"{NFC}.txt",
                   "d.jpg", ("d.txt", "犬".encode("utf-16"))],
         "y.tar": ["._a.jpg", "a"]},
        "shards x.tar y.tar", {"a": ["text"], "c": ["text"], NFD: ["text"], "d": ["犬"]},
        {"sample: a member occurs twice": 1, "no sample: no ending": 3,
         "no sample: begins with __": 1, "no sample: hidden": 1}),
}

# (files, command, reason, what its first example says)
EXPLAINED = [
    ({"x.tar": ["a.jpg", "b.jpg", "a.txt", "b.txt"]}, "shards x.tar",
     "caption: missing", ["x.tar", "a", "members jpg", "not sorted"]),
    ({"images/a.jpg": 0, "t.csv": table("images\\a.jpg")}, "table t.csv",
     "image: missing", ["images\\a.jpg", "backslashes"]),
    ({"a.jpg": 0, "t.csv": table("http://host/a.jpg")}, "table t.csv",
     "image: missing", ["http://host/a.jpg", "URL"]),
    ({"IMG_1.JPG": 0, "t.csv": table("IMG_1.jpg")}, "table t.csv",
     "image: missing", ["IMG_1.jpg", "IMG_1.JPG"]),
    ({"a.jpg": 0, "t.csv": table(".")}, "table t.csv", "image: missing", ["folder"]),
    ({"a.jpg": 0, "a.caption": "x"}, "folder .", "caption: missing", ["a.jpg", "a.caption"]),
    ({"IMG_1.JPG": 0, "img_1.txt": "x"}, "folder .", "caption: missing", ["img_1.txt"]),
    ({"a.jpg": "<html><body>", "a.txt": "x"}, "folder .",
     "image: unreadable (UnidentifiedImageError)", ["a.jpg", "<html>"]),
    ({"b.jpg": "", "a.heic": HEIC}, "folder .", "no image: .heic", ["a.heic", "pillow-heif"]),
    ({"b.jpg": "", ".x/a.jpg": 0}, "folder .", "no image: hidden", [".x"]),
    ({"a.jpg": 0, "a.json": "{"}, "folder .", "json: unreadable", ["a.jpg", "a.json"]),
    ({"x.tar": ["a.jpg", "b/c"]}, "shards x.tar", "no sample: no ending", ["x.tar", "b/c"]),
    ({"c.json": coco(("a.jpg", "1")).replace('"image_id": 0', '"image_id": "0"')}, "coco c.json",
     "image: missing", ["c.json", "'0'"]),
    ({"a.jpg": 0, "t.jsonl": '{"path": "a.jpg", "caption": 5}'}, "table t.jsonl",
     "caption: no text", ["a.jpg", "[5]"]),
]

BAD_INPUTS = {
    "empty/.hidden.jpg": "", "texts/a.txt": "", "texts/b.heic": "", "texts/c.heic": "",
    "photos/a.jpg": 0, "photos/a.txt": "a caption",
    "pairs.xlsx": "", "pairs.csv": "file,words\na.jpg,a\n",
    "header.csv": "path,caption\n", "open.csv": 'path,caption\na.jpg,"a caption\nb.jpg,b\n',
    "half.csv": table("a.jpg", "b.jpg,\ud800").encode("utf-16", "surrogatepass"),
    "wide.csv": "path,caption\na.jpg,a dog\n0.jpg,a dog, running on the beach, at sunset\n",
    "twice.csv": "path,caption,path\n", "odd.csv": UMLAUTS.encode("utf-16")[:-1],
    "latin.csv": table("a.jpg", '"b\nc.jpg",ein Hündchen').encode("cp1252"),
    "latin.json": coco(("a.jpg", "1")).replace("1", "Hündchen").encode("cp1252"),
    "list.jsonl": '{"path": "a.jpg", "caption": "a"}\n[1]\n',
    "split.json": '{"images": [{"split": "test"}, {"split": "train"}]}',
    "again.jsonl": '{"path": "a.jpg", "caption": "1", "caption": "2"}\n',
    "again.json": '{"1": {"category": "x", "prompt": "1"}, "1": {"category": "x", "prompt": "2"}}',
    "same.json": coco(("a.jpg", "1"), ("b.jpg", "2")).replace('"id": 1', '"id": 0'),
    "nothing.tar": [],
}
REFUSED = [
    ("folder none", ["folder", "none"]),
    ("folder texts", ["texts", ".heic (2), .txt (1)"]),
    ("table none.csv", ["none.csv"]),
    ("table pairs.xlsx", ["pairs.xlsx", ".csv, .tsv, .parquet or .jsonl", "--separator"]),
    ("table pairs.csv", ["'path'", "'file', 'words'"]),
    ("table pairs.csv --separator ab", ["--separator", "'ab'"]),
    ("table header.csv", ["header.csv"]),
    ("table open.csv", ["open.csv line 2", "--no-quotes"]),
    ("table half.csv", ["half.csv line 3", "--encoding"]),
    ("table latin.csv", ["latin.csv line 4", "UTF-8", "ein H", "--encoding"]),
    ("table latin.csv --encoding utf-16", ["latin.csv", "UTF-16"]),
    ("table latin.csv --encoding hex", ["latin.csv", "--encoding hex"]),
    ("coco latin.json", ["latin.json line 1", "UTF-8"]),
    ("table wide.csv", ["wide.csv line 3", "4 fields", "2 (path, caption)", "--separator"]),
    ("table twice.csv", ["twice.csv", "'path'"]),
    ("table odd.csv", ["odd.csv", "UTF-16"]),
    ("table list.jsonl", ["list.jsonl line 2", "'[1]'"]),
    ("table again.jsonl", ["again.jsonl line 1", "twice"]),
    ("table again.jsonl --no-quotes", ["again.jsonl", "--no-quotes"]),
    ("table none.parquet --encoding cp1252", ["none.parquet", "--encoding"]),
    ("coco none.json", ["none.json", "No such file"]),
    ("coco same.json", ["same.json", "'a.jpg' and 'b.jpg'", "id 0"]),
    ("coco split.json", ["split.json", "'annotations'", "images"]),
    ("karpathy split.json --split dev", ["split", "'dev'", "test, train"]),
    ("mjhq split.json", ["split.json", "'images'"]),
    ("mjhq again.json", ["again.json", "twice"]),
    ("shards cut.tar", ["cut.tar"]),
    ("shards nothing.tar", ["nothing.tar"]),
    ("shards pairs.csv", ["pairs.csv", ".tar"]),
    ("shards http://host/x.tar", ["http://host/x.tar"]),
    ("folder photos --shard-index 2 --num-shards 2", ["shard_index", "2", "0..1"]),
    ("folder photos --holdout 1", ["holdout", "1"]),
    ("folder photos --output photos", ["output", "photos"]),
    ("folder photos --background 0 0 256", ["--background", "256", "0..255"]),
    ("folder photos --max-aspect-ratio 0.5", ["max_aspect_ratio", "0.5"]),
    ("folder photos --caption-keys json:", ["caption_keys", "json:"]),
]
# fmt: on


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The test's folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_with_which_captions(name, here):
    files, command, captions, dropped = KEPT[name]
    for file, content in files.items():
        text = content.replace("HERE", str(here)) if isinstance(content, str) else content
        write_files(here, {file: text})
    # the output is no part of the source when the same command comes again
    for _ in range(2):
        run(*command.split(), "--output", "new/out")
    assert {sample["__key__"]: captions_of(sample) for sample in samples_of("new/out")} == captions
    summary = summary_of("new/out")
    assert summary["dropped"] == dropped
    assert summary["read"] == summary["kept"] + sum(dropped.values())


@pytest.mark.parametrize(("files", "command", "reason", "words"), EXPLAINED)
def test_a_reason_shows_its_first_case_with_what_lies_there(
    files, command, reason, words, here, capsys
):
    write_files(here, files)
    message = fails(capsys, *command.split(), "--output", "out", "--no-shuffle")
    example = summary_of("out")["first"][reason]
    assert all(word in example for word in words)
    assert reason in message and example in message


@pytest.mark.parametrize(("command", "named"), REFUSED)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(command, named, here, capsys):
    write_files(here, BAD_INPUTS)
    write_shard(here / "cut.tar", [{"__key__": str(i), "txt": "x"} for i in range(9)])
    (here / "cut.tar").write_bytes((here / "cut.tar").read_bytes()[:1024])
    before = sorted(here.rglob("*"))
    output = [] if "--output" in command else ["--output", "new/out"]
    message = fails(capsys, *command.split(), *output)
    assert all(name in message.splitlines()[-1] for name in named)
    assert sorted(here.rglob("*")) == before


def test_a_column_of_parquet_that_is_no_text_is_named_with_its_type(here, capsys):
    write_parquet(here / "t.parquet", [{"path": b"\xff", "caption": [1]}])
    command = ["table", "t.parquet", "--output", "out"]
    assert "'path' is of type binary" in fails(capsys, *command)
    message = fails(capsys, *command, "--path-column", "caption")
    assert "'caption' is of type list" in message


def test_text_of_parquet_that_is_not_utf_8_is_refused_by_name(here, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    texts = [pyarrow.array([text]).view(pyarrow.string()) for text in (b"a.jpg", b"caf\xe9")]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(("path", "caption"), texts))), "t.parquet")
    message = fails(capsys, "table", "t.parquet", "--output", "out")
    assert "t.parquet" in message and "0xe9" in message and not Path("out").exists()


def test_what_kept_samples_do_not_use_is_printed_with_its_first_case(here, capsys):
    files = {"a.jpg": 0, "a.txt": "1", "a.json": Path("nowhere"), "b.jpg": 1, "b.txt": "2"}
    write_files(here, files | {"b.json": "{"})
    run("folder", ".", "--output", "out")
    summary, printed = summary_of("out"), capsys.readouterr().out
    assert summary["kept"] == 2 and summary["dropped"] == {}
    for reason, name in {"json: no plain file": "a.json", "json: unreadable": "b.json"}.items():
        assert summary["unused"][reason] == 1 and name in summary["first_unused"][reason]
        assert f"{reason}: 1, first {summary['first_unused'][reason]}" in printed


VALUES = ["x", 5, None, {"raw": "y"}, ""]
FIELD_OF_VALUES = json.dumps({"path": "a.jpg", "split": "val", "captions": VALUES})
ANNOTATIONS = [{"image_id": 0, "caption": value} for value in VALUES]
IMAGE = {"id": 0, "file_name": "a.jpg", "filename": "a.jpg", "split": "val"}
IMAGE["sentences"] = [{"raw": value} for value in VALUES]


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("table FILE.jsonl --caption-column captions", FIELD_OF_VALUES),
        ("coco FILE", json.dumps({"images": [IMAGE], "annotations": ANNOTATIONS})),
        ("karpathy FILE --split val", json.dumps({"images": [IMAGE]})),
        ("folder .", FIELD_OF_VALUES),
        ("shards FILE.tar", [("a.jpg", 0), ("a.json", FIELD_OF_VALUES)]),
    ],
)
def test_captions_that_are_no_text_are_counted(command, content, here):
    words = command.split()
    name = "a.json" if words[0] == "folder" else words[1]
    write_files(here, {"a.jpg": 0, name: content})
    run(*words, "--output", "out")
    assert [captions_of(sample) for sample in samples_of("out")] == [["x"]]
    assert summary_of("out")["unused"] == {"caption: missing": 2, "caption: no text": 2}


def test_further_images_of_a_sample_stay_and_readers_take_the_same_as_before(here):
    write_files(here, {"x.tar": ["a.png", "a.jpg", "a.txt"]})
    run("shards", "x.tar", "--output", "out")
    assert summary_of("out")["unused"] == {"image: further one": 1}
    (before,), (after,) = read_shard(here / "x.tar"), samples_of("out")
    assert {name: after[name] for name in ("jpg", "png")} == {
        name: before[name] for name in ("jpg", "png")
    }
    assert image_bytes(after) == image_bytes(before)


def test_the_home_folder_is_meant_by_a_tilde_that_the_shell_leaves(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write_files(here, {"photos/a.jpg": 0, "photos/a.txt": "1"})
    run("folder", "~/photos", "--output", "~/out")
    assert [sample["__key__"] for sample in samples_of(here / "out")] == ["a"]
    assert not (here / "~").exists()


def test_parquet_without_pyarrow_names_the_package(here, monkeypatch, capsys):
    (here / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in fails(capsys, "table", "t.parquet", "--output", "out")
