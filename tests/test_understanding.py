"""eval/understanding.py on a tiny dual tokenizer."""

import json

import pytest
import torch
from evaluations import run_program
from torch.nn import functional as F

from eval import understanding
from modeling.clip_weights import save_clip
from modeling.image_tower import Teacher, TeacherConfig
from scripts.train_text_encoder import ClipSize, new_pair, open_clip_config


@pytest.fixture(params=["class_token", "mean"])
def pooled(request, tmp_path):
    """What stands for an image of a CLIP, the CLIP, and where it is written."""
    size = ClipSize(32, context_length=16, width=64, depth=1, num_heads=2, image_pool=request.param)
    clip = new_pair(size).clip.eval()
    save_clip(clip, open_clip_config(size), tmp_path / "clip")
    return request.param, clip, f"local-dir:{tmp_path}/clip"


@torch.no_grad()
def test_the_mean_of_a_teachers_features_is_open_clips_feature_if_it_pools_by_mean(pooled):
    (pool, clip, model), images = pooled, torch.rand(2, 3, 32, 32)
    mean = F.normalize(Teacher(TeacherConfig(model))(images).mean(1), dim=-1)
    feature = clip.encode_image(images * 2 - 1, normalize=True)
    assert torch.allclose(mean, feature, atol=1e-5, rtol=0) == (pool == "mean")
    assert "pool_type" not in open_clip_config(ClipSize())["vision_cfg"]


def test_the_report_says_what_each_representation_knows(dual_chain, tiny_shards, tmp_path, pooled):
    pool, _, model = pooled
    options = [f"run_dir={tmp_path}/run", f"dual.teacher.model={model}", "training.max_steps=1"]
    run = dual_chain.run("tokenizer", *options)
    shards = [f"{tiny_shards}/train-0000{number}.tar" for number in (0, 1)]
    arguments = [run, "--train", shards[0], "--heldout", shards[1], "--num-workers", 0]
    run_program(understanding, *arguments, "--num-train", 20)
    report = json.loads((run / "understanding.json").read_text())
    names = {"teacher_patches", "predicted_features", "semantic_codes", "pixel_codes", "pixels"}
    assert report["readouts"].keys() == names
    assert (report["num_train"], report["num_heldout"]) == (20, 24)
    for values in report["readouts"].values():
        assert 0 <= values["top1"] <= values["top5"] <= 1
    by_mean = {name for name, x in report["readouts"].items() if x["read_by"] == "mean"}
    assert by_mean == ({"teacher_patches", "predicted_features"} if pool == "mean" else set())
    if pool == "mean":
        assert report["readouts"]["teacher_patches"]["cosine"] == pytest.approx(1)
    with pytest.raises(ValueError, match="dual"):
        run_program(understanding, *arguments, "--flowtok", run)
    arguments[2] = shards[1]
    with pytest.raises(ValueError, match="understanding.json"):
        run_program(understanding, *arguments)


def test_a_text_is_found_among_the_nearest_and_the_share_has_the_error_of_pairs():
    texts = F.normalize(torch.randn(5, 8), dim=-1)
    own = torch.tensor([0, 1, 4, 2])
    assert understanding.among_nearest(texts[own], texts, own, 1).all()
    found = understanding.among_nearest(texts[[0, 1, 4, 3]], texts, own, 1)
    assert found.tolist() == [True, True, True, False]
    reached = torch.tensor([True, True, False, True])
    assert understanding.share_of(reached, reached) == (1, 0)  # alike in each image
    share, error = understanding.share_of(found, reached)
    assert share == 1 and error == pytest.approx(2**0.5 / 3)
    assert understanding.share_of(found, ~found & found) == (None, None)
