"""eval/reconstruction.py and eval/images.py: the json of a tiny run against independent computations, one process and
two, what is skipped or absent, and errors before any work."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shape_sample
from evaluations import train_on
from PIL import Image
from tiny_experiment import Experiment, reset_accelerate
from torchmetrics.functional.image import structural_similarity_index_measure

from data.tar import read_shard, write_shard
from eval.frechet import FeatureStatistics, frechet_distance
from eval.images import ImageSet, iterate_images, list_images
from eval.inception import INCEPTION_WIDTH, InceptionFeatures
from eval.reconstruction import main, parse_args
from eval.reconstruction_metrics import ssim
from modeling.perceptual import LPIPS
from modeling.published import file_sha256
from modeling.text_encoder import TextTokenizer, load_text_encoder
from training.checkpoint import EMA_FILE, MODEL_FILE
from training.loading import load_tokenizer

ROOT = Path(__file__).parents[1]
LIMIT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_shards, tiny_clip_dir):
    """A tokenizer trained for a few steps with text guidance; tests leave its folder as it is."""
    experiment = Experiment(tmp_path_factory.mktemp("experiment"), tiny_shards)
    return experiment.run("tokenizer", f"text_encoder.model=local-dir:{tiny_clip_dir}")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """No weights that happen to be on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


@pytest.fixture(scope="module")
def whole(run, tiny_shards, vgg_file, inception_file, tmp_path_factory):
    """Folder with report.json and a picture: all metrics of the first images."""
    folder = tmp_path_factory.mktemp("whole")
    report(
        run,
        tiny_shards / "*.tar",
        folder,
        *options(vgg_file, inception_file),
        "--save-images",
        folder,
    )
    return folder


def options(vgg_file, inception_file):
    return [
        "--limit",
        LIMIT,
        "--vgg-weights",
        vgg_file,
        "--inception-weights",
        inception_file,
        "--batch-size",
        5,
    ]


def report(run, data, folder, *arguments):
    """Run the program; returns its json."""
    reset_accelerate()
    words = [
        run,
        data,
        "--output",
        folder / "report.json",
        "--device",
        "cpu",
        "--num-workers",
        0,
        *arguments,
    ]
    main(parse_args([*map(str, words)]))
    return json.loads((folder / "report.json").read_text())


def read(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def pairs(run, tiny_shards):
    """(originals, reconstructions) of the first images, LIMIT x 32 x 32 x 3 uint8, made one by one by other means."""
    tokenizer, text_config = load_tokenizer(run)
    tower, tokenize = load_text_encoder(text_config), TextTokenizer(text_config)
    samples = [*read_shard(tiny_shards / "train-00000.tar")][:LIMIT]
    originals, reconstructions = [], []
    for sample in samples:
        image = np.array(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            states = tower(tokenize([sample["txt"].decode()]))
            y = tokenizer.decode(tokenizer.encode(x).mean, states)[0].permute(1, 2, 0).numpy()
        originals.append(image)
        reconstructions.append(np.rint(np.clip(y, 0, 1) * 255).astype(np.uint8))
    return np.stack(originals), np.stack(reconstructions)


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# The numbers


def test_psnr_is_the_mean_of_each_images_own(whole, pairs):
    x, y = (images.astype(np.float64) / 255 for images in pairs)
    values = 10 * np.log10(1 / ((x - y) ** 2).mean(axis=(1, 2, 3)))
    assert values.std() > 0.05  # else a pooled one would be the same
    assert read(whole)["metrics"]["psnr_db"] == pytest.approx(values.mean(), abs=1e-4)


def test_ssim_is_that_of_torchmetrics(whole, pairs):
    x, y = (as_tensor(images).double() / 255 for images in pairs)
    expected = structural_similarity_index_measure(y, x, data_range=1.0, sigma=1.5, kernel_size=11)
    assert 0 < expected < 1
    assert read(whole)["metrics"]["ssim"] == pytest.approx(expected.item(), abs=1e-4)


def test_lpips_is_the_mean_over_images(whole, pairs, vgg_file):
    net, (x, y) = LPIPS(vgg_file), (as_tensor(images).float() / 255 for images in pairs)
    expected = [net(y[i : i + 1], x[i : i + 1]).item() for i in range(LIMIT)]
    assert min(expected) > 0.01
    assert read(whole)["metrics"]["lpips"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_rfid_is_between_originals_and_reconstructions(whole, pairs, inception_file):
    net, gaussians = InceptionFeatures(inception_file), []
    for images in pairs:
        statistics = FeatureStatistics(INCEPTION_WIDTH)
        statistics.add(net(as_tensor(images)))
        gaussians.append(statistics.gaussian())
    assert read(whole)["metrics"]["rfid"] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)


def test_two_processes_get_the_numbers_of_one(
    run, tiny_shards, whole, vgg_file, inception_file, tmp_path
):
    flags = (
        "--num_processes 2 --num_machines 1 --multi_gpu --main_process_port 0 --mixed_precision no"
    )
    flags += " --dynamo_backend no --num_cpu_threads_per_process 1 --module eval.reconstruction"
    words = [
        run,
        tiny_shards / "*.tar",
        *options(vgg_file, inception_file),
        "--output",
        tmp_path / "report.json",
    ]
    words += ["--num-workers", 1, "--device", "cpu", "--save-images", tmp_path]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *map(str, words)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ACCELERATE_"))}
    environment = kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("report.json: 12 images") == 1  # one process talks
    found, expected = read(tmp_path), read(whole)
    assert (found["num_processes"], found["num_images"]) == (2, LIMIT)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    same = ("protocol", "model", "weights", "versions", "num_identical", "num_without_caption")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert (tmp_path / "reconstructions.png").read_bytes() == (
        whole / "reconstructions.png"
    ).read_bytes()


def test_the_json_says_what_was_measured_and_how(run, whole, vgg_file, inception_file, tiny_shards):
    found = read(whole)
    assert (found["num_images"], found["num_identical"], found["num_without_caption"]) == (
        LIMIT,
        0,
        0,
    )
    assert found["missing"] == {} and found["skipped"] == []
    for name, file in (("lpips", vgg_file), ("rfid", inception_file)):
        assert found["weights"][name] == {"file": file.name, "sha256": file_sha256(file)}
    assert found["model"]["step"] == 4
    assert found["model"]["ema_sha256"] == file_sha256(
        run / "checkpoints" / "step_00000004" / EMA_FILE
    )
    assert (found["protocol"]["image_size"], found["protocol"]["limit"]) == (32, LIMIT)
    assert found["protocol"]["data"] == [f"{tiny_shards}/*.tar"]
    assert "rounded to uint8 before every metric" in found["protocol"]["rounding"]
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["versions"]["torch-fidelity"] == metadata.version("torch-fidelity")


def test_the_picture_shows_the_first_pairs(whole, pairs):
    with Image.open(whole / "reconstructions.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    margin, factor = 6, 2  # 64 x 32 pixels a pair, enlarged to 128 x 64
    for column in (0, 3):
        left = margin + column * (128 + margin)
        cell = pixels[margin : margin + 64 : factor, left : left + 128 : factor]
        assert abs(cell - np.concatenate([pairs[0][column], pairs[1][column]], axis=1)).max() <= 1


def test_ema_weights_are_measured(run, whole, tiny_shards, vgg_file, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        (folder / MODEL_FILE).write_bytes(bytes((folder / MODEL_FILE).stat().st_size))
    assert report(copy, tiny_shards / "*.tar", tmp_path, "--limit", LIMIT)["metrics"][
        "ssim"
    ] == pytest.approx(read(whole)["metrics"]["ssim"], rel=1e-9)


def test_the_json_names_the_weights_that_were_measured_while_training_goes_on(
    run, tiny_shards, tmp_path, monkeypatch
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    measure = main.__globals__["measure"]
    monkeypatch.setitem(
        main.__globals__, "measure", lambda *arguments: train_on(copy) or measure(*arguments)
    )
    assert report(copy, tiny_shards / "*.tar", tmp_path, "--limit", 2)["model"]["step"] == 4
    assert report(copy, tiny_shards / "*.tar", tmp_path, "--limit", 2)["model"]["step"] == 5


def test_ssim_of_equal_images_is_one_and_of_negatives_far_below():
    images = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(ssim(images, images), torch.ones(2).double())
    assert ssim(images, 1 - images).max() < 0


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_ssim_of_noisy_and_flat_images_is_that_of_torchmetrics(noise):
    images = torch.rand(4, 3, 40, 24).double()
    images[0], images[1, :, :20] = 0.5, 0
    others = (images + noise * torch.randn_like(images)).clamp(0, 1)
    expected = structural_similarity_index_measure(others, images, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(others, images), expected, rtol=1e-9, atol=1e-9)


# Absent weights


def test_without_weights_two_metrics_are_null_with_the_file_to_fetch_and_the_others_are_there(
    run, tiny_shards, whole, tmp_path, capsys
):
    found = report(run, tiny_shards / "*.tar", tmp_path, "--limit", LIMIT)
    metrics = found["metrics"]
    assert metrics["rfid"] is None and metrics["lpips"] is None
    assert metrics["psnr_db"] == pytest.approx(read(whole)["metrics"]["psnr_db"], rel=1e-6)
    assert metrics["ssim"] == pytest.approx(read(whole)["metrics"]["ssim"], rel=1e-6)
    assert found["missing"].keys() == {"rfid", "lpips"} and found["weights"] == {}
    for name, file, option in (
        ("rfid", "weights-inception-2015-12-05-6726825d.pth", "--inception-weights"),
        ("lpips", "vgg16-397923af.pth", "--vgg-weights"),
    ):
        assert all(
            part in found["missing"][name]
            for part in (file, option, os.environ["TORCH_HOME"], "--download")
        )
    assert "no rfid: InceptionV3's weights are absent" in capsys.readouterr().out


def test_one_image_has_no_rfid(run, tiny_shards, inception_file, tmp_path):
    found = report(
        run, tiny_shards / "*.tar", tmp_path, "--limit", 1, "--inception-weights", inception_file
    )
    assert (
        found["metrics"]["rfid"] is None
        and found["missing"]["rfid"] == "it needs at least 2 images"
    )


# Data


def folder_of_images(folder, captions=True):
    """photos/00000.png ... with a caption each, one without; odd sizes."""
    (folder / "photos" / "b").mkdir(parents=True)
    for number in range(4):
        sample = shape_sample(number)
        image = Image.open(io.BytesIO(sample["png"])).resize((32 + 9 * number, 40))
        path = folder / "photos" / ("b" if number == 3 else "") / f"{number:05d}.png"
        image.save(path)
        if captions and number != 2:
            path.with_suffix(".txt").write_text(sample["txt"])
    return folder / "photos"


def test_a_folder_with_captions_beside_its_images_serves_too(run, tmp_path):
    found = report(run, folder_of_images(tmp_path), tmp_path)
    assert (found["num_images"], found["num_without_caption"]) == (4, 1)
    assert found["metrics"]["psnr_db"] > 1


def test_the_caption_reaches_the_decoder(run, tmp_path):
    with_captions = report(run, folder_of_images(tmp_path / "a"), tmp_path)
    without = report(run, folder_of_images(tmp_path / "b", captions=False), tmp_path)
    assert without["num_without_caption"] == 4
    assert with_captions["metrics"]["psnr_db"] != without["metrics"]["psnr_db"]


def test_what_cannot_be_read_is_skipped_counted_and_listed(run, tmp_path):
    photos = folder_of_images(tmp_path)
    (photos / "00001.png").write_bytes(b"no image")
    (photos / "00002.png").unlink()
    (photos / "00002.png").symlink_to(photos / "nowhere.png")
    found = report(run, photos, tmp_path, "--batch-size", 1)
    assert (found["num_images"], len(found["skipped"])) == (2, 2)
    assert found["skipped_by_reason"] == {
        "image: unreadable (UnidentifiedImageError)": 1,
        "image: missing": 1,
    }
    assert {Path(entry["image"]).name for entry in found["skipped"]} == {"00001.png", "00002.png"}


def test_the_numbers_are_there_though_no_image_is_for_the_picture(run, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.reconstruction.PICTURE_PAIRS", 1)
    photos = folder_of_images(tmp_path)
    (photos / "00000.png").write_bytes(b"no image")
    found = report(run, photos, tmp_path, "--save-images", tmp_path / "pictures")
    assert (
        len(found["skipped"]) == 1
        and found["metrics"]["psnr_db"] > 0
        and not (tmp_path / "pictures").exists()
    )


def test_identical_pairs_are_counted_and_left_out_of_psnr(run, tmp_path, monkeypatch):
    from eval.reconstructor import Reconstructor

    def copy_all_but_the_first(self, images, captions):
        return torch.cat([255 - images[:1], images[1:]])

    monkeypatch.setattr(Reconstructor, "__call__", copy_all_but_the_first)
    found = report(run, folder_of_images(tmp_path), tmp_path)
    assert found["num_identical"] == 3 and 0 < found["metrics"]["psnr_db"] < 60
    monkeypatch.setattr(Reconstructor, "__call__", lambda self, images, captions: images)
    found = report(run, tmp_path / "photos", tmp_path)
    assert (found["metrics"]["psnr_db"], found["metrics"]["ssim"]) == (None, pytest.approx(1))
    assert "identical" in found["missing"]["psnr_db"]


def test_a_reconstruction_that_is_not_finite_stops_it(run, tiny_shards, tmp_path, monkeypatch):
    from modeling.image_tokenizer import ImageTokenizer

    monkeypatch.setattr(
        ImageTokenizer, "decode", lambda self, tokens, states: torch.full((4, 3, 32, 32), torch.nan)
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        report(run, tiny_shards / "*.tar", tmp_path, "--limit", 4)
    assert not list(tmp_path.iterdir())


def image_set(entries):
    return ImageSet(entries, 32, ("txt",), (255, 255, 255))


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_read_once_over_all_processes(tiny_shards, world_size, num_workers):
    entries = list_images([str(tiny_shards / "*.tar")])
    assert len(entries) == 48
    found = {}
    for rank in range(world_size):
        for batch in iterate_images(image_set(entries), 7, num_workers, rank, world_size):
            assert (
                batch["image"].shape == (len(batch["index"]), 3, 32, 32)
                and batch["image"].dtype == torch.uint8
            )
            for index, image, caption in zip(batch["index"], batch["image"], batch["caption"]):
                assert index not in found and index % world_size == rank
                found[index] = image, caption
    assert sorted(found) == [*range(48)]
    for index in (0, 30, 47):
        sample = shape_sample(index)
        expected = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
        assert (
            np.array_equal(found[index][0].permute(1, 2, 0), expected)
            and found[index][1] == sample["txt"]
        )


def test_several_sources_come_in_the_order_given(tiny_shards, tmp_path):
    photos = folder_of_images(tmp_path)
    names = [
        entry.path for entry in list_images([str(tiny_shards / "train-00001.tar"), str(photos)])
    ]
    assert names[:24] == [str(tiny_shards / "train-00001.tar")] * 24
    assert [Path(name).name for name in names[24:]] == [
        "00000.png",
        "00001.png",
        "00002.png",
        "00003.png",
    ]


def test_transparent_pixels_show_the_runs_background(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    images = ImageSet(list_images([str(tmp_path)]), 8, ("txt",), (255, 0, 51))
    assert images[0]["image"][:, 4, 4].tolist() == [255, 0, 51]


def test_a_sample_without_an_image_is_a_skipped_one(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "7", "txt": "no image"}])
    [batch] = iterate_images(image_set(list_images([str(tmp_path / "a.tar")])), 4, 0)
    assert (batch["index"], batch["skipped"]) == ([], [(f"{tmp_path}/a.tar: 7", "image: missing")])


# Options and errors


def test_another_image_size_and_bf16_change_the_numbers_and_are_in_the_json(
    run, tiny_shards, whole, tmp_path
):
    arguments = [run, tiny_shards / "*.tar", tmp_path, "--limit", LIMIT]
    larger, rounded = (
        report(*arguments, "--image-size", 48),
        report(*arguments, "--precision", "bf16"),
    )
    assert (
        larger["protocol"]["image_size"] == 48 and "bf16" in rounded["protocol"]["reconstruction"]
    )
    expected = read(whole)["metrics"]["psnr_db"]
    assert larger["metrics"]["psnr_db"] != pytest.approx(expected, rel=1e-6)
    assert rounded["metrics"]["psnr_db"] != pytest.approx(expected, rel=1e-9)
    assert rounded["metrics"]["psnr_db"] == pytest.approx(expected, rel=0.02)


def test_a_tokenizer_without_text_guidance_needs_no_captions(tmp_path, tiny_shards):
    (tmp_path / "experiment").mkdir()
    experiment = Experiment(tmp_path / "experiment", tiny_shards)
    experiment.run("tokenizer", "tokenizer.text_guidance=false", "training.max_steps=1")
    found = report(
        tmp_path / "experiment", tiny_shards / "*.tar", tmp_path, "--limit", 3
    )  # the experiment's folder
    assert (
        found["protocol"]["text_guidance"] is None
        and found["model"]["text_encoder_fingerprint"] is None
    )
    assert found["num_images"] == 3


def test_the_json_goes_into_the_run_unless_it_is_told_otherwise(run, tiny_shards, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    reset_accelerate()
    words = [copy, tiny_shards / "*.tar", "--limit", 2, "--num-workers", 0, "--device", "cpu"]
    main(parse_args([*map(str, words)]))
    assert json.loads((copy / "reconstruction.json").read_text())["num_images"] == 2
    assert f"{copy / 'reconstruction.json'}: 2 images, psnr_db" in capsys.readouterr().out


def test_progress_tells_rate_and_time_left(run, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.reconstructor.PROGRESS_SECONDS", 0)
    report(run, tiny_shards / "*.tar", tmp_path, "--limit", 4, "--batch-size", 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3/4 images, ") and lines[0].endswith(" s left")
    assert lines[1].startswith("4/4 images, ") and lines[1].endswith(" 0 s left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
        (["--image-size", "33"], "image_size"),
        (["--vgg-weights", "/nowhere/vgg.pth"], "--vgg-weights: no file /nowhere/vgg.pth"),
        (
            ["--inception-weights", "/nowhere/inception.pth"],
            "--inception-weights: no file /nowhere/inception.pth",
        ),
        (["--output", "/"], "/ is a folder, expected a file"),
        (
            ["--output", "/dev/null/a.json"],
            "/dev/null/a.json cannot be written: /dev/null: Not a directory",
        ),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(
    run, tiny_shards, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("eval.reconstruction.measure", None)
    with pytest.raises(ValueError, match=message):
        report(run, tiny_shards / "*.tar", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--vgg-weights", "--inception-weights"])
def test_wrong_and_truncated_weights_are_refused_before_any_work(
    run, tiny_shards, vgg_file, inception_file, tmp_path, monkeypatch, option
):
    monkeypatch.setattr("eval.reconstruction.measure", None)
    right, other = (
        (vgg_file, inception_file) if option == "--vgg-weights" else (inception_file, vgg_file)
    )
    wrong_hash, cut = tmp_path / "net-00000000.pth", tmp_path / "cut.pth"
    shutil.copy(right, wrong_hash)
    cut.write_bytes(right.read_bytes()[:-1000])
    for file, message in (
        (wrong_hash, "net-00000000.pth is damaged or another file"),
        (cut, "cut.pth (has no weights for this net|is no file of weights alone)"),
        (other, "made-up.pth has (no weights for this net|other weights than)"),
    ):
        with pytest.raises(ValueError, match=message):
            report(run, tiny_shards / "*.tar", tmp_path, option, file)


def test_without_images_it_says_so(run, tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        report(run, tmp_path, tmp_path)
    write_shard(tmp_path / "a.tar", [{"__key__": "7", "txt": "no image"}])
    with pytest.raises(ValueError, match="not one image could be read"):
        report(run, tmp_path / "a.tar", tmp_path)
    with pytest.raises(ValueError, match=r"b\.tar"):
        report(run, tmp_path / "b.tar", tmp_path)


def test_an_image_named_twice_and_a_broken_shard_are_refused(tiny_shards, tmp_path):
    shard = str(tiny_shards / "train-00000.tar")
    with pytest.raises(ValueError, match="train-00000.tar: 00000 is named twice"):
        list_images([shard, str(tiny_shards / "*.tar")])
    photos = folder_of_images(tmp_path)
    with pytest.raises(ValueError, match=r"00003\.png is named twice"):
        list_images([str(photos), str(photos / "b")])
    (tmp_path / "cut.tar").write_bytes(Path(shard).read_bytes()[:20_000])
    with pytest.raises(ValueError, match="cut.tar: truncated"):
        list_images([str(tmp_path / "cut.tar")])


def test_a_folder_that_is_no_tokenizer_run_is_refused_with_status_2(
    tiny_shards, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "flowtok"
    other.mkdir()
    (other / "config.yaml").write_text("stage: flowtok\n")
    with pytest.raises(ValueError, match="is a run of stage 'flowtok', not of stage 'tokenizer'"):
        report(other, tiny_shards / "*.tar", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["reconstruction", str(tmp_path / "none"), str(tiny_shards / "*.tar")]
    )
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "eval" / "reconstruction.py"), run_name="__main__")
    assert caught.value.code == 2
    error, place = capsys.readouterr().err.splitlines()
    assert "none is no run folder" in error and "raised at" in place
