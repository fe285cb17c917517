"""What a run draws of the scenes' captions (data/scenes.py), fact by fact, for each split.

    python -m eval.scenes --run runs/scenes
    python -m eval.scenes --run RUN --data DIR --steps 1,2,4,8,20 --guidance 1,2 --captions 64

The judge (eval/judge.py) reads the images; the facts that their captions state are in the scenes'
shards. Shares of images with each fact right, and with all; diversity, which is how far the images
of one caption differ in places and sizes, as a share of what real ones do; KID on the judge's
features. Before the generated images come the ceilings: real images, and their reconstructions by
the tokenizer; and, of a flow from the text, the mean of its start, decoded: what a regression draws
without a flow. RUN is an experiment or its run of stage 3 or next_scale; EMA weights. Prints a
table and writes report.json and captions.png: captions never trained on, with four images each, by
the last values of guidance and steps.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from data.files import check_writable, integer, load_json, user_path, write_json
from data.images import image_bytes
from data.scenes import SPLITS, Kind, Statement
from data.tar import expand_shards, read_shard
from data.transforms import open_image
from eval import judge, programs
from eval.generation import describe_model
from eval.images import to_bytes
from eval.reconstruction import Reconstructor
from eval.scores import kernel_distance
from modeling.pipeline import Generator, ImageGenerator, Sampling
from training.errors import exit_on_error
from training.loading import load_newest
from training.pictures import caption_grid, save_png
from training.pipelines import flow_folder, load_generator

EVALUATED = SPLITS[1:]  # seen: other images of captions that were trained on
REPORT, PICTURE = "report.json", "captions.png"
SHOWN_CAPTIONS, SHOWN_IMAGES = 4, 4  # of each split that is not seen; of each caption
GAP = 2  # pixels between the images of a caption
Row = dict[str, Any]  # of the table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = programs.build_parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=user_path, help="experiment folder, or a stage-3 run folder")
    add("--data", type=user_path, metavar="DIR", help="default: scenes in RUN")
    add("--output", type=user_path, metavar="DIR", help="default: evaluation/scenes in RUN")
    add("--captions", type=integer(1), help="of each split, the first ones; default: all")
    add("--images-per-caption", type=integer(1), default=4)
    add("--seed", type=integer(0), default=0)
    programs.add_sweep_options(parser)
    add("--batch-size", type=integer(1), default=64, help="images at a time")
    programs.add_device_option(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure the ceilings, then each point of the sweep; write and return the table."""
    # What needs no network is checked first
    output = args.output or args.run / "evaluation" / "scenes"
    data = args.data or args.run / "scenes"
    programs.check_report(output / REPORT, [str(data)])
    check_writable(output / PICTURE)
    sets = [read_split(data, split, args.captions) for split in EVALUATED]

    # The run
    state = programs.start_processes(args.device)
    (generator, default), checkpoint = load_newest(
        flow_folder(args.run), lambda: load_generator(args.run, state.device)
    )
    model = describe_model(checkpoint, generator)
    size = generator.tokenizer.config.image_size
    for scenes in sets:
        if (pixels := scenes.images.shape[-1]) != size:
            raise ValueError(
                f"the images of split {scenes.split} have {pixels} px, those of the run {size}: "
                f"make scenes with image_size={size}"
            )
    points = [
        default.but(guidance=guidance, steps=steps)
        for guidance in args.guidance or [None]
        for steps in args.steps or [None]
    ]
    for sampling in points:
        if isinstance(generator, ImageGenerator):
            sampling.check_flow(generator.flow.config)
        sampling.check_images("--images-per-caption", args.images_per_caption)

    # A row for each set of images
    net = judge.load_judge(state.device)
    rows, strips = [], []
    for scenes in sets:
        found, images = measure_split(net, generator, scenes, points, args)
        rows += found
        if scenes.split != "seen":
            strips += choose_strips(scenes, images)
    report = {
        "rows": rows,
        "protocol": {"data": [str(data)]},
        "captions": {scenes.split: len(scenes.texts) for scenes in sets},
        "images_per_caption": args.images_per_caption,
        "seed": args.seed,
        "sampling": asdict(points[-1]),
        "model": model,
        **programs.describe_environment(state),
    }
    write_json(report, output / REPORT)
    pictures, texts = zip(*strips)
    save_png(caption_grid(torch.stack(pictures), [*texts], columns=2), output / PICTURE)
    print_table(rows)
    if find_spec("torch_fidelity") is None:
        print(f"no kid: it needs torch-fidelity: {programs.INSTALL}")
    print(f"{output}: {REPORT}, {PICTURE} written")
    return rows


def measure_split(
    net: judge.Judge,
    generator: Generator,
    scenes: "Scenes",
    points: list[Sampling],
    args: argparse.Namespace,
) -> tuple[list[Row], Tensor]:
    """(a row for each set of images, those generated at the last point)."""

    def row_of(kind: str, facts: judge.Facts, **settings: Any) -> Row:
        return {"split": scenes.split, "images": kind} | settings | measure(scenes, facts, real)

    # The ceilings. Half of the real images is compared with the other half
    real = read(net, scenes.images, args.batch_size)
    halves = rearrange(real.features, "(n m) d -> m n d", n=len(scenes.texts)).chunk(2)
    kid = distance(*(half.flatten(0, 1) for half in halves)) if len(halves) == 2 else None
    rebuilt = read(net, reconstruct(generator, scenes, args.batch_size), args.batch_size)
    rows = [row_of("real", real) | {"kid": kid}, row_of("reconstructed", rebuilt)]

    # The run's own, without the flow and with it
    if isinstance(generator, ImageGenerator) and generator.flow.config.source == "text":
        rows.append(row_of("start", read(net, decode_starts(generator, scenes), args.batch_size)))
    for sampling in points:
        start = time.perf_counter()
        images = generate(generator, scenes, sampling, args)
        rate = len(images) / (time.perf_counter() - start)
        settings = {"steps": sampling.steps, "guidance": sampling.guidance}
        row = row_of("generated", read(net, images, args.batch_size), **settings)
        rows.append(row | {"images_per_second": rate})
    return rows, images


# ------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Scenes:
    """N captions of a split, what they say, and M real images of each."""

    split: str
    texts: list[str]
    wanted: judge.Wanted
    images: Tensor  # NM x 3 x R x R uint8; those of a caption follow each other


def read_split(folder: Path, split: str, most: int | None) -> Scenes:
    """The first captions of a split, with their images, off its shards.

    ValueError: no such shards, or not all of them.
    """
    # Gathered by the captions' numbers, in whatever order samples come
    about: dict[int, dict[str, Any]] = {}
    images: dict[int, list[np.ndarray]] = {}
    for shard in expand_shards([f"{folder}/{split}-*.tar"]):
        for sample in read_shard(shard):
            facts = load_json(sample["json"])
            number = facts["caption_number"]
            if most is None or number < most:
                about[number] = facts
                image = np.asarray(open_image(image_bytes(sample)))
                images.setdefault(number, []).append(image)
    numbers = sorted(about)
    counts = {len(found) for found in images.values()}
    if len(counts) > 1:  # a shard is missing, and rows would be taken for another caption's
        raise ValueError(
            f"{folder}: captions of split {split} have {min(counts)} to {max(counts)} images, "
            "expected equally many: run scripts/make_scenes.py to its end"
        )
    pixels = np.stack([image for number in numbers for image in images[number]])
    return Scenes(
        split=split,
        texts=[about[number]["captions"][0] for number in numbers],
        wanted=judge.wanted_by([statement_of(about[number]["statement"]) for number in numbers]),
        images=rearrange(torch.from_numpy(pixels), "b h w c -> b c h w"),
    )


def statement_of(values: dict[str, Any]) -> Statement:
    return Statement(**values | {"objects": tuple(Kind(**kind) for kind in values["objects"])})


def reconstruct(generator: Generator, scenes: Scenes, batch_size: int) -> Tensor:
    """The tokenizer's reconstructions of the real images."""
    reconstructor = Reconstructor(generator.tokenizer, generator.text_encoder, bf16=False)
    captions = np.repeat(scenes.texts, len(scenes.images) // len(scenes.texts)).tolist()
    parts = []
    for i in range(0, len(captions), batch_size):
        batch = scenes.images[i : i + batch_size].to(generator.device)
        parts.append(reconstructor(batch, captions[i : i + batch_size]).cpu())
    return torch.cat(parts)


def generate(
    generator: Generator, scenes: Scenes, sampling: Sampling, args: argparse.Namespace
) -> Tensor:
    """B x 3 x R x R uint8; those of a caption follow each other. Noise of (seed, number)."""
    # An image's noise is a function of (seed, its number), whatever the batch
    captions = np.repeat(scenes.texts, args.images_per_caption).tolist()
    parts = []
    for i in range(0, len(captions), args.batch_size):
        batch = captions[i : i + args.batch_size]
        numbers = list(range(i, i + len(batch)))
        pixels, _ = generator.generate(batch, sampling, args.seed, numbers)
        parts.append(to_bytes(pixels, f"an image of split {scenes.split}").cpu())
    return torch.cat(parts)


def decode_starts(generator: ImageGenerator, scenes: Scenes) -> Tensor:
    """The mean of the flow's start of each caption: N x 3 x R x R uint8."""
    states = generator.encode_text(scenes.texts)
    latents = generator.flow.projector.start(states, noise=None) / generator.flow.latent_scale
    return to_bytes(generator.decode(latents, states), "an image of a start").cpu()


def choose_strips(scenes: Scenes, images: Tensor) -> list[tuple[Tensor, str]]:
    """Of the first captions: (images side by side, 3 x R x W in [0, 1], and the caption)."""
    strips = images.unflatten(0, (len(scenes.texts), -1))[:SHOWN_CAPTIONS, :SHOWN_IMAGES]
    strips = F.pad(strips.float() / 255, (0, GAP), value=1)
    strips = rearrange(strips, "n m c h w -> n c h (m w)")
    return [(strip, f"{scenes.split}: {text}") for strip, text in zip(strips, scenes.texts)]


# ------------------------------------------------------------------------------------------ numbers


@torch.no_grad()
def read(net: judge.Judge, images: Tensor, batch_size: int) -> judge.Facts:
    """What images show, B x 3 x R x R uint8; on the CPU."""
    device = net.background.weight.device
    batches = images.split(batch_size)
    found = judge.joined([net(batch.to(device).float() / 255) for batch in batches])
    return judge.Facts(*(values.cpu() for values in found))


def measure(scenes: Scenes, facts: judge.Facts, real: judge.Facts) -> Row:
    """Shares of images with each fact right (None: no caption states it), diversity, KID."""
    num_captions = len(scenes.texts)
    number = len(facts.background) // num_captions  # of images of a caption
    wanted = judge.Wanted(*(values.repeat_interleave(number, dim=0) for values in scenes.wanted))
    verdicts, said = judge.right(facts, wanted), judge.is_said(wanted)
    row: Row = {
        name: verdicts[name][said[name]].double().mean().item() if said[name].any() else None
        for name in judge.FACTS
    }
    own, others = judge.spread(facts, scenes.wanted), judge.spread(real, scenes.wanted)
    row["diversity"] = None if None in (own, others) else own / others
    return row | {"kid": distance(facts.features, real.features)}


def distance(features: Tensor, real: Tensor) -> float | None:
    """KID; None without torch-fidelity, or of a single image."""
    smaller = min(len(features), len(real))
    if find_spec("torch_fidelity") is None or smaller < 2:
        return None
    kid, _ = kernel_distance(features, real, subsets=1, subset_size=smaller)
    return kid


def print_table(rows: list[Row]) -> None:
    def cell(row: Row, name: str) -> str:
        value = row.get(name)
        if value is None or isinstance(value, str):
            return value or ""
        return f"{100 * value:.1f}" if name in judge.FACTS else f"{value:.3g}"

    names = ["split", "images", "steps", "guidance", *reversed(judge.FACTS)]
    names += ["diversity", "kid", "images_per_second"]
    cells = [[cell(row, name) for name in names] for row in rows]
    print(programs.markdown_table([names, *cells]), end="")


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
