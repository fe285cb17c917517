"""data/transforms.py: hostile images, and crops against resize-then-crop."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sources import encode
from torchvision.transforms import v2

from data import transforms
from data.samples import BadSample, SampleDraws
from data.transforms import (
    IMAGE_KEYS,
    Picture,
    crop,
    decode_image,
    load_picture,
    open_image,
    train_crop,
)


def photo(width, height, seed=0):
    """A smooth RGB image with all corners different."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def center(image, size, resize="exact"):
    """The centre crop of an image that was decoded whole."""
    return crop(Picture(image, *image.size), size, resize)


def train(image, size, random_crop, flip_probability, epoch=0, resize="exact"):
    picture = Picture(image, *image.size)
    return train_crop(
        picture, size, SampleDraws(0, epoch, "key"), random_crop, flip_probability, resize
    )


# what a file shows


UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}  # by orientation: what the tag says of the stored H x W x 3 pixels


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("MPO", {"quality": 95, "append_images": [photo(8, 8)]}),
        ("PNG", {}),
        ("AVIF", {"quality": 95}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP with XMP", {"lossless": True}),
    ],
)
def test_images_are_upright_whatever_the_format(format, options):
    for orientation, turn in UPRIGHT.items():
        tag = {"exif": exif_of(orientation)}
        if "XMP" in format:
            tag = {"xmp": b'<rdf:Description tiff:Orientation="%d"/>' % orientation}
        data = encode(photo(40, 32), format.split()[0], **options, **tag)
        picture = load_picture(open_image(data), (0, 0, 0), for_size=16)
        expected = turn(np.asarray(photo(40, 32), np.int16))
        assert picture.image.size == (picture.width, picture.height) == expected.shape[1::-1]
        assert np.abs(np.asarray(picture.image) - expected).mean() < 4


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_broken_metadata_does_not_cost_the_image():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert decode_image(encode(photo(40, 30), "JPEG", exif=exif)).size == (40, 30)


def png(bits, colour, row, transparent=()):
    """A PNG of one row of packed bytes; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    width = len(row) * 8 // bits // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))]
    if transparent:
        parts.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bits, photometric, row, width, order="<", **tags):
    """A TIFF of one row of packed bytes; bits: of each sample; tags: t339=1, ..."""
    entries = {256: [width], 257: [1], 258: bits, 259: [1], 262: [photometric], 277: [len(bits)]}
    entries |= {278: [1], 279: [len(row)]} | {int(name[1:]): [tags[name]] for name in tags}
    entries[273] = [8 + 2 + 12 * (len(entries) + 1) + 4]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, values in sorted(entries.items()):
        head += struct.pack(order + "HHIHH", tag, 3, len(values), *values, *[0] * (2 - len(values)))
    return head + bytes(4) + row


def shorts(order, *values):
    return struct.pack(f"{order}{len(values)}H", *values)


def palette(*transparency):
    """A PNG of a red and a green pixel, transparent like this."""
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    return encode(image, "PNG", transparency=bytes(transparency))


def tga(alpha_bits, *row):
    """A TGA of one row of 32-bit pixels, BGRA."""
    width = len(row) // 4
    return struct.pack("<3B5x4H2B", 0, 0, 2, 0, 0, width, 1, 32, alpha_bits) + bytes(row)


DCX = struct.pack("<3I", 987654321, 12, 0) + encode(Image.new("L", (2, 1), 9), "PCX")
XPM = b'/* XPM */\nstatic char *x[] = {\n"2 1 2 1",\n"a c #010203",\n"b c None",\n"ab"\n};\n'
GREYS = shorts("<", 0, 257, 32768, 65535)
COLOURS = shorts(">", 0, 0x8000, 0xFFFF, 0x0101, 0x4000, 0xC000)
BACKGROUND = (10, 20, 30)
RANGE = "image: grey of 32 bits or with a sign"
# what files hold -> what a viewer shows, by pixel (None: the background), or why they are dropped
SHOWN = {
    "PNG of 16 bits": (png(16, 0, GREYS[::-1]), [255, 128, 1, 0]),
    "of 16 bits, one transparent": (png(16, 0, GREYS[::-1], [257]), [255, 128, None, 0]),
    "of 2 bits, one transparent": (png(2, 0, b"\x1b", [2]), [0, 85, None, 255]),
    "of 16 bits and alpha": (png(16, 4, shorts(">", 0xFFFF, 0xFFFF, 9, 0)), [255, None]),
    "in colour of 16 bits": (png(16, 2, COLOURS), [(0, 128, 255), (1, 64, 192)]),
    "in colour of 16 bits, one transparent": (
        png(16, 2, COLOURS, (0, 0x8000, 0xFFFF)),
        "image: a transparent colour of 16 bits",
    ),
    "in colour, one transparent": (png(8, 2, bytes(range(6)), (0, 1, 2)), [None, (3, 4, 5)]),
    "with a transparent colour in its palette": (palette(255, 0), [(200, 0, 0), None]),
    "TIFF of 16 bits": (tiff([16], 1, GREYS, 4), [0, 1, 128, 255]),
    "of 16 bits, big end first": (tiff([16], 1, GREYS[::-1], 4, ">"), [255, 128, 1, 0]),
    "of 16 bits, white is zero": (tiff([16], 0, GREYS, 4), [255, 254, 127, 0]),
    "of 12 bits": (tiff([12], 1, b"\x00\x0f\xff", 2), [0, 255]),
    "of 8 bits, white is zero": (tiff([8], 0, b"\x00\x01\xff", 3), [255, 254, 0]),
    "with alpha": (tiff([8, 8], 1, bytes([200, 255, 200, 0]), 2, t338=2), [200, None]),
    "premultiplied by alpha": (tiff([8, 8], 1, bytes([200, 255, 0, 0]), 2, t338=1), [200, None]),
    "of 32 bits": (tiff([32], 1, bytes(8), 2), RANGE),
    "with a sign": (tiff([16], 1, GREYS, 4, t339=2), RANGE),
    "of 8 bits with a sign": (tiff([8], 1, b"\x00\x80", 2, t339=2), RANGE),
    "of CIELAB": (encode(Image.new("LAB", (4, 4)), "TIFF"), "image: CIELAB pixels"),
    "PGM of 10 bits": (b"P5 3 1 1023\n" + shorts(">", 0, 512, 1023), [0, 128, 255]),
    "PGM of 4 values": (b"P5 4 1 3\n\x00\x01\x02\x03", [0, 85, 170, 255]),
    "PBM": (b"P4 8 1\n\x55", [255, 0] * 4),
    "PFM": (b"Pf 1 1 -1.0\n" + bytes(4), "image: float pixels"),
    "TGA with alpha": (tga(8, 1, 2, 3, 255, 4, 5, 6, 0), [(3, 2, 1), None]),
    "TGA whose alpha has no bits": (tga(0, 1, 2, 3, 0, 4, 5, 6, 0), [(3, 2, 1), (6, 5, 4)]),
    "DCX": (DCX, [9, 9]),
    "SUN": (struct.pack(">8I", 1504078485, 1, 1, 24, 3, 3, 0, 0) + bytes([1, 2, 3]), [(1, 2, 3)]),
    "XPM": (XPM, [(1, 2, 3), None]),
    "JPEG 2000 of 16 bits": (
        encode(Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)), "JPEG2000"),
        [0, 1, 128, 255],
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_files_show_what_a_viewer_shows_or_are_dropped_by_name(kind):
    data, expected = SHOWN[kind]
    if isinstance(expected, str):
        with pytest.raises(BadSample, match=f"^{expected}$"):
            decode_image(data)
        return
    for background, options in (((255, 255, 255), ()), (BACKGROUND, (BACKGROUND,))):
        colours = [background if x is None else np.broadcast_to(x, 3) for x in expected]
        assert np.array_equal(decode_image(data, *options), [colours])


def test_cmyk_becomes_rgb_with_adobes_inversion():
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = np.asarray(decode_image(data)).reshape(-1, 3).mean(0)
    assert red > 200 and green < 60 and blue < 60


def test_image_keys_are_the_names_of_what_is_read():
    usual = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif")
    assert IMAGE_KEYS[: len(usual)] == usual and len({*IMAGE_KEYS}) == len(IMAGE_KEYS)
    assert {"jfif", "jpe", "pjpeg", "apng", "mpo", "j2k", "ppm", "pgm", "avifs"} < {*IMAGE_KEYS}
    assert {"ico", "icns", "qoi", "pcx", "dcx", "sgi", "ras", "dib", "xpm", "tga"} < {*IMAGE_KEYS}
    assert not {*IMAGE_KEYS} & {"eps", "pdf", "psd", "pfm", "dng", "txt", "json", "npy", "jxl"}
    assert not {*IMAGE_KEYS} & {"wmf", "dds", "fits", "mpg", "flc", "h5"}
    assert ("heic" in IMAGE_KEYS) == ("HEIF" in Image.OPEN)


BROKEN = [
    b"",
    b"<html>404</html>",
    *(encode(photo(200, 200), name)[:2000] for name in ("JPEG", "PNG")),
]
BROKEN += [encode(photo(200, 200), "JPEG")[:20]]
BROKEN += [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]  # for which Pillow runs a program


@pytest.mark.parametrize("data", BROKEN)
def test_what_is_no_image_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="^image: unreadable"):
        decode_image(data)


def test_a_decompression_bomb_is_refused_before_its_pixels_are_made(monkeypatch):
    bomb = bytearray(encode(Image.new("1", (8, 8)), "BMP"))
    for side in (9000, 60000):  # over our limit, over Pillow's own
        bomb[18:26] = side.to_bytes(4, "little") * 2
        with pytest.raises(BadSample, match="too many pixels"):
            decode_image(bytes(bomb))
    # the limit is inclusive
    monkeypatch.setattr(transforms, "MAX_PIXELS", 64)
    assert decode_image(encode(Image.new("RGB", (8, 8)), "PNG")).size == (8, 8)
    with pytest.raises(BadSample):
        decode_image(encode(Image.new("RGB", (13, 5)), "PNG"))


# crops


def planes(image, left=0, top=0, size=None):
    """3 x H x W of an image, or of a square of it."""
    box = (left, top, left + size, top + size) if size else None
    return np.asarray(image.crop(box)).transpose(2, 0, 1)


def torchvision_route(image, size):
    """Resize, then crop: what ours stand in for, 3 x size x size."""
    image = v2.functional.resize(image, [size], v2.InterpolationMode.BICUBIC, antialias=True)
    return planes(v2.functional.center_crop(image, [size]))


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (20, 33), (300, 301), (32, 32), (40, 32)])
def test_exact_centre_crops_are_those_of_torchvision(shape):
    got = center(photo(*shape), 32)
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    assert np.array_equal(got, torchvision_route(photo(*shape), 32))
    # as is the training crop without random crop and flip
    assert np.array_equal(train(photo(*shape), 32, False, 0.0), got)
    # what has the right size is not resampled
    if min(shape) == 32:
        assert np.array_equal(center(photo(*shape), 32, "fast"), got)


def test_random_crops_reach_both_ends_and_nothing_else():
    image = photo(35, 32)
    options = {planes(image, left, 0, 32).tobytes() for left in range(4)}
    assert {train(image, 32, True, 0.0, epoch).tobytes() for epoch in range(100)} == options


def test_flip_probability_decides_the_flip():
    image = photo(32, 32)
    plain = center(image, 32)
    assert np.array_equal(train(image, 32, True, 0.0), plain)
    flipped = train(image, 32, True, 1.0)
    assert np.array_equal(flipped, plain[:, :, ::-1]) and flipped.flags.c_contiguous
    count = sum(np.array_equal(train(image, 32, True, 0.5, epoch), plain) for epoch in range(200))
    assert 70 < count < 130


@pytest.mark.parametrize("resize", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (1, 1)])
def test_strips_and_dots_are_cropped_without_a_giant_image(shape, resize):
    assert train(Image.new("RGB", shape), 256, True, 0.5, resize=resize).shape == (3, 256, 256)


# smaller decoding


def textured(width, height, seed=0):
    """A photo-like image: noise at all scales, weaker at the finer ones."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[:, :, channel])
            layer = layer.resize((width, height), Image.Resampling.BICUBIC)
            total[:, :, channel] += np.asarray(layer) * 60 / (cells / 4) ** 0.5
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("with_torch", [True, False])
@pytest.mark.parametrize(
    ("mode", "shape"),
    [("RGB", (301, 220)), ("RGB", (1001, 603)), ("L", (301, 220)), ("CMYK", (301, 220))],
)
def test_fast_crops_of_photos_are_near_those_of_torchvision(monkeypatch, mode, shape, with_torch):
    monkeypatch.setattr(transforms, "TORCH_IS_FASTER", with_torch)
    data = encode(textured(*shape).convert(mode), "JPEG", quality=90)
    picture = load_picture(open_image(data), (255, 255, 255), for_size=64)
    assert picture.image.width < shape[0] and min(picture.image.size) >= 96
    assert picture.image.mode == "RGB"
    halves, quarters = ([side / scale for side in shape] for scale in (2, 4))
    assert [picture.width, picture.height] in (halves, quarters)
    expected = torchvision_route(decode_image(data), 64).astype(np.float32)
    assert 0 < np.abs(crop(picture, 64, "fast") - expected).mean() < 1.5


def test_torch_resizes_like_pillow(monkeypatch):
    monkeypatch.setattr(transforms, "TORCH_IS_FASTER", True)
    for seed, shape in enumerate([(97, 61), (61, 97), (300, 301), (64, 33)]):
        crop = (textured(*shape, seed), 32, True, 0.5, seed)
        exact, fast = train(*crop, "exact"), train(*crop, "fast")
        assert np.abs(fast.astype(np.int16) - exact).max() <= 1 and fast.flags.c_contiguous


def test_only_images_far_larger_than_the_crop_are_decoded_smaller():
    for format, shape, size, expected in (
        ("JPEG", (191, 300), 64, (191, 300)),
        ("JPEG", (192, 300), 64, (96, 150)),
        ("JPEG", (385, 1001), 64, (97, 251)),
        ("MPO", (385, 1001), 64, (97, 251)),
        ("PNG", (385, 1001), 64, (385, 1001)),
        ("JPEG", (385, 1001), 0, (385, 1001)),
    ):
        frames = {"append_images": [photo(8, 8)]} if format == "MPO" else {}
        data = encode(photo(*shape), format, **frames)
        assert load_picture(open_image(data), (0, 0, 0), for_size=size).image.size == expected


def test_a_photo_that_lies_on_its_side_is_decoded_smaller_upright():
    data = encode(textured(304, 216), "JPEG", quality=95, exif=exif_of(6))
    small = load_picture(open_image(data), (255, 255, 255), 64)
    assert (small.width, small.height) == (108, 152)
    expected = torchvision_route(decode_image(data), 64).astype(np.float32)
    assert np.abs(crop(small, 64, "fast") - expected).mean() < 1.5
    # 150.5 px: turned, the half would be at the top
    data = encode(textured(301, 216), "JPEG", quality=95, exif=exif_of(6))
    assert load_picture(open_image(data), (255, 255, 255), 64).image.size == (216, 301)


def test_a_truncated_photo_that_would_be_decoded_smaller_is_a_bad_sample():
    image = open_image(encode(textured(400, 400), "JPEG")[:20_000])
    with pytest.raises(BadSample, match=r"^image: unreadable \(OSError\)$"):
        load_picture(image, (255, 255, 255), for_size=64)
