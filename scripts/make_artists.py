"""Emoji as several artists drew them, as image shards: a caption has several drawings.

    python -m scripts.make_artists --config configs/artists/artists.yaml
    python -m scripts.make_artists --config configs/artists/artists.yaml packages=DIR run_dir=DIR

In: npm packages of openly licensed drawings (ARTISTS), in the folder `packages` as `npm pack`
writes them; those that are not there are fetched. Skin tones, flags and families are left out, and
a drawing that its artist gives to several names; a name has at least two artists.
Out: the splits in shards of their own: train; captions (all drawings of names that train never
shows); styles (one drawing each of names that train shows by the other artists). A sample is
{key}.png, on white; {key}.txt, "red apple" or "red apple, noto": half of the drawings of a name say
whose they are, in styles all; {key}.json with "captions" (both; the first is the .txt),
"caption_number" (of the name), "name", "style", "category" and "subcategory". manifest.json has the
licences. The same command continues an interrupted one.
"""

import io
import json
import os
import random
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from assets.noto_emoji.make_demo_data import Emoji, describe_emoji, load_image, png_bytes
from configs.load import parse_stage_args
from data.files import write_json
from data.packing import MANIFEST, check_data_set
from data.tar import write_shard
from modeling.layers import check_least
from training.errors import exit_on_error
from training.stage import StageConfig

SHARDS = {"train": 8, "captions": 1, "styles": 1}  # of each split
NAMES_FILE = "emoji.json"  # in the package of noto
# code points that some packages leave out of a file's name
JOINERS = ("fe0f", "200d")
LEFT_OUT = {"flags", "component", "family"}  # categories and subcategories
LARGEST_SIZE = 64  # pixels: that of most packages


@dataclass(frozen=True)
class Artist:
    """Where drawings of one style come from."""

    package: str  # NAME@VERSION
    folder: str  # of the drawings in it, which have the emoji's code points for their names
    licence: str  # of the drawings
    author: str

    @property
    def file(self) -> str:
        """What npm pack calls the package."""
        return self.package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


ARTISTS = {  # by the word that captions have for the style
    "noto": Artist("emoji-datasource-google@16.0.0", "img/google/64", "Apache-2.0", "Google"),
    "twemoji": Artist(
        "emoji-datasource-twitter@16.0.0", "img/twitter/64", "CC-BY-4.0", "Twitter and contributors"
    ),
    "fluent": Artist("@lobehub/fluent-emoji-3d@1.1.0", "assets", "MIT", "Microsoft"),
    "emojione": Artist("emojione@2.2.7", "assets/png", "CC-BY-4.0", "EmojiOne"),
}
STYLES = tuple(ARTISTS)


@dataclass
class ArtistsStage(StageConfig):
    """What can be set in artists.yaml."""

    image_size: int = LARGEST_SIZE  # pixels, 16 to 64
    seed: int = 0  # decides what is held out
    heldout_names: int = 100  # of split captions
    heldout_pairs: int = 200  # of a name and a style, of split styles; the artists take turns
    packages: str = "${data_dir}/npm"  # folder of the npm packages

    stage = "artists"

    def check(self) -> None:
        if not 16 <= self.image_size <= LARGEST_SIZE:
            raise ValueError(f"image_size must be 16 to {LARGEST_SIZE}, got {self.image_size}")
        check_least(self, 0, "seed")
        check_least(self, 1, "heldout_names", "heldout_pairs")

    def plan(self) -> dict[str, Any]:
        """What the data set is made of, as the manifest has it."""
        names = ("image_size", "seed", "heldout_names", "heldout_pairs")
        plan = {name: getattr(self, name) for name in names}
        return plan | {"artists": {style: asdict(artist) for style, artist in ARTISTS.items()}}

    def outputs(self) -> list[str]:
        return [str(path) for split in SHARDS for path in shard_files(self, split)]


@dataclass(frozen=True)
class Drawing:
    """One artist's image of an emoji."""

    key: str  # the emoji's code points, as code_points has them
    number: int  # of the emoji
    emoji: Emoji
    style: str
    image: bytes  # a file


def main(config: ArtistsStage) -> None:
    """Write the shards that are not there."""
    folder = Path(config.run_dir)
    plan = config.plan()
    check_data_set(folder, plan)
    if all(Path(shard).is_file() for shard in config.outputs()):
        print(f"{folder}: complete, nothing to do")
        return

    fetch_packages(Path(config.packages))
    splits = split_drawings(config, read_drawings(Path(config.packages)))
    images = {split: Counter(d.style for d in drawings) for split, drawings in splits.items()}
    # whose shards these are is written first: an interrupted run goes on
    write_json({"plan": plan, "images": images}, folder / MANIFEST)
    for split, drawings in splits.items():
        files = shard_files(config, split)
        for i, file in enumerate(files):
            if not file.is_file():
                own = drawings[i :: len(files)]
                write_shard(file, (make_sample(d, split, config.image_size) for d in own))
        counts = ", ".join(f"{images[split][style]} {style}" for style in STYLES)
        print(f"{folder}: {split}: {len(drawings)} images: {counts}")


def shard_files(config: ArtistsStage, split: str) -> list[Path]:
    return [Path(config.run_dir) / f"{split}-{i:06d}.tar" for i in range(SHARDS[split])]


def fetch_packages(folder: Path) -> None:
    """Have npm fetch the packages that are not there; ValueError says how to do it elsewhere."""
    missing = [a.package for a in ARTISTS.values() if not (folder / a.file).is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", *missing]
    print(f"+ {shlex.join(command)}", flush=True)
    # aside, so that what is not whole never lies among the packages
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        try:
            subprocess.run([*command, "--loglevel=error"], cwd=partial, check=True)
        except (OSError, subprocess.CalledProcessError) as error:  # there is no npm, or it failed
            raise ValueError(
                f"{folder} lacks npm packages that npm did not fetch ({error}). Elsewhere, type "
                f"'{shlex.join(command)}', and copy the .tgz files that it writes into {folder}"
            ) from None
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)


def read_drawings(folder: Path) -> list[Drawing]:
    """All drawings that are wanted, those of one name side by side; ValueError as read_package."""
    files = {style: read_package(folder / a.file, a.folder) for style, a in ARTISTS.items()}
    emoji = describe_emoji(json.loads(files["noto"][NAMES_FILE]))
    wanted = [e for e in emoji if not (e.tone or {e.category, e.subcategory} & LEFT_OUT)]
    drawings = []
    for number, one in enumerate(wanted):
        key = code_points(one.key)
        # no artist has drawn all names
        own = {style: files[style][key] for style in STYLES if key in files[style]}
        drawings += [Drawing(key, number, one, style, own[style]) for style in own]
    # a drawing of several names shows none of them; a name with one artist has no style to compare
    uses = Counter(drawing.image for drawing in drawings)
    drawings = [drawing for drawing in drawings if uses[drawing.image] == 1]
    artists = Counter(drawing.key for drawing in drawings)
    return [drawing for drawing in drawings if artists[drawing.key] > 1]


def read_package(path: Path, folder: str) -> dict[str, bytes]:
    """{code points: image} of a package's folder, and emoji.json; ValueError names the package."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                parent, _, name = member.name.removeprefix("package/").rpartition("/")
                if parent == folder and member.isfile():
                    files.setdefault(code_points(Path(name).stem), tar.extractfile(member).read())
                elif not parent and name == NAMES_FILE:
                    files[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({error}): delete it to fetch it anew") from error
    return files


def code_points(key: str) -> str:
    """The form in which packages agree: "0023-FE0F-20E3" -> "23-20e3"."""
    codes = [code.lstrip("0") for code in key.lower().split("-")]
    return "-".join(code for code in codes if code not in JOINERS)


def split_drawings(config: ArtistsStage, drawings: Sequence[Drawing]) -> dict[str, list[Drawing]]:
    """The drawings of each split, shuffled; ValueError: too few names to hold so many out."""
    rng = random.Random(config.seed)
    counts = Counter(drawing.key for drawing in drawings)
    candidates = sorted(key for key, count in counts.items() if count == len(STYLES))
    num_heldout = config.heldout_names + config.heldout_pairs
    if num_heldout >= len(candidates):
        raise ValueError(
            f"heldout_names {config.heldout_names} + heldout_pairs {config.heldout_pairs} must be "
            f"below the number of names that all artists have drawn, {len(candidates)}"
        )
    # names first, then pairs: neither takes what the other holds out
    chosen = rng.sample(candidates, num_heldout)
    names = {*chosen[: config.heldout_names]}
    pairs = {*zip(chosen[config.heldout_names :], cycle(STYLES))}

    splits: dict[str, list[Drawing]] = {split: [] for split in SHARDS}
    for drawing in drawings:
        is_pair = (drawing.key, drawing.style) in pairs
        split = "captions" if drawing.key in names else "styles" if is_pair else "train"
        splits[split].append(drawing)
    for part in splits.values():
        rng.shuffle(part)
    return splits


def make_sample(drawing: Drawing, split: str, image_size: int) -> dict[str, Any]:
    """Raw sample of a drawing: half of those of a name say the style, in split styles all."""
    emoji = drawing.emoji
    style = drawing.style
    captions = [emoji.name, f"{emoji.name}, {style}"]
    if split == "styles" or (drawing.number + STYLES.index(style)) % 2:
        captions.reverse()
    about = {"captions": captions, "caption_number": drawing.number, "name": emoji.name}
    about |= {"style": style, "category": emoji.category, "subcategory": emoji.subcategory}
    image = load_image(io.BytesIO(drawing.image)).resize((image_size, image_size))
    return {
        "__key__": f"{drawing.key}-{style}",
        "png": png_bytes(image),
        "txt": captions[0],
        "json": json.dumps(about).encode(),
    }


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(ArtistsStage, __doc__)))
