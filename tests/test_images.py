"""eval/images.py: every image once over all processes; clean-fid's rule, and FID by it."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shape_sample
from evaluations import CPU, QuickInception, evaluate, read, run_program, write_inputs
from PIL import Image

from data.tar import write_shard
from eval import feature_nets
from eval.feature_nets import InceptionFeatures
from eval.features import FeatureSet, fit_gaussian, frechet_distance
from eval.images import CLEAN_SIZE, ImageSet, clean_resize, iterate_images, list_images
from modeling.pipeline import ImageGenerator
from scripts import reference_stats

CATEGORIES = ("animals", "food")
SIZES = [(40, 40), (700, 500), (299, 299), (31, 640)]  # width, height


# Reading


@pytest.mark.parametrize("num_processes", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_read_once_over_all_processes(tiny_shards, num_processes, num_workers):
    images = ImageSet(list_images([f"{tiny_shards}/*.tar"]), 32, ("txt",))
    found = {}
    for rank in range(num_processes):
        state = SimpleNamespace(process_index=rank, num_processes=num_processes)
        for batch in iterate_images(images, 7, num_workers, state):
            assert batch["image"].shape == (len(batch["index"]), 3, 32, 32)
            for index, image, caption in zip(batch["index"], batch["image"], batch["caption"]):
                assert index not in found and index % num_processes == rank
                found[index] = image, caption
    assert sorted(found) == [*range(48)]
    for index in (0, 30, 47):
        sample = shape_sample(index)
        expected = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
        image, caption = found[index]
        assert np.array_equal(image.permute(1, 2, 0), expected) and caption == sample["txt"]


def test_sources_come_in_the_order_given_and_unreadable_images_are_listed(tiny_shards, tmp_path):
    shard = f"{tiny_shards}/train-00001.tar"
    write_shard(tmp_path / "bare.tar", [{"__key__": "7", "txt": "no image"}])
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "0.png").write_bytes(shape_sample(0)["png"])
    (photos / "1.png").write_bytes(b"no image")
    (photos / "2.png").symlink_to(photos / "nowhere.png")
    entries = list_images([str(photos), shard, f"{tmp_path}/bare.tar"])
    assert [Path(entry.path).name for entry in entries[:4]] == [
        "0.png",
        "1.png",
        "2.png",
        "train-00001.tar",
    ]
    batches = [*iterate_images(ImageSet(entries, 32), 30)]
    assert [index for batch in batches for index in batch["index"]] == [0, *range(3, 27)]
    assert [item for batch in batches for item in batch["skipped"]] == [
        (f"{photos}/1.png", "image: unreadable (UnidentifiedImageError)"),
        (f"{photos}/2.png", "image: missing"),
        (f"{tmp_path}/bare.tar: 7", "image: missing"),
    ]


def test_transparent_pixels_show_the_background(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    images = ImageSet(list_images([str(tmp_path)]), 8, background=(255, 0, 51))
    assert images[0]["image"][:, 4, 4].tolist() == [255, 0, 51]


def test_an_image_named_twice_and_a_broken_shard_are_refused(tiny_shards, tmp_path):
    shard = str(tiny_shards / "train-00000.tar")
    with pytest.raises(ValueError, match=f"{shard}: 00000"):
        list_images([shard, f"{tiny_shards}/*.tar"])
    (tmp_path / "cut.tar").write_bytes(Path(shard).read_bytes()[:20_000])
    for name in (f"{tmp_path}/cut.tar", f"{tmp_path}/absent.tar"):
        with pytest.raises(ValueError, match=name):
            list_images([name])


# clean-fid's rule


def noise(width, height, seed=0):
    """H x W x 3 uint8 in every value; sharp edges, at which bicubic overshoots."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_is_clean_fids_on_whole_images(size, tmp_path):
    module = pytest.importorskip("cleanfid.resize")
    Image.fromarray(noise(*size)).save(tmp_path / "a.png")
    found = ImageSet(list_images([str(tmp_path)]), CLEAN_SIZE, rule="clean")[0]["image"]
    expected = module.build_resizer("clean")(noise(*size))
    assert found.dtype == np.float32 and np.array_equal(found.transpose(1, 2, 0), expected)


def test_the_resize_gives_the_numbers_that_clean_fid_gave():
    """clean-fid 0.1.35, Pillow 13: pixels (0, 0), (100, 7), (298, 298) of channel 1, the mean."""
    ramp = (np.arange(50 * 70 * 3) * 37 % 256).astype(np.uint8).reshape(50, 70, 3)
    found = clean_resize(ramp)
    pixels = [found[1, 0, 0], found[1, 100, 7], found[1, 298, 298], found.mean(dtype=np.float64)]
    assert pixels == pytest.approx([13.880631, 86.996483, 34.713219, 127.470747], rel=1e-5)
    assert found.shape == (3, CLEAN_SIZE, CLEAN_SIZE) and found.min() >= 0 and found.max() <= 255


@pytest.fixture(scope="module")
def mjhq(tmp_path_factory, tiny_shards):
    """meta_data.json and imgs/CATEGORY/ID.png of several sizes, as MJHQ-30K has them."""
    folder, rows = write_inputs(tmp_path_factory.mktemp("mjhq"), tiny_shards), {}
    for number in range(10):
        category, colour = CATEGORIES[number % 2], ("red", "blue")[number // 2 % 2]
        rows[f"{number:040x}"] = {"category": category, "prompt": f"a {colour} {category}"}
        (folder / "imgs" / category).mkdir(parents=True, exist_ok=True)
        for copy in range(2):  # as many as it takes
            path = folder / "imgs" / category / f"{number:040x}{copy}.png"
            small = Image.fromarray(noise(6, 6, seed=2 * number + copy))
            small.resize(SIZES[number // 2 % 2], Image.Resampling.BILINEAR).save(path)
    (folder / "meta_data.json").write_text(json.dumps(rows))
    return folder


def options(mjhq, inception_file):
    metrics = ["resize=clean", "metrics=[frechet,frechet_by_category]"]
    return [f"captions=[{mjhq}/meta_data.json]", *metrics, "--inception-weights", inception_file]


@pytest.fixture(scope="module")
def whole(chain, mjhq, inception_file, tmp_path_factory):
    """Folder of an evaluation against the folder of images."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(chain.folder, mjhq, folder, *options(mjhq, inception_file), f"reference=[{mjhq}/imgs]")
    return folder


def test_clean_fid_finds_the_same_distances_overall_and_by_category(whole, mjhq, inception_file):
    fid, net = pytest.importorskip("cleanfid.fid"), InceptionFeatures(inception_file)
    settings = {"num_workers": 0, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    made, real = (
        torch.from_numpy(fid.get_folder_features(str(folder), model=net, **settings))
        for folder in (whole / "images", mjhq / "imgs")  # sorted by path
    )
    parts = {"clean_fid": (made, real)}
    parts |= {
        "clean_fid/animals": (made[0::2], real[:10]),
        "clean_fid/food": (made[1::2], real[10:]),
    }
    expected = {
        name: frechet_distance(fit_gaussian(a), fit_gaussian(b)) for name, (a, b) in parts.items()
    }
    assert len({*expected.values()}) == 3 and min(expected.values()) > 1
    assert read(whole)["metrics"] == pytest.approx(expected, rel=1e-3)  # features are float32


def test_a_statistics_file_gives_the_same_numbers_and_needs_the_features_for_categories(
    chain, mjhq, tmp_path, monkeypatch
):
    for module in (feature_nets, reference_stats):
        monkeypatch.setattr(module, "InceptionFeatures", QuickInception)
    kept, plain, weights = (tmp_path / name for name in ("kept.npz", "plain.npz", "quick.pth"))
    weights.touch()
    for words in ([kept, "--keep-features"], [kept, "--check"], [plain]):
        file, *more = words
        clean = ["--clean", "--inception-weights", weights]
        run_program(reference_stats, file, mjhq / "imgs", *CPU, *clean, *more)
    file = FeatureSet.load(kept)
    assert file.features.shape == (20, QuickInception.width)
    assert file.categories == [name for name in CATEGORIES for _ in range(10)]
    found = {}
    for reference in (mjhq / "imgs", kept, plain):
        arguments = [*options(mjhq, weights), f"reference=[{reference}]"]
        found[reference] = evaluate(chain.folder, mjhq, tmp_path / "out", *arguments)
    expected = found[mjhq / "imgs"]["metrics"]
    assert expected.keys() == {"clean_fid", *(f"clean_fid/{category}" for category in CATEGORIES)}
    assert found[kept]["metrics"] == pytest.approx(expected, rel=1e-5)
    assert found[plain]["metrics"]["clean_fid"] == pytest.approx(expected["clean_fid"], rel=1e-5)
    assert "--keep-features" in found[plain]["missing"]["clean_fid_by_category"]


def test_a_reference_without_the_categories_is_refused_before_an_image_is_made(
    chain, mjhq, tmp_path, monkeypatch
):
    monkeypatch.setattr(ImageGenerator, "generate", None)
    monkeypatch.setattr(feature_nets, "InceptionFeatures", QuickInception)
    (tmp_path / "food").mkdir()
    for number in range(2):
        Image.fromarray(noise(8, 8, number)).save(tmp_path / "food" / f"{number}.png")
    with pytest.raises(ValueError, match="frechet_by_category.* animals.* food"):
        arguments = [*options(mjhq, mjhq / "captions.txt"), f"reference=[{tmp_path}]"]
        evaluate(chain.folder, mjhq, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
