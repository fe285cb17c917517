"""eval/reconstruction.py: its json against independent computations; skips and refusals."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import refusal, shape_sample
from evaluations import CPU, launch_two, run_program, train_on
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from data.tar import read_shard, write_shard
from eval import reconstruction
from eval.feature_nets import InceptionFeatures
from eval.features import fit_gaussian, frechet_distance
from eval.reconstruction import Reconstructor
from modeling.perceptual import LPIPS
from modeling.published import file_sha256
from training.checkpoint import EMA_FILE, MODEL_FILE, checkpoint_folders
from training.loading import find_text_encoder, load_tokenizer

LIMIT, BATCH = 3, 2  # Inception takes half a second an image; the last batch is a short one
# A pixel at a rounding edge may fall on either side in other batches
NEAR = {"rel": 1e-4, "abs": 1e-4}


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(scope="module")
def run(chain):
    """A stage-1 run; tests leave its folder as it is."""
    return chain.folder / "tokenizer"


@pytest.fixture(scope="module")
def weights(vgg_file, inception_file):
    return ["--vgg-weights", vgg_file, "--inception-weights", inception_file]


@pytest.fixture(scope="module")
def whole(run, tiny_shards, weights, tmp_path_factory):
    """Folder with report.json and a picture: all metrics of the first images."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["--limit", LIMIT, "--batch-size", BATCH, "--save-images", folder]
    report(run, tiny_shards / "*.tar", folder, *arguments, *weights)
    return folder


def report(run, data, folder, *arguments):
    """Run the program; returns its json."""
    output = folder / "report.json"
    run_program(reconstruction, run, data, "--output", output, *CPU, *arguments)
    return read(folder)


def read(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def pairs(run, tiny_shards):
    """(originals, reconstructions) of the first images, uint8, made one by one by other means."""
    tokenizer, text_encoder = load_tokenizer(run), find_text_encoder(run)
    originals, reconstructions = [], []
    for sample in [*read_shard(tiny_shards / "train-00000.tar")][:LIMIT]:
        image = np.array(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
        x = torch.from_numpy(image).permute(2, 0, 1)
        with torch.no_grad():
            states = text_encoder(text_encoder.tokenize([sample["txt"].decode()]))
            y = tokenizer.decode(tokenizer.encode(x[None] / 255).mean, states)[0]
        originals.append(x)
        reconstructions.append((y.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(originals), torch.stack(reconstructions)


# The numbers


def test_the_numbers_are_those_of_independent_computations(whole, pairs, vgg_file, inception_file):
    x, y = (images.double() / 255 for images in pairs)
    decibels = 10 * torch.log10(1 / (x - y).square().mean(dim=(1, 2, 3)))
    assert decibels.std() > 0.05  # else a pooled one would be the same
    lpips, net = LPIPS(vgg_file), InceptionFeatures(inception_file)
    distances = [lpips(b[None].float(), a[None].float()).item() for a, b in zip(x, y)]
    expected = {
        "psnr_db": decibels.mean().item(),
        "ssim": structural_similarity_index_measure(y, x, data_range=1.0).item(),
        "lpips": np.mean(distances),
        "rfid": frechet_distance(*(fit_gaussian(net(images)) for images in pairs)),
    }
    found = read(whole)
    assert found["metrics"] == pytest.approx(expected, **NEAR)
    # The json says what was measured, and how
    counts = [found[f"num_{name}"] for name in ("images", "identical", "without_caption")]
    assert counts == [LIMIT, 0, 0] and found["missing"] == {} and found["skipped"] == []
    for name, file in (("lpips", vgg_file), ("rfid", inception_file)):
        assert found["weights"][name] == {"file": file.name, "sha256": file_sha256(file)}
    assert (found["protocol"]["image_size"], found["protocol"]["limit"]) == (32, LIMIT)


def test_two_processes_get_the_numbers_of_one(run, tiny_shards, whole, weights, tmp_path):
    words = [run, tiny_shards / "*.tar", "--limit", LIMIT, "--batch-size", BATCH, *weights]
    words += ["--output", tmp_path / "report.json", "--num-workers", 1, "--device", "cpu"]
    output = launch_two(tmp_path / "log", "eval.reconstruction", *words)
    assert output.count(f"report.json: {LIMIT} images") == 1  # one process talks
    found, expected = read(tmp_path), read(whole)
    assert (found["num_processes"], found["num_images"]) == (2, LIMIT)
    assert found["metrics"] == pytest.approx(expected["metrics"], **NEAR)
    for name in ("protocol", "model", "weights", "num_identical", "num_without_caption"):
        assert found[name] == expected[name]


def test_the_picture_shows_the_first_pairs(whole, pairs):
    with Image.open(whole / "reconstructions.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    margin, factor = 6, 2  # 64 x 32 pixels a pair, enlarged to 128 x 64
    left = margin + (LIMIT - 1) * (128 + margin)
    cell = pixels[margin : margin + 64 : factor, left : left + 128 : factor]
    expected = torch.cat([images[-1] for images in pairs], dim=2).permute(1, 2, 0)
    assert abs(cell - expected.numpy()).max() <= 1


def test_ema_weights_are_measured_and_the_json_names_them_while_training_goes_on(
    run, whole, tiny_shards, tmp_path, monkeypatch
):
    copy, measure = tmp_path / "run", reconstruction.measure_reconstructions
    shutil.copytree(run, copy)
    for folder in checkpoint_folders(copy).values():
        (folder / MODEL_FILE).write_bytes(bytes((folder / MODEL_FILE).stat().st_size))

    ema = max(checkpoint_folders(run).items())[1] / EMA_FILE

    def and_train(*arguments, **options):
        train_on(copy)
        return measure(*arguments, **options)

    monkeypatch.setattr(reconstruction, "measure_reconstructions", and_train)
    found = report(copy, tiny_shards / "*.tar", tmp_path, "--limit", LIMIT)
    assert found["metrics"]["ssim"] == pytest.approx(read(whole)["metrics"]["ssim"], **NEAR)
    assert found["model"]["step"] == 4
    assert found["model"]["ema_sha256"] == file_sha256(ema)
    assert report(copy, tiny_shards / "*.tar", tmp_path, "--limit", 2)["model"]["step"] == 5


# What is absent or can't be read


def test_without_weights_two_metrics_are_null_with_the_file_to_fetch_and_the_others_are_there(
    run, tiny_shards, whole, tmp_path
):
    found = report(run, tiny_shards / "*.tar", tmp_path, "--limit", LIMIT)
    kept = {name: read(whole)["metrics"][name] for name in ("psnr_db", "ssim")}
    assert found["metrics"] == {"rfid": None, "lpips": None} | {
        name: pytest.approx(value, **NEAR) for name, value in kept.items()
    }
    assert found["missing"].keys() == {"rfid", "lpips"} and found["weights"] == {}
    files = {"rfid": "weights-inception-2015-12-05-6726825d.pth", "lpips": "vgg16-397923af.pth"}
    for name, file in files.items():
        assert file in found["missing"][name] and os.environ["TORCH_HOME"] in found["missing"][name]


@pytest.fixture
def photos(tmp_path):
    """00000.png ... of odd sizes, one in a sub-folder; with a caption each, one without."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for number in range(4):
        sample = shape_sample(number)
        image = Image.open(io.BytesIO(sample["png"])).resize((32 + 9 * number, 40))
        path = folder / ("b" if number == 3 else "") / f"{number:05d}.png"
        image.save(path)
        if number != 2:
            path.with_suffix(".txt").write_text(sample["txt"])
    return folder


def test_captions_beside_images_reach_the_text_encoder_and_what_is_unreadable_is_listed(
    run, photos, tmp_path, monkeypatch
):
    seen, reconstruct = [], Reconstructor.__call__

    def watched(self, images, captions):
        seen.extend(captions)
        return reconstruct(self, images, captions)

    monkeypatch.setattr(Reconstructor, "__call__", watched)
    monkeypatch.setattr(reconstruction, "PICTURE_PAIRS", 1)
    (photos / "00000.png").write_bytes(b"no image")
    (photos / "00004.png").symlink_to(photos / "nowhere.png")
    found = report(run, photos, tmp_path, "--batch-size", 1, "--save-images", tmp_path / "pictures")
    assert (found["num_images"], found["num_without_caption"]) == (3, 1)
    assert seen == [shape_sample(1)["txt"], "", shape_sample(3)["txt"]]
    skipped = {entry["image"]: entry["reason"] for entry in found["skipped"]}
    unreadable, missing = "image: unreadable (UnidentifiedImageError)", "image: missing"
    assert skipped == {f"{photos}/00000.png": unreadable, f"{photos}/00004.png": missing}
    assert not (tmp_path / "pictures").exists()  # the only image for it is unreadable


def test_identical_pairs_are_counted_and_left_out_of_psnr(run, photos, tmp_path, monkeypatch):
    def all_but(number):
        return lambda self, images, captions: torch.cat([255 - images[:number], images[number:]])

    monkeypatch.setattr(Reconstructor, "__call__", all_but(1))
    found = report(run, photos, tmp_path)
    assert found["num_identical"] == 3 and 0 < found["metrics"]["psnr_db"] < 60
    monkeypatch.setattr(Reconstructor, "__call__", all_but(0))
    found = report(run, photos, tmp_path)
    assert (found["metrics"]["psnr_db"], found["metrics"]["ssim"]) == (None, pytest.approx(1))
    assert "identical" in found["missing"]["psnr_db"]


# Options and refusals


def test_bf16_changes_the_numbers_and_is_in_the_json(run, tiny_shards, whole, tmp_path):
    words = ["--limit", LIMIT, "--precision", "bf16"]
    found = report(run, tiny_shards / "*.tar", tmp_path, *words)
    assert "bf16" in found["protocol"]["reconstruction"]
    before, after = (x["metrics"]["psnr_db"] for x in (read(whole), found))
    assert after != pytest.approx(before, rel=1e-9) and after == pytest.approx(before, rel=0.02)


def test_the_json_goes_into_the_stage_1_run_of_an_experiment(chain, tiny_shards, tmp_path):
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(chain.folder / name, tmp_path / name)
    run_program(reconstruction, tmp_path, tiny_shards / "*.tar", "--limit", 2, *CPU)
    output = tmp_path / "tokenizer" / "reconstruction.json"
    assert json.loads(output.read_text())["num_images"] == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("--vgg-weights", "/nowhere/vgg.pth"), ("--output", "/"), ("--save-images", "/dev/null")],
)
def test_impossible_arguments_are_refused_before_any_work(
    run, tiny_shards, tmp_path, monkeypatch, option, value
):
    monkeypatch.setattr(reconstruction, "measure_reconstructions", None)
    with refusal(value):
        report(run, tiny_shards / "*.tar", tmp_path, option, value)
    assert not list(tmp_path.iterdir())


def test_a_report_of_other_data_is_not_replaced(run, photos, whole):
    before = read(whole)
    with refusal(f"{whole}/report.json"):
        report(run, photos, whole, "--limit", LIMIT)
    assert read(whole) == before


def test_without_images_or_a_tokenizer_it_is_refused(chain, run, tiny_shards, tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "7", "txt": "no image"}])
    for folder, data, part in (
        (run, tmp_path / "a.tar", "image"),
        (run, tmp_path / "b.tar", "b.tar"),
        (chain.folder / "flowtok", tiny_shards / "*.tar", "flowtok.*tokenizer"),
        (tmp_path / "none", tiny_shards / "*.tar", "none"),
    ):
        with pytest.raises(ValueError, match=part):
            report(folder, data, tmp_path)
