"""Charts as pictures, drawn with Pillow: no plotting package is needed."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN, TICKS = 720, 480, 70, 5  # pixels; numbers on the vertical axis
ROW_HEIGHT = 26  # pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")


def line_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str
) -> Image.Image:
    """Curves by name, each a list of (x, y); the axes span all points. Vertical ticks are even, horizontal at each x.

    Raises:
        ValueError: no point at all.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("a chart needs at least one point")
    xs, ys = zip(*points)
    font = ImageFont.load_default(12)
    names_width = math.ceil(max(font.getlength(name) for name in curves))
    chart = Image.new("RGB", (WIDTH + max(0, names_width + 12 - MARGIN), HEIGHT), "white")
    draw = ImageDraw.Draw(chart)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (y - min(ys)) / ((max(ys) - min(ys)) or 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    draw.rectangle([MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN], outline="#999999")
    for x in sorted({*xs}):
        draw.text(
            (place(x, min(ys))[0], HEIGHT - MARGIN + 6),
            f"{x:g}",
            fill="black",
            font=font,
            anchor="mt",
        )
    for tick in range(TICKS):
        y = min(ys) + (max(ys) - min(ys)) * tick / (TICKS - 1)
        draw.text(
            (MARGIN - 6, place(min(xs), y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm"
        )
    draw.text((WIDTH / 2, HEIGHT - MARGIN / 2), x_name, fill="black", font=font, anchor="mt")
    draw.text((MARGIN, MARGIN / 4), y_name, fill="black", font=font, anchor="lt")
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        ends = [place(*point) for point in sorted(curve)]
        draw.line(ends, fill=colour, width=2)
        for x, y in ends:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text(
            (WIDTH - MARGIN + 6, MARGIN + 16 * number), name, fill=colour, font=font, anchor="lm"
        )
    return chart


def dot_chart(rows: Mapping[str, Sequence[float]], name: str) -> Image.Image:
    """One row a name, a dot for each of its values and a bar at their mean; the axis spans all values.

    Raises:
        ValueError: no value at all.
    """
    values = [value for row in rows.values() for value in row]
    if not values:
        raise ValueError("a chart needs at least one value")
    font, low, span = ImageFont.load_default(12), min(values), (max(values) - min(values)) or 1
    left = MARGIN + math.ceil(max(font.getlength(row) for row in rows))
    chart = Image.new("RGB", (left + WIDTH - MARGIN, ROW_HEIGHT * len(rows) + 2 * MARGIN), "white")
    draw, right, bottom = ImageDraw.Draw(chart), chart.width - MARGIN, chart.height - MARGIN
    draw.text((left, MARGIN / 4), name, fill="black", font=font, anchor="lt")
    draw.rectangle([left, MARGIN, right, bottom], outline="#999999")
    for tick in range(TICKS):
        x = left + (right - left) * tick / (TICKS - 1)
        draw.text(
            (x, bottom + 6),
            f"{low + span * tick / (TICKS - 1):.4g}",
            fill="black",
            font=font,
            anchor="mt",
        )
    for number, (row, points) in enumerate(rows.items()):
        y = MARGIN + ROW_HEIGHT * (number + 0.5)
        draw.text((left - 6, y), row, fill="black", font=font, anchor="rm")
        places = [left + (point - low) / span * (right - left) for point in points]
        for x in places:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], outline=COLOURS[0], width=2)
        if places:
            mean = sum(places) / len(places)
            draw.line([mean, y - 8, mean, y + 8], fill=COLOURS[1], width=2)
    return chart
