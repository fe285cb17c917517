"""Emoji of several artists: what is held out, what samples say, and the program, offline."""

import io
import json
import tarfile
from collections import Counter

import pytest
from PIL import Image

from data.tar import read_shard
from scripts.make_artists import ARTISTS, STYLES, ArtistsStage, main

# code points as in emoji.json -> name
WANTED = {f"1F4{i:02X}": f"thing {i}" for i in range(10, 30)}
WANTED |= {"0023-FE0F-20E3": "keycap #", "1F44D": "thumb", "1F6B0": "one", "1F6B1": "two"}
UNWANTED = {"1F1E6": "a flag", "1F46A": "a family", "1F6A9": "lonely", "1F44D-1F3FB": "a tone"}
NAMES = [*WANTED.values(), *UNWANTED.values()]
SHARED = {("one", "twemoji"), ("two", "twemoji")}  # twemoji draws both alike
DRAWN = {(name, style) for name in WANTED.values() for style in STYLES} - SHARED


def colour_of(name, style):
    number = NAMES.index("one" if (name, style) in SHARED else name)
    return (8 * number, 60 * STYLES.index(style), 0)


def save_image(path, colour):
    """A square of one colour in the middle of nothing."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*colour, 255), (16, 16, 48, 48))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, lossless=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder, entries = tmp_path_factory.mktemp("packages"), []
    for code, name in (WANTED | UNWANTED).items():
        entry = {"unified": code, "name": name.upper(), "short_name": name}
        entries.append(entry | {"category": "Flags" * (name == "a flag"), "subcategory": name[2:]})
    thumb = next(entry for entry in entries if entry["name"] == "THUMB")
    thumb["skin_variations"] = {"1F3FB": {"unified": entries.pop()["unified"]}}
    for style, artist in ARTISTS.items():
        for code, name in (WANTED | UNWANTED).items():
            if name != "lonely" or style == "noto":
                code = code.replace("-FE0F", "") if style == "emojione" else code
                file = f"{code.lower()}.{'webp' if style == 'fluent' else 'png'}"
                save_image(folder / style / artist.folder / file, colour_of(name, style))
        (folder / style / "emoji.json").write_text(json.dumps(entries))
        with tarfile.open(folder / artist.file, "w:gz") as tar:
            tar.add(folder / style, "package")
    return folder


def make(packages, folder, **options):
    """Splits as lists of raw samples, their json parsed."""
    options = {"heldout_names": 3, "heldout_pairs": 8, "image_size": 32} | options
    config = ArtistsStage(run_dir=str(folder), packages=str(packages), **options)
    config.check()
    main(config)
    splits = {}
    for split in ("train", "captions", "styles"):
        shards = [read_shard(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
        splits[split] = [s | {"json": json.loads(s["json"])} for shard in shards for s in shard]
    return splits


@pytest.fixture(scope="module")
def splits(packages, tmp_path_factory):
    return make(packages, tmp_path_factory.mktemp("artists"))


def test_what_is_held_out_is_not_trained_on_but_its_parts_are(splits):
    pairs = {k: [(s["json"]["name"], s["json"]["style"]) for s in splits[k]] for k in splits}
    assert Counter(pair for split in pairs.values() for pair in split) == dict.fromkeys(DRAWN, 1)
    names = {name for name, _ in pairs["captions"]}
    assert len(names) == 3 and {*pairs["captions"]} == {(n, s) for n in names for s in STYLES}
    assert Counter(style for _, style in pairs["styles"]) == dict.fromkeys(STYLES, 2)
    for name, style in pairs["styles"]:
        assert {s for n, s in pairs["train"] if n == name} == {*STYLES} - {style}


def test_half_of_the_drawings_of_a_name_say_their_style_and_held_out_pairs_all(splits):
    says = {split: {} for split in splits}
    for split, sample in ((k, sample) for k in splits for sample in splits[k]):
        about, text = sample["json"], sample["txt"].decode()
        bare, full = about["name"], f"{about['name']}, {about['style']}"
        assert text == about["captions"][0] and {*about["captions"]} == {bare, full}
        says[split].setdefault((about["caption_number"], bare), []).append(text == full)
    for split in ("train", "captions"):
        assert {sum(said) for said in says[split].values() if len(said) == len(STYLES)} == {2}
    assert [*says["styles"].values()] == [[True]] * 8
    names = {key for split in says.values() for key in split}
    assert len(names) == len({number for number, _ in names}) == len(WANTED)


def test_images_are_the_artists_on_white_in_the_size_that_was_asked_for(splits):
    for sample in splits["train"]:
        image, about = Image.open(io.BytesIO(sample["png"])), sample["json"]
        assert (image.size, image.mode, image.getpixel((1, 1))) == ((32, 32), "RGB", (255,) * 3)
        assert image.getpixel((16, 16)) == colour_of(about["name"], about["style"])


def test_the_program_goes_on_and_refuses_another_data_set(packages, splits, tmp_path, capsys):
    assert make(packages, tmp_path) == splits
    (tmp_path / "train-000003.tar").unlink()
    assert make(packages, tmp_path) == splits
    assert make("nowhere", tmp_path) == splits and "complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another data set"):
        make(packages, tmp_path, seed=2)


def test_npm_is_asked_for_what_is_not_there(packages, splits, tmp_path, monkeypatch):
    first, *others = ARTISTS.values()
    for artist in others:
        (tmp_path / artist.file).symlink_to(packages / artist.file)
    monkeypatch.setenv("PATH", str(tmp_path))
    npm = tmp_path / "npm"
    for script in ("", "exit 1"):  # there is none; it fails
        npm.write_text(f"#!/bin/sh\n{script}\n")
        npm.chmod(0o755 if script else 0o644)
        with pytest.raises(ValueError, match=f"{tmp_path}.*npm pack {first.package}"):
            make(tmp_path, tmp_path / "out")
    npm.write_text(f'#!/bin/sh\n[ "$2" = {first.package} ] && /bin/cp {packages}/emoji-d*-g* .\n')
    assert make(tmp_path, tmp_path / "out") == splits


@pytest.mark.parametrize(
    "option", [{"image_size": 8}, {"heldout_names": 0}, {"heldout_names": 9, "heldout_pairs": 13}]
)
def test_what_cannot_be_made_is_refused(packages, tmp_path, option):
    with pytest.raises(ValueError, match=".*".join(f"{k}.* {v}" for k, v in option.items())):
        make(packages, tmp_path, **option)
    assert not any(tmp_path.iterdir())
