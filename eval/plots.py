"""A line chart as a picture, drawn with Pillow: no plotting package is needed."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN, TICKS = 720, 480, 70, 5  # pixels; numbers on the vertical axis
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")


def line_chart(curves: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> Image.Image:
    """Curves by name, each a list of (x, y); the axes span all points. Vertical ticks are even, horizontal at each x.

    Raises:
        ValueError: no point at all.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("a chart needs at least one point")
    xs, ys = zip(*points)
    chart, font = Image.new("RGB", (WIDTH, HEIGHT), "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(chart)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (y - min(ys)) / ((max(ys) - min(ys)) or 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    draw.rectangle([MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN], outline="#999999")
    for x in sorted({*xs}):
        draw.text((place(x, min(ys))[0], HEIGHT - MARGIN + 6), f"{x:g}", fill="black", font=font, anchor="mt")
    for tick in range(TICKS):
        y = min(ys) + (max(ys) - min(ys)) * tick / (TICKS - 1)
        draw.text((MARGIN - 6, place(min(xs), y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
    draw.text((WIDTH / 2, HEIGHT - MARGIN / 2), x_name, fill="black", font=font, anchor="mt")
    draw.text((MARGIN, MARGIN / 4), y_name, fill="black", font=font, anchor="lt")
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        ends = [place(*point) for point in sorted(curve)]
        draw.line(ends, fill=colour, width=2)
        for x, y in ends:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((WIDTH - MARGIN + 6, MARGIN + 16 * number), name, fill=colour, font=font, anchor="lm")
    return chart
