"""data/transforms.py: hostile images, and crops against resize-then-crop."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data import transforms
from data.samples import BadSample, SampleDraws
from data.transforms import Picture, center_crop, decode_image, load_picture, open_image, train_crop

torch.set_num_threads(1)


def photo(width, height, seed=0):
    """A smooth RGB image with all corners different."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def center(image, size, resize="exact"):
    """The centre crop of an image that was decoded whole."""
    return center_crop(Picture(image, *image.size), size, resize)


def train(image, size, random_crop, flip_probability, epoch=0, resize="exact"):
    picture = Picture(image, *image.size)
    return train_crop(
        picture, size, SampleDraws(0, epoch, "key"), random_crop, flip_probability, resize
    )


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_jpeg_and_png_decode_to_rgb():
    image = photo(40, 30)
    decoded = decode_image(encoded(image, "PNG"))
    assert decoded.mode == "RGB" and np.array_equal(decoded, image)
    near = np.asarray(decode_image(encoded(image, "JPEG", quality=95)), np.int16)
    assert np.abs(near - np.asarray(image, np.int16)).mean() < 6


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    decoded = decode_image(encoded(photo(40, 30), "PNG", exif=exif))
    assert np.array_equal(decoded, photo(40, 30).transpose(Image.Transpose.ROTATE_270))


def transparent(mode):
    """A PNG of transparent pixels: by an alpha channel or a transparent colour."""
    if mode == "RGBA":
        return encoded(Image.new("RGBA", (4, 4)), "PNG")
    image = Image.new(mode, (4, 4), 0)
    if mode == "P":
        image.putpalette([1, 2, 3])
    return encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA"])
def test_transparent_pixels_show_the_background(mode):
    data = transparent(mode)
    assert np.unique(np.asarray(decode_image(data))).tolist() == [255]
    decoded = np.asarray(decode_image(data, background=(10, 20, 30)))
    assert np.unique(decoded.reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]


def test_a_palette_with_alpha_per_colour_is_composited():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    decoded = decode_image(encoded(image, "PNG", transparency=bytes([255, 0])))
    assert np.asarray(decoded).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_cmyk_becomes_rgb_with_adobes_inversion():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in data  # it says that the stored values are inverted
    red, green, blue = np.asarray(decode_image(data)).reshape(-1, 3).mean(0)
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize(
    ("format", "mode"), [("WEBP", "RGB"), ("WEBP", "RGBA"), ("AVIF", "RGB"), ("TIFF", "RGB")]
)
def test_other_formats_decode(format, mode):
    decoded = decode_image(encoded(photo(40, 30).convert(mode), format))
    assert (
        decoded.size == (40, 30)
        and np.abs(np.asarray(decoded, np.int16) - np.asarray(photo(40, 30))).mean() < 6
    )


def test_sixteen_bit_colour_keeps_its_high_bytes():
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # 2 x 1 pixels, 16 bits, RGB
    row = b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x0101, 0x4000, 0xC000)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    decoded = decode_image(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.asarray(decoded).tolist() == [[[0, 128, 255], [1, 64, 192]]]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_broken_metadata_does_not_cost_the_image(exif):
    assert decode_image(encoded(photo(40, 30), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(format):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), format)))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255] and decoded.shape == (1, 4, 3)


def test_greyscale_bilevel_and_animations_decode():
    frames = [photo(6, 6, seed).convert("L") for seed in range(2)]
    for data in (
        encoded(photo(6, 6).convert("L"), "JPEG"),
        encoded(photo(6, 6).convert("1"), "PNG"),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    ):
        decoded = decode_image(data)
        assert decoded.mode == "RGB" and decoded.size == (6, 6)


BROKEN = {
    "empty": b"",
    "a few bytes": encoded(photo(200, 200), "JPEG")[:20],
    "half a JPEG": encoded(photo(200, 200), "JPEG")[:2000],
    "half a PNG": encoded(photo(200, 200), "PNG")[:2000],
    "a format that runs programs": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "text": b"<html>404</html>",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_image_is_a_bad_sample(kind):
    with pytest.raises(BadSample, match="^image: unreadable"):
        decode_image(BROKEN[kind])


def test_flipped_bytes_give_an_image_or_a_bad_sample():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP"):
        data = np.frombuffer(encoded(photo(40, 40), format), np.uint8)
        for _ in range(30):
            broken = data.copy()
            broken[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            try:
                assert decode_image(broken.tobytes()).mode == "RGB"
            except BadSample as error:
                assert error.reason.startswith("image: ") and len(error.reason) < 60


def test_a_decompression_bomb_is_refused_before_its_pixels_are_made():
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    for side in (9000, 60000):  # over our limit, over Pillow's own
        bomb[18:26] = side.to_bytes(4, "little") * 2
        with pytest.raises(BadSample, match="too many pixels"):
            decode_image(bytes(bomb))


def test_the_pixel_limit_is_inclusive(monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 64)
    assert decode_image(encoded(Image.new("RGB", (8, 8)), "PNG")).size == (8, 8)
    with pytest.raises(BadSample):
        decode_image(encoded(Image.new("RGB", (13, 5)), "PNG"))


def resize_then_crop(image, size, left, top):
    shorter = min(image.size)
    image = image.resize(
        tuple(side * size // shorter for side in image.size), Image.Resampling.BICUBIC
    )
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (40, 40), (20, 33), (300, 301), (40, 160)])
def test_the_centre_crop_equals_resize_then_crop(shape):
    image, size = photo(*shape), 32
    width, height = (side * size // min(shape) for side in shape)
    expected = resize_then_crop(image, size, round((width - size) / 2), round((height - size) / 2))
    got = center(image, size)
    assert got.shape == (3, 32, 32) and got.dtype == np.uint8 and got.flags.c_contiguous
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_an_image_of_the_right_size_is_not_resampled(resize):
    assert np.array_equal(
        center(photo(32, 32), 32, resize), np.asarray(photo(32, 32)).transpose(2, 0, 1)
    )
    assert np.array_equal(
        center(photo(40, 32), 32, resize), np.asarray(photo(40, 32))[:, 4:36].transpose(2, 0, 1)
    )


def test_random_crops_reach_both_ends_and_nothing_else():
    image = photo(35, 32)
    options = {
        np.asarray(image)[:, left : left + 32].transpose(2, 0, 1).tobytes() for left in range(4)
    }
    seen = {train(image, 32, True, 0.0, epoch).tobytes() for epoch in range(100)}
    assert seen == options


def test_flip_probability_decides_the_flip():
    image = photo(32, 32)
    plain = center(image, 32)
    assert np.array_equal(train(image, 32, True, 0.0), plain)
    flipped = train(image, 32, True, 1.0)
    assert np.array_equal(flipped, plain[:, :, ::-1]) and flipped.flags.c_contiguous
    count = sum(np.array_equal(train(image, 32, True, 0.5, epoch), plain) for epoch in range(200))
    assert 70 < count < 130


def test_without_random_crop_and_flip_the_training_crop_is_the_centre():
    image = photo(70, 50)
    assert np.array_equal(train(image, 32, False, 0.0), center(image, 32))


@pytest.mark.parametrize("resize", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (300, 30000), (1, 1)])
def test_strips_and_dots_are_cropped_without_a_giant_image(shape, resize):
    assert train(Image.new("RGB", shape), 256, True, 0.5, resize=resize).shape == (3, 256, 256)


# smaller decoding


def textured(width, height, seed=0):
    """A photo-like image: noise at all scales, weaker at the finer ones."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        layers = [
            Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        total += (
            np.stack([np.asarray(layer) for layer in layers], axis=-1) * 60 / (cells / 4) ** 0.5
        )
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def torchvision_route(data, size):
    """What fast decoding stands in for, 3 x size x size in 0..255."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = v2.functional.resize(image, [size], v2.InterpolationMode.BICUBIC, antialias=True)
    return (
        np.asarray(v2.functional.center_crop(image, [size])).transpose(2, 0, 1).astype(np.float32)
    )


@pytest.mark.parametrize("with_torch", [True, False])
@pytest.mark.parametrize("shape", [(301, 220), (250, 257), (1001, 603)])
def test_fast_crops_of_photos_are_near_those_of_torchvision(monkeypatch, shape, with_torch):
    monkeypatch.setattr(transforms, "TORCH_IS_FASTER", with_torch)
    data = encoded(textured(*shape), "JPEG", quality=90)
    picture = load_picture(open_image(data), (255, 255, 255), for_size=64)
    assert picture.image.width < shape[0] and min(picture.image.size) >= 96
    assert (picture.width, picture.height) in [
        (shape[0] / scale, shape[1] / scale) for scale in (2, 4)
    ]
    difference = np.abs(center_crop(picture, 64, "fast") - torchvision_route(data, 64)).mean()
    assert 0 < difference < 1.5


def test_exact_crops_are_those_of_torchvision():
    data = encoded(textured(301, 220), "JPEG", quality=90)
    crop = center_crop(load_picture(open_image(data), (255, 255, 255)), 64, "exact")
    assert np.array_equal(crop, torchvision_route(data, 64))


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (300, 301), (64, 33)])
def test_torch_resizes_like_pillow(monkeypatch, shape):
    monkeypatch.setattr(transforms, "TORCH_IS_FASTER", True)
    for seed in range(3):
        exact, fast = (
            train(textured(*shape, seed), 32, True, 0.5, seed, resize)
            for resize in ("exact", "fast")
        )
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
        data = encoded(
            photo(*shape), format, **({"append_images": [photo(8, 8)]} if format == "MPO" else {})
        )
        assert load_picture(open_image(data), (0, 0, 0), for_size=size).image.size == expected


def whole_and_small(data, size=64):
    """A photo decoded whole and smaller, and the mean difference of their crops."""
    whole, small = (load_picture(open_image(data), (255, 255, 255), n) for n in (0, size))
    crops = [center_crop(small, size, "fast"), center_crop(whole, size, "exact")]
    return whole, small, np.abs(np.subtract(*crops, dtype=np.int16)).mean()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_photos_are_decoded_smaller_too(mode):
    data = encoded(textured(301, 220).convert(mode), "JPEG", quality=95)
    _, small, difference = whole_and_small(data)
    assert small.image.size == (151, 110) and small.image.mode == "RGB" and difference < 1.5


def test_a_photo_that_lies_on_its_side_is_decoded_smaller_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(textured(304, 216), "JPEG", quality=95, exif=exif)
    whole, small, difference = whole_and_small(data)
    assert (whole.width, whole.height) == (216, 304) and (small.width, small.height) == (108, 152)
    assert difference < 1.5
    # 150.5 px: turned, the half would be at the top
    data = encoded(textured(301, 216), "JPEG", quality=95, exif=exif)
    assert load_picture(open_image(data), (255, 255, 255), 64).image.size == (216, 301)


def test_a_truncated_photo_that_would_be_decoded_smaller_is_a_bad_sample():
    data = encoded(textured(400, 400), "JPEG")
    image = open_image(data[: len(data) // 2])
    assert image.size == (400, 400)
    with pytest.raises(BadSample, match=r"^image: unreadable \(OSError\)$"):
        load_picture(image, (255, 255, 255), for_size=64)
