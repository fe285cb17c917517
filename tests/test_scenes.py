"""Scenes: what is held out, what is drawn, what captions say, and the program that writes them."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    MAX_SLANT,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN_COUNTS,
    UNSEEN_PAIRS,
    UNSEEN_RELATIONS,
    Kind,
    Object,
    Scene,
    Statement,
    draw_caption,
    draw_image,
    draw_scene,
    draw_statement,
    split_of,
)
from data.tar import read_shard
from scripts import make_scenes

SMALL = {"captions": 400, "images_per_caption": 2, "heldout_captions": 40}
FEW = {"captions": 40, "heldout_captions": 8}  # where it does not matter what is drawn


def make(folder, **options):
    config = make_scenes.ScenesStage(run_dir=str(folder), **SMALL | options)
    config.check()
    make_scenes.main(config)
    return folder


def read(folder, split):
    """Facts of all samples of a split."""
    samples = [s for path in sorted(folder.glob(f"{split}-*.tar")) for s in read_shard(path)]
    return [json.loads(sample["json"]) for sample in samples]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make(tmp_path_factory.mktemp("few"), **FEW)


def pairs_of(scene):
    return {(item["shape"], item["colour"]) for item in scene["objects"]}


def relation_of(scene):
    """What the positions of two different shapes say, or None."""
    if len({item["shape"] for item in scene["objects"]}) == 1:
        return None
    first, second = scene["objects"]
    x, y = second["x"] - first["x"], second["y"] - first["y"]
    if max(x, y, key=abs) < 0:
        first, second = second, first
    return first["shape"], "left of" if abs(x) > abs(y) else "above", second["shape"]


def counts_of(scene):
    return {(n, shape) for shape, n in Counter(i["shape"] for i in scene["objects"]).items()}


def core(about):
    kinds = [(kind["shape"], kind["colour"]) for kind in about["statement"]["objects"]]
    return about["statement"]["relation"], tuple(kinds)


# What is held out


def test_each_split_shows_what_it_is_for_and_what_is_held_out_is_never_trained_on(scenes):
    splits = {name: [about["scene"] for about in read(scenes, name)] for name in SPLITS}
    assert len(splits["train"]) == 800
    for scene in splits["train"] + splits["seen"] + splits["new"]:
        assert not pairs_of(scene) & UNSEEN_PAIRS
        assert relation_of(scene) not in UNSEEN_RELATIONS
        assert not counts_of(scene) & UNSEEN_COUNTS
    assert all(pairs_of(scene) <= UNSEEN_PAIRS for scene in splits["pairs"])
    assert all(relation_of(scene) in UNSEEN_RELATIONS for scene in splits["relations"])
    assert all(counts_of(scene) <= UNSEEN_COUNTS for scene in splits["counts"])
    assert not any(pairs_of(s) & UNSEEN_PAIRS for s in splits["relations"] + splits["counts"])
    assert {len(scene["objects"]) for scene in splits["pairs"]} == {1, 2}


def test_split_new_says_what_is_never_said_in_training_and_seen_says_it_of_new_images(scenes):
    said = {core(about) for about in read(scenes, "train")}
    new = {core(about) for about in read(scenes, "new")}
    assert len(new) > 30 and not said & new
    train, seen = (
        [sample for path in scenes.glob(f"{name}-*.tar") for sample in read_shard(path)]
        for name in ("train", "seen")
    )
    assert {sample["txt"] for sample in seen} <= {sample["txt"] for sample in train}
    assert not {sample["png"] for sample in seen} & {sample["png"] for sample in train}


def test_what_is_held_out_spares_no_shape_and_no_colour_and_what_mixes_it_is_in_no_split():
    for names in (SHAPES, COLOURS):
        assert all(sum(name in pair for pair in UNSEEN_PAIRS) in (1, 2) for name in names)
    one_pair_is_unseen = Statement((Kind("circle", "red"), Kind("square", "red")), "left of")
    a_pair_and_a_count = Statement((Kind("cross", "cyan"),) * 2)
    assert split_of(one_pair_is_unseen) is split_of(a_pair_and_a_count) is None


# What is drawn


def test_objects_lie_in_cells_of_their_own_and_plainly_in_their_relation():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        statement = draw_statement(rng)
        scene = draw_scene(statement, rng)
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.diameter + 1e-4 and item.diameter - 1e-4 <= high
            for place in (item.x, item.y):
                from_border = place * CELLS % 1 / CELLS
                assert item.diameter / 2 <= from_border <= 1 / CELLS - item.diameter / 2
        cells = {(int(item.x * CELLS), int(item.y * CELLS)) for item in scene.objects}
        assert len(cells) == len(scene.objects)
        if statement.relation:
            first, second = scene.objects
            along, across = second.x - first.x, second.y - first.y
            if statement.relation == "above":
                along, across = across, along
            assert abs(across) <= (MAX_SLANT + 0.01) * along


def test_a_scene_has_what_its_statement_says_and_draws_what_is_left_open():
    said = Statement((Kind("star", "red", "small"),) * 2, background="grey")
    scene = draw_scene(said, np.random.default_rng(0))
    assert scene.background == "grey" and len(scene.objects) == 2
    assert {(o.shape, o.colour, o.size) for o in scene.objects} == {("star", "red", "small")}
    left_open = Statement((Kind("star", "red"),))
    scenes = [draw_scene(left_open, np.random.default_rng(seed)) for seed in range(40)]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.objects[0].size for scene in scenes} == set(SIZES)
    assert len({scene.objects[0].x for scene in scenes}) > 30


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_with_its_colour_and_nothing_else(shape):
    image_size = 100
    item = Object(shape, "red", "large", 0.4, 0.6, 0.45)
    pixels = np.asarray(draw_image(Scene("white", (item,)), image_size)).astype(int)
    assert pixels.shape == (image_size, image_size, 3)
    drawn = (pixels != 255).any(axis=2)
    rows, columns = np.nonzero(drawn)
    for places, centre in ((rows, item.y), (columns, item.x)):
        assert abs((places.min() + places.max() + 1) / 2 / image_size - centre) < 0.02
    assert max(np.ptp(rows), np.ptp(columns)) / image_size == pytest.approx(0.45, abs=0.05)
    full = (pixels == COLOURS["red"]).all(axis=2)
    assert 0.5 * drawn.sum() < full.sum() < drawn.sum()  # the rest is the antialiased border


# What captions say


def test_captions_say_all_of_a_statement_and_nothing_else():
    vocabulary = {*COLOURS, *BACKGROUNDS, *SIZES}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        statement = draw_statement(rng)
        text = draw_caption(statement, rng)
        said = {word for kind in statement.objects for word in (kind.colour, kind.size)}
        said |= {statement.background}
        assert {*text.split()} & vocabulary == said & vocabulary, text
        assert all(kind.shape in text for kind in statement.objects)
        assert len(text.split()) <= 24


def test_a_relation_is_said_from_either_side():
    said = Statement((Kind("circle", "red"), Kind("star", "orange", "small")), "above")
    texts = {draw_caption(said, np.random.default_rng(seed)) for seed in range(100)}
    assert {"a red circle above a small orange star"} < texts
    for text in texts:
        is_turned = text.index("orange") < text.index("red")
        assert is_turned == any(word in text.split() for word in ("below", "under"))


# The program


def test_samples_are_images_of_their_size_with_captions_and_facts(scenes):
    sample = next(read_shard(scenes / "new-000000.tar"))
    about = json.loads(sample["json"])
    assert about["captions"][0] == sample["txt"].decode() and len(about["captions"]) == 4
    image = Image.open(io.BytesIO(sample["png"]))
    assert image.size == (64, 64) and image.mode == "RGB"
    shown = {colour for _, colour in image.getcolors(64 * 64)}
    assert {COLOURS[item["colour"]] for item in about["scene"]["objects"]} <= shown


def test_the_same_command_gives_the_same_bytes_with_any_number_of_processes(few, tmp_path):
    make(tmp_path, num_processes=2, **FEW)
    one, two = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (few, tmp_path))
    assert one == two


def test_more_images_begin_with_the_same_ones(few, tmp_path):
    make(tmp_path, images_per_caption=3, **FEW)
    assert read(tmp_path, "train")[:80] == read(few, "train")


def test_the_program_goes_on_and_refuses_another_data_set(few, tmp_path, capsys):
    for path in few.iterdir():
        if path.name != "new-000000.tar":
            shutil.copy(path, tmp_path)
    make(tmp_path, **FEW)
    assert (tmp_path / "new-000000.tar").read_bytes() == (few / "new-000000.tar").read_bytes()
    make(tmp_path, **FEW)
    assert "complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another data set"):
        make(tmp_path, seed=2, **FEW)
    for other in ("[1]", "{}", "no json"):  # whose shards are they?
        (tmp_path / "manifest.json").write_text(other)
        with pytest.raises(ValueError, match="another data set"):
            make(tmp_path, **FEW)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="another program .manifest.json is missing"):
        make(tmp_path, **FEW)


@pytest.mark.parametrize("option", [{"image_size": 8}, {"captions": 10}])
def test_a_plan_that_cannot_be_made_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        make(tmp_path, **option)
    assert not any(tmp_path.iterdir())
