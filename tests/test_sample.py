"""sample.py on a tiny experiment: prompts in, pictures out, the same for the same seed."""

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_experiment import Experiment, draw

import sample
from modeling.flowtok import TimeTable


def images(folder):
    """Pixels of the images of --save-dir, in order."""
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())]


def close(left, right):
    """Equal but for rounding to 8 bits of sums in another order."""
    return len(left) == len(right) and all(
        np.abs(a - b).max() <= 1 for a, b in zip(left, right, strict=True)
    )


def test_prompts_become_a_grid_and_single_images(chain, tmp_path, capsys):
    where = ["--output", tmp_path / "a" / "grid.png", "--save-dir", tmp_path / "b"]
    draw(chain.folder, "--prompts", "a red circle", "a cat", *where)
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.format == "PNG" and grid.width > 2 * 128
    singles = images(tmp_path / "b")
    assert [single.shape for single in singles] == [(32, 32, 3)] * 2
    assert (
        f"{tmp_path / 'a' / 'grid.png'}: 2 images, 3 steps, guidance 2, seed 0"
        in capsys.readouterr().out
    )


def test_a_file_of_prompts_has_one_a_line(chain, tmp_path, capsys):
    text = "\ufeffa red circle\n\n  a blüe\u2028square  \n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    draw(chain.folder, "--prompts-file", tmp_path / "prompts.txt", "--output", tmp_path / "x.png")
    assert "2 images" in capsys.readouterr().out
    args = sample.parse_args(["--run", "x", "--prompts-file", str(tmp_path / "prompts.txt")])
    assert sample.read_prompts(args) == ["a red circle", "a blüe\u2028square"]


def test_the_same_seed_gives_the_same_image_in_any_batch_and_another_seed_another(chain, tmp_path):
    def run(name, *arguments):
        prompts = ["--prompts", "a red circle", "a cat", "a dog"]
        draw(
            chain.folder,
            *prompts,
            "--output",
            tmp_path / "x.png",
            "--save-dir",
            tmp_path / name,
            *arguments,
        )
        return images(tmp_path / name)

    together = run("together", "--seed", "3")
    assert close(run("again", "--seed", "3"), together)
    assert close(run("alone", "--seed", "3", "--batch-size", "1"), together)
    assert close(run("pairs", "--seed", "3", "--batch-size", "2"), together)
    assert not close(run("other", "--seed", "4"), together)


def test_images_per_prompt_differ_and_stand_in_one_row(chain, tmp_path):
    arguments = ["--prompts", "a red circle", "a cat", "--images-per-prompt", "3"]
    draw(
        chain.folder,
        *arguments,
        "--output",
        tmp_path / "grid.png",
        "--save-dir",
        tmp_path / "single",
    )
    singles = images(tmp_path / "single")
    assert len(singles) == 6 and not close(singles[:1], singles[1:2])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > grid.height


@pytest.mark.parametrize(("guidance", "rows"), [("1", 1), ("0", 1), ("1.5", 2)])
def test_guidance_1_costs_one_pass_a_step(chain, tmp_path, monkeypatch, guidance, rows):
    batches, call = [], TimeTable.__call__

    def counted(self, x, time, null):
        batches.append(len(null) * len(x))
        return call(self, x, time, null)

    monkeypatch.setattr(TimeTable, "__call__", counted)
    arguments = [
        "--prompts",
        "a cat",
        "--guidance",
        guidance,
        "--steps",
        "5",
        "--output",
        tmp_path / "x.png",
    ]
    draw(chain.folder, *arguments)
    assert batches == [rows] * 5


def test_a_run_without_an_unconditional_flow_is_not_guided(chain, tmp_path):
    run = chain.run_in(tmp_path, "flowtok", "flow.null_probability=0", "sampling.guidance=1")
    draw(run, "--prompts", "a cat", "--output", tmp_path / "x.png")
    with pytest.raises(ValueError, match="guidance 2 needs an unconditional flow"):
        draw(run, "--prompts", "a cat", "--guidance", "2", "--output", tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_interpolation_walks_from_one_image_to_the_other(chain, tmp_path, capsys):
    draw(
        chain.folder,
        *("--interpolate", "a red circle", "a blue square", "--frames", "5"),
        *("--output", tmp_path / "walk.png", "--save-dir", tmp_path / "frames"),
    )
    frames = images(tmp_path / "frames")
    assert len(frames) == 5
    assert "5 images" in capsys.readouterr().out
    for prompt, frame in (("a red circle", frames[0]), ("a blue square", frames[-1])):
        draw(
            chain.folder,
            "--prompts",
            prompt,
            "--output",
            tmp_path / "x.png",
            "--save-dir",
            tmp_path / prompt,
        )
        assert close(images(tmp_path / prompt), [frame])


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(chain, tmp_path, capsys):
    long = "cat " * 30
    draw(chain.folder, "--prompts", long, "a cat", "--output", tmp_path / "x.png")
    assert capsys.readouterr().err.splitlines() == [
        f"warning: prompt cut from 32 to 16 tokens: {long!r}"
    ]


def test_the_stage_folder_serves_as_well_as_the_experiment(chain, tmp_path, capsys):
    draw(chain.folder / "flowtok", "--output", tmp_path / "x.png")
    assert "2 images" in capsys.readouterr().out  # the captions of the run's own pictures


def test_the_release_sampler_can_be_chosen(chain, tmp_path):
    draw(chain.folder, "--sampler", "euler_release", "--output", tmp_path / "x.png")
    with pytest.raises(ValueError, match="unknown sampler 'rk4'; valid: euler, euler_release"):
        draw(chain.folder, "--sampler", "rk4", "--output", tmp_path / "x.png")


def test_a_moved_experiment_still_samples_with_its_own_parts(tmp_path, tiny_shards, capsys):
    (tmp_path / "old").mkdir()
    experiment = Experiment(tmp_path / "old", tiny_shards)
    for stage in ("text_encoder", "tokenizer", "tokens", "text_projector", "flowtok"):
        experiment.run(stage, *([] if stage == "tokens" else ["training.max_steps=1"]))
    arguments = ["--prompts", "a red circle", "--output", tmp_path / "x.png", "--save-dir"]
    draw(tmp_path / "old", *arguments, tmp_path / "before")
    (tmp_path / "old").rename(tmp_path / "new")
    draw(tmp_path / "new", *arguments, tmp_path / "after")
    assert close(images(tmp_path / "after"), images(tmp_path / "before"))
    shutil.rmtree(tmp_path / "new" / "tokenizer")
    with pytest.raises(ValueError, match=f"the tokenizer [0-9a-f]{{16}}.*{tmp_path}/new/tokenizer"):
        draw(tmp_path / "new", *arguments, tmp_path / "none")


def test_other_weights_where_the_config_points_are_not_used(chain, tmp_path, tiny_clip_dir):
    for stage in ("flowtok", "tokenizer"):
        shutil.copytree(chain.folder / stage, tmp_path / stage)
    other = chain.run_in(tmp_path / "other", "tokenizer", "training.seed=1", "training.max_steps=1")
    arguments = ["--prompts", "a cat", "--output", tmp_path / "x.png", "--save-dir"]

    def point(stage, old, new):
        config = tmp_path / stage / "config.yaml"
        config.write_text(config.read_text().replace(str(old), str(new)))

    point("flowtok", chain.folder / "tokenizer", other)
    draw(tmp_path, *arguments, tmp_path / "a")  # the right tokenizer is beside the flow
    shutil.move(tmp_path / "tokenizer", tmp_path / "away")
    with pytest.raises(ValueError, match=f"the tokenizer [0-9a-f]{{16}}.*{other}"):
        draw(tmp_path, *arguments, tmp_path / "none")

    shutil.move(tmp_path / "away", tmp_path / "tokenizer")
    point("tokenizer", chain.folder / "text_encoder" / "clip", tiny_clip_dir)
    with pytest.raises(ValueError, match=f"text encoder [0-9a-f]{{16}}.*{tiny_clip_dir}"):
        draw(tmp_path, *arguments, tmp_path / "none")
    shutil.copytree(chain.folder / "text_encoder", tmp_path / "text_encoder")  # beside: found
    draw(tmp_path, *arguments, tmp_path / "b")
    draw(chain.folder, *arguments, tmp_path / "c")
    assert close(images(tmp_path / "a"), images(tmp_path / "c"))
    assert close(images(tmp_path / "b"), images(tmp_path / "c"))


def test_a_missing_or_other_run_is_named(chain, tmp_path):
    with pytest.raises(ValueError, match="nothing is no run folder .* holds:"):
        draw(tmp_path / "nothing", "--prompts", "a cat")
    with pytest.raises(ValueError, match=f"{chain.folder}/tokenizer .*no 'flow'"):
        draw(chain.folder / "tokenizer", "--prompts", "a cat")


def test_the_program_ends_a_users_error_with_one_line(capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--run", "x", "--prompts", "a", "--interpolate", "a", "b"])
    assert "not allowed with" in capsys.readouterr().err
