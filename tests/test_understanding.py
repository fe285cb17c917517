"""eval/understanding.py on tiny dual tokenizers."""

import json

import pytest
import torch
from tiny_experiment import reset_accelerate
from torch.nn import functional as F

from eval import understanding
from modeling.clip_weights import save_clip
from modeling.image_tower import Teacher, TeacherConfig
from scripts.train_text_encoder import ClipSize, new_pair, open_clip_config


def measure(run, shards, *options):
    """The report on 20 training images and another shard."""
    first, second = (f"{shards}/train-0000{number}.tar" for number in (0, 1))
    arguments = [str(run), "--train", first, "--heldout", second, "--num-workers", "0"]
    reset_accelerate()
    understanding.main(understanding.parse_args([*arguments, "--num-train", "20", *options]))
    return json.loads((run / "understanding.json").read_text())


def test_the_report_says_what_each_representation_knows(dual_chain, tiny_shards):
    run = dual_chain.folder / "tokenizer"
    report = measure(run, tiny_shards)
    names = {"teacher_patches", "predicted_features", "semantic_codes", "pixel_codes", "pixels"}
    assert report["readouts"].keys() == names
    assert (report["num_train"], report["num_heldout"]) == (20, 24)
    for values in report["readouts"].values():
        assert -1 <= values["cosine"] <= 1 and values["read_by"] == "ridge"
        assert 0 <= values["top1"] <= values["top5"] <= 1
    with pytest.raises(ValueError, match="dual"):
        measure(run, tiny_shards, "--flowtok", str(run))


def test_a_teacher_that_pools_by_mean_reads_patch_features_itself(
    dual_chain, tiny_shards, tmp_path
):
    size = ClipSize(32, context_length=16, width=64, depth=1, num_heads=2, image_pool="mean")
    clip, images = new_pair(size).clip.eval(), torch.rand(2, 3, 32, 32)
    save_clip(clip, open_clip_config(size), tmp_path / "clip")
    teacher = Teacher(TeacherConfig(f"local-dir:{tmp_path}/clip"))
    read = F.normalize(teacher(images).mean(1), dim=-1)
    expected = clip.encode_image(images * 2 - 1, normalize=True)
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=0)
    assert "pool_type" not in open_clip_config(ClipSize())["vision_cfg"]

    model = f"dual.teacher.model=local-dir:{tmp_path}/clip"
    run = dual_chain.run("tokenizer", f"run_dir={tmp_path}/run", model, "training.max_steps=1")
    report = measure(run, tiny_shards)
    by_mean = {name for name, x in report["readouts"].items() if x["read_by"] == "mean"}
    assert by_mean == {"teacher_patches", "predicted_features"}
    own = report["readouts"]["teacher_patches"]
    assert own["cosine"] == pytest.approx(1) and own["top1"] == report["teacher"]["top1"]


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
