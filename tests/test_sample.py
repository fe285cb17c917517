"""sample.py on a tiny experiment: prompts in, pictures out, the same for the same seed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import refusal
from evaluations import run_program
from PIL import Image
from tiny_experiment import draw

import sample
from eval import generation
from modeling.pipeline import ImageGenerator
from training.vocabulary import (
    MAX_WORDS,
    VOCABULARY_FILE,
    find_vocabulary,
    join_vocabularies,
    measure_vocabulary,
    save_vocabulary,
)


def images(folder):
    """Pixels of the images of --save-dir, in order."""
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())]


def drawn(run, folder, *arguments):
    """Pixels of what sample.py draws into a folder."""
    draw(run, *arguments, "--output", folder.with_suffix(".png"), "--save-dir", folder)
    return images(folder)


def close(left, right):
    """Equal but for rounding to 8 bits of sums in another order."""
    return len(left) == len(right) and all(
        np.abs(a - b).max() <= 1 for a, b in zip(left, right, strict=True)
    )


def test_prompts_become_a_grid_and_single_images(chain, tmp_path, capsys):
    grid = tmp_path / "a" / "grid.png"
    prompts = ["--prompts", "a red circle", "a cat", "--images-per-prompt", "3"]
    draw(chain.folder, *prompts, "--output", grid, "--save-dir", tmp_path / "b")
    with Image.open(grid) as picture:
        assert picture.format == "PNG" and picture.width > picture.height  # a row for each prompt
    singles = images(tmp_path / "b")
    assert [single.shape for single in singles] == [(32, 32, 3)] * 6
    assert not close(singles[:1], singles[1:2])
    assert f"{grid}: 6 images, 3 steps, guidance 2, seed 0" in capsys.readouterr().out


def test_a_file_of_prompts_has_one_a_line(tmp_path):
    text = "\ufeffa red circle\n\n  a blüe\u2028square  \n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    args = sample.parse_args(["--run", "x", "--prompts-file", str(tmp_path / "prompts.txt")])
    assert sample.read_prompts(args) == ["a red circle", "a blüe\u2028square"]


def test_the_same_seed_gives_the_same_image_in_any_batch_and_another_seed_another(chain, tmp_path):
    def run(name, *arguments):
        prompts = ["--prompts", "a red circle", "a cat", "a dog"]
        return drawn(chain.folder, tmp_path / name, *prompts, *arguments)

    together = run("together", "--seed", "3")
    assert close(run("pairs", "--seed", "3", "--batch-size", "2"), together)
    assert not close(run("other", "--seed", "4"), together)


def test_a_run_without_an_unconditional_flow_is_not_guided(chain, tmp_path):
    run = chain.run_in(tmp_path, "flowtok", "flow.null_probability=0", "sampling.guidance=1")
    draw(run, "--prompts", "a cat", "--output", tmp_path / "x.png")
    with pytest.raises(ValueError, match="guidance 2 needs an unconditional flow"):
        draw(run, "--prompts", "a cat", "--guidance", "2", "--output", tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_more_images_than_a_page_holds_are_written_as_they_are_made(
    chain, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sample, "PAGE_IMAGES", 4)
    monkeypatch.setattr(sample, "COLUMNS", 2)
    prompts = ["a red circle", "a blue square", "a green triangle"] * 3
    arguments = ["--prompts", *prompts, "--batch-size", "3", "--output"]
    pages = tmp_path / "pages" / "x.png"
    draw(chain.folder, *arguments, pages, "--gallery", pages.with_suffix(".html"))
    names = sorted(path.name for path in pages.parent.iterdir())
    assert names == [f"x{n}.{kind}" for n in ("", "_002", "_003") for kind in ("html", "png")]
    sizes = [Image.open(pages.with_stem(f"x{n}")).height for n in ("", "_002", "_003")]
    assert sizes[0] == sizes[1] > sizes[2]
    assert f"{pages} ... {pages.with_stem('x_003')}: 9 images" in capsys.readouterr().out

    # what is made before a failure stays
    made = []
    generate = ImageGenerator.generate

    def generate_twice(self, *rest):
        made.append(1)
        if len(made) == 3:
            raise OSError("no memory")
        return generate(self, *rest)

    monkeypatch.setattr(ImageGenerator, "generate", generate_twice)
    with pytest.raises(OSError, match="no memory"):
        draw(chain.folder, *arguments, tmp_path / "y.png", "--save-dir", tmp_path / "single")
    assert [path.name for path in tmp_path.glob("*.png")] == ["y.png"]
    assert len(images(tmp_path / "single")) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "a", "--frames", "3"], ["--frames", "--interpolate"]),
        (["--interpolate", "a", "b", "--images-per-prompt", "2"], ["--images-per-prompt"]),
        (["--caption", "x", "--save-dir", "y"], ["--save-dir", "--caption"]),
        (["--prompts", "a", "--output", "x.jpg"], ["x.jpg", ".png"]),
        (["--prompts", "a", "--save-dir", "/dev/null/x"], ["/dev/null/x"]),
        (["--prompts", "a", " ", "b"], ["prompt 2 of 3", "empty"]),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(arguments, said):
    with refusal(*said):
        draw("nowhere", *arguments)


def test_a_run_that_draws_nothing_makes_one_image_of_a_prompt(chain, tmp_path, capsys):
    run = chain.run_in(tmp_path, "flowtok", "sampling.sample_text_latent=false")
    arguments = ["--prompts", "a red circle", "--output", tmp_path / "x.png"]
    with pytest.raises(ValueError, match="--images-per-prompt 2: .*sample_text_latent=false"):
        draw(run, *arguments, "--images-per-prompt", "2")
    assert not (tmp_path / "x.png").exists()
    row = {"tag": "object", "include": [{"class": "x"}], "prompt": "a red circle"}
    (tmp_path / "geneval.jsonl").write_text(json.dumps(row))
    words = ["--protocol", "geneval", f"captions=[{tmp_path}/geneval.jsonl]", "--device", "cpu"]
    with pytest.raises(ValueError, match="images_per_caption 4: .*sample_text_latent=false"):
        run_program(generation, run, *words)
    draw(run, *arguments)
    assert "warning" not in capsys.readouterr().err
    draw(run, *arguments, "--seed", "3")
    assert "--seed 3 changes nothing" in capsys.readouterr().err


def test_prompts_unlike_the_captions_of_the_training_are_named(chain, tmp_path, capsys):
    prompts = ["a red circle", "A  Green Square", "red circle", "a purple cat"]
    draw(chain.folder, "--prompts", *prompts, "--output", tmp_path / "x.png")
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert "2 of 4 prompts are captions" in said.out
    assert "'red circle'" in first and "every caption" in first and " 'a'" in first
    assert "'a purple cat'" in second and "'cat', 'purple'" in second
    draw(chain.folder, "--prompts", *["a cat"] * 12, "--output", tmp_path / "x.png")
    assert capsys.readouterr().err.splitlines()[-1] == "warning: 2 more about prompts"


def test_where_the_words_of_captions_are_not_known_that_is_said_once(chain, tmp_path, capsys):
    for name in ("flowtok", "tokenizer", "text_encoder"):
        shutil.copytree(chain.folder / name, tmp_path / name)
    tokens = shutil.copytree(chain.folder / "tokens", tmp_path / "tokens")
    config = tmp_path / "flowtok" / "config.yaml"
    config.write_text(config.read_text().replace(str(chain.folder), "/gone"))
    draw(tmp_path, "--prompts", "a cat", "--output", tmp_path / "x.png")
    assert "'cat'" in capsys.readouterr().err  # the tokens beside a moved run are its own
    (tokens / VOCABULARY_FILE).unlink()
    draw(tmp_path, "--prompts", "a cat", "a dog", "--output", tmp_path / "x.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert VOCABULARY_FILE in line
    config.write_text(config.read_text().replace("recaption_keys: []", "recaption_keys: [txt]"))
    draw(tmp_path, "--prompts", "a cat", "--output", tmp_path / "x.png")
    assert capsys.readouterr().err == ""


def test_a_vocabulary_is_that_of_all_captions_together():
    parts = [["a cat, animal", "A dog, animal"], [], ["a car"]]
    found = join_vocabularies([measure_vocabulary(part) for part in parts])
    assert found == measure_vocabulary(caption for part in parts for caption in part)
    assert (found.example, found.common) == ("a cat, animal", ["a"])
    assert found.words == [",", "a", "animal", "car", "cat", "dog"]
    assert found.captions == ["a car", "a cat, animal", "a dog, animal"]
    assert found.difference("a Dog, cat") == ""
    assert join_vocabularies([found, replace(found, captions=None)]).captions is None
    many = measure_vocabulary(f"the {number}" for number in range(MAX_WORDS + 1))
    assert many.words is None and many.difference("the cat") == ""
    assert "'the'" in join_vocabularies([found, many, many][1:]).difference("cat")
    assert join_vocabularies([found, many]).difference("anything") == ""


def test_captions_are_known_of_what_is_read_unless_they_are_others_in_each_epoch(tmp_path):
    known = measure_vocabulary(["a cat. it is black"])
    save_vocabulary(known, tmp_path / "a")

    def found(weight_of_other, **captions):
        a = {"shards": [f"{tmp_path}/a/*.tar"], "captions": captions}
        other = {"shards": [f"{tmp_path}/b/*.tar"], "weight": weight_of_other}
        text = yaml.safe_dump({"data": {"sources": {"a": a, "b": other}}})
        (tmp_path / "config.yaml").write_text(text)
        return find_vocabulary(tmp_path)

    assert found(0) == found(0, window="start") == known
    assert found(1) is None
    for drawn_ones in ({"window": "sentences"}, {"recaption_keys": ["x"]}):
        assert found(0, **drawn_ones).difference("anything") == ""


@pytest.mark.parametrize("walk", ["--interpolate", "--trajectory"])
def test_a_walk_ends_at_the_images_of_its_prompts(chain, tmp_path, walk):
    prompts, steps = ("a red circle", "a blue square"), ("--steps", "6")
    frames = drawn(chain.folder, tmp_path / "walk", walk, *prompts, "--frames", "4", *steps)
    ends = frames[::3] if walk == "--interpolate" else frames[3::4]
    assert len(frames) == (4 if walk == "--interpolate" else 8)
    for prompt, end in zip(prompts, ends, strict=True):
        assert close(drawn(chain.folder, tmp_path / prompt, "--prompts", prompt, *steps), [end])


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(chain, tmp_path, capsys):
    long = "a red circle " * 10
    draw(chain.folder, "--prompts", long, "a red circle", "--output", tmp_path / "x.png")
    assert capsys.readouterr().err.splitlines() == [
        f"warning: prompt cut from 32 to 16 tokens: {long!r}"
    ]


def test_the_stage_folder_serves_as_well(chain, tmp_path, capsys):
    draw(chain.folder / "flowtok", "--output", tmp_path / "x.png")
    assert "2 images" in capsys.readouterr().out  # the captions of the run's own pictures


def test_a_missing_or_other_run_is_named(chain, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing is no run folder .* holds:"):
        draw(tmp_path / "nothing", "--prompts", "a cat")
    monkeypatch.chdir(tmp_path)  # a path that was meant from another working directory
    with pytest.raises(ValueError, match=f"runs/mine/flowtok is no run .* {tmp_path} holds: noth"):
        draw("runs/mine/flowtok", "--prompts", "a cat")
    with pytest.raises(ValueError, match=f"{chain.folder}/tokenizer .*no 'flow'"):
        draw(chain.folder / "tokenizer", "--prompts", "a cat")
    weights = next(chain.folder.glob("flowtok/checkpoints/*/ema.safetensors"))
    for inside in (weights, weights.parent):
        with pytest.raises(ValueError, match=f"{inside} is no .* name {chain.folder}/flowtok$"):
            draw(inside, "--prompts", "a cat")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--interpolate", "a", "b", "--frames", "1"], "--frames: must be at least 2, got 1"),
        (["--device", "cuda:99"], "--device: torch cannot use 'cuda:99' here"),
        (["--sampler", "rk4"], "--sampler: invalid choice: 'rk4' (choose from"),
    ],
)
def test_wrong_options_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit):
        sample.parse_args(["--run", "x", *arguments])
    assert said in capsys.readouterr().err
