"""training/pictures.py: pixels, layout of the caption grid, whole files; pages without code."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import shape_sample
from PIL import Image
from tiny_experiment import draw

from training.pictures import (
    CAPTION_LINES,
    LINE_HEIGHT,
    MARGIN,
    caption_grid,
    gallery,
    pair_rows,
    sample_path,
    save_png,
    to_pil,
    write_gallery,
)

WHITE = [255, 255, 255]
EVIL = """<script>alert(1)</script> " onerror='x' & é 😀"""
OWN_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "dl", "dt", "dd", "main"}
OWN_TAGS |= {"figure", "img", "figcaption"}


def pixels(image):
    return np.asarray(image)


def test_image_becomes_its_rounded_and_clamped_bytes():
    image = (
        torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 128 / 255, 1.0, 7.0])
        .view(1, 1, 7)
        .expand(3, 2, 7)
    )
    assert pixels(to_pil(image))[0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_image_keeps_its_channels_and_directions():
    image = torch.zeros(3, 4, 6)
    image[0, 1, 5], image[2, 3, 0] = 1, 1
    array = pixels(to_pil(image))
    assert array.shape == (4, 6, 3)
    assert (
        array[1, 5].tolist() == [255, 0, 0]
        and array[3, 0].tolist() == [0, 0, 255]
        and array.sum() == 2 * 255
    )


@pytest.mark.parametrize(
    ("number", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (3, 8, 1)]
)
def test_grid_has_a_cell_for_each_image_and_room_for_captions(number, columns, rows):
    sheet = caption_grid(torch.zeros(number, 3, 128, 128), ["x"] * number, columns)
    cell_height = 128 + CAPTION_LINES * LINE_HEIGHT + MARGIN
    assert sheet.size == (columns * (128 + MARGIN) + MARGIN, rows * cell_height + MARGIN)


@pytest.mark.parametrize(
    ("side", "shown"), [(16, 128), (32, 128), (100, 200), (128, 128), (256, 256)]
)
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
    long = caption_grid(torch.zeros(2, 3, 128, 128), ["many words " * 60, ""], 2)
    array = pixels(long)
    assert (
        array[:, 2 * MARGIN + 128 + MARGIN // 2 :][MARGIN + 128 :] == 255
    ).all()  # below the right image
    assert (array[-MARGIN // 2 :] == 255).all()


def test_every_image_needs_a_caption():
    with pytest.raises(ValueError):
        caption_grid(torch.zeros(2, 3, 16, 16), ["one"], 2)


def test_pairs_stand_side_by_side():
    first, second = torch.rand(2, 5, 3, 8, 8)
    pairs = pair_rows(first.double(), second)
    assert pairs.shape == (5, 3, 8, 16) and pairs.dtype == torch.float32
    torch.testing.assert_close(pairs[..., :8], first)
    assert torch.equal(pairs[..., 8:], second)


def test_png_comes_back_as_it_was_in_folders_that_are_made(tmp_path):
    image = to_pil(torch.rand(3, 9, 7))
    path = tmp_path / "new" / "folder" / "x.png"
    save_png(image, path)
    assert (pixels(Image.open(path)) == pixels(image)).all()
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


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


# Pages


class Page(HTMLParser):
    """Tags with attributes, and text, as a browser sees them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self):
        """(bytes, alt text) of each image."""
        shown = [attrs for tag, attrs in self.tags if tag == "img"]
        return [(base64.b64decode(x["src"].partition(",")[2]), x["alt"]) for x in shown]


def test_images_captions_and_settings_are_in_the_page():
    pictures = [(shape_sample(number)["png"], f"caption {number}") for number in range(3)]
    page = Page(gallery("demo", pictures, {"steps": 20, "guidance": 2.0}))
    assert page.images() == pictures
    text = page.text.replace("\n", "")
    assert all(part in text for part in ("caption 0", "caption 2", "steps20", "guidance2"))


def test_text_stays_text():
    page = Page(gallery(EVIL, [(b"x", EVIL)], {EVIL: EVIL}))
    assert {tag for tag, _ in page.tags} == OWN_TAGS
    assert page.images() == [(b"x", EVIL)]
    assert page.text.count(EVIL) == 5  # title, heading, name, value, caption


def test_nothing_comes_from_elsewhere():
    text = gallery("demo", [(b"x", "a caption")], {"steps": 1})
    assert not re.search(r"https?:|//|url\(|@import|<link|<script|<base|<iframe", text)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in Page(text).tags


def test_a_caption_that_no_file_can_hold_is_written_all_the_same(tmp_path):
    write_gallery(tmp_path / "new" / "gallery.html", "demo", [(b"x", "a\ud800b")], {})
    assert "a?b" in (tmp_path / "new" / "gallery.html").read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gallery.html"]


def test_sample_writes_the_page_it_is_asked_for(chain, tmp_path):
    prompts, single = ["--prompts", "a red circle", "<b>"], tmp_path / "single"
    files = ["--output", tmp_path / "x.png", "--save-dir", single]
    draw(chain.folder, *prompts, *files, "--steps", "2", "--gallery", tmp_path / "gallery.html")
    page = Page((tmp_path / "gallery.html").read_text(encoding="utf-8"))
    shown = [file.read_bytes() for file in sorted(single.iterdir())]
    assert page.images() == list(zip(shown, ["a red circle", "<b>"]))
    assert "steps2" in page.text.replace("\n", "")
