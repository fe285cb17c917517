"""Prompts + a run folder -> an image grid with captions (paper, Sec. 3.1: 20 Euler steps from text to image), and back.

    python sample.py --run runs/demo --prompts "pineapple, food fruit" "black cat, animal mammal" --output grid.png
    python sample.py --run runs/demo --interpolate "blue heart, heart" "soccer ball, sport" --frames 8
    python sample.py --run runs/released_xl --prompts "a corgi in the snow" --sampler euler_release
    python sample.py --run runs/demo --caption photo.jpg other.png
    python sample.py --run runs/demo --caption FOLDER --output captions.jsonl

The third: the published weights, as scripts/convert_checkpoint.py writes them, on their own time grid. The last two:
image to text, printed and as a contact sheet, or as a line an image; an unreadable image in a folder is left out, named
and counted.

EMA weights. Without prompts or images, the captions or images of the run's own pictures. The same seed gives the same
image whatever the batch size (up to float rounding); sampling defaults (steps, guidance) are the run's.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data.entries import Entry
from data.files import check_writable, read_text_file
from eval.captioning import (
    Captioned,
    caption_images,
    choose_images,
    list_pictures,
    sheet_of,
    write_captions,
)
from eval.gallery import write_gallery
from eval.images import image_name
from modeling.pipeline import ImageGenerator, SamplingConfig
from modeling.samplers import SOLVERS
from training.errors import exit_on_error, printable
from training.loading import read_run_config
from training.pictures import caption_grid, png_bytes, save_png, to_pil
from training.pipelines import (
    captioning_run,
    direction_of,
    flow_folder,
    load_captioner,
    load_pipeline,
)

SHEET_IMAGES = 60  # of a caption's contact sheet


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, type=Path, help="experiment folder, or a stage-3 run folder"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", nargs="+", metavar="TEXT")
    source.add_argument("--prompts-file", type=Path, help="one prompt a line")
    source.add_argument(
        "--caption",
        nargs="+",
        metavar="IMAGE",
        help="images, folders or tar shards to make captions of",
    )
    source.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help="walk between the latents of two prompts"
    )
    parser.add_argument(
        "--frames", type=int, default=8, help="images of --interpolate, ends included"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        help="the grid, a PNG; of captions also a .jsonl",
    )
    parser.add_argument("--save-dir", type=Path, help="also write each image as its own PNG here")
    parser.add_argument(
        "--gallery", type=Path, help="also write a page with images, captions and settings here"
    )
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--guidance", type=float, help="1: no guidance, half the work")
    parser.add_argument(
        "--sampler", help=f"{', '.join(SOLVERS)}: the release's own time grid is euler_release"
    )
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("START", "END"),
        help="times with guidance",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="of velocity network and decoder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images-per-prompt", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line, of the file, or of the run's own pictures.

    Raises:
        ValueError: none found, or one is empty.
    """
    prompts = args.prompts or args.interpolate
    if args.prompts_file:
        # splitlines would also split at U+2028
        lines = read_text_file(args.prompts_file).split("\n")
        prompts = [line.strip() for line in lines if line.strip()]
    if prompts is None:
        prompts = list(read_run_config(flow_folder(args.run)).pictures.captions)
    if not prompts or not all(p.strip() for p in prompts):
        raise ValueError(
            "no prompt, or an empty one: give --prompts, --prompts-file or --interpolate"
        )
    return prompts


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible numbers before anything is loaded."""
    for name, smallest in (("frames", 2), ("images_per_prompt", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) < smallest:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(args, name)}"
            )
    if args.caption and (args.save_dir or args.gallery or args.images_per_prompt > 1):
        raise ValueError(
            "--save-dir, --gallery and --images-per-prompt are for prompts, not for --caption"
        )


def check_outputs(args: argparse.Namespace, captioning: bool) -> None:
    """Refuse, before anything is loaded, files that could not be written or would have a wrong name."""
    endings = (".png", ".jsonl") if captioning else (".png",)
    if args.output.suffix.lower() not in endings:
        raise ValueError(
            f"--output {args.output}: expected a name that ends in {' or '.join(endings)}"
        )
    for path in (args.output, args.gallery):
        if path:
            check_writable(path)


def sampling_of(args: argparse.Namespace, default: SamplingConfig) -> SamplingConfig:
    """The run's sampling with what the command line changes."""
    names = ("steps", "guidance", "sampler", "guidance_interval", "precision")
    return replace(
        default, **{name: getattr(args, name) for name in names if getattr(args, name) is not None}
    )


def warn_of_cuts(parts: ImageGenerator, prompts: list[str]) -> None:
    """Say which prompts the text tower can't read to their end."""
    tokenize = parts.text_encoder.tokenize
    limit = tokenize.context_length
    for prompt in prompts:
        length = tokenize.num_tokens(prompt)
        if length > limit:
            print(
                f"warning: prompt cut from {length} to {limit} tokens: {prompt!r}", file=sys.stderr
            )


@torch.no_grad()
def interpolate(
    parts: ImageGenerator, args: argparse.Namespace, sampling: SamplingConfig, prompts: list[str]
):
    """Images along the straight line between two starts of the flow, and between their text states for the decoder."""
    states = parts.encode_text(prompts)
    starts = parts.start(states, sampling, args.seed, indices=[0, 0])
    weights = torch.linspace(0, 1, args.frames, device=parts.device).view(-1, 1, 1)
    starts = torch.lerp(starts[:1], starts[1:], weights)
    states = torch.lerp(states[:1], states[1:], weights)
    latents = parts.transport(starts, states, sampling)
    images = parts.decode(latents, states, sampling.precision)
    captions = [prompts[0], *(f"{w:.2f}" for w in weights.flatten()[1:-1].tolist()), prompts[1]]
    return images.cpu(), captions


def generate(
    parts: ImageGenerator, args: argparse.Namespace, sampling: SamplingConfig, prompts: list[str]
):
    """Images of all prompts, `images_per_prompt` each, in batches; image i of the grid has randomness (seed, i)."""
    captions = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
    images = []
    for start in range(0, len(captions), args.batch_size):
        chunk = captions[start : start + args.batch_size]
        images.append(
            parts.generate(chunk, sampling, args.seed, list(range(start, start + len(chunk))))[
                0
            ].cpu()
        )
    return torch.cat(images), captions


def only_captions(run: Path) -> bool:
    """Whether a run, or an experiment's only stage 3, flows from image to text alone."""
    run = flow_folder(run) if (run / "flowtok").is_dir() else captioning_run(run)
    return direction_of(run) == "image_to_text"


def caption(args: argparse.Namespace) -> None:
    """Caption the images of the command line, or those of the run's own pictures."""
    if args.caption:
        entries = list_pictures(args.caption)
    else:
        pictures = read_run_config(captioning_run(args.run)).pictures
        entries = choose_images(pictures.images, pictures.num_images)
    parts, default = load_captioner(args.run, torch.device(args.device))
    sampling = sampling_of(args, default)
    start = time.perf_counter()
    batches = tell_skipped(caption_images(parts, entries, sampling, args.batch_size))
    if args.output.suffix.lower() == ".jsonl":
        number, skipped = write_captions(args.output, entries, batches)
    else:
        number, skipped = print_captions(args.output, entries, batches)
    print(
        f"{args.output}: {number} captions, {sampling.steps} steps, guidance {sampling.guidance:g}, "
        f"{number / (time.perf_counter() - start):.1f} images/s"
        + (f"; {skipped} unreadable images" if skipped else "")
    )


def tell_skipped(batches: Iterator[Captioned]) -> Iterator[Captioned]:
    """The same batches; what could not be read is said at once."""
    for batch in batches:
        for name, reason in batch.skipped:
            print(printable(f"left out: {name}: {reason}"), file=sys.stderr)
        yield batch


def print_captions(
    path: Path, entries: list[Entry], batches: Iterator[Captioned]
) -> tuple[int, int]:
    """Print each caption and save a sheet of the first ones. Returns (captions, skipped images)."""
    images, captions, number, skipped = [], [], 0, 0
    for batch in batches:
        for index, text in zip(batch.index, batch.captions, strict=True):
            print(printable(f"{image_name(entries[index])}: {text}"), flush=True)
        left = SHEET_IMAGES - len(captions)
        images.append(batch.images[:left])  # nothing once the sheet is full
        captions += batch.captions[:left]
        number, skipped = number + len(batch.captions), skipped + len(batch.skipped)
    save_png(sheet_of(images, captions), path)
    return number, skipped


def main(args: argparse.Namespace) -> None:
    """Load, generate, write."""
    check_args(args)
    is_left_open = not (args.prompts or args.prompts_file or args.interpolate)
    captioning = bool(args.caption) or (is_left_open and only_captions(args.run))
    check_outputs(args, captioning)
    if captioning:
        caption(args)
        return
    prompts = read_prompts(args)
    parts, default = load_pipeline(args.run, torch.device(args.device))
    sampling = sampling_of(args, default)
    warn_of_cuts(parts, prompts)
    start = time.perf_counter()
    images, captions = (interpolate if args.interpolate else generate)(
        parts, args, sampling, prompts
    )
    seconds = time.perf_counter() - start
    columns = len(images) if args.interpolate else args.images_per_prompt
    columns = columns if columns > 1 else min(8, len(images))
    save_png(caption_grid(images, captions, columns), args.output)
    if args.gallery:
        settings = {"run": args.run.name, **asdict(sampling), "seed": args.seed}
        write_gallery(args.gallery, "Samples", zip(map(png_bytes, images), captions), settings)
    if args.save_dir:
        for index, image in enumerate(images):
            save_png(to_pil(image), args.save_dir / f"{index:05d}.png")
    print(
        f"{args.output}: {len(images)} images, {sampling.steps} steps, guidance {sampling.guidance:g}, "
        f"seed {args.seed}, {len(images) / seconds:.1f} images/s"
    )


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
