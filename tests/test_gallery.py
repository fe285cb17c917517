"""training/pictures.py, pages: a page that needs nothing else and executes nothing."""

import base64
import re
from html.parser import HTMLParser

from conftest import shape_sample
from tiny_experiment import draw

from training.pictures import gallery, write_gallery

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
