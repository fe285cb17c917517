"""Charts of the studies, by matplotlib (requirements-eval.txt)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window system, no global state


def save_lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str,
    y_name: str,
    path: Path,
    y_scale: str = "linear",
) -> None:
    """Curves by name, each a list of (x, y)."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel=x_name, ylabel=y_name, yscale=y_scale)
    for name, points in curves.items():
        x, y = zip(*sorted(points))
        axes.plot(x, y, "o-", label=name)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def save_dots(rows: Mapping[str, Sequence[float]], name: str, path: Path) -> None:
    """A row for each name: a dot for each of its values, a bar at their mean."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel=name, yticks=range(len(rows)), yticklabels=[*rows])
    axes.invert_yaxis()  # the first row on top
    for row, values in enumerate(rows.values()):
        axes.plot(values, [row] * len(values), "o", color="C0", fillstyle="none")
        if values:
            axes.plot(sum(values) / len(values), row, "|", color="C3", markersize=15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
