"""Bytes -> RGB image -> square crop: uint8 in [0, 255], 3 x size x size; training divides by 255.

What an image is, Pillow decides by its bytes, not by its name. Phones' HEIC needs pillow-heif.

Resizing is bicubic with antialiasing, in two ways:
exact  the whole image is decoded and Pillow resizes: the very pixels of torchvision's Resize + crop
       of a Pillow image, by which published reconstruction numbers are measured.
fast   JPEGs far larger than the crop are decoded at 1/2, 1/4 or 1/8 of their size, which saves most
       of the inverse DCT, and torch resizes (AVX2). Photos of 900-1300 px at 256 px: 0.3/255 from
       exact on average, dense noise 0.9/255; without the smaller decoding 0.003/255. Enlarging is
       exact.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from data.samples import BadSample, SampleDraws

Resize = Literal["fast", "exact"]

MAX_PIXELS = 1 << 26  # 8192 x 8192; above it a file is taken for a decompression bomb
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()  # loads Pillow's own formats
USUAL_FORMATS = "JPEG PNG WEBP GIF BMP TIFF JPEG2000 PPM AVIF HEIF"
# last TGA, which has no signature
OTHER_FORMATS = "ICO ICNS QOI PCX DCX SGI SUN DIB XBM XPM MSP TGA"
# named, because of what else Pillow opens much is no picture: documents and drawings, for which it
# runs other programs (EPS, WMF), videos (MPEG, FLI), textures (DDS), measurements (FITS), files
# whose picture may be missing or a preview (PSD, PCD)
FORMATS = tuple(
    name
    for name in f"{USUAL_FORMATS} {OTHER_FORMATS}".split()
    if name in Image.OPEN  # AVIF needs Pillow 11.2
)
WITHOUT_SIGNATURE = ("TGA",)  # anything may begin like one
HEIF_KEYS = ("heic", "heics", "heif", "heifs", "hif")
# extensions under which a sample's image is looked for, in this order. After the usual ones all
# others of FORMATS, but for pfm, which holds floats; and what browsers call a JPEG
USUAL_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif")
OTHER_KEYS = {"jif", "jfi", "pjp", "pjpeg"} | {
    extension[1:]
    for extension, name in Image.registered_extensions().items()
    if name in (*FORMATS, "MPO")
}
IMAGE_KEYS = (*USUAL_KEYS, *sorted(OTHER_KEYS - {*USUAL_KEYS, "pfm"}))
# fast: the shorter side keeps so many times the crop's size. Less would alias: what is then still
# to be resized away must lie below the frequencies that the smaller decoding cuts off.
SPARE = 1.5
# longer / shorter side; up to it, what the crop leaves out is resized with it: a 1 x 10,000 strip
# would become a 256 x 2,560,000 image
MAX_WHOLE_RATIO = 4
# without AVX2, torch takes twice as long as Pillow
TORCH_IS_FASTER = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
UNDEFINED_RANGE = "image: grey of 32 bits or with a sign"
SIGNED = 2  # of SAMPLEFORMAT
# their range is not defined, or Pillow has no conversion
UNDEFINED_MODES = {"F": "float", "LAB": "CIELAB"}


class Picture(NamedTuple):
    """RGB image, and its size in pixels: fractional if decoded smaller, 1001 / 2 = 500.5."""

    image: Image.Image
    width: float
    height: float


# ----------------------------------------------------------------------------------------- decoding


def decode_image(data: bytes, background: Sequence[int] = (255, 255, 255)) -> Image.Image:
    """Any image file -> RGB, upright by EXIF orientation, transparency on `background` (0..255).

    16-bit grey is scaled to 8 bits; of an animation the first frame counts. BadSample: unreadable,
    over MAX_PIXELS, or of a kind whose colours are not defined.
    """
    return load_picture(open_image(data), background).image


def open_image(data: bytes) -> Image.Image:
    """An image of known size, its pixels not yet decoded. BadSample: none, or over MAX_PIXELS."""
    with _errors_as_bad_samples():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("image: too many pixels")
        return image


def load_picture(image: Image.Image, background: Sequence[int], for_size: int = 0) -> Picture:
    """Decode what open_image gives; RGB as in decode_image. BadSample: unreadable.

    for_size: a JPEG may be decoded smaller, if its shorter side keeps SPARE x for_size pixels. 0:
    whole.
    """
    drafted = None
    with _errors_as_bad_samples():
        # a part of a pixel lies at the right or the bottom, and a turned image must have none: it
        # would lie elsewhere
        if (
            for_size
            and image.format in ("JPEG", "MPO")
            and (_orientation(image) == 1 or image.width % 8 == image.height % 8 == 0)
        ):
            drafted = image.draft(None, (int(SPARE * for_size),) * 2)
        if image.format == "TIFF" and SIGNED in image.tag_v2.get(SAMPLEFORMAT, ()):
            raise BadSample(UNDEFINED_RANGE)
        _fit_transparency(image)
        ignores_alpha = image.format == "TGA" and _tga_alpha_bits(image) == 0
        image.load()
        width, height = drafted[1][2:] if drafted else image.size
        # only now: Pillow has turned TIFFs, and taken the tag off them
        orientation = _orientation(image)
        if orientation >= 5:
            width, height = height, width
        with suppress(Exception):  # of metadata that cannot be written anew: the pixels are turned
            ImageOps.exif_transpose(image, in_place=True)
        rgb = image.convert("RGB") if ignores_alpha else _to_rgb(image, background)
        return Picture(rgb, width, height)


@contextmanager
def _errors_as_bad_samples() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata, one per file
            yield
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("image: too many pixels") from None
    except Exception as error:  # Pillow raises a dozen types on hostile bytes; they are the reason
        raise BadSample(f"image: unreadable ({type(error).__name__})") from None


def _orientation(image: Image.Image) -> int:
    """1..8; 1 also for broken metadata, whose pixels may be fine."""
    with suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in range(1, 9) else 1
    return 1


def _fit_transparency(image: Image.Image) -> None:
    """PNG names its transparent grey in the file's bits, Pillow compares it with 8 of them."""
    if image.format != "PNG" or "transparency" not in image.info or not image.tile:
        return
    stored = image.tile[0][3]
    if stored in ("L;2", "L;4"):
        image.info["transparency"] *= 255 // (3 if stored == "L;2" else 15)
    if stored == "RGB;16B":
        raise BadSample("image: a transparent colour of 16 bits")


def _tga_alpha_bits(image: Image.Image) -> int:
    """Of a pixel; 0: what Pillow takes for its alpha is of no meaning, and often all zeros."""
    image.fp.seek(17)
    return image.fp.read(1)[0] & 15


def _to_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_to_rgb(image, background)
    if image.mode in UNDEFINED_MODES:
        raise BadSample(f"image: {UNDEFINED_MODES[image.mode]} pixels")
    if image.mode == "La":  # Pillow would drop the alpha
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """Grey of 9 to 16 bits: modes "I;16", "I;16B", ..., and "I" with 16-bit content."""
    white, is_negative = 65535, False
    if image.format == "TIFF":
        if image.mode == "I":
            raise BadSample(UNDEFINED_RANGE)
        # neither of which Pillow looks at
        white = (1 << image.tag_v2[BITSPERSAMPLE][0]) - 1
        is_negative = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, 0) == 0
    values = np.asarray(image).astype(np.int64).clip(0, white)
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    rgb = np.repeat((255 - grey if is_negative else grey)[:, :, None], 3, axis=2)
    if "transparency" in image.info:
        rgb[values == image.info["transparency"]] = background
    return Image.fromarray(rgb)


# -------------------------------------------------------------------------------------------- crops


def train_crop(
    picture: Picture,
    size: int,
    draws: SampleDraws,
    random_crop: bool,
    flip_probability: float,
    resize: Resize,
) -> np.ndarray:
    """3 x size x size uint8: shorter side to `size`, random or centre crop, horizontal flip."""
    place = (draws.crop_x, draws.crop_y) if random_crop else None
    pixels = crop(picture, size, resize, place)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if draws.flip < flip_probability else pixels


def crop(
    picture: Picture, size: int, resize: Resize, place: tuple[float, float] | None = None
) -> np.ndarray:
    """3 x size x size uint8: shorter side to `size`, a part of the longer one.

    place: of the corner among all that it can have, x and y in [0, 1); None: the centre.
    """
    shorter, longer = sorted((picture.width, picture.height))
    width, height = (int(size * side // shorter) for side in (picture.width, picture.height))
    if place is None:
        left, top = round((width - size) / 2), round((height - size) / 2)
    else:
        left, top = int(place[0] * (width - size + 1)), int(place[1] * (height - size + 1))
    square = (left, top, left + size, top + size)
    is_strip = longer > MAX_WHOLE_RATIO * shorter
    if shorter == size:
        image = picture.image.crop(square)
    elif not is_strip and (resize == "exact" or shorter < size):
        image = picture.image.resize((width, height), Image.Resampling.BICUBIC).crop(square)
    elif not is_strip and TORCH_IS_FASTER:
        pixels = _resize_by_torch(picture, width, height)
        return pixels[:, top : top + size, left : left + size].contiguous().numpy()
    else:
        # only the square; up to 3/255 from exact, as Pillow may resize the axes in another order
        scale_x, scale_y = picture.width / width, picture.height / height
        right = min((left + size) * scale_x, picture.width)
        bottom = min((top + size) * scale_y, picture.height)
        box = (left * scale_x, top * scale_y, right, bottom)
        image = picture.image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # 3 x size x size


def _resize_by_torch(picture: Picture, width: int, height: int) -> torch.Tensor:
    """3 x height x width uint8 by vector instructions on bytes; at most 1/255 from Pillow."""
    pixels = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1)[None]  # 1 x 3 x H x W
    # The scale itself, as the decoded pixels may reach beyond the image; torch rounds the size
    # down, hence the 1e-6
    scale = ((height + 1e-6) / picture.height, (width + 1e-6) / picture.width)
    return torch.nn.functional.interpolate(
        pixels, scale_factor=scale, mode="bicubic", antialias=True
    )[0]
