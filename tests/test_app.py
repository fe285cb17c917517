"""scripts/app.py: what its buttons do, and the page itself in a real browser, if there is one."""

import io
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import shape_sample
from PIL import Image

from scripts import app
from training.pipelines import load_captioner, load_pipeline

PROMPT, OTHER = "a red circle", "a blue square"
CPU = torch.device("cpu")
HERE = {None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1"}


@pytest.fixture(scope="module")
def studio(both_ways):
    return app.Studio(both_ways, CPU)


def same(left, right):
    return np.array_equal(np.asarray(left), np.asarray(right))


def test_a_prompt_is_drawn_as_the_run_draws_it(studio, both_ways):
    parts, sampling = load_pipeline(both_ways, CPU)
    gallery, remarks = studio.draw(PROMPT, 5, 1.5, 3, 2)
    images, _ = parts.generate([PROMPT] * 2, sampling.but(steps=5, guidance=1.5), seed=3)
    assert [text for _, text in gallery] == [PROMPT] * 2 and remarks == ""
    assert all(same(app.shown(image), found) for image, (found, _) in zip(images, gallery))
    assert gallery[0][0].size == (256, 256) and not same(gallery[0][0], gallery[1][0])
    assert "'cat'" in studio.draw("a cat", 1, 1, 0, 1)[1]


def test_walks_end_at_the_images_of_their_prompts(studio):
    first, last = (studio.draw(prompt, 4, 2, 0, 1)[0][0][0] for prompt in (PROMPT, OTHER))
    ends = [studio.blend(PROMPT, OTHER, place, 4, 2, 0)[0] for place in (0, 0.5, 1)]
    assert same(ends[0], first) and same(ends[2], last)
    assert not same(ends[1], first) and not same(ends[1], last)

    way, _ = studio.follow(PROMPT, 4, 2, 0, 3)
    assert [text for _, text in way] == ["t = 0.00", "t = 0.50", "t = 1.00"]
    states = studio.generator.encode_text([PROMPT])
    start = studio.generator.start(states, studio.sampling, 0, [0])
    [image] = studio.generator.decode(start / studio.generator.flow.latent_scale, states)
    assert same(way[0][0], app.shown(image)) and same(way[-1][0], first)
    assert len(studio.follow(PROMPT, 2, 2, 0, 9)[0]) == 3  # no more points than the solver has


def test_a_picture_is_captioned_as_the_run_captions_it(studio, both_ways, tmp_path):
    (tmp_path / "x.png").write_bytes(shape_sample(1)["png"])
    captioner, sampling = load_captioner(both_ways, CPU)
    pixels = np.asarray(Image.open(tmp_path / "x.png")).astype(np.float32) / 255
    expected = captioner.captions(torch.from_numpy(pixels).permute(2, 0, 1)[None], sampling)
    assert [studio.caption(str(tmp_path / "x.png"))] == expected
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="x.png cannot be captioned"):
        studio.caption(str(tmp_path / "x.png"))


def test_what_cannot_be_drawn_or_read_gives_a_sentence(studio, monkeypatch):
    with pytest.raises(ValueError, match="Type a prompt"):
        studio.draw(" ", 5, 1, 0, 1)
    with pytest.raises(ValueError, match="Choose an image"):
        studio.caption(None)
    monkeypatch.setattr(studio, "sampling", studio.sampling.but(sample_text_latent=False))
    with pytest.raises(ValueError, match="one image"):
        studio.draw(PROMPT, 5, 1, 0, 2)


# In the browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine."""
    pytest.importorskip("gradio", reason="needs pip install -r requirements-app.txt")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=program, args=["--no-sandbox"])


def ask(page, prompt):
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()


def picture_of(page):
    """The first picture of the gallery, once it is there."""
    image = page.locator(".grid-wrap img").first
    image.wait_for(timeout=60_000)
    return Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body()))


def test_the_page_draws_for_two_at_once_says_what_is_wrong_and_asks_nobody_else(
    studio, browser, monkeypatch, tmp_path
):
    foreign, look_up = [], socket.getaddrinfo

    def watched(host, *arguments, **options):
        if host not in HERE:
            foreign.append(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = app.build_page(studio)
    address = app.serve(page, "127.0.0.1", port)
    try:
        # Each of two people types a prompt and gets its own picture.
        size = {"width": 1100, "height": 900}
        tabs = [browser.new_context(viewport=size).new_page() for _ in range(2)]
        for tab in tabs:
            tab.on("request", lambda request: foreign.append(request.url))
            tab.goto(address)
            tab.get_by_role("button", name="Draw", exact=True).wait_for(timeout=60_000)
        for tab, prompt in zip(tabs, (PROMPT, OTHER)):
            ask(tab, prompt)
        steps, guidance = studio.sampling.steps, studio.sampling.guidance
        for tab, prompt in zip(tabs, (PROMPT, OTHER)):
            expected = studio.draw(prompt, steps, guidance, 0, 1)[0][0][0]
            assert same(picture_of(tab).convert("RGB"), expected)

        # Wrong inputs
        ask(tabs[1], " ")
        tabs[1].get_by_text("Type a prompt first.").wait_for(timeout=60_000)
        tabs[1].get_by_text("Settings").click()
        tabs[1].get_by_label("Seed").fill("-1")
        ask(tabs[1], PROMPT)
        tabs[1].get_by_text("-1 is less than minimum").wait_for(timeout=60_000)

        # The way of the flow
        tabs[0].get_by_role("tab", name="From text to image").click()
        tabs[0].get_by_role("button", name="Follow", exact=True).click()
        tabs[0].get_by_text("t = 1.00").first.wait_for(timeout=60_000)
    finally:
        page.close()
    assert [url for url in foreign if not url.startswith((address, "data:", "blob:"))] == []
