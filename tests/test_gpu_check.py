"""scripts/gpu_check.py: its commands exist; each part is written when it ends, failures too."""

import json

import pytest

from scripts import benchmark, gpu_check
from scripts.workload.sizes import read_stage

RATES = {"samples_per_second": {"median": 4.0}, "share_of_mm": {"median": 0.5}}


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_the_command_of_a_part_is_one_that_can_run(name):
    first, *words = gpu_check.PARTS[name][1].split()
    if first == "scripts/benchmark.py":
        args = benchmark.parse_args(words)
        assert args.part == "readers" or read_stage(args.config, args.overrides)
    else:
        files = [word for word in words if word.startswith("tests/")]
        assert all((gpu_check.ROOT / file).is_file() for file in files)
        assert words[0] in ("pytest", "scripts.run_experiment")


def test_parts_are_written_one_by_one_and_a_failure_or_a_limit_stops_none(
    tmp_path, monkeypatch, capsys
):
    measures = json.dumps(
        {"measures": dict.fromkeys(("text", "projector", "flow", "decode"), RATES)}
    )
    output = tmp_path / "gpu" / "x.json"
    load = f"json.load(open({str(output)!r}))"
    programs = {
        "tests": "import os; raise SystemExit('no such GPU in ' + os.getcwd())",
        "encode": "import time; time.sleep(60)",
        "sample_xl": f"print({measures!r})",
        # What is there before this part ends
        "readers": f"import json; print(json.dumps({{'measures': {load}}}))",
        "demo": "print('== emoji/tokens\\n== emoji/tokens took 12 s')",
    }
    parts = {}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        parts[name] = (0.5 if name == "encode" else 60, str(tmp_path / name))
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main(gpu_check.parse_args(["--output", str(output)])) == 1
    found = json.loads(output.read_text())["parts"]
    assert f"no such GPU in {gpu_check.ROOT}" in found["tests"]["failed"]
    assert "timed out" in found["encode"]["failed"]
    assert found["readers"]["parts"].keys() == {"tests", "encode", "sample_xl"}
    assert found["demo"]["seconds"] == {"emoji/tokens": 12}
    row = found["sample_xl"]
    assert (row["images_per_second"], row["paper_images_per_second"]) == (1.0, 22.7)
    shown = capsys.readouterr().out
    assert "| tests | failed" in shown and "| sample_xl: flow | 4.0 | 50% |" in shown
    assert gpu_check.main(gpu_check.parse_args(["--output", str(output), "--parts=demo"])) == 0
