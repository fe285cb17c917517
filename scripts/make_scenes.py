"""A data set that is a program: scenes of coloured shapes with captions, as image shards.

    python -m scripts.make_scenes --config configs/scenes/scenes.yaml
    python -m scripts.make_scenes --config configs/scenes/scenes.yaml run_dir=DIR captions=20000

Splits (data/scenes.py), each in shards of its own: train; seen (other images of captions that were
trained on); new (captions of shown objects that are never together in train); pairs (colours that
a shape never has in train); relations (as two shapes never lie); counts (numbers in which a shape
is never shown). A sample is {key}.png, {key}.txt and {key}.json with "captions" (several phrasings,
the first is the .txt), "statement" (what they say), "scene" (all that is shown, exactly) and
"caption_number". A caption is a function of (seed, split, its number), an image of its caption and
(seed, split, its number), whatever the number of processes and of images. Also writes
manifest.json. The same command continues an interrupted one.
"""

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from configs.load import parse_stage_args
from data.files import write_json
from data.packing import MANIFEST, check_data_set
from data.scenes import (
    SPLITS,
    Statement,
    draw_caption,
    draw_image,
    draw_scene,
    draw_statement_of,
)
from data.tar import write_shard
from data.workers import map_in_processes
from modeling.layers import check_least
from training.errors import exit_on_error
from training.stage import StageConfig

SAMPLES_PER_SHARD = 2000
PHRASINGS = 4  # of a caption; some may be equal
# the settings that decide what is drawn
PLAN = "image_size seed captions images_per_caption heldout_captions heldout_images_per_caption"


@dataclass
class ScenesStage(StageConfig):
    """What can be set in scenes.yaml."""

    image_size: int = 64  # pixels
    seed: int = 0
    captions: int = 4000  # of split train; they may repeat
    images_per_caption: int = 4
    heldout_captions: int = 256  # of each other split
    heldout_images_per_caption: int = 4
    num_processes: int = 1  # shards that are drawn at a time; changes nothing in them

    stage = "scenes"

    def check(self) -> None:
        check_least(self, 16, "image_size")
        check_least(self, 0, "seed")
        check_least(self, 1, "captions", "images_per_caption", "num_processes")
        check_least(self, 1, "heldout_captions", "heldout_images_per_caption")
        if self.heldout_captions > self.captions:
            raise ValueError(
                f"heldout_captions {self.heldout_captions}: the split seen takes them from "
                f"captions {self.captions}"
            )

    def plan(self) -> dict[str, int]:
        """What the data set is made of, as the manifest has it."""
        return {name: getattr(self, name) for name in PLAN.split()}

    def size_of(self, split: str) -> tuple[int, int]:
        """(captions, images of each) of a split."""
        if split == "train":
            return self.captions, self.images_per_caption
        return self.heldout_captions, self.heldout_images_per_caption

    def outputs(self) -> list[str]:
        return [str(shard_file(self, *task)) for task in shard_tasks(self)]


def main(config: ScenesStage) -> None:
    """Write the shards that are not there."""
    # whose shards these are is written first: an interrupted run goes on
    folder = Path(config.run_dir)
    plan = config.plan()
    check_data_set(folder, plan)
    sizes = {split: math.prod(config.size_of(split)) for split in SPLITS}
    write_json({"plan": plan, "images": sizes}, folder / MANIFEST)
    tasks = [task for task in shard_tasks(config) if not shard_file(config, *task).is_file()]
    if not tasks:
        print(f"{folder}: complete, nothing to do")
        return
    for _ in map_in_processes(partial(make_shard, config), tasks, config.num_processes):
        pass
    print(f"{folder}: {sum(sizes.values())} images of {config.image_size} px")


def shard_tasks(config: ScenesStage) -> Iterator[tuple[str, int]]:
    """(split, number of the shard) of all shards."""
    for split in SPLITS:
        captions, images = config.size_of(split)
        for shard in range(-(-captions * images // SAMPLES_PER_SHARD)):
            yield split, shard


def shard_file(config: ScenesStage, split: str, shard: int) -> Path:
    return Path(config.run_dir) / f"{split}-{shard:06d}.tar"


def make_shard(config: ScenesStage, task: tuple[str, int]) -> None:
    split, shard = task
    total = math.prod(config.size_of(split))
    numbers = range(total)[shard * SAMPLES_PER_SHARD :][:SAMPLES_PER_SHARD]
    samples = (make_sample(config, split, number) for number in numbers)
    write_shard(shard_file(config, split, shard), samples)


def make_sample(config: ScenesStage, split: str, number: int) -> dict[str, Any]:
    """Raw sample of an image."""
    # captions take turns: images of one lie far apart, also in a shuffle of neighbours
    caption = number % config.size_of(split)[0]
    # seen: other images of what was trained on
    statement, texts = make_caption(config.seed, "train" if split == "seen" else split, caption)
    scene = draw_scene(statement, generator(config.seed, split, "image", number))
    buffer = io.BytesIO()
    draw_image(scene, config.image_size).save(buffer, format="PNG", compress_level=6)
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
    statement = draw_statement_of("seen" if split == "train" else split, rng)
    return statement, [draw_caption(statement, rng) for _ in range(PHRASINGS)]


def generator(seed: int, split: str, use: str, number: int) -> np.random.Generator:
    """Numbers of one image or caption: the same whatever else is made."""
    stream = 2 * SPLITS.index(split) + (use == "image")
    # an own stream each: more images, or another split, change no other. Philox is keyed directly:
    # no seed has to be hashed
    return np.random.Generator(np.random.Philox(key=(seed, stream << 40 | number)))


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(ScenesStage, __doc__)))
