"""eval/images.py, clean-fid's rule: its own resize and features bit for bit; FID overall and per category by it."""

import json

import numpy as np
import pytest
import torch
from evaluations import evaluate, read, write_inputs
from PIL import Image

from eval.frechet import FeatureStatistics, frechet_distance, load_features
from eval.images import CLEAN_SIZE, ImageSet, clean_resize, iterate_images, list_images
from eval.inception import INCEPTION_WIDTH, InceptionFeatures
from eval.making import resize
from modeling.pipeline import ImageGenerator
from scripts import reference_stats

CATEGORIES = ("animals", "food")
SIZES = [(40, 40), (700, 500), (299, 299), (31, 640)]  # width, height


def noise(width, height, seed=0):
    """H x W x 3 uint8 in every value; sharp edges, at which bicubic overshoots."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_is_clean_fids(size):
    resize_module = pytest.importorskip("cleanfid.resize")
    image = noise(*size)
    expected = resize_module.build_resizer("clean")(image)
    found = clean_resize(image)
    assert found.dtype == np.float32 and np.array_equal(found.transpose(1, 2, 0), expected)


def test_the_resize_gives_the_numbers_that_clean_fid_gave():
    """Of clean-fid 0.1.35 with Pillow 13: pixels (0, 0), (100, 7), (298, 298) of channel 1, and the mean."""
    ramp = (np.arange(50 * 70 * 3) * 37 % 256).astype(np.uint8).reshape(50, 70, 3)
    found = clean_resize(ramp)
    stored = [13.880631, 86.996483, 34.713219, 127.470747]
    pixels = [found[1, 0, 0], found[1, 100, 7], found[1, 298, 298], found.mean(dtype=np.float64)]
    assert pixels == pytest.approx(stored, rel=1e-5)
    assert found.shape == (3, CLEAN_SIZE, CLEAN_SIZE) and found.min() >= 0 and found.max() <= 255


def test_generated_and_real_images_are_resized_alike(tmp_path):
    image = noise(64, 64)
    Image.fromarray(image).save(tmp_path / "a.png")
    images = ImageSet(list_images([str(tmp_path)]), CLEAN_SIZE, (), (255, 255, 255), "clean")
    [batch] = iterate_images(images, 4, 0)
    made = resize(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], CLEAN_SIZE, "clean")
    assert torch.equal(batch["image"], made) and made.dtype == torch.float32


def test_whole_images_are_seen_not_their_centre(tmp_path):
    Image.fromarray(noise(90, 30)).save(tmp_path / "a.png")
    [entry] = list_images([str(tmp_path)])
    found = ImageSet([entry], CLEAN_SIZE, (), (255, 255, 255), "clean")[0]["image"]
    assert np.array_equal(found, clean_resize(noise(90, 30)))


def test_inception_takes_resized_floats_as_it_takes_bytes_of_its_size(inception_file):
    net, image = (
        InceptionFeatures(inception_file),
        torch.from_numpy(noise(299, 299).transpose(2, 0, 1).copy())[None],
    )
    torch.testing.assert_close(net(image.float()), net(image), rtol=1e-5, atol=1e-6)
    exact = InceptionFeatures(inception_file, "float64")
    assert exact(image.float()).dtype == torch.float32
    torch.testing.assert_close(exact(image.float()), exact(image), rtol=1e-6, atol=1e-7)


# The protocol


@pytest.fixture(scope="module")
def mjhq(tmp_path_factory, tiny_shards):
    """meta_data.json, imgs/CATEGORY/ID.png of several sizes, and a protocol that asks for FID by category."""
    folder, rows = write_inputs(tmp_path_factory.mktemp("mjhq"), tiny_shards), {}
    for number in range(10):
        category, name = CATEGORIES[number % 2], f"{number:040x}"
        rows[name] = {
            "category": category,
            "prompt": f"a {('red', 'blue')[number // 2 % 2]} {category}",
        }
        for copy in range(2):  # as many as it takes
            path = folder / "imgs" / category / f"{name}{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(noise(6, 6, seed=2 * number + copy))
            small.resize(SIZES[number // 2 % 2], Image.Resampling.BILINEAR).save(path)
    (folder / "meta_data.json").write_text(json.dumps(rows))
    return folder


def options(mjhq, inception_file):
    captions = [
        f"captions=[{mjhq}/meta_data.json]",
        "resize=clean",
        "metrics=[frechet,frechet_by_category]",
    ]
    return [*captions, "--inception-weights", inception_file]


@pytest.fixture(scope="module")
def whole(chain, mjhq, inception_file, tmp_path_factory):
    """Folder of an evaluation against the folder of images."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(chain.folder, mjhq, folder, *options(mjhq, inception_file), f"reference=[{mjhq}/imgs]")
    return folder


def test_clean_fid_finds_the_same_features_and_distance(whole, mjhq, inception_file):
    fid = pytest.importorskip("cleanfid.fid")
    net, gaussians = InceptionFeatures(inception_file), []
    for folder in (whole / "images", mjhq / "imgs"):
        features = fid.get_folder_features(
            str(folder),
            model=net,
            num_workers=0,
            device=torch.device("cpu"),
            mode="clean",
            verbose=False,
        )
        assert features.shape[1] == INCEPTION_WIDTH
        statistics = FeatureStatistics(INCEPTION_WIDTH)
        statistics.add(torch.from_numpy(features))
        gaussians.append(statistics.gaussian())
    expected = frechet_distance(*gaussians)
    assert expected > 1 and read(whole)["metrics"]["clean_fid"] == pytest.approx(expected, rel=1e-4)


def test_each_category_is_measured_against_its_own_folder(whole, mjhq, inception_file):
    found = read(whole)["metrics"]
    assert found.keys() == {"clean_fid", *(f"clean_fid/{category}" for category in CATEGORIES)}
    assert len({*found.values()}) == 3
    net, pair = InceptionFeatures(inception_file), []
    generated = [whole / "images" / f"{index:06d}.png" for index in range(1, 10, 2)]
    for paths in (generated, sorted((mjhq / "imgs" / "food").iterdir())):
        statistics = FeatureStatistics(INCEPTION_WIDTH)
        pixels = np.stack(
            [clean_resize(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
        )
        statistics.add(net(torch.from_numpy(pixels)))
        pair.append(statistics.gaussian())
    assert found["clean_fid/food"] == pytest.approx(frechet_distance(*pair), rel=1e-3)


def test_a_statistics_file_gives_the_same_numbers(
    chain, whole, mjhq, inception_file, tmp_path, capsys
):
    from tiny_experiment import reset_accelerate

    def run(*words):
        reset_accelerate()
        words += ("--device", "cpu", "--num-workers", 0, "--inception-weights", inception_file)
        reference_stats.main(reference_stats.parse_args([*map(str, words)]))

    file = tmp_path / "mjhq.npz"
    run(file, mjhq / "imgs", "--clean", "--keep-features")
    run(file, mjhq / "imgs", "--check")
    assert "whole, and of these images" in capsys.readouterr().out
    features, categories = load_features(file)
    assert features.shape == (20, INCEPTION_WIDTH) and categories == [
        name for name in CATEGORIES for _ in range(10)
    ]
    arguments = [
        *options(mjhq, inception_file),
        "metrics=[frechet_by_category]",
        f"reference=[{file}]",
    ]
    found = evaluate(chain.folder, mjhq, tmp_path / "out", *arguments)
    by_category = {name: value for name, value in read(whole)["metrics"].items() if "/" in name}
    assert found["metrics"] == pytest.approx(by_category, rel=1e-4) and len(by_category) == 2
    assert found["reference"]["resize"].startswith("clean-fid's")
    with pytest.raises(ValueError, match="is of images of 299 px, the generated ones have 32 px"):
        evaluate(chain.folder, mjhq, tmp_path / "crop", *arguments, "resize=crop")
    with pytest.raises(ValueError, match="is of images resized so: clean-fid's"):
        evaluate(chain.folder, mjhq, tmp_path / "crop", *arguments, "resize=crop", "image_size=299")
    run(tmp_path / "plain.npz", mjhq / "imgs", "--clean")
    found = evaluate(
        chain.folder, mjhq, tmp_path / "out", *arguments[:-1], f"reference=[{tmp_path}/plain.npz]"
    )
    assert found["metrics"] == {"clean_fid_by_category": None}
    assert "--keep-features" in found["missing"]["clean_fid_by_category"]


def test_references_without_the_categories_and_impossible_protocols_are_refused(
    chain, mjhq, inception_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(ImageGenerator, "generate", None)
    (tmp_path / "food").mkdir()
    for number in range(2):
        Image.fromarray(noise(8, 8, number)).save(tmp_path / "food" / f"{number}.png")
    wanted, reference = options(mjhq, inception_file), f"reference=[{mjhq}/imgs]"
    for arguments, message in (
        (
            [f"reference=[{tmp_path}]"],
            "no reference image lies in a folder animals; there are food",
        ),
        ([f"captions=[{mjhq}/captions.txt]", reference], "needs captions with a category"),
        (
            ["image_size=64", reference],
            "resize=clean goes with features=inception and image_size=0",
        ),
        (
            ["features=dinov2", reference],
            "resize=clean goes with features=inception and image_size=0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(chain.folder, mjhq, tmp_path / "out", *wanted, *arguments)
    assert not (tmp_path / "out").exists()
