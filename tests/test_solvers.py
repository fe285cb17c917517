"""research/solvers.py: errors against a fine reference, the fewest evaluations, files, refusals."""

import json

import pytest
import torch

from research.solvers import fewest, main, parse_args, relative_error


def test_error_is_relative_to_the_way_travelled():
    start, reference = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    assert relative_error(reference + 0.5, reference, start) == pytest.approx(0.25)
    assert relative_error(reference, reference, start) == 0


def test_fewest_is_the_smallest_budget_within_the_limit():
    rows = [
        {"sampler": "euler", "evaluations": 20, "error": 0.1},
        {"sampler": "heun", "evaluations": 8, "error": 0.1},
        {"sampler": "heun", "evaluations": 6, "error": 0.05},
        {"sampler": "adams2", "evaluations": 4, "error": 0.3},
    ]
    assert fewest(rows, 0.1) == {"euler": 20, "heun": 6, "adams2": None}


def test_more_evaluations_come_nearer_and_second_order_needs_fewer(chain, tmp_path):
    options = ["--guidance", "2", "--evaluations", "4", "12", "--output", str(tmp_path)]
    main(parse_args([str(chain.folder), *options]))
    report = json.loads((tmp_path / "solvers.json").read_text())["guidance"]["2"]
    errors = {(row["sampler"], row["evaluations"]): row["error"] for row in report["rows"]}
    assert errors["euler", 20] < errors["euler", 12] < errors["euler", 4]
    for name in ("midpoint", "heun", "adams2"):
        assert errors[name, 12] < errors["euler", 12]
    assert report["euler_20_error"] == errors["euler", 20]
    reached = report["evaluations_to_reach_it"]
    assert reached["euler"] == 20 and reached["adams2"] <= 12
    assert (tmp_path / "guidance_2.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(chain):
    with pytest.raises(ValueError, match="solvers.json cannot be written"):
        main(parse_args([str(chain.folder), "--output", "/dev/null/out"]))


def test_impossible_budgets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--evaluations .*0"):
        main(parse_args([str(tmp_path), "--evaluations", "0"]))
