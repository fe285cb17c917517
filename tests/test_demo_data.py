"""The committed demo shards (assets/noto_emoji), and their builder on a tiny made-up package."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from assets.noto_emoji import make_demo_data as demo

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "noto_emoji"
MANIFEST = json.loads((ASSETS / "manifest.json").read_text(encoding="utf-8"))
SPLITS = ("train-base", "train-tone", "heldout", "heldout-tone")
HELDOUT = set((ASSETS / "heldout.txt").read_text(encoding="utf-8").split())


def read_shard(path):
    """[(key, {"png", "txt", "json"} as raw bytes)] as webdataset reads them."""
    samples = wds.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    return [
        (sample["__key__"], {name: sample[name] for name in ("png", "txt", "json")})
        for sample in samples
    ]


@pytest.fixture(scope="module")
def shards():
    return {row["file"]: read_shard(ASSETS / row["file"]) for row in MANIFEST["shards"]}


@pytest.fixture(scope="module")
def samples(shards):
    return [sample for items in shards.values() for sample in items]


@pytest.fixture(scope="module")
def images(samples):
    return {key: Image.open(io.BytesIO(files["png"])).convert("RGB") for key, files in samples}


def test_committed_shards_match_the_manifest():
    files = [row["file"] for row in MANIFEST["shards"]]
    assert sorted(path.name for path in ASSETS.glob("*.tar.gz")) == sorted(files)
    for row in MANIFEST["shards"]:
        data = (ASSETS / row["file"]).read_bytes()
        assert len(data) == row["bytes"]
        assert hashlib.sha256(data).hexdigest() == row["sha256"]


def test_no_heldout_emoji_in_a_training_shard(shards, images):
    bases = {"train": set(), "heldout": set()}
    pixels = {"train": set(), "heldout": set()}
    for file, items in shards.items():
        split = file.split("-")[0]
        bases[split] |= {json.loads(files["json"])["base"] for _, files in items}
        pixels[split] |= {images[key].tobytes() for key, _ in items}
    assert bases["heldout"] == HELDOUT and len(HELDOUT) == 150
    assert not bases["train"] & HELDOUT
    assert not pixels["train"] & pixels["heldout"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SMILING CAT FACE WITH HEART-SHAPED EYES", "smiling cat face with heart-shaped eyes"),
        ("United States Flag", "united states flag"),
        ("KEYCAP: *", "keycap *"),
        ("MAN: RED HAIR", "man with red hair"),
        ("PERSON: BALD", "bald person"),
        ("KISS: WOMAN, MAN", "kiss of woman and man"),
        ("COUPLE WITH HEART: WOMAN, MAN", "couple of woman and man with heart"),
        ("FAMILY: MAN, WOMAN, GIRL, BOY", "family of man, woman, girl and boy"),
        ("CLOCK FACE ONE OCLOCK", "clock face one o'clock"),
        ("BLACK TELEPHONE", "telephone"),
        ("BLACK CAT", "black cat"),
        ("HEAVY BLACK HEART", "red heart"),
    ],
)
def test_names_read_naturally(name, expected):
    assert demo.natural_name(name) == expected


def test_tone_names():
    variations = ("1F3FB", "1F3FC", "1F3FB-1F3FF", "1F3FF-1F3FB", "1F3FD-1F3FD")
    expected = ["light", "medium-light", "light and dark", "dark and light", "medium"]
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


def test_two_builds_are_equal_byte_for_byte(package, tmp_path):
    build(package, tmp_path / "one")
    build(package, tmp_path / "two")
    build(package, tmp_path / "two")  # over an earlier build
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    shards = {f"{name}-000000.tar.gz" for name in SPLITS}
    assert set(one) == shards | {"manifest.json", "LICENSE-emoji-datasource"}


def test_built_samples_are_captioned_and_composited_on_white(package, tmp_path):
    build(package, tmp_path / "out")
    samples = dict(read_shard(tmp_path / "out" / "train-base-000000.tar.gz"))
    assert {files["txt"].decode() for files in samples.values()} == {
        "person in tuxedo, person role",
        "man in tuxedo, person role",
    }
    image = Image.open(io.BytesIO(samples["1f935"]["png"]))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    tones = dict(read_shard(tmp_path / "out" / "train-tone-000000.tar.gz"))
    assert tones["1f935-1f3ff"]["txt"].decode() == "person in tuxedo, person role, dark skin tone"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("package.json", '{"name": "emoji", "version": "15.0"}', "emoji 15.0, expected"),
        ("img/google/64/extra.png", "", r"not in emoji.json \['extra'\]"),
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
