"""Bytes -> RGB image -> square crop. Images leave as uint8 in [0, 255], 3 x size x size; the trainer divides by 255.

Resizing is bicubic with antialiasing (Pillow), and pixels match torchvision's Resize(size) + crop, by which published
reconstruction numbers are measured.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from data.shards import BadSample

MAX_PIXELS = 1 << 26  # 8192 x 8192; above it a file is taken for a decompression bomb
# named, because Pillow would otherwise also try formats that run other programs (EPS: ghostscript)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")


def decode_image(data: bytes, background: Sequence[int] = (255, 255, 255)) -> Image.Image:
    """Any image file -> RGB, upright by its EXIF orientation, transparency composited on `background` (0..255).

    16-bit grey is scaled to 8 bits; of an animation the first frame counts. BadSample: unreadable or over MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata, one per file
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("image: too many pixels")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image, background)
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("image: too many pixels") from None
    except Exception as error:  # Pillow's parsers raise a dozen types on hostile bytes; the type becomes the reason
        raise BadSample(f"image: unreadable ({type(error).__name__})") from None


def _to_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16", "I;16B", ..., and "I" with 16-bit content
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadSample("image: float pixels")  # their range is not defined
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def train_crop(
    image: Image.Image, size: int, rng: np.random.Generator, random_crop: bool, flip_probability: float
) -> np.ndarray:
    """RGB image -> 3 x size x size uint8: shorter side to `size`, random or centre crop, horizontal flip.

    Always takes three numbers from `rng`, so that one option does not change what another draws.
    """
    along_x, along_y, flip = rng.random(3)
    width, height = _resized(image, size)
    left, top = int(along_x * (width - size + 1)), int(along_y * (height - size + 1))
    pixels = _crop(image, size, left, top) if random_crop else center_crop(image, size)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if flip < flip_probability else pixels


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> 3 x size x size uint8: shorter side to `size`, the middle of the longer one."""
    width, height = _resized(image, size)
    return _crop(image, size, round((width - size) / 2), round((height - size) / 2))


def _resized(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height once the shorter side is `size`."""
    shorter = min(image.size)
    return size * image.width // shorter, size * image.height // shorter


def _crop(image: Image.Image, size: int, left: int, top: int) -> np.ndarray:
    """The square at (left, top) of the resized image.

    Only the square is computed: resizing a 1 x 10,000 strip first would make a 256 x 2,560,000 image.
    """
    if min(image.size) == size:
        image = image.crop((left, top, left + size, top + size))
    else:
        width, height = _resized(image, size)
        scale_x, scale_y = image.width / width, image.height / height
        right, bottom = min((left + size) * scale_x, image.width), min((top + size) * scale_y, image.height)
        box = (left * scale_x, top * scale_y, right, bottom)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # 3 x size x size
