"""Prompts + a run folder -> image grids with captions, and images -> captions.

    python sample.py --run runs/emoji --prompts "pineapple, food fruit" "black cat, animal mammal"
    python sample.py --run runs/emoji --interpolate "blue heart, heart" "soccer ball, sport"
    python sample.py --run runs/emoji --trajectory "blue heart, heart" --frames 11
    python sample.py --run runs/released_xl --prompts "a corgi in snow" --sampler euler_release
    python sample.py --run runs/emoji --caption photo.jpg other.png
    python sample.py --run runs/emoji --caption FOLDER --output captions.jsonl
    python sample.py --run USER/NAME --prompts "a corgi in snow"

The third: what the flow passes on its way from t = 0 to t = 1, decoded, a row a prompt. The fourth:
the published weights, as scripts/convert_checkpoint.py writes them, on their own time grid. The two
after it: image to text, printed and as a contact sheet, or as a line an image; an unreadable image
in a folder is left out, named and counted. Without prompts or images, the captions or images of the
run's own pictures.

A run of stage next_scale has neither steps nor a solver: its options are --guidance, --precision.
EMA weights. 20 Euler steps from text to image (paper, Sec. 3.1); defaults are the run's. The same
seed gives the same image whatever the batch size (up to float rounding). A grid holds about 64
images; the next ones go to NAME_002.png, and so on, each written when it is full. Where the run
knows the captions of its training, it says what a prompt has that none of them had, and how many
prompts are captions themselves.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from data.entries import Entry
from data.files import check_writable, errors_naming, integer, read_text_file, user_path
from eval.images import caption_images, choose_images, image_name, list_pictures, sheet_of
from eval.programs import build_parser, usable_device
from modeling.layers import to_pil
from modeling.pipeline import Generator, ImageGenerator, Sampling, SamplingConfig
from modeling.pretrained import find_folder, is_pretrained
from modeling.samplers import SOLVERS
from training import pipelines
from training.errors import exit_on_error, printable
from training.loading import read_run_config
from training.pictures import caption_grid, png_bytes, save_png, write_gallery
from training.vocabulary import VOCABULARY_FILE, Vocabulary, find_vocabulary, one_form

SHEET_IMAGES = 60  # of a caption's contact sheet
PAGE_IMAGES, COLUMNS, MAX_COLUMNS = 64, 8, 16  # of a grid, about; for images of one prompt at most
MAX_WARNINGS = 10  # about prompts
Picture = tuple[Tensor, str]  # 3 x R x R in [0, 1], its caption


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    help_text = "experiment folder, stage-3 run, or a folder of scripts/export.py or its hub id"
    add("--run", required=True, type=user_path, help=help_text)
    source.add_argument("--prompts", nargs="+", metavar="TEXT")
    source.add_argument("--prompts-file", type=user_path, help="one prompt a line")
    source.add_argument("--caption", nargs="+", metavar="IMAGE", help="images, folders, tar shards")
    source.add_argument("--interpolate", nargs=2, metavar=("A", "B"), help="between two prompts")
    help_text = "the flow's way from text to image, decoded, a row a prompt"
    source.add_argument("--trajectory", nargs="+", metavar="TEXT", help=help_text)
    help_text = "images of --interpolate, or of a row of --trajectory, ends included; default: 8"
    add("--frames", type=integer(2), help=help_text)
    help_text = "PNG; of captions also .jsonl"
    add("--output", type=user_path, default=Path("samples.png"), help=help_text)
    add("--save-dir", type=user_path, help="also write each image as its own PNG here")
    add("--gallery", type=user_path, help="also write a page with images, captions, settings here")
    add("--steps", type=integer(1), help="solver steps")
    help_text = "1, or 0 of a run of next_scale: no guidance, half the work"
    add("--guidance", type=float, help=help_text)
    add("--sampler", choices=[*SOLVERS], help="euler_release: the release's own time grid")
    times = ("START", "END")
    add("--guidance-interval", nargs=2, type=float, metavar=times, help="times with guidance")
    add("--precision", choices=["fp32", "bf16"], help="of velocity network and decoder")
    add("--seed", type=integer(0), default=0)
    add("--images-per-prompt", type=integer(1), default=1)
    add("--batch-size", type=integer(1), default=64, help="images at a time")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=default)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Load, generate, write."""
    # Before a hub's id becomes the folder of its files here, which are gigabytes
    to_text = bool(args.caption)
    check_options(args, to_text)
    has_input = args.prompts or args.prompts_file or args.interpolate or args.trajectory
    args.run = find_folder(args.run)
    if not (to_text or has_input):
        to_text = pipelines.directions_of(args.run) == {"image_to_text"}
        check_options(args, to_text)
    check_outputs(args, (".png", ".jsonl") if to_text else (".png",))
    if to_text:
        caption(args)
    else:
        draw(args)


def check_options(args: argparse.Namespace, to_text: bool) -> None:
    """Refuse, before anything is loaded, options that would be ignored."""
    is_row = args.interpolate or args.trajectory
    if args.frames and not is_row:
        raise ValueError(f"--frames {args.frames} is for --interpolate and --trajectory")
    if is_row and args.images_per_prompt > 1:
        raise ValueError(
            "--images-per-prompt is for prompts, not for --interpolate and --trajectory"
        )
    if to_text and (args.save_dir or args.gallery or args.images_per_prompt > 1):
        raise ValueError(
            "--save-dir, --gallery and --images-per-prompt are for images, not for captions "
            "(--caption, or a run that flows from image to text)"
        )


def check_outputs(args: argparse.Namespace, endings: tuple[str, ...]) -> None:
    """Refuse, before anything is loaded, files that can't be written or would have a wrong name."""
    if args.output.suffix.lower() not in endings:
        raise ValueError(f"--output {args.output}: expected a name in {' or '.join(endings)}")
    single = args.save_dir and args.save_dir / "00000.png"
    for path in filter(None, (args.output, args.gallery, single)):
        check_writable(path)


def sampling_of(args: argparse.Namespace, default: Sampling) -> Sampling:
    """The run's sampling with what the command line changes."""
    names = ("steps", "guidance", "sampler", "guidance_interval", "precision")
    return default.but(**{name: getattr(args, name) for name in names})


# Text to image


def draw(args: argparse.Namespace) -> None:
    """Make images of prompts, or between two of them, and write them."""
    # What is known of the prompts is said before the work, which may be long
    prompts = read_prompts(args)
    is_row = args.interpolate or args.trajectory
    load = pipelines.load_pipeline if is_row else pipelines.load_generator
    parts, default = load(args.run, args.device)
    sampling = sampling_of(args, default)
    sampling.check_images("--images-per-prompt", args.images_per_prompt)
    vocabulary = known_words(args.run)
    remarks = list_remarks(parts, vocabulary, prompts)
    if args.seed and not sampling.sample_text_latent:
        reason = f"{args.run} draws nothing (sampling.sample_text_latent=false)"
        remarks.insert(0, f"--seed {args.seed} changes nothing: {reason}")
    if len(remarks) > MAX_WARNINGS:
        remarks[MAX_WARNINGS:] = [f"{len(remarks) - MAX_WARNINGS} more about prompts"]
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)

    # A row of the grid is a prompt's, where it has several images
    start = time.perf_counter()
    if args.interpolate:
        in_row = args.frames or COLUMNS
        pictures = interpolate(parts, args, sampling, prompts, in_row)
    elif args.trajectory:
        # All at once: the width of the grid is known when the solver has made its points.
        followed = [*follow(parts, args, sampling, prompts)]
        in_row = len(followed) // len(prompts)
        pictures = iter(followed)
    else:
        in_row = args.images_per_prompt
        pictures = generate(parts, args, sampling, prompts)
    # A single image of each prompt fills rows of eight.
    columns = in_row if 1 < in_row <= MAX_COLUMNS else min(COLUMNS, len(prompts) * in_row)
    number, last = write_pages(pictures, columns, args, sampling)
    rate = number / (time.perf_counter() - start)
    names = args.output if last == args.output else f"{args.output} ... {last}"
    print(
        f"{names}: {number} images, {sampling.steps} steps, guidance {sampling.guidance:g}, "
        f"seed {args.seed}, {rate:.1f} images/s"
    )
    if vocabulary and vocabulary.captions is not None:
        captions = {*vocabulary.captions}
        known = sum(one_form(prompt) in captions for prompt in prompts)
        print(f"{known} of {len(prompts)} prompts are captions that the run was trained on")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line, of the file, or of the run's own pictures."""
    prompts = args.prompts or args.interpolate or args.trajectory
    if args.prompts_file:
        # splitlines would also split at U+2028
        lines = read_text_file(args.prompts_file).split("\n")
        prompts = [line.strip() for line in lines if line.strip()]
    if prompts is None:
        prompts = pipelines.example_captions(args.run)
    if not prompts:
        raise ValueError("no prompt: give --prompts, --prompts-file, --interpolate or --trajectory")
    if empty := [number for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise ValueError(f"prompt {empty[0]} of {len(prompts)} is empty: expected a text")
    return prompts


def known_words(run: Path) -> Vocabulary | None:
    """Those of the captions of a run; None if they are not where they should be."""
    # They do not leave with an exported folder, and images encoded in training have no list
    if is_pretrained(run) or pipelines.is_next_scale(run):
        return Vocabulary("", [], None)
    return find_vocabulary(pipelines.flow_folder(run))


def list_remarks(
    parts: Generator, vocabulary: Vocabulary | None, prompts: Sequence[str]
) -> list[str]:
    """Which prompts the tower can't read to their end, and which are unlike the run's captions."""
    remarks = []
    tokenize = parts.text_encoder.tokenize
    limit = tokenize.context_length
    for prompt in prompts:
        length = tokenize.num_tokens(prompt)
        if length > limit:
            remarks.append(f"prompt cut from {length} to {limit} tokens: {prompt!r}")
    if vocabulary is None:
        remarks.append(
            "the run does not know the words of its captions, with which prompts would be "
            f"compared: {VOCABULARY_FILE} is not beside its token shards"
        )
        return remarks
    for prompt in prompts:
        if difference := vocabulary.difference(prompt):
            remarks.append(f"prompt {prompt!r}: {difference}")
    return remarks


def generate(
    parts: Generator, args: argparse.Namespace, sampling: Sampling, prompts: list[str]
) -> Iterator[Picture]:
    """`images_per_prompt` images of each prompt, in batches; the i-th has randomness (seed, i)."""
    # Numbered over all images, so that the batch size changes none of them.
    captions = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
    for start in range(0, len(captions), args.batch_size):
        chunk = captions[start : start + args.batch_size]
        indices = list(range(start, start + len(chunk)))
        images, _ = parts.generate(chunk, sampling, args.seed, indices)
        yield from zip(images.cpu(), chunk, strict=True)


def interpolate(
    parts: ImageGenerator,
    args: argparse.Namespace,
    sampling: SamplingConfig,
    prompts: list[str],
    frames: int,
) -> Iterator[Picture]:
    """Images between two prompts, named by their place."""
    # The ends have their prompts for captions, what lies between its share of the second.
    names = {0.0: prompts[0], 1.0: prompts[1]}
    for weights in torch.linspace(0, 1, frames).split(args.batch_size):
        images = parts.between(prompts, weights, sampling, args.seed)
        captions = [names.get(value, f"{value:.2f}") for value in weights.tolist()]
        yield from zip(images.cpu(), captions, strict=True)


def follow(
    parts: ImageGenerator, args: argparse.Namespace, sampling: SamplingConfig, prompts: list[str]
) -> Iterator[Picture]:
    """What the flow passes on its way to an image of each prompt, named by the time.

    Rows are of one length: --frames, or as many points as the solver has.
    """
    for prompt in prompts:
        times, images = parts.trajectory(prompt, sampling, args.seed, args.frames or COLUMNS)
        names = [prompt, *(f"t = {time:.2f}" for time in times[1:])]
        yield from zip(images.cpu(), names, strict=True)


def write_pages(
    pictures: Iterator[Picture], columns: int, args: argparse.Namespace, sampling: Sampling
) -> tuple[int, Path]:
    """Write grids, galleries and single images, a page at a time. Returns (images, last grid)."""
    settings = {"run": args.run.name, **asdict(sampling), "seed": args.seed}
    size = max(PAGE_IMAGES // columns, 1) * columns
    # A page is written as soon as it is full: the next ones may take hours
    number, path = 0, args.output
    while page := list(islice(pictures, size)):
        suffix = f"_{number // size + 1:03d}" if number else ""
        images = torch.stack([image for image, _ in page])
        captions = [caption for _, caption in page]
        path = args.output.with_stem(args.output.stem + suffix)
        save_png(caption_grid(images, captions, columns), path)
        if args.gallery:
            gallery = args.gallery.with_stem(args.gallery.stem + suffix)
            files = [(png_bytes(to_pil(image)), caption) for image, caption in page]
            write_gallery(gallery, "Samples", files, settings)
        if args.save_dir:
            for index, image in enumerate(images, start=number):
                save_png(to_pil(image), args.save_dir / f"{index:05d}.png")
        number += len(page)
    return number, path


# Image to text


def caption(args: argparse.Namespace) -> None:
    """Caption the images of the command line, or those of the run's own pictures."""
    if args.caption:
        entries = list_pictures(args.caption)
    elif is_pretrained(args.run):
        raise ValueError(f"{args.run} comes without pictures: give --caption IMAGE")
    else:
        pictures = read_run_config(pipelines.captioning_run(args.run)).pictures
        entries = choose_images(pictures.images, pictures.num_images)
    parts, default = pipelines.load_captioner(args.run, args.device)
    sampling = sampling_of(args, default)
    start = time.perf_counter()
    batches = caption_images(parts, entries, sampling, args.batch_size)
    number, skipped = write_captions(args.output, entries, batches)
    rate = number / (time.perf_counter() - start)
    print(
        f"{args.output}: {number} captions, {sampling.steps} steps, guidance "
        f"{sampling.guidance:g}, {rate:.1f} images/s"
        + (f"; {skipped} unreadable images" if skipped else "")
    )


def write_captions(path: Path, entries: list[Entry], batches: Iterator[dict]) -> tuple[int, int]:
    """Captions as they come: lines {"image", "caption"} of a jsonl, or printed, the first on a PNG.

    batches: of caption_images. What could not be read is said at once. Returns (captions, skipped
    images).
    """
    is_jsonl = path.suffix.lower() == ".jsonl"
    images, captions, number, skipped = [], [], 0, 0
    # What is captioned is written at once: the next batches may take hours, or fail.
    for batch in batches:
        for name, reason in batch["skipped"]:
            print(printable(f"left out: {name}: {reason}"), file=sys.stderr)
        names = [image_name(entries[index]) for index in batch["index"]]
        rows = [*zip(names, batch["caption"], strict=True)]
        if is_jsonl and rows:
            # The first ones replace what an earlier command has written
            path.parent.mkdir(parents=True, exist_ok=True)
            with errors_naming(path), path.open("a" if number else "w", encoding="utf-8") as file:
                for name, text in rows:
                    row = {"image": name, "caption": text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif not is_jsonl:
            for name, text in rows:
                print(printable(f"{name}: {text}"), flush=True)
            left = SHEET_IMAGES - len(captions)
            images.append(batch["image"][:left])  # nothing once the sheet is full
            captions += batch["caption"][:left]
        number += len(rows)
        skipped += len(batch["skipped"])
    if not number:
        raise ValueError(f"none of {skipped} images could be read")
    if not is_jsonl:
        save_png(sheet_of(images, captions), path)
    return number, skipped


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
