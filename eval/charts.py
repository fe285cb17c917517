"""Charts, by matplotlib (requirements-eval.txt)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window system, no global state

Curve = Sequence[tuple[float, float]]  # (x, y)
PANEL_COLUMNS, PANEL_INCHES = 5, (3.2, 2.2)
WIDE_RANGE = 100.0  # largest / smallest value from which a panel is logarithmic


def save_lines(
    curves: Mapping[str, Curve],
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


def save_panels(
    rows: Mapping[str, Mapping[str, Mapping[str, Curve]]], x_name: str, path: Path
) -> None:
    """A panel for each title of each row, wrapped; a name has one colour in all.

    Args:
        rows: row -> title -> name -> curve.
    """
    titled = [curves for panels in rows.values() for curves in panels.values()]
    names = list(dict.fromkeys(name for curves in titled for name in curves))
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
        place = -(-place // PANEL_COLUMNS) * PANEL_COLUMNS  # the next row starts a line
    figure.supxlabel(x_name, fontsize="small")
    figure.legend(
        [*handles.values()], [*handles], loc="outside upper left", ncols=4, fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def scale_of(curves: Mapping[str, Curve]) -> str:
    """Logarithmic for positive values of a wide range, else linear."""
    values = [y for points in curves.values() for _, y in points]
    is_wide = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
    return "log" if is_wide else "linear"
