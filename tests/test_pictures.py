"""training/pictures.py: pixels, layout of the caption grid, files that are whole or not there."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.layers import to_pil
from training.pictures import (
    CAPTION_LINES,
    LINE_HEIGHT,
    MARGIN,
    caption_grid,
    pair_rows,
    sample_path,
    save_png,
)


def pixels(image):
    return np.asarray(image)


def test_image_becomes_its_rounded_and_clamped_bytes_with_its_channels_and_directions():
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 128 / 255, 1.0, 7.0])
    assert pixels(to_pil(values.expand(3, 2, 7)))[0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]
    image = torch.zeros(3, 4, 6)
    image[0, 1, 5], image[2, 3, 0] = 1, 1
    array = pixels(to_pil(image))
    assert array.shape == (4, 6, 3) and array.sum() == 2 * 255
    assert array[1, 5].tolist() == [255, 0, 0] and array[3, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (5, 4, 2), (3, 8, 1)])
def test_grid_has_a_cell_for_each_image_and_room_for_captions(number, columns, rows):
    sheet = caption_grid(torch.zeros(number, 3, 128, 128), ["x"] * number, columns)
    cell_height = 128 + CAPTION_LINES * LINE_HEIGHT + MARGIN
    assert sheet.size == (columns * (128 + MARGIN) + MARGIN, rows * cell_height + MARGIN)


@pytest.mark.parametrize(("side", "shown"), [(16, 128), (100, 200), (256, 256)])
def test_small_images_are_enlarged_by_a_whole_factor(side, shown):
    sheet = caption_grid(torch.zeros(1, 3, side, side), [""], 1)
    black = (pixels(sheet) == 0).all(axis=-1)
    assert black.sum() == shown**2 and black[MARGIN : MARGIN + shown, MARGIN : MARGIN + shown].all()


def test_images_stand_row_by_row_with_their_captions_below():
    images = torch.stack([torch.full((3, 128, 128), value) for value in (0.2, 0.4, 0.6)])
    sheet = pixels(caption_grid(images, ["", "", "a caption"], 2))
    width, height = 128 + MARGIN, 128 + CAPTION_LINES * LINE_HEIGHT + MARGIN
    for (row, column), value in (((0, 0), 51), ((0, 1), 102), ((1, 0), 153)):
        y, x = MARGIN + row * height, MARGIN + column * width
        assert (sheet[y : y + 128, x : x + 128] == value).all()
        written = (sheet[y + 128 : y + height - MARGIN, x : x + 128] != 255).any()
        assert written == ((row, column) == (1, 0))
    assert (sheet[MARGIN + height :, MARGIN + width :] == 255).all()  # the empty fourth cell


def test_long_captions_stay_inside_their_cell():
    array = pixels(caption_grid(torch.zeros(2, 3, 128, 128), ["many words " * 60, ""], 2))
    below_the_right_image = array[MARGIN + 128 :, 2 * MARGIN + 128 + MARGIN // 2 :]
    assert (below_the_right_image == 255).all() and (array[-MARGIN // 2 :] == 255).all()


def test_pairs_stand_side_by_side():
    first, second = torch.rand(2, 5, 3, 8, 8)
    pairs = pair_rows(first.double(), second)
    assert pairs.shape == (5, 3, 8, 16) and pairs.dtype == torch.float32
    torch.testing.assert_close(pairs[..., :8], first)
    assert torch.equal(pairs[..., 8:], second)


def test_png_whose_writing_stops_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (4, 4), "red"), path)

    def break_off(file):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", break_off)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.new("RGB", (4, 4), "blue"), path)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.new("RGB", (4, 4), "blue"), tmp_path / "y.png")
    monkeypatch.undo()
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_sample_paths_sort_by_step(tmp_path):
    paths = [sample_path(tmp_path, step) for step in (0, 9, 10, 99_999, 100_000)]
    assert paths == sorted(paths) and len(set(paths)) == 5
    assert all(path.parent == tmp_path / "samples" and path.suffix == ".png" for path in paths)
