"""eval/generation.py on a tiny run: the same images in any number of processes, resumed, by its
protocol; its numbers against torch-fidelity's and clean-fid's on the images that it wrote.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import TINY_CLIP, refusal, shape_sample
from evaluations import (
    CAPTIONS,
    CPU,
    LIGHT,
    QuickInception,
    evaluate,
    launch,
    pngs,
    read,
    run_program,
    train_on,
)
from PIL import Image
from safetensors.torch import save_file

from data.tar import read_shard, write_shard
from eval import feature_nets, generation, programs
from eval.feature_nets import ClipScorer
from eval.features import FeatureSet, Gaussian, fit_gaussian, frechet_distance
from eval.images import RULES, ImageSet, list_images
from modeling import clip_weights
from modeling.pipeline import ImageGenerator
from modeling.published import file_sha256
from scripts import reference_stats
from training.checkpoint import EMA_FILE, checkpoint_folders

FIDELITY = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}
# Features are float32, computed in other batches: each is off by some 1e-6 of itself.
NEAR = {"rel": 1e-5, "abs": 1e-7}


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(scope="module")
def light(chain, inputs, tmp_path_factory):
    """The same with only the Frechet distance of the tokenizer's latents."""
    folder = tmp_path_factory.mktemp("light")
    evaluate(chain.folder, inputs, folder, *LIGHT)
    return folder


@pytest.fixture
def out(tmp_path):
    """Where `evaluated` writes."""
    return tmp_path / "out"


@pytest.fixture
def evaluated(chain, inputs, out):
    """Runs the program on the chain, with further arguments; its report."""
    return lambda *arguments: evaluate(chain.folder, inputs, out, *arguments)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Arguments that give a stand-in for Inception."""
    for module in (feature_nets, reference_stats):
        monkeypatch.setattr(module, "InceptionFeatures", QuickInception)
    (tmp_path / "quick.pth").touch()
    return ["--inception-weights", tmp_path / "quick.pth"]


@pytest.fixture
def no_images(monkeypatch):
    """Generating an image is an error."""
    monkeypatch.setattr(ImageGenerator, "generate", None)


# The numbers


def test_the_numbers_are_those_of_torch_fidelity_and_the_report_says_what_was_done(
    evaluated, chain, inception_file, tmp_path, out
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        (photos / f"{number}.png").write_bytes(shape_sample(number)["png"])
    words = [f"reference=[{photos}]", "choice=first", "num_captions=6", "kid_subset_size=4"]
    found = evaluated(*words, "--inception-weights", inception_file)
    settings = {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    settings |= {"kid_subsets": 4, "kid_subset_size": 4, "isc_splits": 3}
    settings |= dict.fromkeys(("fid", "kid", "isc", "prc"), True)
    settings["feature_extractor"] = "inception-v3-compat"
    settings["feature_extractor_weights_path"] = str(inception_file)
    folders = {"input1": str(out / "images"), "input2": str(photos)}
    theirs = torch_fidelity.calculate_metrics(**folders, **settings)
    expected = {name: theirs[key] for name, key in FIDELITY.items()}
    assert found["metrics"].keys() == expected.keys() and found["missing"] == {}
    assert found["metrics"]["fid"] > 1 and found["metrics"]["kid"] > 1e-3
    # Theirs are in float32
    assert found["metrics"] == pytest.approx(expected, rel=1e-3, abs=1e-6)

    newest = max(checkpoint_folders(chain.folder / "flowtok").items())[1]
    assert found["model"]["ema_sha256"] == file_sha256(newest / EMA_FILE)
    assert found["num_images"] == found["images_made"] == 6
    assert (found["sampling"]["steps"], found["sampling"]["guidance"]) == (2, 2.0)
    assert (found["image_size"], found["protocol"]["group_size"]) == (32, 5)
    assert found["weights"]["inception"]["sha256"] == file_sha256(inception_file)
    assert found["reference"]["num_images"] == 5 and found["images_per_second"] > 0
    assert (out / "gallery.html").read_text().count("<figure>") == 6
    assert (out / "samples.png").is_file()


def test_clean_fid_finds_the_same_distance(evaluated, quick, out, tmp_path):
    fid = pytest.importorskip("cleanfid.fid")
    rows = {f"{number:040x}": {"prompt": f"a red {number}"} for number in range(6)}
    (tmp_path / "meta_data.json").write_text(json.dumps(rows))
    for number, size in enumerate([(40, 40), (700, 500), (31, 640)] * 2):
        folder = tmp_path / "imgs" / ("animals", "food")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(number).integers(0, 2, (6, 6, 3)).astype(np.uint8) * 255
        Image.fromarray(small).resize(size).save(folder / f"{number}.png")
    words = [f"captions=[{tmp_path}/meta_data.json]", "resize=clean", "metrics=[frechet]", *quick]
    found = evaluated(*words, f"reference=[{tmp_path}/imgs]")["metrics"]
    settings = {"num_workers": 0, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    made, real = (
        torch.from_numpy(fid.get_folder_features(str(folder), model=QuickInception(), **settings))
        for folder in (out / "images", tmp_path / "imgs")
    )
    expected = frechet_distance(fit_gaussian(made), fit_gaussian(real))
    assert found == {"clean_fid": pytest.approx(expected, rel=1e-3)}  # features are float32
    statistics(tmp_path / "clean.npz", tmp_path / "imgs", "--clean", *quick)
    assert evaluated(*words, f"reference=[{tmp_path}/clean.npz]")["metrics"] == found


def test_two_processes_make_the_images_and_numbers_of_one(chain, inputs, light, out, tmp_path):
    measured = ("features=tokenizer", "metrics=[frechet,precision_recall,clip_score]")
    words = [*measured, "clip.model=own", "--num-workers", 1]
    printed = launch(chain.folder, inputs, out, *words)
    assert printed.count("evaluation.json: 12 images, 12 made now") == 1  # one process talks
    assert pngs(out) == pngs(light)
    found = read(out)
    shutil.copytree(light, tmp_path / "one")
    expected = evaluate(chain.folder, inputs, tmp_path / "one", *words)
    assert found["metrics"] == pytest.approx(expected["metrics"], **NEAR)
    assert found["num_processes"] == 2
    for name in ("protocol", "sampling", "reference", "model", "weights", "captions_sha256"):
        assert found[name] == expected[name]


def test_two_checkpoints_in_one_process_do_not_mix(chain, inputs, light, evaluated, out, tmp_path):
    other = tmp_path / "flowtok"
    shutil.copytree(chain.folder / "flowtok", other)
    shutil.rmtree(max(checkpoint_folders(other).items())[1])  # an earlier step of the same run
    second = evaluate(other, inputs, tmp_path / "other", *LIGHT)
    again = evaluated(*LIGHT)
    assert again["metrics"] == read(light)["metrics"] and second["model"] != again["model"]
    with pytest.raises(ValueError, match=rf"{out} .*\(model differ\)"):
        evaluate(other, inputs, out, *LIGHT)


def test_what_was_half_loaded_while_training_went_on_is_loaded_again(
    chain, inputs, out, tmp_path, monkeypatch
):
    run, load, calls = tmp_path / "flowtok", generation.load_pipeline, []
    shutil.copytree(chain.folder / "flowtok", run)

    def and_train(*arguments):
        calls.append(arguments)
        result = load(*arguments)
        if len(calls) == 1:
            train_on(run)
        return result

    monkeypatch.setattr(generation, "load_pipeline", and_train)
    found = evaluate(run, inputs, out, *LIGHT)
    assert (found["model"]["checkpoint"], len(calls)) == ("step_00000005", 2)


def test_processes_that_loaded_different_checkpoints_are_stopped(evaluated, out, monkeypatch):
    monkeypatch.setattr(programs, "gather_object", lambda own: [*own, "of another checkpoint"])
    with pytest.raises(ValueError, match="different checkpoints"):
        evaluated(*LIGHT)
    assert not out.exists()


# The images


def test_an_image_depends_neither_on_the_feature_batch_nor_on_how_many_follow_it(
    evaluated, light, out
):
    evaluated(*LIGHT, "choice=first", "num_captions=6", "--batch-size", 1)
    assert len(pngs(light)) == CAPTIONS
    assert pngs(out) == {name: data for name, data in pngs(light).items() if name < "000006"}


def test_an_interrupted_evaluation_continues_and_ends_alike(evaluated, light, out, monkeypatch):
    calls, generate = [], ImageGenerator.generate

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(ImageGenerator, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(*LIGHT)
    (out / "images" / "000003.png").unlink()  # its group is made again
    found = evaluated(*LIGHT)
    assert (len(calls), found["images_made"]) == (5, 7)
    assert pngs(out) == pngs(light) and found["metrics"] == read(light)["metrics"]
    found = evaluated(*LIGHT)
    assert (len(calls), found["images_made"], found["images_per_second"]) == (5, 0, None)
    assert not list(out.rglob("*.tmp"))


def test_damaged_files_are_named_and_made_anew_when_deleted(evaluated, light, out):
    out.mkdir()
    (out / "inputs.json").write_text("[]")
    with pytest.raises(ValueError, match="inputs.json is damaged"):
        evaluated(*LIGHT)
    shutil.copytree(light, out, dirs_exist_ok=True)
    image, [features] = out / "images" / "000003.png", [*(out / "features").iterdir()]
    for damage in (features, image):
        damage.write_bytes(b"half")
        with pytest.raises(ValueError, match=f"damaged.*{damage}|{damage} is damaged"):
            evaluated(*LIGHT)
        damage.unlink()
    found = evaluated(*LIGHT)
    assert (found["images_made"], found["metrics"]) == (5, read(light)["metrics"])


def test_without_weights_metrics_are_null_with_the_file_to_fetch_and_follow_when_it_has_come(
    evaluated, quick
):
    found = evaluated()
    assert found["metrics"] == dict.fromkeys(FIDELITY) and found["images_made"] == CAPTIONS
    assert "weights-inception-2015-12-05-6726825d.pth" in found["missing"]["fid"]
    found = evaluated("reference=[]", "metrics=[inception_score,frechet]", *quick)
    assert found["metrics"]["inception_score"] > 1
    assert (found["images_made"], found["metrics"]["fid"]) == (0, None)
    assert "reference=" in found["missing"]["fid"]


def test_the_images_are_made_as_the_protocol_says_and_rounded(evaluated, inputs, out, monkeypatch):
    calls, lines = [], (inputs / "captions.txt").read_text().splitlines()

    def generate(self, captions, sampling, seed, indices):
        assert captions == [lines[index] for index in indices]
        calls.append((sampling.steps, sampling.guidance, sampling.sampler, seed, indices))
        return torch.full((len(captions), 3, 32, 32), 100.7 / 255), None

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    evaluated("steps=3", "guidance=5", "sampler=midpoint", "seed=1", "metrics=[]")
    groups = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 11, 11, 11])
    assert calls == [(3, 5.0, "midpoint", 1, group) for group in groups]
    assert Image.open(out / "images" / "000000.png").getpixel((0, 0)) == (101, 101, 101)


def test_a_sweep_loads_once_and_gives_a_row_a_point_and_a_picture(evaluated, out, monkeypatch):
    loads, load = [], generation.load_pipeline

    def generate(self, captions, sampling, seed, indices):
        level = (sampling.steps + sampling.guidance) / 255
        return torch.full((len(captions), 3, 32, 32), level), None

    monkeypatch.setattr(generation, "load_pipeline", lambda *a: loads.append(a) or load(*a))
    monkeypatch.setattr(ImageGenerator, "generate", generate)
    with pytest.raises(SystemExit):
        evaluated(*LIGHT, "--guidance", "1,1")
    assert evaluated(*LIGHT, "--guidance", "1,50", "--steps", "1,2") is None and len(loads) == 1
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["steps"], row["guidance"]) for row in rows] == [(1, 1), (1, 50), (2, 1), (2, 50)]
    assert len({row["frechet_distance"] for row in rows}) == 4
    for row in rows:
        point = out / f"guidance_{row['guidance']:g}_steps_{row['steps']}"
        assert row["frechet_distance"] == read(point)["metrics"]["frechet_distance"]
        with Image.open(point / "images" / "000000.png") as image:
            assert image.getpixel((0, 0))[0] == row["steps"] + row["guidance"]
    table = (out / "sweep.md").read_text().splitlines()
    assert table[0].split(" | ")[:2] == ["| steps", "guidance"] and len(table) == 2 + len(rows)
    with Image.open(out / "sweep.png") as chart:
        chart.verify()


def test_geneval_gets_its_folders(chain, tmp_path, out):
    rows = [{"tag": "object", "include": [{"class": "x"}], "prompt": f"a {x}"} for x in "xyz"]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--protocol", "geneval", f"captions=[{file}]", "steps=1", "group_size=5"]
    run_program(generation, chain.folder, *words, "--output", out, *CPU)
    # What evaluation/evaluate_images.py of djghosh13/geneval reads
    for number, row in enumerate(rows):
        folder = out / "images" / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        samples = sorted((folder / "samples").iterdir())
        assert [sample.name for sample in samples] == [f"{n:04d}.png" for n in range(4)]
        assert len({sample.read_bytes() for sample in samples}) == 4


def test_an_image_that_is_not_finite_stops_it(evaluated, out, monkeypatch):
    images = torch.full((5, 3, 32, 32), torch.nan)
    monkeypatch.setattr(ImageGenerator, "generate", lambda *arguments: (images, None))
    with pytest.raises(FloatingPointError, match=r"0\.\.4"):
        evaluated()
    assert not (out / "images").exists()


# The reference


def statistics(file, *words):
    """scripts/reference_stats.py."""
    run_program(reference_stats, file, *words, *CPU)


def test_a_statistics_file_gives_the_numbers_of_its_images(
    evaluated, tiny_shards, quick, tmp_path, capsys
):
    shard, size = f"{tiny_shards}/train-00000.tar", ["--image-size", 32]
    full, plain = tmp_path / "a.npz", tmp_path / "b.npz"
    statistics(full, shard, *size, "--keep-features", *quick)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a\x1b[31m.png").write_bytes(b"no image")
    statistics(plain, shard, tmp_path / "photos", *size, *quick)
    # What a reference lacks is named without what a terminal would obey
    assert f"{tmp_path}/photos/a\\x1b[31m.png" in capsys.readouterr().out

    metrics = ["metrics=[frechet,kid,precision_recall]", *quick]
    images = evaluated(*metrics)
    found = evaluated(f"reference=[{full}]", *metrics)
    assert found["metrics"] == pytest.approx(images["metrics"], **NEAR)
    assert found["reference"]["images_sha256"] == images["reference"]["images_sha256"]
    found = evaluated(f"reference=[{plain}]", *metrics)
    assert found["metrics"]["fid"] == pytest.approx(images["metrics"]["fid"], **NEAR)
    assert found["missing"].keys() == {"kid", "kid_std", "precision", "recall"}
    assert "--keep-features" in found["missing"]["kid"]


def test_images_are_resized_before_their_features_and_kept_as_they_were_made(
    evaluated, light, quick, out, monkeypatch
):
    sizes, forward = [], QuickInception.forward
    monkeypatch.setattr(
        QuickInception, "forward", lambda self, x: sizes.append(x.shape[-1]) or forward(self, x)
    )
    found = evaluated("image_size=20", "metrics=[frechet]", *quick)
    assert {*sizes} == {20} and found["image_size"] == found["reference"]["image_size"] == 20
    assert pngs(out) == pngs(light)


def test_retrieval_finds_the_own_image_among_the_reference(evaluated, tiny_shards, monkeypatch):
    shard = f"{tiny_shards}/train-00001.tar"
    images = ImageSet(list_images([shard]), 32)
    true = torch.stack([torch.from_numpy(images[n]["image"]) for n in range(24)]) / 255

    def all_but_one(self, captions, sampling, seed, indices):
        return true[[(index + 1) % 24 if index == 5 else index for index in indices]], None

    monkeypatch.setattr(ImageGenerator, "generate", all_but_one)
    names = [f"captions=[{shard}]", f"reference=[{tiny_shards}/*.tar]"]
    found = evaluated(*names, "features=tokenizer", "metrics=[retrieval]")
    assert found["num_images"] == 24
    assert found["metrics"]["retrieval_top1"] == pytest.approx(23 / 24)


def test_retrieval_refuses_reference_images_of_one_name(evaluated, tiny_shards, tmp_path):
    samples = [*read_shard(tiny_shards / "train-00000.tar")][:3]
    named = [{**x, "__key__": key} for x, key in zip(samples, ("0+1", "0_1", "2"))]
    write_shard(tmp_path / "a.tar", named)
    words = [f"captions=[{tmp_path}/a.tar]", f"reference=[{tmp_path}/a.tar]"]
    with pytest.raises(ValueError, match="retrieval: .*one name"):
        evaluated(*words, "features=tokenizer", "metrics=[retrieval]")


# Refusals: (arguments, what the message names)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["num_captions=13"], ["captions.txt", "12", "13"]),
        (["capttions=[a.txt]"], ["capttions", "captions"]),
        (["steps=0"], ["steps", "0"]),
        (["reference=[/nowhere]"], ["/nowhere"]),
        (["reference=[/nowhere.npz]"], ["/nowhere.npz"]),
        (["metrics=[retrieval]"], ["retrieval", "folders"]),
        (["--output", "/dev/null/out"], ["/dev/null/out/evaluation.json"]),
        (["--inception-weights", "/nowhere.pth"], ["--inception-weights", "/nowhere.pth"]),
        (["metrics=[clip_score]", "clip.model=ViT-B-33"], ["clip.model", "ViT-B-33"]),
        (["metrics=[clip_score]", "clip.model=ViT-B-32"], ["ViT-B-32-quickgelu"]),
    ],
)
def test_wrong_inputs_are_refused_before_an_image_is_made(
    evaluated, out, no_images, arguments, parts
):
    with refusal(*parts):
        evaluated(*arguments)
    assert not out.exists()


def test_references_that_cannot_serve_are_refused_before_an_image_is_made(
    evaluated, quick, tmp_path, out, no_images
):
    width = QuickInception.width
    gaussian = Gaussian(torch.zeros(width).double(), torch.eye(width).double(), 9)
    FeatureSet(gaussian, {"image_size": 48}).save(tmp_path / "big.npz")
    FeatureSet(gaussian, {"weights_sha256": "0" * 64}).save(tmp_path / "other.npz")
    FeatureSet(gaussian, {"resize": RULES["clean"]}).save(tmp_path / "clean.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "big.npz").read_bytes()[:9000])
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for name, part in {
        "big.npz": "image_size 48, expected 32",
        "other.npz": "weights_sha256 '0000",
        "clean.npz": "resize .*clean",
        "cut.npz": "cut.npz",
        "narrow.npz": "3 features",
        "broken": "broken/a.png",
    }.items():
        with pytest.raises(ValueError, match=part):
            evaluated(f"reference=[{tmp_path / name}]", *quick)
    assert not out.exists()


# CLIP score

BOTH = ("features=tokenizer", "metrics=[frechet,clip_score]")


def test_the_clip_score_is_kept_and_not_that_of_another_activation(
    evaluated, light, out, tmp_path, no_images, monkeypatch
):
    shutil.copytree(light, out)
    own = evaluated(*BOTH, "clip.model=own")
    assert own["weights"]["clip"]["model"].endswith("/text_encoder/clip")
    assert own["metrics"]["frechet_distance"] == read(light)["metrics"]["frechet_distance"]
    for name, config in (("kept", TINY_CLIP), ("kept-quickgelu", TINY_CLIP | {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    clip_weights.open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)  # cosines of which not all are negative
    save_file(clip_weights.build_clip(TINY_CLIP).state_dict(), tmp_path / "clip.safetensors")
    words = [*BOTH, f"clip.pretrained={tmp_path}/clip.safetensors"]
    quick = evaluated(*words, "clip.model=kept-quickgelu")["metrics"]
    exact = evaluated(*words, "clip.model=kept", "clip.exact_gelu=true")["metrics"]
    assert exact["clip_score"] != quick["clip_score"]
    monkeypatch.setattr(ClipScorer, "cosines", None)
    assert evaluated(*BOTH, "clip.model=own")["metrics"] == own["metrics"]


def test_an_absent_clip_gives_null_with_the_file_to_fetch_and_the_rest_is_there(
    evaluated, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_session", None)
    found = evaluated(*BOTH)
    assert found["metrics"]["clip_score"] is None and found["metrics"]["frechet_distance"] > 0
    parts = ("open_clip_model.safetensors", "timm/vit_base_patch32_clip_224.openai")
    assert all(part in found["missing"]["clip_score"] for part in parts)
