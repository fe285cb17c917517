"""Image to text after training: sample.py --caption, and eval/captions.py."""

import json

import pytest
from conftest import shape_sample
from evaluations import CPU, run_program
from PIL import Image
from tiny_experiment import draw

import sample
from data.entries import Entry
from data.files import write_json
from data.tar import write_shard
from eval import captions
from eval.captions import NO_JAVA, PTB, SCORERS, SIMPLE, CaptionScorer, ptb_tokens, simple_tokens
from modeling.pipeline import Captioner, join_punctuation

HAS_JAVA = captions.which("java") is not None


@pytest.fixture
def no_java(monkeypatch):
    """Only the fast half of the metrics."""
    monkeypatch.setattr(captions, "which", lambda name: None)


# The captioner


@pytest.mark.parametrize(
    ("decoded", "written"),
    [
        ("cat , black ( old )", "cat, black (old)"),
        ("t - rex , the king ' s 1 2 3 .", "t-rex, the king ' s 123."),
        ("a man 's dog", "a man's dog"),
        ("a & b", "a & b"),
    ],
)
def test_spaces_around_punctuation_are_as_they_are_written(decoded, written):
    assert join_punctuation(decoded) == written


def test_a_run_of_the_other_direction_is_refused_both_ways(chain, captioner, tmp_path, pictures):
    output = ["--output", tmp_path / "x.png"]
    for run, arguments, part in (
        (chain.folder, ["--caption", pictures], "image_to_text"),
        (captioner, ["--prompts", "a cat"], "--caption"),
        (chain.folder / "tokenizer", ["--caption", pictures], "tokenizer"),
    ):
        with pytest.raises(ValueError, match=part):
            draw(run, *arguments, *output)


# sample.py


def test_captions_are_printed_with_a_contact_sheet_or_become_a_line_an_image(
    captioner, pictures, tmp_path, capsys
):
    image, output = pictures / "1.png", tmp_path / "new" / "out.jsonl"
    draw(captioner, "--caption", image, pictures, "--output", tmp_path / "sheet.png")
    *lines, end = capsys.readouterr().out.splitlines()
    names = [str(pictures / f"{i}.png") for i in range(3)]
    assert [line.split(": ")[0] for line in lines] == [str(image), *names]
    assert lines[0] == lines[2]  # the same image
    assert f"{tmp_path}/sheet.png: 4 captions" in end
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 128
    draw(captioner, "--caption", pictures, "--output", output, "--batch-size", "2")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [f"{row['image']}: {row['caption']}" for row in rows] == lines[1:]
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_captions_of_a_long_list_are_written_as_they_come(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("of an earlier command\n")
    entries = [Entry(name, f"{name}.png", captions=[]) for name in "abc"]

    def batches():
        yield {"index": [0, 1], "caption": ["one", "two"], "skipped": []}
        assert len(path.read_text().splitlines()) == 2
        yield {"index": [], "caption": [], "skipped": [("b.png", "image: unreadable")]}
        yield {"index": [2], "caption": ["drei ü"], "skipped": []}

    assert sample.write_captions(path, entries, batches()) == (3, 1)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["caption"] for row in rows] == ["one", "two", "drei ü"]


def test_without_arguments_the_runs_own_pictures_are_captioned(captioner, tmp_path, capsys):
    draw(captioner, "--output", tmp_path / "sheet.png")
    assert "3 captions" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()
    with pytest.raises(ValueError, match="--gallery"):
        draw(captioner, "--gallery", tmp_path / "x.html", "--output", tmp_path / "sheet.png")


def test_an_unreadable_image_in_a_folder_is_left_out_named_and_counted(
    captioner, pictures, tmp_path, capsys
):
    (pictures / "1b\x1b[31m.png").write_bytes(b"no image")
    for output in ("x.png", "x.jsonl"):
        draw(captioner, "--caption", pictures, "--output", tmp_path / output)
        printed = capsys.readouterr()
        assert f"{pictures}/1b\\x1b[31m.png: image: " in printed.err
        assert "3 captions" in printed.out and "1 unreadable" in printed.out


@pytest.mark.parametrize("output", ["x.png", "x.jsonl"])
def test_what_can_not_be_captioned_is_an_error_that_leaves_nothing(
    captioner, pictures, tmp_path, output
):
    broken = pictures / "broken" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no image")
    for arguments, part in (
        ([pictures / "0.png", broken], "broken.png"),
        ([tmp_path / "nothing.png"], "nothing.png"),
        ([broken.parent], "read"),
    ):
        with pytest.raises(ValueError, match=part):
            draw(captioner, "--caption", *arguments, "--output", tmp_path / "out" / output)
    assert not [*(tmp_path / "out").rglob("*")]


# Scores


def test_equal_captions_score_as_high_as_can_be_without_java(no_java):
    texts = ["a red circle on white paper", "a blue square above it", "two green triangles here"]
    scorer = CaptionScorer([[text, "something else entirely in here"] for text in texts])
    assert (scorer.tokenizer, scorer.tokenizer_reason) == (SIMPLE, NO_JAVA)
    assert simple_tokens([["A man's T-shirt, (red)!"]]) == {0: ["a man's t-shirt red"]}
    same, other = scorer.score(texts), scorer.score(texts[1:] + texts[:1])
    assert same["bleu_4"] == pytest.approx(100, abs=1e-3) and same["rouge_l"] == pytest.approx(100)
    for name in ("bleu_4", "rouge_l", "cider"):
        assert other[name] < 0.5 * same[name]
    assert same["meteor"] is same["spice"] is None
    assert same["reasons"] == {"meteor": NO_JAVA, "spice": NO_JAVA}


def test_without_the_package_all_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    scores = CaptionScorer([["a cat"]]).score(["a cat"])
    assert all(scores[name] is None for name in SCORERS) and scores["reasons"].keys() == {*SCORERS}
    assert all("requirements-eval.txt" in reason for reason in scores["reasons"].values())


@pytest.mark.skipif(not HAS_JAVA, reason="no Java")
def test_the_ptb_tokenizer_gives_a_line_for_each_text():
    pytest.importorskip("pycocoevalcap")
    texts = [["A man's T-shirt, (red)!", "two\nlines"], [""], ["Zoë & co. -- 3.5 m\u2028end"]]
    found = ptb_tokens(texts)
    assert found[0][0].startswith("a man 's t-shirt ") and found[0][1] == "two lines"
    assert found[1] == [""] and found[2][0].startswith("zoë & co. ")
    assert CaptionScorer(texts).tokenizer == PTB


# eval/captions.py


def evaluate(run, tmp_path, *arguments):
    output = tmp_path / "report.json"
    run_program(captions, run, "--output", output, *CPU, *arguments)
    return json.loads(output.read_text())


def test_shards_are_measured_at_each_steps_and_guidance(captioner, tiny_shards, tmp_path, no_java):
    points = ["--steps", "1,2", "--guidance", "1,2"]
    report = evaluate(captioner, tmp_path, f"{tiny_shards}/*.tar", *points)
    found = [(row["steps"], row["guidance"]) for row in report["results"]]
    assert found == [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)]
    protocol = report["protocol"]
    assert (protocol["num_images"], protocol["tokenizer"]) == (48, SIMPLE)
    assert protocol["references_per_image"] == {"min": 1, "max": 1, "mean": 1.0}
    assert report["model"]["checkpoint"] == "flowtok_caption/step_00000004"
    for row in [*report["results"], report["without_flow"]]:
        assert {*SCORERS} <= row.keys() and 0 <= row["exact_match"] <= 100
        assert len(row["examples"]) == 20


def rouge(common, length, reference_length):
    """ROUGE-L of a caption, with the weight 1.2 of the package."""
    precision, recall = common / length, common / reference_length
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def test_several_references_count_and_one_hit_is_an_exact_match(
    captioner, pictures, tmp_path, no_java, monkeypatch
):
    caption = "a black cat, old"
    monkeypatch.setattr(Captioner, "read", lambda self, latents: [caption] * len(latents))
    rows = [
        {"captions": ["another", "A black cat , old"]},
        {"caption": "a black cat"},
        {"captions": ["a  black\u2028cat, old"]},
    ]
    for number, row in enumerate(rows):
        (pictures / f"{number}.json").write_text(json.dumps(row), encoding="utf-8")
    report = evaluate(captioner, tmp_path, pictures, "--steps", "1")
    assert report["protocol"]["references_per_image"]["max"] == 2
    [result] = report["results"]
    assert result["exact_match"] == pytest.approx(100 * 2 / 3)
    assert result["rouge_l"] == pytest.approx(100 * (2 + rouge(3, 4, 3)) / 3)
    assert result["examples"][2]["references"] == ["a black cat, old"]


def test_an_unreadable_image_is_refused(captioner, pictures, tmp_path):
    for file in [*pictures.iterdir()]:
        file.with_suffix(".txt").write_text("a cat")
    (pictures / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1.png cannot be measured"):
        evaluate(captioner, tmp_path, pictures)
    assert not (tmp_path / "report.json").exists()


def test_wrong_arguments_are_refused_before_any_work(captioner, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(captions, "load_captioner", None)
    bare, whole = (shape_sample(number) for number in range(2))
    del bare["txt"]
    write_shard(tmp_path / "bare.tar", [bare])
    write_shard(tmp_path / "whole.tar", [whole])
    # The numbers of other data are not replaced
    write_json({"protocol": {"data": ["other.tar"]}}, tmp_path / "report.json")
    for arguments, part in (
        ([tmp_path / "bare.tar"], "bare.tar: 00000.*json:captions, txt"),
        ([tmp_path / "absent.tar"], "absent.tar"),
        ([tmp_path / "whole.tar", "--output", pictures / "0.png" / "a.json"], "0.png"),
        ([tmp_path / "whole.tar"], "report.json .*other data"),
    ):
        with pytest.raises(ValueError, match=part):
            evaluate(captioner, tmp_path, *arguments)
