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
    names = {"predicted_features", "semantic_codes", "pixel_codes", "pixels"}
    assert report["readouts"].keys() == names
    assert (report["num_train"], report["num_heldout"]) == (20, 24)
    for values in report["readouts"].values():
        assert -1 <= values["cosine"] <= 1 and 0 <= values["top1"] <= 1
    with pytest.raises(ValueError, match="dual"):
        understanding.main(understanding.parse_args([*arguments, "--flowtok", str(run)]))


def test_retrieval_is_the_share_whose_own_caption_is_nearest():
    texts = F.normalize(torch.randn(5, 8), dim=-1)
    own = torch.tensor([0, 1, 4, 2])
    assert understanding.retrieval(texts[own], texts, own) == 1
    assert understanding.retrieval(texts[[0, 1, 4, 3]], texts, own) == 0.75
