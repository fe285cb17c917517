"""Prompts + a run folder -> an image grid with captions (paper, Sec. 3.1: 20 Euler steps from text to image).

    python sample.py --run runs/demo --prompts "pineapple, food fruit" "black cat, animal mammal" --output grid.png
    python sample.py --run runs/demo --interpolate "blue heart, heart" "soccer ball, sport" --frames 8
    python sample.py --run runs/released_xl --prompts "a corgi in the snow" --sampler euler_release

The last one: the published weights, as scripts/convert_checkpoint.py writes them, on their own time grid.

EMA weights. Without prompts, the captions of the run's own pictures. The same seed gives the same image whatever the
batch size (up to float rounding); sampling defaults (steps, guidance) are the run's.
"""

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from configs.load import exit_on_error
from eval.gallery import write_gallery
from eval.loading import load_pipeline, read_run_config
from eval.pictures import caption_grid, png_bytes, save_png, to_pil
from modeling.pipeline import SamplingConfig, TextToImage
from modeling.samplers import make_grid


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="experiment folder, or a stage-3 run folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", nargs="+", metavar="TEXT")
    source.add_argument("--prompts-file", type=Path, help="one prompt a line")
    source.add_argument("--interpolate", nargs=2, metavar=("A", "B"), help="walk between the latents of two prompts")
    parser.add_argument("--frames", type=int, default=8, help="images of --interpolate, ends included")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the grid, a PNG")
    parser.add_argument("--save-dir", type=Path, help="also write each image as its own PNG here")
    parser.add_argument("--gallery", type=Path, help="also write a page with images, captions and settings here")
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--guidance", type=float, help="1: no guidance, half the work")
    parser.add_argument("--sampler", help="euler, or euler_release for the release's time grid")
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
        if not args.prompts_file.is_file():
            raise ValueError(f"--prompts-file {args.prompts_file} does not exist")
        prompts = [line.strip() for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if prompts is None:
        flow_dir = args.run / "flowtok" if (args.run / "flowtok").is_dir() else args.run
        prompts = list(read_run_config(flow_dir).pictures.captions)
    if not prompts or not all(p.strip() for p in prompts):
        raise ValueError("no prompt, or an empty one: give --prompts, --prompts-file or --interpolate")
    return prompts


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible numbers before anything is loaded."""
    for name, smallest in (("frames", 2), ("images_per_prompt", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(args, name)}")


def sampling_of(args: argparse.Namespace, default: SamplingConfig) -> SamplingConfig:
    """The run's sampling with what the command line changes."""
    given = {name: getattr(args, name) for name in ("steps", "guidance", "sampler") if getattr(args, name) is not None}
    sampling = replace(default, **given)
    make_grid(sampling.sampler, sampling.steps)
    return sampling


def warn_of_cuts(parts: TextToImage, prompts: list[str]) -> None:
    """Say which prompts the text tower can't read to their end."""
    limit = parts.tokenize.context_length
    for prompt in prompts:
        length = parts.tokenize.num_tokens(prompt)
        if length > limit:
            print(f"warning: prompt cut from {length} to {limit} tokens: {prompt!r}", file=sys.stderr)


@torch.no_grad()
def interpolate(parts: TextToImage, args: argparse.Namespace, sampling: SamplingConfig, prompts: list[str]):
    """Images along the straight line between two starts of the flow, and between their text states for the decoder."""
    states = parts.encode_text(prompts)
    starts = parts.source(states, sampling, args.seed, indices=[0, 0])
    weights = torch.linspace(0, 1, args.frames, device=parts.device).view(-1, 1, 1)
    latents = parts.transport(torch.lerp(starts[:1], starts[1:], weights), sampling)
    images = parts.decode(latents, torch.lerp(states[:1], states[1:], weights))
    captions = [prompts[0], *(f"{w:.2f}" for w in weights.flatten()[1:-1].tolist()), prompts[1]]
    return images.cpu(), captions


def generate(parts: TextToImage, args: argparse.Namespace, sampling: SamplingConfig, prompts: list[str]):
    """Images of all prompts, `images_per_prompt` each, in batches; image i of the grid has randomness (seed, i)."""
    captions = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
    images = []
    for start in range(0, len(captions), args.batch_size):
        chunk = captions[start : start + args.batch_size]
        images.append(parts.generate(chunk, sampling, args.seed, list(range(start, start + len(chunk))))[0].cpu())
    return torch.cat(images), captions


def main(args: argparse.Namespace) -> None:
    """Load, generate, write."""
    check_args(args)
    prompts = read_prompts(args)
    parts, default = load_pipeline(args.run, torch.device(args.device))
    sampling = sampling_of(args, default)
    warn_of_cuts(parts, prompts)
    start = time.perf_counter()
    images, captions = (interpolate if args.interpolate else generate)(parts, args, sampling, prompts)
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
