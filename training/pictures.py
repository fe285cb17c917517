"""Pictures that people look at: grids of images with captions. PNGs are written whole."""

import io
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.files import write_bytes
from modeling.pipeline import to_pil

CELL_WIDTH_MIN = (
    128  # pixels; smaller images are enlarged by a whole factor so that captions are readable
)
MARGIN, LINE_HEIGHT, CAPTION_LINES = 6, 13, 3
FONT_SIZE, CHARACTER_WIDTH = 11, 6


def caption_grid(images: Tensor, captions: list[str], columns: int) -> Image.Image:
    """Images with their captions below, row by row.

    Args:
        images: B x 3 x R x W in [0, 1].
        captions: B strings; wrapped to three lines and cut.
    """
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


def png_bytes(image: Tensor) -> bytes:
    """3 x R x R in [0, 1] -> a PNG file's content."""
    return encode_png(to_pil(image))


def encode_png(image: Image.Image) -> bytes:
    """A PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG aside and rename it."""
    write_bytes(encode_png(image), path)


def sample_path(run_dir: Path, step: int) -> Path:
    """Where a stage writes its picture of a step."""
    return run_dir / "samples" / f"step_{step:08d}.png"
