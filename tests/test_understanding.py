"""eval/understanding.py on a tiny dual tokenizer."""

import json

import pytest
import torch
from tiny_experiment import reset_accelerate
from torch.nn import functional as F

from eval import understanding


def test_the_report_says_what_each_representation_knows(dual_chain, tiny_shards):
    run = dual_chain.folder / "tokenizer"
    shards = [f"{tiny_shards}/train-0000{number}.tar" for number in (0, 1)]
    arguments = [str(run), "--train", shards[0], "--heldout", shards[1], "--num-workers", "0"]
    reset_accelerate()
    understanding.main(understanding.parse_args([*arguments, "--num-train", "20"]))
    report = json.loads((run / "understanding.json").read_text())
    names = {"teacher_patches", "predicted_features", "semantic_codes", "pixel_codes", "pixels"}
    assert report["readouts"].keys() == names
    assert (report["num_train"], report["num_heldout"]) == (20, 24)
    for values in report["readouts"].values():
        assert -1 <= values["cosine"] <= 1
        assert 0 <= values["top1"] <= values["top5"] <= 1
    with pytest.raises(ValueError, match="dual"):
        understanding.main(understanding.parse_args([*arguments, "--flowtok", str(run)]))


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
