"""scripts/gpu_check.py: its commands exist; each part is written when it ends, failures too."""

import json

import pytest
import yaml

from scripts import benchmark, gpu_check
from scripts.gpu_check import Part, run_parts
from scripts.workload.sizes import read_stage


@pytest.mark.parametrize("name", gpu_check.all_parts())
def test_the_command_of_a_part_is_one_that_can_run(name):
    first, *words = gpu_check.all_parts()[name].command
    if first == "scripts/benchmark.py":
        args = benchmark.parse_args(words)
        assert args.part == "readers" or read_stage(args.config, args.overrides)
    else:
        files = [word for word in words if word.startswith("tests/")]
        assert all((gpu_check.ROOT / file).is_file() for file in files)
        assert words[0] in ("pytest", "scripts.run_experiment")


FAILS = "import os; raise SystemExit('no such GPU in ' + os.getcwd())"
RATES = {"samples_per_second": {"median": 4.0}, "share_of_mm": {"median": 0.5}}
MEASURES = json.dumps({"measures": dict.fromkeys(("text", "projector", "flow", "decode"), RATES)})


def test_parts_are_written_one_by_one_and_a_failure_or_a_limit_stops_none(tmp_path, capsys):
    output = tmp_path / "gpu" / "x.json"
    seen = f"import json; print(json.dumps(dict(measures=list(json.load(open({str(output)!r}))))))"
    parts = {
        "bad": Part(("-c", FAILS), 60, gpu_check.pytest_summary),
        "slow": Part(("-c", "import time; time.sleep(60)"), 0.5, gpu_check.pytest_summary),
        "sample_xl": Part(("-c", f"print({MEASURES!r})"), 60, gpu_check.sampling_figures),
    }
    parts["next"] = Part(("-c", seen), 60, lambda text: {"keys": yaml.safe_load(text)["measures"]})
    assert not run_parts(parts, output)
    found = json.loads(output.read_text())["parts"]
    assert f"no such GPU in {gpu_check.ROOT}" in found["bad"]["failed"]
    assert "timed out" in found["slow"]["failed"]
    assert found["next"]["keys"] == ["machine", "parts"]  # it was there before this part ended
    row = found["sample_xl"]
    assert (row["images_per_second"], row["paper_images_per_second"]) == (1.0, 22.7)
    shown = capsys.readouterr().out
    assert "| bad | failed" in shown and "| sample_xl: flow | 4.0 | 50% |" in shown
    assert run_parts({"next": parts["next"]}, output)


def test_the_demos_stages_are_timed_by_what_the_script_prints():
    text = "== emoji/tokens\n== emoji/tokens took 12 s\nx\n== emoji/flowtok took 3 s\n"
    assert gpu_check.demo_figures(text) == {"seconds": {"emoji/tokens": 12, "emoji/flowtok": 3}}
