"""Evaluations at several values of guidance and steps -> a table and a plot."""

from pathlib import Path
from typing import Any

from eval.plots import line_chart
from training.files import write_json, write_text
from training.pictures import save_png


def write_sweep(folder: Path, reports: list[dict[str, Any]]) -> None:
    """sweep.json, sweep.md and sweep.png: a row, a point for each guidance and number of steps."""
    names = [
        name
        for name in reports[0]["metrics"]
        if any(r["metrics"][name] is not None for r in reports)
    ]
    rows = [
        {
            "steps": r["sampling"]["steps"],
            "guidance": r["sampling"]["guidance"],
            **{n: r["metrics"][n] for n in names},
        }
        | {"images_per_second": r["images_per_second"]}
        for r in reports
    ]
    write_json({"rows": rows}, folder / "sweep.json")
    lines = [
        [*rows[0]],
        ["---"] * len(rows[0]),
        *([show(value) for value in row.values()] for row in rows),
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text(table, folder / "sweep.md")
    print(table, end="")
    if names:
        curves = {f"{steps} steps": [] for steps in dict.fromkeys(row["steps"] for row in rows)}
        for row in rows:
            if row[names[0]] is not None:
                curves[f"{row['steps']} steps"].append((row["guidance"], row[names[0]]))
        save_png(line_chart(curves, "guidance", names[0]), folder / "sweep.png")
    print(f"{folder}: sweep.json, sweep.md{', sweep.png' if names else ''} written")


def show(value: float | int | None) -> str:
    """A cell of the table."""
    return "" if value is None else f"{value:.6g}"
