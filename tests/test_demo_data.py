"""The committed demo shards (assets/noto_emoji), and their builder on a tiny made-up package."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from assets.noto_emoji import make_demo_data as demo
from data.tar import read_shard

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "noto_emoji"
MANIFEST = json.loads((ASSETS / "manifest.json").read_text(encoding="utf-8"))
SPLITS = ("train-base", "train-tone", "heldout", "heldout-tone")
HELDOUT = set((ASSETS / "heldout.txt").read_text(encoding="utf-8").split())


def content_hash(samples):
    """What the manifest says of a shard's contents: of its json and RGB pixels."""
    content = hashlib.sha256()
    for sample in samples:
        rgb = Image.open(io.BytesIO(sample["png"])).convert("RGB").tobytes()
        content.update(sample["json"] + b"\n" + rgb)
    return content.hexdigest()


def test_committed_shards_are_the_manifests_and_no_heldout_emoji_is_in_a_training_shard():
    files = [row["file"] for row in MANIFEST["shards"]]
    assert sorted(path.name for path in ASSETS.glob("*.tar.gz")) == sorted(files)
    bases = {"train": set(), "heldout": set()}
    pixels = {"train": set(), "heldout": set()}
    for row in MANIFEST["shards"]:
        data = (ASSETS / row["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["sha256"])
        split, samples = row["file"].split("-")[0], [*read_shard(ASSETS / row["file"])]
        for sample in samples:
            bases[split].add(json.loads(sample["json"])["base"])
            pixels[split].add(Image.open(io.BytesIO(sample["png"])).convert("RGB").tobytes())
        assert content_hash(samples) == row["content_sha256"]
    assert bases["heldout"] == HELDOUT and len(HELDOUT) == 150
    assert not bases["train"] & HELDOUT
    assert not pixels["train"] & pixels["heldout"]


NATURAL = {
    "KEYCAP: *": "keycap *",
    "MAN: RED HAIR": "man with red hair",
    "PERSON: BALD": "bald person",
    "KISS: WOMAN, MAN": "kiss of woman and man",
    "COUPLE WITH HEART: WOMAN, MAN": "couple of woman and man with heart",
    "FAMILY: MAN, WOMAN, GIRL, BOY": "family of man, woman, girl and boy",
    "CLOCK FACE ONE OCLOCK": "clock face one o'clock",
    "BLACK TELEPHONE": "telephone",
    "HEAVY BLACK HEART": "red heart",
}


def test_names_and_tones_read_naturally():
    assert {name: demo.natural_name(name) for name in NATURAL} == NATURAL
    variations = ("1F3FC", "1F3FB-1F3FF", "1F3FD-1F3FD")
    expected = ["medium-light", "light and dark", "medium"]
    assert [demo.tone_name(variation) for variation in variations] == expected


def make_entry(unified, name, short_name, variations=()):
    variants = {tone: {"unified": f"{unified}-{tone}"} for tone in variations}
    entry = {"unified": unified, "name": name, "short_name": short_name}
    entry |= {"category": "People & Body", "subcategory": "person-role"}
    return entry | {"skin_variations": variants}


@pytest.fixture
def package(tmp_path):
    """Six images: two emoji of one name, one in two skin tones; a held-out emoji in one tone."""
    folder = tmp_path / "package"
    demo.image_folder(folder).mkdir(parents=True)
    entries = [
        make_entry("1F935", "MAN IN TUXEDO", "person_in_tuxedo", ("1F3FB", "1F3FF")),
        make_entry("1F935-2642", "MAN IN TUXEDO", "man_in_tuxedo"),
        make_entry("1F44D", "THUMBS UP SIGN", "+1", ("1F3FD",)),
    ]
    (folder / "emoji.json").write_text(json.dumps(entries))
    name, version = demo.PACKAGE.split()
    (folder / "package.json").write_text(json.dumps({"name": name, "version": version}))
    (folder / "LICENSE").write_text("licence")
    for index, item in enumerate(demo.describe_emoji(entries)):
        image = Image.new("RGBA", (64, 64), (255, 0, 0, 40 * index))  # the first: white on white
        image.save(demo.image_folder(folder) / f"{item.key}.png")
    (tmp_path / "heldout.txt").write_text("1f44d\n")
    return folder


def build(package, output):
    return demo.build(package, output, package.parent / "heldout.txt")


def test_built_samples_are_captioned_on_white_and_the_same_bytes_each_time(package, tmp_path):
    for name in ("one", "two", "two"):  # the last over an earlier build
        build(package, tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    files = {path.name for path in one.iterdir()}
    shards = {f"{name}-000000.tar.gz" for name in SPLITS}
    assert files == shards | {"manifest.json", "LICENSE-emoji-datasource"}
    assert files == {path.name for path in two.iterdir()}
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    for row in json.loads((one / "manifest.json").read_text())["shards"]:
        assert content_hash(read_shard(one / row["file"])) == row["content_sha256"]

    samples, tones = (
        {sample["__key__"]: sample for sample in read_shard(one / f"train-{part}-000000.tar.gz")}
        for part in ("base", "tone")
    )
    captions = {"person in tuxedo, person role", "man in tuxedo, person role"}
    assert {parts["txt"].decode() for parts in samples.values()} == captions
    image = Image.open(io.BytesIO(samples["1f935"]["png"]))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    assert tones["1f935-1f3ff"]["txt"].decode() == "person in tuxedo, person role, dark skin tone"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("package.json", '{"name": "emoji", "version": "15.0"}', "emoji 15.0, expected"),
        ("../heldout.txt", "1f600\n", r"\['1f600'\] are no base emoji"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(package, tmp_path, name, text, message):
    (package / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        build(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="error: "):
        demo.main(["--package", str(tmp_path), "--output", str(tmp_path / "out")])
