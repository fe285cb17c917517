"""A data set that is a program: scenes of coloured shapes with captions, as image shards.

    python scripts/make_scenes.py runs/scenes/data
    python scripts/make_scenes.py DIR --captions 20000 --image-size 128 --num-processes 8

Splits (data/scenes.py), each in shards of its own: train; seen (other images of captions that were
trained on); new (captions of shown objects that are never together in train); pairs (colours that
a shape never has in train); relations (as two shapes never lie); counts (numbers in which a shape
is never shown). A sample is {key}.png, {key}.txt and {key}.json with "captions" (several phrasings,
the first is the .txt), "statement" (what they say), "scene" (all that is shown, exactly) and
"caption_number". An image is a function of (seed, split, its number), a caption of (seed, split,
its number), whatever the number of processes and of images. Also writes manifest.json. The same
command continues an interrupted one.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from data.files import check_writable, write_json
from data.processes import map_in_processes
from data.scenes import (
    SPLITS,
    Statement,
    draw_caption,
    draw_image,
    draw_scene,
    draw_statement,
    split_of,
)
from data.tar import write_shard
from training.errors import exit_on_error

SAMPLES_PER_SHARD = 2000
PHRASINGS = 4  # of a caption; some may be equal
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Plan:
    """What a data set is made of, as the manifest has it."""

    image_size: int = 64
    seed: int = 0
    captions: int = 4000  # of split train; they may repeat
    images_per_caption: int = 4
    heldout_captions: int = 256  # of each other split
    heldout_images_per_caption: int = 4

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = {"image_size": 16, "seed": 0}.get(name, 1)
            if value < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {value}"
                )
        if self.heldout_captions > self.captions:
            raise ValueError(
                f"--heldout-captions {self.heldout_captions}: the split seen takes them from "
                f"--captions {self.captions}"
            )

    def size_of(self, split: str) -> tuple[int, int]:
        """(captions, images of each) of a split."""
        if split == "train":
            return self.captions, self.images_per_caption
        return self.heldout_captions, self.heldout_images_per_caption


def main(arguments: list[str] | None = None) -> None:
    """Write the shards that are not there."""
    args = vars(parse_args(arguments))
    output, num_processes = args.pop("output"), args.pop("num_processes")
    plan = Plan(**args)
    # Whose shards these are is written first: an interrupted run goes on
    path = output / MANIFEST
    check_writable(path)
    if path.is_file() and json.loads(path.read_text())["plan"] != asdict(plan):
        raise ValueError(f"{output} holds another data set (see {path}): delete it")
    sizes = {split: plan.size_of(split) for split in SPLITS}
    counts = {split: captions * images for split, (captions, images) in sizes.items()}
    write_json({"plan": asdict(plan), "images": counts}, path)
    tasks = [task for task in shard_tasks(plan) if not shard_file(output, *task).is_file()]
    if not tasks:
        print(f"{output}: complete, nothing to do")
        return
    for _ in map_in_processes(partial(make_shard, output, plan), tasks, num_processes):
        pass
    print(f"{output}: {sum(counts.values())} images of {plan.image_size} px")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder of the shards")
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--num-processes", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.num_processes < 1:
        parser.error(f"--num-processes must be at least 1, got {args.num_processes}")
    return args


def shard_tasks(plan: Plan) -> Iterator[tuple[str, int]]:
    """(split, number of the shard) of all shards."""
    for split in SPLITS:
        captions, images = plan.size_of(split)
        for shard in range(-(-captions * images // SAMPLES_PER_SHARD)):
            yield split, shard


def shard_file(output: Path, split: str, shard: int) -> Path:
    """Where a shard is written."""
    return output / f"{split}-{shard:06d}.tar"


def make_shard(output: Path, plan: Plan, task: tuple[str, int]) -> None:
    """Write one shard."""
    split, shard = task
    captions, images = plan.size_of(split)
    numbers = range(captions * images)[shard * SAMPLES_PER_SHARD :][:SAMPLES_PER_SHARD]
    samples = (make_sample(plan, split, number) for number in numbers)
    write_shard(shard_file(output, split, shard), samples)


def make_sample(plan: Plan, split: str, number: int) -> dict[str, Any]:
    """Raw sample of an image: captions take turns, so that those of one lie far apart."""
    caption = number % plan.size_of(split)[0]
    statement, texts = make_caption(plan.seed, "train" if split == "seen" else split, caption)
    scene = draw_scene(statement, generator(plan.seed, split, "image", number))
    buffer = io.BytesIO()
    draw_image(scene, plan.image_size).save(buffer, format="PNG", compress_level=6)
    about = {"captions": texts, "caption_number": caption}
    about |= {"statement": asdict(statement), "scene": asdict(scene)}
    return {
        "__key__": f"{split}{number:08d}",
        "png": buffer.getvalue(),
        "txt": texts[0],
        "json": json.dumps(about).encode(),
    }


def make_caption(seed: int, split: str, number: int) -> tuple[Statement, list[str]]:
    """(what it says, phrasings) of a split's caption."""
    rng = generator(seed, split, "caption", number)
    wanted = "seen" if split == "train" else split
    while split_of(statement := draw_statement(rng)) != wanted:
        pass
    return statement, [draw_caption(statement, rng) for _ in range(PHRASINGS)]


def generator(seed: int, split: str, use: str, number: int) -> np.random.Generator:
    """Numbers of one image or caption: the same whatever else is made."""
    stream = 2 * SPLITS.index(split) + (use == "image")
    # Philox is keyed directly: no seed has to be hashed
    return np.random.Generator(np.random.Philox(key=(seed, stream << 40 | number)))


if __name__ == "__main__":
    exit_on_error(main)
