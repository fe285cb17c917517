"""eval/gallery.py and eval/plots.py: a page that needs nothing else and executes nothing; a chart with its points."""

import base64
import io
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import shape_sample
from PIL import Image

from eval.gallery import gallery, write_gallery
from eval.plots import COLOURS, line_chart
from training.pictures import encode_png

EVIL = """<script>alert(1)</script> " onerror='x' & é 😀"""


OWN_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "dl", "dt", "dd", "main"}
OWN_TAGS |= {"figure", "img", "figcaption"}


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


def test_images_captions_and_settings_are_in_the_page():
    pictures = [(shape_sample(number)["png"], f"caption {number}") for number in range(3)]
    page = Page(gallery("demo", pictures, {"steps": 20, "guidance": 2.0}))
    shown = [attrs for tag, attrs in page.tags if tag == "img"]
    for (data, caption), attrs in zip(pictures, shown, strict=True):
        kind, content = attrs["src"].split(",")
        assert (
            kind == "data:image/png;base64"
            and base64.b64decode(content) == data
            and attrs["alt"] == caption
        )
        assert caption in page.text
    assert "steps20" in page.text.replace("\n", "") and "guidance2" in page.text.replace("\n", "")


def test_text_stays_text():
    page = Page(gallery(EVIL, [(b"x", EVIL)], {EVIL: EVIL}))
    assert {tag for tag, _ in page.tags} == OWN_TAGS
    [image] = [attrs for tag, attrs in page.tags if tag == "img"]
    assert image.keys() == {"src", "alt"} and image["alt"] == EVIL
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


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Runs a headless Chromium on a page, with further flags; what it prints. Skips where there is none."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("no chromium on PATH")
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses to run as root otherwise

    def run(page, *more):
        command = [chromium, *flags, *more, page.as_uri()]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    return run


def test_a_browser_shows_every_image_and_takes_captions_as_text(browse, tmp_path):
    colours = [(255 * (n % 2), 85 * (n % 4), 28 * n) for n in range(9)]
    captions = [
        *map(str, range(7)),
        EVIL,
        "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>",
    ]
    pictures = [
        (encode_png(Image.new("RGB", (32, 32), colour)), caption)
        for colour, caption in zip(colours, captions)
    ]
    write_gallery(tmp_path / "gallery.html", "nine", pictures, {"steps": 20})
    document = browse(tmp_path / "gallery.html", "--dump-dom")
    page = Page(document)
    shown = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [attrs["alt"] for attrs in shown] == captions
    for attrs, colour in zip(shown, colours):
        image = Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
        assert image.getpixel((0, 0)) == colour
    assert (
        "script" not in {tag for tag, _ in page.tags}
        and "<title>nine</title>" in document
        and "owned" in page.text
    )
    browse(tmp_path / "gallery.html", f"--screenshot={tmp_path}/page.png", "--window-size=700,1200")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    areas = [(pixels == colour).all(axis=1).sum() for colour in colours]
    assert min(areas) > 0.9 * max(areas) > 20_000  # each is drawn, as large as the others


def colour_columns(chart, number):
    """Columns of the picture in which a curve's colour is."""
    rgb = [int(COLOURS[number][i : i + 2], 16) for i in (1, 3, 5)]
    plot = np.asarray(chart)[:, 60:660]  # without the legend
    return np.flatnonzero((plot == rgb).all(axis=-1).any(axis=0))


def test_each_curve_spans_its_points():
    chart = line_chart(
        {"10 steps": [(3, 5.0), (1, 7.0)], "20 steps": [(1, 4.0), (2, 4.5)]}, "guidance", "fid"
    )
    first, second = (colour_columns(chart, number) for number in (0, 1))
    assert first.max() - first.min() > 550 and 270 < second.max() - second.min() < 310


@pytest.mark.parametrize(
    "curves", [{"a": [(1, 2)]}, {"a": [(1, 2), (1, 2)]}, {"a": [(1, 2)], "b": []}]
)
def test_single_points_have_a_chart(curves):
    assert len(colour_columns(line_chart(curves, "x", "y"), 0))


def test_no_point_is_an_error():
    with pytest.raises(ValueError, match="at least one point"):
        line_chart({"a": []}, "x", "y")


def test_sample_writes_the_page_it_is_asked_for(chain, tmp_path):
    from tiny_experiment import draw

    arguments = [
        "--prompts",
        "a red circle",
        "<b>",
        "--output",
        tmp_path / "x.png",
        "--save-dir",
        tmp_path / "single",
    ]
    draw(chain.folder, *arguments, "--steps", "2", "--gallery", tmp_path / "gallery.html")
    page = Page((tmp_path / "gallery.html").read_text(encoding="utf-8"))
    shown = [
        base64.b64decode(attrs["src"].split(",")[1]) for tag, attrs in page.tags if tag == "img"
    ]
    assert shown == [file.read_bytes() for file in sorted((tmp_path / "single").iterdir())]
    assert (
        "a red circle" in page.text
        and "<b>" in page.text
        and "steps2" in page.text.replace("\n", "")
    )
