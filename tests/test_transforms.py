"""data/transforms.py: hostile images, and crops against resize-then-crop."""

import io

import numpy as np
import pytest
from PIL import Image

from data import transforms
from data.shards import BadSample
from data.transforms import center_crop, decode_image, train_crop


def photo(width, height, seed=0):
    """A smooth RGB image with all corners different."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


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


def test_transparent_pixels_show_the_background():
    image = photo(8, 8).convert("RGBA")
    image.putalpha(Image.new("L", (8, 8), 0))
    assert np.unique(np.asarray(decode_image(encoded(image, "PNG")))).tolist() == [255]
    decoded = np.asarray(decode_image(encoded(image, "PNG"), background=(10, 20, 30)))
    assert decoded.reshape(-1, 3).max(0).tolist() == decoded.reshape(-1, 3).min(0).tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_shows_the_background(mode):
    image = Image.new(mode, (4, 4), 0 if mode != "RGB" else (0, 0, 0))
    if mode == "P":
        image.putpalette([1, 2, 3])
    data = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert np.unique(np.asarray(decode_image(data, background=(9, 9, 9)))).tolist() == [9]


def test_a_palette_with_alpha_per_colour_is_composited():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    decoded = decode_image(encoded(image, "PNG", transparency=bytes([255, 0])))
    assert np.asarray(decoded).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_cmyk_becomes_rgb():
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = np.asarray(decoded).reshape(-1, 3).mean(0)
    assert decoded.mode == "RGB" and red > 200 and green < 60 and blue < 60


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


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_truncated_image_is_a_bad_sample(format):
    data = encoded(photo(200, 200), format)
    for length in (0, 1, 20, len(data) // 2):
        with pytest.raises(BadSample, match="^image: unreadable"):
            decode_image(data[:length])


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


def test_formats_that_run_programs_and_text_are_refused():
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<html>404</html>"):
        with pytest.raises(BadSample, match="unreadable"):
            decode_image(data)


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
    image = image.resize(tuple(side * size // shorter for side in image.size), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (40, 40), (20, 33), (300, 301)])
def test_the_centre_crop_equals_resize_then_crop(shape):
    image, size = photo(*shape), 32
    width, height = (side * size // min(shape) for side in shape)
    expected = resize_then_crop(image, size, round((width - size) / 2), round((height - size) / 2))
    got = center_crop(image, size)
    assert got.shape == (3, 32, 32) and got.dtype == np.uint8 and got.flags.c_contiguous
    assert np.abs(got.astype(np.int16) - expected).max() <= 1


def test_an_image_of_the_right_size_is_not_resampled():
    assert np.array_equal(center_crop(photo(32, 32), 32), np.asarray(photo(32, 32)).transpose(2, 0, 1))
    assert np.array_equal(center_crop(photo(40, 32), 32), np.asarray(photo(40, 32))[:, 4:36].transpose(2, 0, 1))


def test_random_crops_reach_both_ends_and_nothing_else():
    image = photo(35, 32)
    options = {np.asarray(image)[:, left : left + 32].transpose(2, 0, 1).tobytes() for left in range(4)}
    rng = np.random.default_rng(0)
    seen = {train_crop(image, 32, rng, True, 0.0).tobytes() for _ in range(100)}
    assert seen == options


def test_flip_probability_decides_the_flip():
    image, rng = photo(32, 32), np.random.default_rng(0)
    plain = center_crop(image, 32)
    assert np.array_equal(train_crop(image, 32, rng, True, 0.0), plain)
    flipped = train_crop(image, 32, rng, True, 1.0)
    assert np.array_equal(flipped, plain[:, :, ::-1]) and flipped.flags.c_contiguous
    count = sum(np.array_equal(train_crop(image, 32, rng, True, 0.5), plain) for _ in range(200))
    assert 70 < count < 130


def test_without_random_crop_and_flip_the_training_crop_is_the_centre():
    image = photo(70, 50)
    assert np.array_equal(train_crop(image, 32, np.random.default_rng(0), False, 0.0), center_crop(image, 32))


def test_a_strip_of_one_pixel_is_cropped_without_a_giant_image():
    for shape in ((1, 20000), (20000, 1)):
        assert train_crop(Image.new("RGB", shape), 256, np.random.default_rng(0), True, 0.5).shape == (3, 256, 256)
