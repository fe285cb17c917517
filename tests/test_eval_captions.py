"""Image to text after training: sample.py --caption, eval/captioning.py, eval/captions.py, eval/caption_metrics.py."""

import json
import shutil

import pytest
import torch
from conftest import shape_sample
from evaluations import train_on
from modeling.image_to_text import Captioner, join_punctuation
from PIL import Image
from tiny_experiment import draw, to_text

from data.tar import write_shard
from eval import caption_metrics, captions
from eval.caption_metrics import PTB, SIMPLE, CaptionScorer, simple_tokens
from eval.captioning import choose_images, list_pictures
from training.loading import load_captioner, load_pipeline

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path):
    """A folder with three images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(shape_sample(number)["png"])
    return folder


# Captions


def test_a_caption_depends_on_its_image_alone(captioner, pictures):
    parts, sampling = load_captioner(captioner, CPU)
    images = torch.rand(5, 3, 32, 32)
    together = parts.captions(images, sampling)
    assert len(together) == 5
    assert [parts.captions(image[None], sampling)[0] for image in images] == together


@pytest.mark.parametrize(
    ("decoded", "written"),
    [
        ("cat , black ( old )", "cat, black (old)"),
        ("t - rex , the king ' s 1 2 3 .", "t-rex, the king ' s 123."),
        ("a man 's dog", "a man's dog"),
        ("a & b", "a & b"),
        ("", ""),
    ],
)
def test_spaces_around_punctuation_are_as_they_are_written(decoded, written):
    assert join_punctuation(decoded) == written


# Which run


def test_an_experiment_with_a_caption_round_is_found_also_after_it_was_moved(
    chain, captioner, tmp_path
):
    experiment = tmp_path / "moved"
    for name in ("tokenizer", "text_decoder", "text_encoder"):
        shutil.copytree(chain.folder / name, experiment / name)
    shutil.copytree(captioner, experiment / "flowtok_caption")
    config = experiment / "flowtok_caption" / "config.yaml"
    config.write_text(config.read_text().replace(str(chain.folder), "/nowhere"))
    moved, _ = load_captioner(experiment, CPU)
    original, sampling = load_captioner(captioner, CPU)
    images = torch.rand(4, 3, 32, 32)
    assert moved.captions(images, sampling) == original.captions(images, sampling)
    shutil.rmtree(experiment / "text_decoder")
    with pytest.raises(
        ValueError, match="the projector [0-9a-f]{16}, and no text decoder for it is there"
    ):
        load_captioner(experiment, CPU)


def test_a_run_of_the_other_direction_is_refused_both_ways(chain, captioner, tmp_path, pictures):
    with pytest.raises(
        ValueError, match="flows from text to image only: captions need a run with flow.direction="
    ):
        draw(chain.folder, "--caption", pictures, "--output", tmp_path / "x.png")
    with pytest.raises(ValueError, match="flows from image to text: it makes captions"):
        draw(captioner, "--prompts", "a cat", "--output", tmp_path / "x.png")
    with pytest.raises(
        ValueError, match="is a run of stage 'tokenizer'; captions need a flowtok run"
    ):
        draw(chain.folder / "tokenizer", "--caption", pictures, "--output", tmp_path / "x.png")


# sample.py


def test_captions_are_printed_with_a_contact_sheet(captioner, pictures, tmp_path, capsys):
    image = pictures / "1.png"
    draw(captioner, "--caption", image, pictures, "--output", tmp_path / "sheet.png")
    *lines, end = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(image),
        *(str(pictures / f"{i}.png") for i in range(3)),
    ]
    assert lines[0] == lines[2]  # the same image
    assert end.startswith(f"{tmp_path}/sheet.png: 4 captions, 3 steps, guidance 2, ")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 128


def test_a_folder_becomes_a_line_an_image(captioner, pictures, tmp_path, capsys):
    draw(
        captioner,
        "--caption",
        pictures,
        "--output",
        tmp_path / "new" / "out.jsonl",
        "--batch-size",
        "2",
    )
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(pictures / f"{i}.png") for i in range(3)]
    assert all({*row} == {"image", "caption"} for row in rows)
    assert "3 captions" in capsys.readouterr().out and len(list((tmp_path / "new").iterdir())) == 1


def test_without_arguments_the_runs_own_pictures_are_captioned(captioner, tmp_path, capsys):
    draw(captioner, "--output", tmp_path / "sheet.png")
    assert "3 captions" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()


def test_an_unreadable_image_in_a_folder_is_left_out_named_and_counted(
    captioner, pictures, tmp_path, capsys
):
    (pictures / "1b\x1b[31m.png").write_bytes(b"no image")
    for output in ("x.png", "x.jsonl"):
        draw(captioner, "--caption", pictures, "--output", tmp_path / output)
        printed = capsys.readouterr()
        assert f"left out: {pictures}/1b\\x1b[31m.png: image: " in printed.err
        assert "3 captions" in printed.out and "; 1 unreadable images" in printed.out


@pytest.mark.parametrize("output", ["x.png", "x.jsonl"])
def test_what_can_not_be_captioned_is_an_error_that_leaves_nothing(
    captioner, pictures, tmp_path, output
):
    def caption(*names):
        draw(captioner, "--caption", *names, "--output", tmp_path / "out" / output)

    broken = pictures / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png cannot be captioned: image: "):
        caption(pictures / "0.png", broken)
    with pytest.raises(
        ValueError, match="nothing.png does not exist; expected an image, a folder or a tar shard"
    ):
        caption(tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        caption(tmp_path / "empty")
    for image in pictures.iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 4 images could be read|no image could be read"):
        caption(pictures)
    with pytest.raises(ValueError, match="are for prompts, not for --caption"):
        draw(captioner, "--caption", pictures, "--save-dir", tmp_path / "single")
    assert not [path for path in (tmp_path / "out").rglob("*")]


def test_images_of_shards_are_chosen_evenly(tiny_shards):
    entries = choose_images([f"{tiny_shards}/*.tar"], 3)
    assert [entry.key for entry in entries] == ["00000", "00024", "00047"]
    assert len(list_pictures([f"{tiny_shards}/train-00000.tar"])) == 24


# Metrics


def test_equal_captions_score_as_high_as_can_be_without_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)
    texts = [
        "a red circle on white paper",
        "a blue square above the table",
        "two green triangles in a row",
    ]
    scorer = CaptionScorer([[text, "something else entirely in here"] for text in texts])
    assert (scorer.tokenizer, scorer.tokenizer_reason) == (
        SIMPLE,
        "there is no Java on this machine",
    )
    same, other = scorer.score(texts), scorer.score(texts[1:] + texts[:1])
    assert same["bleu_4"] == pytest.approx(100, abs=1e-3) and same["rouge_l"] == pytest.approx(100)
    for name in ("bleu_4", "rouge_l", "cider"):
        assert other[name] < 0.5 * same[name]
    assert same["meteor"] is None and same["spice"] is None
    assert (
        same["reasons"]["meteor"] == "there is no Java on this machine"
        and "spice" in same["reasons"]
    )


def test_without_the_package_all_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(caption_metrics, "package_folder", lambda: None)
    scores = CaptionScorer([["a cat"]]).score(["a cat"])
    assert all(scores[name] is None for name in caption_metrics.NAMES)
    assert {*scores["reasons"].values()} == {
        "pycocoevalcap is not installed (requirements-eval.txt)"
    }


def test_the_simple_tokenizer_keeps_words_alone():
    assert simple_tokens([["A man's T-shirt, (red)!"]]) == {0: ["a man's t-shirt red"]}


@pytest.mark.skipif(not caption_metrics.shutil.which("java"), reason="no Java")
def test_the_ptb_tokenizer_is_the_packages_own():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = [["A man's T-shirt, (red)!", "two\nlines"], [""], ["Zoë & co. -- 3.5 m"]]
    scorer = CaptionScorer(texts)
    assert scorer.tokenizer == PTB
    theirs = tokenizer.PTBTokenizer().tokenize(
        {i: [{"caption": t} for t in group] for i, group in enumerate(texts)}
    )
    assert scorer.references == theirs


# eval/captions.py


def rouge(common, length, reference_length):
    """ROUGE-L of a caption, with the weight 1.2 of the package."""
    precision, recall = common / length, common / reference_length
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


@pytest.fixture
def no_java(monkeypatch):
    """The fast half of the metrics."""
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)


def evaluate(run, tmp_path, *arguments):
    output = tmp_path / "report.json"
    arguments = ["--output", output, "--device", "cpu", "--num-workers", "0", *arguments]
    captions.main(captions.parse_args([str(run), *map(str, arguments)]))
    return json.loads(output.read_text())


def test_shards_are_measured_at_each_steps_and_guidance(
    captioner, tiny_shards, tmp_path, no_java, capsys
):
    report = evaluate(
        captioner, tmp_path, f"{tiny_shards}/*.tar", "--steps", "1,2", "--guidance", "1,2"
    )
    assert [(r["steps"], r["guidance"]) for r in report["results"]] == [
        (1, 1.0),
        (1, 2.0),
        (2, 1.0),
        (2, 2.0),
    ]
    assert report["protocol"]["num_images"] == 48 and report["protocol"]["tokenizer"] == SIMPLE
    assert report["protocol"]["references_per_image"] == {"min": 1, "max": 1, "mean": 1.0}
    assert len(report["model"]["flow_fingerprint"]) == 16 and report["model"][
        "checkpoint"
    ].endswith("step_00000004")
    assert all(
        0 <= row["exact_match"] <= 100 for row in [*report["results"], report["without_flow"]]
    )
    assert {"image", "caption", "references"} == {*report["results"][0]["examples"][0]}
    printed = capsys.readouterr().out
    assert "no flow" in printed and "spice: null: " in printed


def test_several_references_of_a_jsonl_count_and_one_hit_is_an_exact_match(
    captioner, pictures, tmp_path, no_java, monkeypatch
):
    monkeypatch.setattr(
        Captioner, "read", lambda self, latents: ["a black cat, old"] * len(latents)
    )
    rows = [
        {"image": "pictures/0.png", "captions": ["another", "A black cat , old"]},
        {"image": "pictures/1.png", "caption": "a black cat"},
        {"image": "pictures/2.png", "captions": ["a  black cat, old"]},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    report = evaluate(captioner, tmp_path, file)
    assert report["protocol"]["references_per_image"]["max"] == 2
    assert report["results"][0]["exact_match"] == pytest.approx(100 * 2 / 3)
    assert report["results"][0]["rouge_l"] == pytest.approx(100 * (2 + rouge(3, 4, 3)) / 3)


def test_a_reference_with_a_line_separator_of_unicode_stays_one(
    captioner, pictures, tmp_path, no_java
):
    row = {"image": "pictures/0.png", "caption": "a cat\u2028on a mat"}
    (tmp_path / "data.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    report = evaluate(captioner, tmp_path, tmp_path / "data.jsonl", "--steps", "1")
    assert report["without_flow"]["examples"][0]["references"] == ["a cat on a mat"]


def test_the_json_names_the_weights_that_were_measured_while_training_goes_on(
    chain, captioner, tiny_shards, tmp_path, no_java, monkeypatch
):
    run = tmp_path / "flowtok_caption"
    shutil.copytree(captioner, run)
    encode = captions.encode
    monkeypatch.setattr(captions, "encode", lambda *arguments: train_on(run) or encode(*arguments))
    report = evaluate(run, tmp_path, f"{tiny_shards}/train-00000.tar", "--steps", "1")
    assert report["model"]["checkpoint"] == "flowtok_caption/step_00000004"


@pytest.mark.parametrize("output", ["pictures", "pictures/0.png/a.json"])
def test_a_json_that_cannot_be_written_is_refused_before_any_work(
    captioner, pictures, tmp_path, monkeypatch, output
):
    monkeypatch.setattr(captions, "load_captioner", None)
    words = [
        captioner,
        pictures.parent / "data.jsonl",
        "--output",
        tmp_path / output,
        "--device",
        "cpu",
    ]
    (tmp_path / "data.jsonl").write_text('{"image": "pictures/0.png", "caption": "a"}')
    with pytest.raises(
        ValueError, match="is a folder, expected a file|cannot be written: .*0.png: Not a directory"
    ):
        captions.main(captions.parse_args([*map(str, words)]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"image": "pictures/0.png", "captions": [" "]}',
            "data.jsonl line 1: no reference under captions or caption",
        ),
        ('{"image": "pictures/0.png"}', "line 1: no reference"),
        ('\n{"captions": ["a"]}', 'line 2: expected {"image": FILE'),
        ('{"image": "absent.png", "caption": "a"}', "line 1: .*absent.png does not exist"),
        ("[1", 'line 1: expected {"image": FILE'),
        ("", "has no line with an image"),
        (
            '{"image": "pictures/broken.png", "caption": "a"}',
            "broken.png cannot be measured: image: ",
        ),
    ],
)
def test_a_file_without_references_or_images_is_refused(
    captioner, pictures, tmp_path, text, message
):
    (pictures / "broken.png").write_bytes(b"no image")
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluate(captioner, tmp_path, tmp_path / "data.jsonl")
    assert not (tmp_path / "report.json").exists()


def test_samples_without_references_are_refused(captioner, tmp_path, pictures):
    sample = shape_sample(0)
    sample.pop("txt")
    write_shard(tmp_path / "bare.tar", [sample])
    with pytest.raises(
        ValueError, match=r"bare.tar: 00000 has no reference under json:captions, txt, json:caption"
    ):
        evaluate(captioner, tmp_path, tmp_path / "bare.tar")
    with pytest.raises(ValueError, match="DATA is one .jsonl or several folders and shards"):
        evaluate(captioner, tmp_path, tmp_path / "x.jsonl", pictures)
    with pytest.raises(ValueError, match="--batch-size 0 must be at least 1"):
        evaluate(captioner, tmp_path, pictures, "--batch-size", "0")


# Stage 3 in both directions


def test_a_joint_run_makes_images_and_captions(chain, tiny_shards, tmp_path, pictures, capsys):
    options = [*to_text(chain.folder, tiny_shards), "flow.direction=joint", "flowtok.two_way=true"]
    run = chain.run_in(tmp_path, "flowtok", *options)
    draw(run, "--prompts", "a cat", "--output", tmp_path / "image.png")
    draw(run, "--caption", pictures, "--output", tmp_path / "captions.png")
    printed = capsys.readouterr().out
    assert "1 images" in printed and "3 captions" in printed
    start, (forth, sampling), (back, _) = (
        torch.randn(2, 16, 4),
        load_pipeline(run, CPU),
        load_captioner(run, CPU),
    )
    assert not torch.allclose(
        forth.transport(start, sampling) * forth.flow.latent_scale, back.transport(start, sampling)
    )
    assert {path.name for path in (run / "samples").iterdir()} == {
        f"step_{step:08d}{kind}.png" for step in (2, 4) for kind in ("", "_captions")
    }
