"""training/pictures.py: the caption grid; pages that execute nothing."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tiny_experiment import draw

from modeling.layers import to_pil
from training.pictures import CAPTION_LINES, LINE_HEIGHT, MARGIN, caption_grid, write_gallery


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


@pytest.mark.parametrize(("side", "shown"), [(100, 200), (256, 256)])
def test_small_images_are_enlarged_by_a_whole_factor(side, shown):
    sheet = caption_grid(torch.zeros(1, 3, side, side), [""], 1)
    black = (pixels(sheet) == 0).all(axis=-1)
    assert black.sum() == shown**2 and black[MARGIN : MARGIN + shown, MARGIN : MARGIN + shown].all()


def test_images_stand_row_by_row_with_their_captions_below_each_in_its_cell():
    images = torch.stack([torch.full((3, 128, 128), value) for value in (0.2, 0.4, 0.6)])
    sheet = pixels(caption_grid(images, ["", "", "many words " * 60], 2))
    width, height = 128 + MARGIN, 128 + CAPTION_LINES * LINE_HEIGHT + MARGIN
    assert sheet.shape[:2] == (2 * height + MARGIN, 2 * width + MARGIN)
    for (row, column), value in (((0, 0), 51), ((0, 1), 102), ((1, 0), 153)):
        y, x = MARGIN + row * height, MARGIN + column * width
        assert (sheet[y : y + 128, x : x + 128] == value).all()
        written = (sheet[y + 128 : y + height - MARGIN, x : x + 128] != 255).any()
        assert written == ((row, column) == (1, 0))
    # The empty fourth cell, and the margin below
    assert (sheet[MARGIN + height :, width + MARGIN // 2 :] == 255).all()
    assert (sheet[-MARGIN // 2 :] == 255).all()


# Pages

EVIL = """<script>alert(1)</script> " onerror='x' & é 😀"""
OWN_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "dl", "dt", "dd", "main"}
OWN_TAGS |= {"figure", "img", "figcaption"}


class Page(HTMLParser):
    """Tags with attributes, and text, as a browser sees them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self):
        """(bytes, alt text) of each image."""
        shown = [attrs for tag, attrs in self.tags if tag == "img"]
        return [(base64.b64decode(x["src"].partition(",")[2]), x["alt"]) for x in shown]


def test_text_stays_text_and_what_no_file_can_hold_is_replaced(tmp_path):
    pictures = [(b"x", EVIL), (b"y", "a\ud800b")]
    write_gallery(tmp_path / "new" / "gallery.html", EVIL, pictures, {EVIL: EVIL})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gallery.html"]
    found = Page(tmp_path / "new" / "gallery.html")
    assert {tag for tag, _ in found.tags} == OWN_TAGS
    assert found.images() == [(b"x", EVIL), (b"y", "a?b")]
    assert found.text.count(EVIL) == 5  # title, heading, name, value, caption


def test_sample_writes_a_page_that_needs_nothing_else(chain, tmp_path):
    prompts, single = ["--prompts", "a red circle", "<b>"], tmp_path / "single"
    files = ["--output", tmp_path / "x.png", "--save-dir", single]
    path = tmp_path / "gallery.html"
    draw(chain.folder, *prompts, *files, "--steps", "2", "--gallery", path)
    found = Page(path)
    shown = [file.read_bytes() for file in sorted(single.iterdir())]
    assert found.images() == list(zip(shown, ["a red circle", "<b>"]))
    text = found.text.replace("\n", "")
    assert all(part in text for part in ("a red circle", "<b>", "steps2", "guidance2"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in found.tags
    source = re.sub('base64,[^"]*', "", path.read_text())
    assert not re.search(r"https?:|//|url\(|@import|<link|<script|<base|<iframe", source)
