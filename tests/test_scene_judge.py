"""The judge of scenes, what it calls right, and the program that judges a run."""

import json

import numpy as np
import pytest
import torch
from evaluations import run_program
from PIL import Image

from data.scenes import (
    SPLITS,
    Kind,
    Object,
    Scene,
    Statement,
    draw_image,
    draw_scene,
    draw_statement_of,
)
from eval import scenes
from eval.judge import FACTS, NO_SHAPE, Facts, load_judge, right, spread, wanted_by
from research import train_judge
from research.train_judge import compare, draw_images
from scripts import make_scenes


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def read(judge, drawn):
    """Facts of scenes' images."""
    return judge(torch.from_numpy(draw_images(drawn)).float() / 255)


def scene(*objects, background="white"):
    """Of (shape, colour, size, x, y)."""
    diameters = {"small": 0.21, "large": 0.3}
    return Scene(background, tuple(Object(*item, diameters[item[2]]) for item in objects))


# Reading


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_judge_reads_fresh_scenes_of_each_split(judge, split):
    rng = np.random.default_rng([2, SPLITS.index(split)])
    drawn = [draw_scene(draw_statement_of(split, rng), rng) for _ in range(200)]
    for name, is_right in compare(read(judge, drawn), drawn).items():
        assert is_right.float().mean() >= 0.99, name


def test_it_knows_no_rule_of_what_goes_together(judge):
    drawn = scene(
        ("cross", "pink", "large", 0.25, 0.25),
        ("cross", "cyan", "small", 0.8, 0.2),
        ("star", "pink", "small", 0.2, 0.8),
        ("bar", "blue", "large", 0.75, 0.75),
    )
    facts = read(judge, [drawn, Scene("grey", ())])
    assert facts.count.tolist() == [4, 0]
    assert all(verdict.all() for verdict in compare(read(judge, [drawn]), [drawn]).values())


def test_other_outlines_are_no_shape(judge):
    outlines = [*train_judge.wrong_outlines()][:100]
    facts = read(judge, [scene((name, "red", "large", 0.5, 0.4)) for name in outlines])
    assert (facts.count == 1).float().mean() > 0.9
    assert (facts.shape[:, 0] == NO_SHAPE).float().mean() > 0.6


def test_images_of_other_sizes_are_resized(judge):
    rng = np.random.default_rng(0)
    drawn = [draw_scene(draw_statement_of("new", rng), rng) for _ in range(20)]
    images = np.stack([np.asarray(draw_image(one, 128)) for one in drawn])
    facts = judge(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert compare(facts, drawn)["all"].float().mean() >= 0.95


def test_weights_for_other_scenes_are_refused(monkeypatch):
    monkeypatch.setattr("eval.judge.SHAPES", ("circle", "hexagon"))
    with pytest.raises(ValueError, match="hexagon"):
        load_judge()


# What is right

LEFT = scene(("circle", "red", "small", 0.25, 0.5), ("star", "blue", "large", 0.7, 0.55))
RED, BLUE = Kind("circle", "red"), Kind("star", "blue")
TWO = scene(("ring", "green", "small", 0.25, 0.3), ("ring", "green", "small", 0.7, 0.6))
RING = Kind("ring", "green")
SAME_AROUND = scene(
    ("circle", "red", "small", 0.2, 0.5),
    ("star", "blue", "small", 0.5, 0.5),
    ("circle", "red", "small", 0.8, 0.5),
)


@pytest.mark.parametrize(
    ("drawn", "said", "wrong"),
    [
        (LEFT, Statement((RED, BLUE), "left of"), set()),
        (LEFT, Statement((Kind("circle", "red", "small"), BLUE), "left of", "white"), set()),
        (LEFT, Statement((RED, BLUE), "above"), {"relation"}),
        (LEFT, Statement((Kind("cross", "red"), BLUE), "left of"), {"shape", "object"}),
        # Shape and colour are there, but not together; a size, but of the other object
        (
            LEFT,
            Statement((Kind("star", "red"), Kind("circle", "blue")), "above"),
            {"object", "relation"},
        ),
        (LEFT, Statement((Kind("circle", "red", "large"), BLUE), "left of"), {"all"}),
        (LEFT, Statement((RED, BLUE), "left of", "grey"), {"background"}),
        # Whichever of two equal objects is meant
        (SAME_AROUND, Statement((RED, BLUE), "left of"), {"relation", "count"}),
        (LEFT, Statement((RED,)), {"count"}),
        (LEFT, Statement((RED, RED)), {"shape", "colour", "object"}),
        (TWO, Statement((RING, RING)), set()),
        (TWO, Statement((RING,) * 3), {"shape", "colour", "object", "count"}),
        (TWO, Statement((RING,)), {"count"}),
        (TWO, Statement((Kind("ring", "green", "large"),) * 2), {"size"}),
        (Scene("white", ()), Statement((RING,)), {"shape", "colour", "object", "count"}),
    ],
)
def test_what_differs_from_the_caption_is_wrong(judge, drawn, said, wrong):
    verdicts = right(read(judge, [drawn]), wanted_by([said]))
    found = {name for name in FACTS if not verdicts[name]}
    assert found == (wrong and wrong | {"all"})


@torch.no_grad()
def test_the_diversity_of_equal_images_is_0_and_that_of_real_ones_1(judge):
    rng = np.random.default_rng(7)
    said = [draw_statement_of("new", rng) for _ in range(60)]
    wanted = wanted_by(said)
    first, second = (
        read(judge, [draw_scene(one, rng) for one in said for _ in range(4)]) for _ in range(2)
    )
    assert spread(first, wanted) / spread(second, wanted) == pytest.approx(1, abs=0.08)
    equal = Facts(*(x[::4].repeat_interleave(4, dim=0) for x in first))
    assert spread(equal, wanted) == 0
    none = first._replace(present=torch.zeros_like(first.present))
    assert spread(none, wanted) is None


@torch.no_grad()
def test_the_average_of_several_images_is_not_one_of_them(judge):
    rng = np.random.default_rng(8)
    said = [draw_statement_of("seen", rng) for _ in range(50)]
    images = torch.from_numpy(draw_images([draw_scene(s, rng) for s in said for _ in range(4)]))
    facts = judge((images / 255).unflatten(0, (50, 4)).mean(dim=1))
    assert right(facts, wanted_by(said))["all"].float().mean() < 0.1


# The program


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("scenes"), captions=6, image_size=32)


def make(folder, captions, image_size):
    config = make_scenes.ScenesStage(
        run_dir=str(folder), captions=captions, heldout_captions=captions, image_size=image_size
    )
    make_scenes.main(config)
    return folder


def judge_run(chain, data, output, *options):
    words = ("--run", chain.folder, "--data", data, "--output", output, "--device", "cpu")
    run_program(scenes, *words, *options)
    return json.loads((output / "report.json").read_text())


def test_a_run_is_judged_beside_its_ceilings(chain, data, tmp_path):
    options = ("--steps", "1,2", "--guidance", "1", "--captions", 5, "--images-per-caption", 3)
    rows = judge_run(chain, data, tmp_path, *options)["rows"]
    kinds = [(row["split"], row["images"], row.get("steps")) for row in rows]
    ceilings = (("real", None), ("reconstructed", None), ("start", None))
    sets = (*ceilings, ("generated", 1), ("generated", 2))
    assert kinds == [(split, *one) for split in SPLITS[1:] for one in sets]
    for row in rows:
        if row["images"] == "real":
            assert min(row[name] for name in FACTS if row[name] is not None) > 0.9
            assert row["diversity"] == 1
        if row["images"] == "generated":
            assert row["all"] < 0.5 and row["kid"] > 0  # networks that have learned nothing
    # 16 captions, 8 rows of 2; three images and gaps each
    assert Image.open(tmp_path / "captions.png").width > 2 * 3 * 32
    # The table of other scenes would replace this one
    with pytest.raises(ValueError, match="report.json"):
        judge_run(chain, tmp_path / "other", tmp_path)


def test_a_run_without_a_flow_is_judged_by_its_own_options(dual_chain, data, tmp_path):
    options = ("--guidance", "0,2", "--captions", 2, "--images-per-caption", 2)
    rows = judge_run(dual_chain, data, tmp_path, *options)["rows"]
    kinds = [(row["images"], row.get("guidance")) for row in rows[:4]]
    assert kinds == [("real", None), ("reconstructed", None), ("generated", 0), ("generated", 2)]
    with pytest.raises(ValueError, match="steps"):
        judge_run(dual_chain, data, tmp_path, "--steps", "2")


def test_scenes_of_another_size_or_without_a_shard_are_refused(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(make_scenes, "SAMPLES_PER_SHARD", 6)
    folder = make(tmp_path / "scenes", captions=4, image_size=64)  # 16 images of each split
    with pytest.raises(ValueError, match="image_size=32"):
        judge_run(chain, folder, tmp_path)
    (folder / "new-000001.tar").unlink()
    with pytest.raises(ValueError, match="split new have 2 to 3 images"):
        scenes.read_split(folder, "new", None)


# Training


def test_images_are_drawn_once_and_training_depends_on_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "BATCH_SIZE", 4)
    monkeypatch.setattr(train_judge, "PART", 20)
    images, truth = train_judge.load_images(tmp_path / "new" / "x.npz", 40)
    assert images.shape == (40, 3, 64, 64) and truth["objects"].shape == (40, 4, 5)
    monkeypatch.setattr(train_judge, "draw_images", None)
    again, _ = train_judge.load_images(tmp_path / "new" / "x.npz", 40)
    weights = []
    for shown in (images, again):
        torch.manual_seed(0)
        weights.append(train_judge.train(shown, truth, steps=2).state_dict())
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
