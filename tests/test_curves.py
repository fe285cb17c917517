"""eval/curves.py: a panel for each value of each stage, a line for each run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval import curves
from scripts.run_experiment.stages import load_stage

ROOT = Path(__file__).parents[1]


def log(folder, **values):
    """A log of two reports."""
    folder.mkdir(parents=True)
    rows = [{"step": step, **{k: v * step for k, v in values.items()}} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def draw(*arguments):
    curves.main(curves.parse_args([*map(str, arguments)]))


def test_runs_lie_over_each_other_in_a_panel_for_each_value(tmp_path, monkeypatch):
    drawn, save = [], curves.save_panels
    monkeypatch.setattr(curves, "save_panels", lambda *a: drawn.append(a[0]) or save(*a))
    one, two = tmp_path / "one", tmp_path / "two"
    log(one / "tokenizer", loss=0.5, samples_per_second=3.0)
    flow = log(one / "flowtok", loss=-1.0, **{"by_time/3": 1.0, "eval/fid": 2.0})
    log(two / "flowtok", loss=1.0)
    with (one / "flowtok" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "los')  # of a machine that died
    draw(one, two)
    with Image.open(one / "curves.png") as picture:
        assert picture.width > picture.height > 300
    assert {*drawn[0]} == {"tokenizer", "flowtok"}
    assert drawn[0]["tokenizer"] == {"loss": {str(one): [(10, 5.0), (20, 10.0)]}}
    assert {*drawn[0]["flowtok"]} == {"loss", "eval/fid"}
    line = [(10, -10.0), (20, -20.0)]
    assert drawn[0]["flowtok"]["loss"] == {str(one): line, str(two): [(10, 10.0), (20, 20.0)]}
    draw(flow, "--output", tmp_path / "new" / "x.png")
    assert drawn[1]["flowtok"]["loss"] == {str(flow): line}
    assert (tmp_path / "new" / "x.png").is_file()


def test_a_panel_is_logarithmic_for_positive_values_of_a_wide_range():
    curve = [(1, 1.0), (2, 1000.0)]
    assert curves.scale_of({"a": curve}) == "log"
    assert curves.scale_of({"a": curve, "b": [(1, 0.0)]}) == "linear"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere holds no metrics.jsonl"),
        (["run", "run"], "named twice"),
        (["run", "--output", "x.jpg"], "x.jpg.*.png"),
        (["run", "--output", "/dev/null/x.png"], "/dev/null/x.png"),
        (["run"], "nothing was reported"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=said):
        draw(*arguments)


def test_the_kept_logs_are_of_all_steps_of_the_demo():
    for stage in ("text_encoder", "tokenizer", "text_projector", "flowtok"):
        config = load_stage(ROOT / f"configs/emoji/{stage}.yaml")
        rows = (ROOT / f"docs/logs/emoji/{stage}/metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == config.training.max_steps
