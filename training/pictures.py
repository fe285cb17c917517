"""Pictures that people look at: grids of images with captions, and pages that hold them.

A page is one HTML file that needs nothing beside it. Files are written whole.
"""

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.files import write_bytes, write_text
from data.readers import Reader
from modeling.layers import check_least, to_pil

# Pixels; smaller images are enlarged by a whole factor so that captions are readable
CELL_WIDTH_MIN = 128
MARGIN, LINE_HEIGHT, CAPTION_LINES = 6, 13, 3
FONT_SIZE, CHARACTER_WIDTH = 11, 6
STYLE = """
body { font: 14px sans-serif; margin: 16px; color: #222; background: #fff; }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 12px; }
dt { color: #666; } dd { margin: 0; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; unicode-bidi: isolate; }
img { display: block; width: 100%; margin-bottom: 4px; outline: 1px solid #ddd; }
"""
# The browser itself refuses scripts and anything from elsewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass
class SheetConfig:
    """The picture on the way of what gets images: the first ones, and what it makes of them."""

    num_samples: int = 16
    shards: list[str] = field(default_factory=list)  # whose images; empty: the training shards

    def __post_init__(self):
        check_least(self, 1, "num_samples")

    def read(self, reader: Reader) -> dict[str, Any]:
        """The batch of those images; read before training, whose work a bad shard would cost.

        Raises:
            ValueError: none can be read.
        """
        return next(reader.once(self.num_samples, self.shards or None, limit=self.num_samples))


def caption_grid(images: Tensor, captions: list[str], columns: int) -> Image.Image:
    """Images with their captions below, row by row.

    Args:
        images: B x 3 x R x W in [0, 1].
        captions: B strings; wrapped to three lines and cut.
    """
    # Enlarged by whole factors, without interpolation: what the network made, pixel by pixel.
    factor = max(1, -(-CELL_WIDTH_MIN // images.shape[-1]))
    width, height = images.shape[-1] * factor, images.shape[-2] * factor
    cell_width, cell_height = width + MARGIN, height + CAPTION_LINES * LINE_HEIGHT + MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + index % columns * cell_width, MARGIN + index // columns * cell_height
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(caption, width // CHARACTER_WIDTH)[:CAPTION_LINES]
        for line_index, line in enumerate(lines):
            draw.text((x, y + height + line_index * LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def pair_rows(first: Tensor, second: Tensor) -> Tensor:
    """Put each image of `second` right of its partner in `first`: B x 3 x R x 2R."""
    return torch.cat([first.float().cpu(), second.float().cpu()], dim=-1)


def png_bytes(image: Image.Image) -> bytes:
    """A PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG aside and rename it."""
    write_bytes(png_bytes(image), path)


def sample_path(run_dir: Path, step: int) -> Path:
    """Where a stage writes its picture of a step."""
    return run_dir / "samples" / f"step_{step:08d}.png"


# Pages


def write_gallery(
    path: Path, title: str, pictures: Iterable[tuple[bytes, str]], settings: Mapping[str, Any]
) -> None:
    """Write a page aside and rename it.

    Args:
        pictures: (PNG file's bytes, caption) of each image.
        settings: shown above them, floats by six digits.
    """
    # Captions and settings come from anywhere: all text is escaped.
    shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in settings.items()}
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in shown.items()
    )
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(data).decode()}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>\n'
        for data, caption in pictures
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n"
        f"<dl>\n{rows}</dl>\n<main>\n{figures}</main>\n</body>\n</html>\n"
    )
    write_text(page, path)


def escape(value: Any) -> str:
    """Text in which nothing is markup; what no page can hold (lone surrogates) is replaced."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))
