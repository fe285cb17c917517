"""research/solvers.py: errors against a fine reference, the fewest evaluations, files."""

import json

from research.solvers import main, parse_args


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
