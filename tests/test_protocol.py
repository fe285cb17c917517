"""eval/protocol.py: the shipped protocols; captions of every kind of source, and their choice."""

import json

import pytest
from conftest import refusal

from configs.load import load_dataclass
from eval.protocol import FOLDER, Protocol, protocol_file, read_captions


def texts(path, **values):
    """Captions that a protocol reads of a file."""
    return [caption.text for caption in read_captions(Protocol(captions=[str(path)], **values))]


def test_the_shipped_protocols_are_whole():
    names = [path.stem for path in FOLDER.glob("*.yaml")]
    protocols = {name: load_dataclass(Protocol, protocol_file(name)) for name in names}
    assert protocols.keys() == {"coco30k", "mjhq30k", "emoji", "geneval"}
    assert protocols["coco30k"].num_captions == protocols["mjhq30k"].num_captions == 30_000
    assert (protocols["mjhq30k"].resize, protocols["geneval"].layout) == ("clean", "geneval")
    emoji = protocols["emoji"]
    assert (emoji.features, emoji.clip.model) == ("tokenizer", "own")  # nothing to download
    assert len(read_captions(emoji)) == 150


JSONL = '{"prompt": "one", "tag": 1}\n\n{"prompt": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\n two \n"),
        ("a.jsonl", JSONL),
        ("coco.json", json.dumps({"annotations": [{"caption": "one"}, {"caption": "two"}]})),
        (
            "mjhq.json",
            json.dumps({"x": {"category": "a", "prompt": "one"}, "y": {"prompt": "two"}}),
        ),
    ],
)
def test_captions_come_from_text_jsonl_coco_and_mjhq(tmp_path, name, content):
    for first, encoding in (("ein Hündchen 犬", "utf-16"), ("no end\u2028of a line", "utf-8")):
        text = content.replace("one", first)
        (tmp_path / name).write_text(text, encoding=encoding, newline="\r\n")
        assert texts(tmp_path / name) == [first, "two"]


def test_captions_keep_their_record_and_image(tmp_path, tiny_shards):
    (tmp_path / "a.jsonl").write_text(JSONL)
    [first, _] = read_captions(Protocol(captions=[f"{tmp_path}/a.jsonl"]))
    assert first.record == {"prompt": "one", "tag": 1}
    shard = f"{tiny_shards}/train-00000.tar"
    captions = read_captions(Protocol(captions=[shard]))
    assert len(captions) == 24 and captions[3].source == f"{shard}: 00003"


def test_captions_are_chosen_by_the_protocol(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(map(str, range(100))))

    def chosen(**values):
        return [int(text) for text in texts(file, **values)]

    assert chosen() == [*range(100)]
    assert chosen(choice="first", num_captions=3) == [0, 1, 2]
    assert chosen(choice="spread", num_captions=4) == [0, 33, 66, 99]
    some = chosen(choice="random", num_captions=20)
    assert some == sorted({*some}) and len(some) == 20
    assert some == chosen(choice="random", num_captions=20)
    assert some != chosen(choice="random", num_captions=20, choice_seed=1)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", "", "a.txt"),
        ("a.txt", b"caf\xe9", "UTF-8"),
        ("a.tsv", "prompt\na dog", "jsonl"),
        ("a.jsonl", '{"prompt": "one"}\n{"text": "two"}', "line 2"),
        ("a.jsonl", '{"prompt": " "}', "caption 0"),
        ("a.json", '{"annotations": [3]}', "annotations"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, content, part):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{file}.*{part}|{part}"):
        texts(file)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"captions": []}, ["captions="]),
        ({"captions": ["a.txt", "b"]}, ["captions", "a.txt"]),
        ({"choice": "first"}, ["choice=first", "num_captions"]),
        ({"group_size": 0}, ["group_size", "0"]),
        ({"metrics": ["fid"]}, ["metrics", "fid", "frechet"]),
        ({"features": "tokenizer"}, ["inception_score", "features=tokenizer"]),
        ({"features": "tokenizer", "metrics": [], "image_size": 48}, ["features", "image_size"]),
        ({"layout": "geneval", "captions": ["a.txt"]}, ["layout=geneval", ".jsonl"]),
        ({"background": [0, 0, 256]}, ["background", "256"]),
        ({"resize": "clean", "image_size": 64}, ["resize=clean", "image_size"]),
    ],
)
def test_impossible_protocols_are_refused(values, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\n")
    with refusal(*parts):
        read_captions(Protocol(**values))


def test_a_statistics_file_is_no_reference_among_others():
    with pytest.raises(ValueError, match=r"reference .*a\.npz"):
        Protocol(reference=["a.npz", "b"]).statistics_file  # noqa: B018
