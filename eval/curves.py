"""Charts: losses and guards of runs over their steps, several runs over each other, as one PNG.

    python -m eval.curves runs/emoji
    python -m eval.curves runs/emoji runs/wider --output wider.png

A run is an experiment, or one of its stages. Each stage has a panel for each value of its
metrics.jsonl, but for rates and the parts of a value that stand in numbered names; each run a
colour. Needs pip install -r requirements-eval.txt.
"""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from data.files import check_writable, user_path
from eval.programs import INSTALL, build_parser
from training.errors import exit_on_error
from training.metrics import METRICS_FILE, read_metrics

LEFT_OUT = {"step", "samples_per_second", "data_wait_share"}
PANEL_COLUMNS, PANEL_INCHES = 5, (3.2, 2.2)
WIDE_RANGE = 100.0  # largest / smallest value from which a panel is logarithmic
Curve = Sequence[tuple[float, float]]  # (x, y)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN")
    add("--output", type=user_path, help="PNG; default: curves.png in the first run")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Read all logs, then draw.

    ValueError: a run without a log, one named twice, or no matplotlib.
    """
    output = args.output or args.runs[0] / "curves.png"
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: expected a name in .png")
    names = [str(run) for run in args.runs]
    if len({*names}) != len(names):
        raise ValueError(f"a run is named twice: {' '.join(names)}")
    check_writable(output)
    check_matplotlib()

    # Stage -> value -> run -> curve, stages in the order in which they ran.
    rows: dict[str, dict[str, dict[str, list]]] = {}
    for run in args.runs:
        for file in find_logs(run):
            for name, curve in read_metrics(file).items():
                if name not in LEFT_OUT and not name.split("/")[-1].isdigit():
                    panels = rows.setdefault(file.parent.name, {})
                    panels.setdefault(name, {})[str(run)] = curve
    if not rows:
        raise ValueError(f"{' '.join(names)}: nothing was reported yet")
    save_panels(rows, output)
    print(f"{output}: {', '.join(rows)} of {len(names)} runs")


def find_logs(run: Path) -> list[Path]:
    """The logs of a stage's run, or of an experiment's, the older first; ValueError: none."""
    files = [*run.glob(METRICS_FILE)] or [*run.glob(f"*/{METRICS_FILE}")]
    if not files:
        raise ValueError(f"{run} holds no {METRICS_FILE}, nor does a folder in it")
    return sorted(files, key=lambda file: file.stat().st_mtime)


# Drawing. matplotlib is imported late: evaluations without a chart do not need it


def check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ValueError(f"charts need matplotlib: {INSTALL}")


def save_lines(curves: Mapping[str, Curve], x_name: str, y_name: str, path: Path) -> None:
    """Curves by name, each a list of (x, y)."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel=x_name, ylabel=y_name)
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), "o-", label=name)
    axes.legend()
    figure.savefig(path)


def save_panels(rows: Mapping[str, Mapping[str, Mapping[str, Curve]]], path: Path) -> None:
    """A panel for each value of each stage, wrapped. rows: stage -> value -> run -> curve."""
    from matplotlib.figure import Figure

    # A run has its colour also where a panel lacks it
    drawn = [curves for panels in rows.values() for curves in panels.values()]
    names = list(dict.fromkeys(name for curves in drawn for name in curves))
    lines = sum(-(-len(panels) // PANEL_COLUMNS) for panels in rows.values())
    width, height = PANEL_INCHES
    figure = Figure(figsize=(PANEL_COLUMNS * width, lines * height + 0.6), layout="constrained")
    place, handles = 0, {}
    for row, panels in rows.items():
        for title, curves in panels.items():
            place += 1
            axes = figure.add_subplot(lines, PANEL_COLUMNS, place, yscale=scale_of(curves))
            axes.set_title(f"{row}: {title}", fontsize="small")
            axes.tick_params(labelsize="x-small")
            for name, points in curves.items():
                colour = f"C{names.index(name)}"
                [handles[name]] = axes.plot(*zip(*points), ".-", color=colour, markersize=2)
        # The next stage starts a line
        place = -(-place // PANEL_COLUMNS) * PANEL_COLUMNS
    figure.supxlabel("step", fontsize="small")
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def scale_of(curves: Mapping[str, Curve]) -> str:
    """Logarithmic for positive values of a wide range, else linear."""
    values = [y for points in curves.values() for _, y in points]
    is_wide = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
    return "log" if is_wide else "linear"


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
