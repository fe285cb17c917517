"""Build the demo data: Noto emoji as 64 x 64 image-caption shards, from an npm package.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python assets/noto_emoji/make_demo_data.py --package package --output assets/noto_emoji

In: the unpacked package (emoji.json, img/google/64/*.png, LICENSE), and beside this file the list
of held-out base emoji and names.json: what is called otherwise. "Black", "white" and "red" mean
filled, outlined or another design's in some names; the picture has another colour.
Out: shards of {key}.png (the emoji on white, RGB), {key}.txt (caption) and {key}.json;
manifest.json; the package's licence. A key is the emoji's code points in lower-case hex ("1f600",
"1f44d-1f3fb"). Shards are gzip-compressed tar: 14 MB, where plain tar has 24.
The same package gives the same bytes with the same Pillow and zlib; content_sha256 in the manifest
covers the .json files and pixels only, so it agrees with every version of them.
"""

import argparse
import gzip
import hashlib
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from webdataset import TarWriter

HERE = Path(__file__).parent
PACKAGE = "emoji-datasource-google 16.0.0"
SAMPLES_PER_SHARD = 512
SHUFFLE_SEED = "noto-emoji"
IMAGE_SIZE = 64
NAMES = json.loads((HERE / "names.json").read_text(encoding="utf-8"))

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}


@dataclass(frozen=True)
class Emoji:
    """One sample's description: exactly the fields of its .json."""

    key: str
    name: str
    subcategory: str
    category: str
    base: str  # key of the emoji without skin tones; its own key for a base emoji
    tone: str | None  # "dark", "light and dark"; None for a base emoji
    caption: str


def natural_name(name: str) -> str:
    """'KISS: MAN, WOMAN' -> 'kiss of man and woman', 'MAN: RED HAIR' -> 'man with red hair'."""
    name = name.lower().replace("’", "'")
    name = name.replace("oclock", "o'clock").replace("ideograph-", "ideograph ")
    name = NAMES.get(name, name)
    head, colon, rest = name.partition(": ")
    if not colon:
        return name
    if head == "keycap":
        return f"{head} {rest}"
    if head in ("man", "woman", "person"):
        return f"{rest} {head}" if rest == "bald" else f"{head} with {rest}"
    *first, last = rest.split(", ")
    group, _, attribute = head.partition(" ")  # "couple", "with heart"
    return f"{group} of {', '.join(first)} and {last} {attribute}".rstrip()


def tone_name(variation: str) -> str:
    """'1F3FB' -> 'light', '1F3FB-1F3FF' -> 'light and dark', '1F3FB-1F3FB' -> 'light'."""
    tones = [TONES[code] for code in variation.lower().split("-")]
    return " and ".join(dict.fromkeys(tones))


def describe_emoji(entries: list[dict]) -> list[Emoji]:
    """Entries of emoji.json -> every base emoji and skin-tone variant, in the package's order."""
    name_counts = Counter(entry["name"] for entry in entries)
    emoji = []
    for entry in entries:
        base = entry["unified"].lower()
        # two emoji of one name ("MAN IN TUXEDO") still have different short names.
        is_shared = name_counts[entry["name"]] > 1
        name = entry["short_name"].replace("_", " ") if is_shared else natural_name(entry["name"])
        # the patches of skin colour have no name of their own
        if base in TONES:
            name = f"{TONES[base]} skin tone"
        subcategory = entry["subcategory"].replace("-", " ").lower()
        category = entry["category"].lower()
        caption = f"{name}, {subcategory}"
        emoji.append(Emoji(base, name, subcategory, category, base, None, caption))
        for variation, variant in entry.get("skin_variations", {}).items():
            key = variant["unified"].lower()
            tone = tone_name(variation)
            toned = f"{caption}, {tone} skin tone"
            emoji.append(Emoji(key, name, subcategory, category, base, tone, toned))
    return emoji


def load_package(package: Path) -> list[Emoji]:
    """Emoji of the unpacked package; ValueError: another version."""
    # another version has other pictures, and would silently become another data set
    about = json.loads((package / "package.json").read_text(encoding="utf-8"))
    found = f"{about['name']} {about['version']}"
    if found != PACKAGE:
        raise ValueError(f"{package} holds {found}, expected {PACKAGE}")
    return describe_emoji(json.loads((package / "emoji.json").read_text(encoding="utf-8")))


def image_folder(package: Path) -> Path:
    return package / "img" / "google" / str(IMAGE_SIZE)


def load_image(file: Path | BinaryIO) -> Image.Image:
    """The package's RGBA image composited on white: 64 x 64 RGB."""
    rgba = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def plan_shards(emoji: list[Emoji], heldout: set[str]) -> dict[str, list[Emoji]]:
    """File name -> its samples in order; one held-out shard each for base emoji and variants."""
    # sorting by a hash is a fixed shuffle, the same in every Python version
    emoji = sorted(
        emoji, key=lambda item: hashlib.sha256(f"{SHUFFLE_SEED}:{item.key}".encode()).hexdigest()
    )
    # one held-out emoji keeps its variants out of the training, too
    split = {"train-base": [], "train-tone": [], "heldout": [], "heldout-tone": []}
    for item in emoji:
        is_heldout = item.base in heldout
        base, tone = ("heldout", "heldout-tone") if is_heldout else ("train-base", "train-tone")
        split[tone if item.tone else base].append(item)
    shards = {}
    for name, items in split.items():
        size = SAMPLES_PER_SHARD if name.startswith("train") else max(len(items), 1)
        for index, start in enumerate(range(0, len(items), size)):
            shards[f"{name}-{index:06d}.tar.gz"] = items[start : start + size]
    return shards


def describe_json(item: Emoji) -> bytes:
    return json.dumps(asdict(item), sort_keys=True, ensure_ascii=False).encode()


def png_bytes(image: Image.Image) -> bytes:
    """Lossless RGB PNG; a palette would help only the few images of 256 colours or less."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shard_bytes(items: list[Emoji], images: dict[str, Image.Image]) -> bytes:
    """One gzip-compressed tar without times, owners or host details."""
    # No time in gzip's header, no owner in tar's: equal inputs give equal bytes
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream,
        TarWriter(stream, user="", group="", mode=0o644, mtime=0) as tar,
    ):
        for item in items:
            members = {
                "png": png_bytes(images[item.key]),
                "txt": item.caption.encode(),
                "json": describe_json(item),
            }
            # one by one: else they would be sorted
            for extension, data in members.items():
                tar.write({"__key__": item.key, extension: data})
    return buffer.getvalue()


def build(package: Path, output: Path, heldout_list: Path) -> dict:
    """Check the input, then write shards, manifest.json and the licence; returns the manifest.

    heldout_list: a file with keys of base emoji, one a line.
    """
    emoji = load_package(package)
    heldout = {*heldout_list.read_text(encoding="utf-8").split()}
    if unknown := sorted(heldout - {item.base for item in emoji}):
        raise ValueError(f"{heldout_list}: {unknown[:3]} are no base emoji of the package")
    images = {item.key: load_image(image_folder(package) / f"{item.key}.png") for item in emoji}
    files = {}
    rows = []
    for file, items in plan_shards(emoji, heldout).items():
        data = shard_bytes(items, images)
        files[file] = data
        # the hash of a file depends on Pillow and zlib, that of its .json and RGB pixels does not
        content = [describe_json(item) + b"\n" + images[item.key].tobytes() for item in items]
        row = {"file": file, "samples": len(items), "bytes": len(data)}
        row["sha256"] = hashlib.sha256(data).hexdigest()
        row["content_sha256"] = hashlib.sha256(b"".join(content)).hexdigest()
        rows.append(row)
    totals = {
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "distinct_captions": len({item.caption for item in emoji}),
        "distinct_images": len({image.tobytes() for image in images.values()}),
    }
    manifest = {"package": PACKAGE, "shards": rows, "totals": totals}
    files["LICENSE-emoji-datasource"] = (package / "LICENSE").read_bytes()
    files["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (output / name).write_bytes(data)
    return manifest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--package", type=Path, required=True, help="folder of the unpacked npm package")
    add("--output", type=Path, required=True, help="folder for the shards, made if missing")
    args = parser.parse_args(argv)
    try:
        manifest = build(args.package, args.output, HERE / "heldout.txt")
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    for shard in manifest["shards"]:
        print(f"{shard['file']}: {shard['samples']} samples, {shard['bytes']} bytes")
    print(f"wrote {manifest['totals']} to {args.output}")


if __name__ == "__main__":
    main()
