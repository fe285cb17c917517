"""Train the judge of scenes (eval/judge.py) and measure it on images that it has not seen.

    python -m research.train_judge runs/judge

Images are drawn once, into a file of the folder: half of them scenes as statements have them, half
with up to four objects of any kind. Training lays some over others and damages most. At the end it
measures on fresh scenes of each split and writes assets/scenes/judge.safetensors. 6 minutes on one
core.
"""

import argparse
import math
import sys
import time
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from data.files import user_path, written_whole
from data.scenes import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    SHAPES,
    SPLITS,
    Object,
    Scene,
    draw_image,
    draw_scene,
    draw_statement,
    draw_statement_of,
)
from eval import judge
from eval.programs import build_parser
from training.errors import exit_on_error

PART = 2000  # images that are drawn with one stream of numbers
DIAMETERS = (0.17, 0.34)  # of free objects: also between and beyond the two sizes
LEAST_DISTANCE = 0.27  # of their centres, in x or in y: more than two cells of the judge's grid
WRONG_OUTLINES, WRONG_SHARE = 500, 0.15  # in all; of free objects
BLEND_SHARE = 0.25  # of the images
CLEAR, UNCLEAR = 0.7, 0.6  # an image's weight in a blend, above or below which it shows or not
BATCH_SIZE = 64
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 100, 1e-2
MEASURED = 2000  # fresh images of each split
PLACE_ERROR = 0.03  # of a right place: two pixels of 64
IGNORED = -1
Truth = dict[str, Tensor]  # objects: N x 4 x 5 (shape, colour, x, y, diameter), 0 if absent


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    images, truth = load_images(args.folder / f"images_{args.images}.npz", args.images)
    net = train(images, truth, args.steps)
    judge.WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(weights, judge.WEIGHTS, metadata=judge.contents())
    print(f"{judge.WEIGHTS}: written, {sum(p.numel() for p in net.parameters())} weights")
    print_accuracy()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=user_path, help="for the drawn images")
    parser.add_argument("--images", type=int, default=14000)
    parser.add_argument("--steps", type=int, default=1400, help=f"of {BATCH_SIZE} images")
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------- images


def load_images(file: Path, number: int) -> tuple[Tensor, Truth]:
    """(images N x 3 x 64 x 64 uint8, what they show); drawn into the file if it is not there."""
    if not file.is_file():
        # Each part has numbers of its own: more images begin with the same ones
        scenes = []
        for part in range(-(-number // PART)):
            rng = np.random.default_rng(part)
            scenes += [draw_any_scene(rng) for _ in range(PART)]
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as whole:
            np.savez(whole, images=draw_images(scenes), **truth_of(scenes))
    found = {name: torch.from_numpy(values) for name, values in np.load(file).items()}
    return found.pop("images"), found


def draw_any_scene(rng: np.random.Generator) -> Scene:
    """As a statement has it, or with objects that have nothing to do with each other."""
    # Of all splits and of none, so that the judge knows no rule of what goes together
    return draw_scene(draw_statement(rng), rng) if rng.random() < 0.5 else draw_free_scene(rng)


def draw_free_scene(rng: np.random.Generator) -> Scene:
    """Up to four objects of any kind and size, apart."""
    # Drawn anew until all are apart: the judge reads one object a cell
    number = rng.integers(0, judge.MAX_OBJECTS + 1)
    while True:
        diameters = rng.uniform(*DIAMETERS, size=number)
        centres = rng.uniform(diameters[:, None] / 2, 1 - diameters[:, None] / 2, size=(number, 2))
        if all(
            abs(centres[i] - centres[j]).max() >= max(LEAST_DISTANCE, diameters[[i, j]].mean())
            for i, j in combinations(range(number), 2)
        ):
            break
    is_wrong = rng.random(number) < WRONG_SHARE
    shapes = np.where(is_wrong, rng.choice([*wrong_outlines()], number), rng.choice(SHAPES, number))
    kinds = zip(shapes.tolist(), rng.choice([*COLOURS], number).tolist())
    objects = (
        Object(shape, colour, "large" if diameter > judge.SIZE_BOUND else "small", x, y, diameter)
        for (shape, colour), (x, y), diameter in zip(kinds, centres, diameters)
    )
    return Scene(rng.choice([*BACKGROUNDS]), tuple(objects))


@cache
def wrong_outlines() -> dict[str, list[tuple[float, float]]]:
    """Outlines that are none of the shapes: of unequal corners, and of unequal waves."""
    rng = np.random.default_rng(0)
    outlines = {}
    for number in range(WRONG_OUTLINES):
        if number % 2:
            corners = rng.integers(5, 10)
            angles = (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) * 2 * np.pi / corners
            radii = rng.uniform(0.4, 1, corners)
        else:
            angles = np.linspace(0, 2 * np.pi, 48)
            waves = rng.uniform(0, 2 * np.pi, 3) + np.outer(angles, [2, 3, 5])
            radii = 1 + np.sin(waves) @ rng.uniform(0.1, 0.3, 3)
        points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
        # Into the box [-1, 1] x [-1, 1]
        middle, side = (points.min(axis=0) + points.max(axis=0)) / 2, np.ptp(points, axis=0).max()
        outlines[f"wrong {number}"] = ((points - middle) * 2 / side).tolist()
    return outlines


def draw_images(scenes: list[Scene]) -> np.ndarray:
    """N x 3 x 64 x 64 uint8."""
    outlines = OUTLINES | wrong_outlines()
    images = np.stack([np.asarray(draw_image(x, judge.IMAGE_SIZE, outlines)) for x in scenes])
    return images.transpose(0, 3, 1, 2)


def truth_of(scenes: list[Scene]) -> dict[str, np.ndarray]:
    objects = np.zeros((len(scenes), judge.MAX_OBJECTS, 5), dtype=np.float32)
    for row, scene in zip(objects, scenes):
        for place, item in zip(row, scene.objects):
            shape = SHAPES.index(item.shape) if item.shape in SHAPES else judge.NO_SHAPE
            kind = (shape, [*COLOURS].index(item.colour))
            place[:] = (*kind, item.x, item.y, item.diameter)
    backgrounds = [[*BACKGROUNDS].index(scene.background) for scene in scenes]
    return {"objects": objects, "background": np.array(backgrounds)}


# ------------------------------------------------------------------------------------------ damages


def blend(images: Tensor, truth: Truth, rng: torch.Generator) -> tuple[Tensor, Truth]:
    """Some images with others laid over them; what of them can still be said to show."""
    # An image of which too little is left has no objects, and any background: or the average of
    # several images would be taken for one of them
    shape = (len(images), 1, 1, 1)
    is_blend = torch.rand(shape, generator=rng) < BLEND_SHARE
    share = torch.rand(shape, generator=rng)
    is_clear = (torch.rand(shape, generator=rng) < 0.5) | ~is_blend
    weight = torch.where(is_clear, CLEAR + share * (1 - CLEAR), UNCLEAR * (0.6 + 0.4 * share))
    # One other image, or the mean of three
    rolled = [images.roll(shift, dims=0) for shift in (1, 2, 3)]
    is_one = torch.rand(shape, generator=rng) < 0.5
    others = torch.where(is_one, rolled[0], torch.stack(rolled).mean(dim=0))
    images = torch.lerp(images, others, (1 - weight) * is_blend)
    is_clear = is_clear.flatten()
    return images, {
        "objects": truth["objects"] * is_clear[:, None, None],
        "background": truth["background"].masked_fill(~is_clear, IGNORED),
    }


def damage(images: Tensor, rng: torch.Generator) -> Tensor:
    """B x 3 x R x R in [0, 1], each smoothed and damaged as much as is drawn for it; most are."""
    # As a tokenizer damages them: its reconstructions must be read, too
    b, _, r, _ = images.shape

    def draw(probability: float, most: float) -> Tensor:
        """B x 1 x 1 x 1: 0, or uniform up to `most`."""
        values = torch.rand(b, 1, 1, 1, generator=rng) * most
        return values * (torch.rand(b, 1, 1, 1, generator=rng) < probability)

    # Smoothed by a Gaussian, as a matrix on rows and columns
    distance = torch.arange(r)[:, None] - torch.arange(r)
    kernel = torch.exp(-(distance**2) / (2 * draw(0.6, 1.6)[:, 0] ** 2 + 1e-4))
    kernel = (kernel / kernel.sum(dim=2, keepdim=True))[:, None]
    images = kernel @ images @ kernel.mT
    # Half the resolution
    low = F.interpolate(F.avg_pool2d(images, kernel_size=2), scale_factor=2, mode="bilinear")
    images = torch.lerp(images, low, draw(0.3, 1))
    # JPEG's loss: cosines of 8 x 8 blocks, the finer the coarser rounded
    k = torch.arange(8)
    cosines = torch.cos(math.pi * k[:, None] * (2 * k + 1) / 16) / 2
    cosines[0] /= 2**0.5
    blocks = images.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    waves = cosines @ blocks @ cosines.T
    step = draw(0.3, 0.1)[..., None, None] * (1 + k + k[:, None]) / 2 + 1e-4
    blocks = cosines.T @ ((waves / step).round() * step) @ cosines
    images = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    # Noise of single pixels, and of patches of 8
    images = images + torch.randn(images.shape, generator=rng) * draw(0.4, 0.06)
    coarse = torch.randn(b, 3, r // 8, r // 8, generator=rng)
    coarse = F.interpolate(coarse, size=(r, r), mode="bicubic")
    return (images + coarse * draw(0.4, 0.08)).clamp(0, 1)


# ----------------------------------------------------------------------------------------- training


def train(images: Tensor, truth: Truth, steps: int) -> judge.Judge:
    """A judge trained from random weights."""
    net = judge.Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    started = time.monotonic()
    for step in range(steps):
        # Numbers are a function of the step
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=rng)
        batch, facts = blend(images[rows] / 255, {k: v[rows] for k, v in truth.items()}, rng)
        batch = damage(batch, rng)
        parts, background, _ = net.outputs(batch.contiguous(memory_format=torch.channels_last))
        losses = compute_losses(parts, background, facts)
        # Linear warm-up, then a cosine to zero
        rate = min((step + 1) / WARMUP_STEPS, (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step % 100 == 0:
            values = ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {step} ({time.monotonic() - started:.0f} s): {values}", flush=True)
    return net.eval()


def compute_losses(
    parts: tuple[Tensor, ...], background: Tensor, truth: Truth
) -> dict[str, Tensor]:
    """Of each output of the net; those of objects by how near the centre a cell is."""
    mark, shape, colour, offset, diameter = (part.flatten(2) for part in parts)  # B x C x 64
    objects = truth["objects"]  # B x 4 x 5
    # Marks: of the nearest object, by its distance in cells
    centres = judge.cell_centres(objects.device)
    away = objects[:, :, None, 2:4] * judge.GRID - centres  # B x 4 x 64 x 2
    is_absent = objects[:, :, None, 4] == 0
    wanted = torch.exp(-away.square().sum(dim=3) / (2 * judge.SPREAD**2)).masked_fill(is_absent, 0)
    wanted, nearest = wanted.max(dim=1)  # B x 64
    own = objects.gather(1, nearest[:, :, None].expand(-1, -1, 5))  # B x 64 x 5
    # What lies in a cell is asked only near an object's centre
    weight = wanted * (wanted > 0.3)
    weight = weight / weight.sum()

    def of_objects(loss: Tensor) -> Tensor:
        return (loss * weight).sum()

    target = own[..., 2:4] * judge.GRID - centres
    return {
        "mark": 10 * F.binary_cross_entropy_with_logits(mark[:, 0], wanted)
        - 10 * F.binary_cross_entropy(wanted, wanted),  # 0 at best
        "shape": of_objects(F.cross_entropy(shape, own[..., 0].long(), reduction="none")),
        "colour": of_objects(F.cross_entropy(colour, own[..., 1].long(), reduction="none")),
        "place": 2 * of_objects((offset.mT - target).abs().sum(dim=2)),
        "diameter": 20 * of_objects((diameter[:, 0] - own[..., 4]).abs()),
        "background": F.cross_entropy(background, truth["background"], ignore_index=IGNORED),
    }


# ---------------------------------------------------------------------------------------- measuring


def print_accuracy() -> None:
    """The share of fresh images of which each fact is right, by split; and of the same, damaged."""
    net = judge.load_judge()
    rng = torch.Generator().manual_seed(1)
    for split in SPLITS[1:]:
        numbers = np.random.default_rng([1, SPLITS.index(split)])  # no seed of the training's
        said = [draw_statement_of(split, numbers) for _ in range(MEASURED)]
        scenes = [draw_scene(one, numbers) for one in said]
        images = torch.from_numpy(draw_images(scenes)) / 255
        for name, shown in ((split, images), (f"{split}, damaged", damage(images, rng))):
            facts = judge.joined([net(batch) for batch in shown.split(500)])
            shares = compare(facts, scenes)
            values = (f"{fact} {is_right.float().mean():.2%}" for fact, is_right in shares.items())
            print(f"{name}: {', '.join(values)}", flush=True)


def compare(facts: judge.Facts, scenes: list[Scene]) -> dict[str, Tensor]:
    """Fact -> N bool: right for all of an image's objects, each against the nearest one read."""
    truth = {name: torch.from_numpy(values) for name, values in truth_of(scenes).items()}
    objects = truth["objects"]
    is_absent = objects[..., 4] == 0  # N x 4
    distance = torch.cdist(objects[..., 2:4], facts.place)
    distance, nearest = distance.masked_fill(~facts.present[:, None], 9).min(dim=2)

    def agree(found: Tensor, wanted: Tensor) -> Tensor:
        return ((found.gather(1, nearest) == wanted.long()) | is_absent).all(dim=1)

    # Of equal objects no relation is stated, and they may lie on a diagonal
    read = facts.place.gather(1, nearest[:, :, None].expand(-1, -1, 2))
    is_free = is_absent[:, 1] | (objects[:, 0, 0] == objects[:, 1, 0])
    verdicts = {
        "shape": agree(facts.shape, objects[..., 0]),
        "colour": agree(facts.colour, objects[..., 1]),
        "size": agree(facts.size, objects[..., 4] > judge.SIZE_BOUND),
        "place": ((distance < PLACE_ERROR) | is_absent).all(dim=1),
        "count": facts.count == (~is_absent).sum(dim=1),
        "relation": (relation_of(read) == relation_of(objects[..., 2:4])) | is_free,
        "background": facts.background == truth["background"],
    }
    return verdicts | {"all": torch.stack([*verdicts.values()]).all(dim=0)}


def relation_of(place: Tensor) -> Tensor:
    """Where the second object lies from the first: N x 4 x 2 -> N (right, left, below, above)."""
    distance = place[:, 1] - place[:, 0]
    axis = distance.abs().argmax(dim=1)
    return 2 * axis + (distance.gather(1, axis[:, None])[:, 0] < 0)


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
