"""research/text_limits.py: bags of words, and rows whose answers are known."""

import json

import pytest
import torch

from research.text_limits import (
    bags_of_words,
    gaussian_features,
    main,
    mean_and_deviation,
    measure,
    shuffle_weights,
)


def test_bags_weigh_rare_words_and_ignore_what_all_captions_and_no_training_caption_have():
    train = torch.tensor([[1, 5, 2, 0], [1, 6, 2, 0], [1, 6, 7, 2]])
    bags, heldout = bags_of_words(train, torch.tensor([[1, 6, 9, 2]]))
    columns = train.unique().tolist()  # 0 1 2 5 6 7
    weights = dict(zip(columns, bags[2, 0].tolist()))
    assert weights[1] == weights[2] == weights[5] == 0 and weights[7] > weights[6] > 0
    torch.testing.assert_close(bags.norm(dim=-1), torch.ones(3, 1))
    assert [c for c, w in zip(columns, heldout[0, 0].tolist()) if w] == [6]


def test_a_text_that_determines_the_image_is_enough_and_one_that_does_not_is_chance():
    generator = torch.Generator().manual_seed(0)
    states, heldout = (torch.randn(n, 2, 4, generator=generator) for n in (80, 40))
    matrix = torch.randn(8, 6, generator=generator)
    latents = [(x.flatten(1) @ matrix).view(-1, 3, 2) for x in (states, heldout)]
    noise = [torch.randn(n, 2, 4, generator=generator) for n in (80, 40)]
    rows = list(measure({"true": [states, heldout], "noise": noise}, *latents))
    assert [(row["text"], row["captions"]) for row in rows] == [
        (t, n) for t in ("true", "noise") for n in (20, 40, 80)
    ]
    assert [len(row["top1"]) for row in rows] == [3, 3, 1] * 2
    assert rows[2]["top1"] == [1.0] and rows[5]["top5"][0] < 0.4  # chance: 5 of 40


def test_curved_features_are_a_gaussian_kernel_of_the_mean_distance():
    train, heldout = torch.randn(60, 2, 5).double(), torch.randn(30, 2, 5).double()
    train[1] = train[0]  # the same caption twice
    features, others = (x.squeeze(1) for x in gaussian_features(train, heldout))
    mean_square = (train.flatten(1)[:, None] - train.flatten(1)[None]).square().sum(
        dim=-1
    ).sum() / (60 * 59)
    for rows, states in ((features, train), (others, heldout)):
        distances = torch.cdist(states.flatten(1), train.flatten(1))
        expected = torch.exp(-distances.square() / (2 * mean_square))
        torch.testing.assert_close(rows @ features.T, expected, atol=1e-5, rtol=0)


def test_shuffled_weights_are_the_same_numbers_elsewhere_and_the_module_keeps_its_own():
    module = torch.nn.Linear(8, 4)
    before = module.weight.clone()
    shuffled = shuffle_weights(module)
    assert torch.equal(module.weight, before) and not torch.equal(shuffled.weight, before)
    assert torch.equal(shuffled.weight.flatten().sort().values, before.flatten().sort().values)


def test_cells_are_percent():
    assert mean_and_deviation([0.5]) == "50.0" and mean_and_deviation([0.4, 0.6]) == "50.0 +- 14.1"


def test_the_program_writes_what_it_prints(chain, tmp_path, capsys):
    for path in chain.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    main(chain.config("report", f"experiment_dir={tmp_path}"))
    rows = json.loads((tmp_path / "text_limits.json").read_text())["rows"]
    printed = capsys.readouterr().out
    assert len(rows) == 12 and f"| {mean_and_deviation(rows[0]['top5'])} |" in printed
    assert rows[2]["captions"] == pytest.approx(24)
