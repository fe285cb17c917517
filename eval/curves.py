"""Losses and guards of runs over their steps: one PNG, several runs over each other.

    python -m eval.curves runs/emoji
    python -m eval.curves runs/emoji runs/wider --output wider.png

A run is an experiment, or one of its stages. Each stage has a panel for each value of its
metrics.jsonl, but for rates and the parts of a value that stand in numbered names; each run a
colour. Needs pip install -r requirements-eval.txt.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

# Run as a file, Python looks into eval/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import check_writable, user_path
from eval.programs import INSTALL, build_parser
from training.errors import exit_on_error
from training.metrics import METRICS_FILE, read_metrics

LEFT_OUT = {"step", "samples_per_second", "data_wait_share"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN")
    help_text = "PNG; default: curves.png in the first run"
    parser.add_argument("--output", type=user_path, help=help_text)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Read all logs, then draw.

    Raises:
        ValueError: a run without a log, one named twice, or no matplotlib.
    """
    output = args.output or args.runs[0] / "curves.png"
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: expected a name in .png")
    if len({*args.runs}) != len(args.runs):
        raise ValueError(f"a run is named twice: {' '.join(map(str, args.runs))}")
    logs = {run: find_logs(run) for run in args.runs}
    check_writable(output)
    if find_spec("matplotlib") is None:
        raise ValueError(f"charts need matplotlib: {INSTALL}")
    from eval.charts import save_panels

    # Stage -> value -> run -> curve, stages in the order in which they ran.
    rows: dict[str, dict[str, dict[str, list]]] = {}
    for run, files in logs.items():
        for file in files:
            for name, curve in read_metrics(file).items():
                if name not in LEFT_OUT and not name.split("/")[-1].isdigit():
                    panels = rows.setdefault(file.parent.name, {})
                    panels.setdefault(name, {})[str(run)] = curve
    if not rows:
        raise ValueError(f"{' '.join(map(str, args.runs))}: nothing was reported yet")
    save_panels(rows, "step", output)
    print(f"{output}: {', '.join(rows)} of {len(logs)} runs")


def find_logs(run: Path) -> list[Path]:
    """The logs of a stage's run, or of an experiment's, the older first; ValueError: none."""
    files = [*run.glob(METRICS_FILE)] or [*run.glob(f"*/{METRICS_FILE}")]
    if not files:
        raise ValueError(f"{run} holds no {METRICS_FILE}, nor does a folder in it")
    return sorted(files, key=lambda file: file.stat().st_mtime)


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
