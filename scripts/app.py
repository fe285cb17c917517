"""A page to try a run in a browser.

    python scripts/app.py --run runs/emoji
    python scripts/app.py --run USER/NAME --port 8000

What sample.py takes for --run. Prompts to images, images between two prompts, the way of the flow
from text to image and, where the run has a text decoder, images to captions. EMA weights. One
process; requests wait for each other. Only this machine reaches the page unless --host says
otherwise, and nothing is sent to anybody. Needs pip install -r requirements-app.txt.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import torch
from PIL import Image
from torch import Tensor

from data.files import user_path
from eval.images import caption_images, list_pictures
from eval.programs import build_parser, usable_device
from modeling.layers import to_pil
from modeling.pipeline import Captioner, ImageGenerator, SamplingConfig
from modeling.pretrained import find_folder
from sample import known_words, list_remarks
from training.errors import exit_on_error
from training.pipelines import directions_of, example_captions, load_captioner, load_pipeline

MAX_WAITING = 100  # requests
MIN_PIXELS = 256  # of an image on the page: smaller ones are enlarged by a whole factor
Gallery = list[tuple[Image.Image, str]]  # images and what is written under them


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    help_text = "experiment folder, stage-3 run, or a folder of scripts/export.py or its hub id"
    add("--run", required=True, type=user_path, help=help_text)
    add("--host", default="127.0.0.1", help="0.0.0.0: every machine that reaches this one")
    add("--port", type=int, default=7860)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=default)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Load the run, then serve the page until Ctrl-C."""
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install -r requirements-app.txt")
    page = build_page(Studio(args.run, args.device))
    address = serve(page, args.host, args.port)
    print(f"{address}: open it in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


# What the buttons do


class Studio:
    """A run's networks at work. Methods raise ValueError: a sentence for who sits at the page."""

    def __init__(self, name: Path, device: torch.device):
        """name: of a run, of an exported folder or of one of the hub."""
        self.name = name.name
        self.run = find_folder(name)
        directions = directions_of(self.run)
        self.generator: ImageGenerator | None = None
        self.captioner: Captioner | None = None
        if "text_to_image" in directions:
            self.generator, self.sampling = load_pipeline(self.run, device)
            self.prompts = example_captions(self.run) or [""]  # to try
        if "image_to_text" in directions:
            self.captioner, self.caption_sampling = load_captioner(self.run, device)

    def draw(
        self, prompt: str, steps: int, guidance: float, seed: int, number: int
    ) -> tuple[Gallery, str]:
        """Images of a prompt, and what is to be said of it."""
        remarks = self.remarks(prompt)
        self.sampling.check_images("Images:", number)
        sampling = self.sampling_of(steps, guidance, seed)
        images, _ = self.generator.generate([prompt] * number, sampling, seed)
        return [(shown(image), prompt) for image in images], remarks

    def blend(
        self, first: str, second: str, place: float, steps: int, guidance: float, seed: int
    ) -> tuple[Image.Image, str]:
        """The image at a place between two prompts: 0 is the first, 1 the second."""
        remarks = self.remarks(first, second)
        sampling = self.sampling_of(steps, guidance, seed)
        weights = torch.tensor([float(place)])
        [image] = self.generator.between([first, second], weights, sampling, seed)
        return shown(image), remarks

    def follow(
        self, prompt: str, steps: int, guidance: float, seed: int, number: int
    ) -> tuple[Gallery, str]:
        """What the flow passes on its way from text to image."""
        remarks = self.remarks(prompt)
        sampling = self.sampling_of(steps, guidance, seed)
        times, images = self.generator.trajectory(prompt, sampling, seed, number)
        pairs = zip(times, images, strict=True)
        return [(shown(image), f"t = {time:.2f}") for time, image in pairs], remarks

    def caption(self, path: str | None) -> str:
        if not path:
            raise ValueError("Choose an image first.")
        # The path that measures captions, too: the same crop and size.
        [batch] = caption_images(self.captioner, list_pictures([path]), self.caption_sampling, 1)
        return batch["caption"][0]

    def sampling_of(self, steps: int, guidance: float, seed: int | None) -> SamplingConfig:
        """The run's sampling with a request's settings; ValueError for an empty seed."""
        # NumPy would draw a seed then, which nobody sees.
        if seed is None:
            raise ValueError("Give a seed.")
        return self.sampling.but(steps=steps, guidance=guidance)

    def remarks(self, *prompts: str) -> str:
        """What is to be said of prompts, a line each; ValueError for an empty one."""
        if not all(prompt and prompt.strip() for prompt in prompts):
            raise ValueError("Type a prompt first.")
        return "\n\n".join(list_remarks(self.generator, known_words(self.run), prompts))


def shown(image: Tensor) -> Image.Image:
    """3 x R x R in [0, 1] -> a picture whose pixels can be seen."""
    # By a whole factor and without smoothing: what is seen are the run's own pixels.
    factor = max(1, -(-MIN_PIXELS // image.shape[-1]))
    picture = to_pil(image)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


# The page


def build_page(studio: Studio) -> Any:
    """The page of a studio, a gradio.Blocks: a tab for each thing that it can do."""
    # It asks the world for its newest version unless told otherwise before it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    with gr.Blocks(title="FlowTok", analytics_enabled=False) as page:
        gr.Markdown(f"# FlowTok: {studio.name}")
        if studio.generator:
            # Sliders and numbers refuse what is typed beyond their bounds, and round
            with gr.Accordion("Settings", open=False):
                steps = studio.sampling.steps
                guidance = studio.sampling.guidance
                settings = [
                    gr.Slider(1, max(100, steps), steps, step=1, precision=0, label="Steps"),
                    gr.Slider(0, max(10, guidance), guidance, label="Guidance (1: none)"),
                    gr.Number(0, minimum=0, maximum=2**32, precision=0, label="Seed"),
                ]
            with gr.Tab("Image"):
                prompt = gr.Textbox(studio.prompts[0], label="Prompt")
                number = gr.Slider(1, 16, 1, step=1, precision=0, label="Images")
                button = gr.Button("Draw", variant="primary")
                outputs = [gr.Gallery(label="Images", columns=4, format="png"), gr.Markdown()]
                gr.Examples([[text] for text in studio.prompts], prompt, label="Prompts to try")
                triggers, inputs = [button.click, prompt.submit], [prompt, *settings, number]
                attach(triggers, studio.draw, inputs, outputs)
            # The slider draws the image where it is let go
            with gr.Tab("Between two prompts"):
                first = gr.Textbox(studio.prompts[0], label="From")
                second = gr.Textbox(studio.prompts[-1], label="To")
                place = gr.Slider(0, 1, 0.5, step=0.05, label="Place between them")
                button = gr.Button("Blend", variant="primary")
                outputs = [gr.Image(label="Image", format="png"), gr.Markdown()]
                triggers, inputs = [button.click, place.release], [first, second, place, *settings]
                attach(triggers, studio.blend, inputs, outputs)
            with gr.Tab("From text to image"):
                prompt = gr.Textbox(studio.prompts[0], label="Prompt")
                number = gr.Slider(2, 12, 6, step=1, precision=0, label="Points on the way")
                button = gr.Button("Follow", variant="primary")
                gr.Markdown(
                    "Points of the flow from the text (t = 0) to the image (t = 1), decoded:"
                )
                outputs = [gr.Gallery(show_label=False, columns=6, format="png"), gr.Markdown()]
                triggers, inputs = [button.click, prompt.submit], [prompt, *settings, number]
                attach(triggers, studio.follow, inputs, outputs)
        # Of a run that has a text decoder
        if studio.captioner:
            with gr.Tab("Caption"):
                picture = gr.Image(type="filepath", sources=["upload"], label="Picture")
                caption = gr.Textbox(label="Caption")
                button = gr.Button("Read", variant="primary")
                attach([button.click], studio.caption, [picture], [caption])
    return page


def attach(triggers: list, method: Callable, inputs: list, outputs: list) -> None:
    """Run a method at events; all wait in one queue, and errors are shown as their sentence."""
    import gradio as gr

    @wraps(method)
    def call(*arguments):
        try:
            return method(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    # One at a time: the networks have one device, and two people's images would share its memory.
    gr.on(triggers, call, inputs, outputs, concurrency_limit=1, concurrency_id="networks")


def serve(page: Any, host: str, port: int) -> str:
    """Serve the page in the background; returns its address."""
    # A queue that is full says so, where requests without end would only wait.
    page.queue(max_size=MAX_WAITING)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
