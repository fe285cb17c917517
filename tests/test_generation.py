"""eval/generation.py on a tiny run: the same images in any batch and number of processes, resumed, by its protocol;
its numbers against torch-fidelity's on the images that it wrote; errors before any image."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import CAPTIONS, LIGHT, evaluate, launch, pngs, read, train_on, write_inputs
from PIL import Image
from tiny_experiment import reset_accelerate

from data.tar import read_shard, write_shard
from eval.frechet import Gaussian, load_statistics, save_statistics
from eval.generation import load_protocol, main, parse_args
from eval.inception import INCEPTION_WIDTH
from eval.making import claim_folder, resize
from eval.protocol import FOLDER, Protocol, choose_captions
from modeling.pipeline import ImageGenerator
from modeling.published import file_sha256
from scripts import reference_stats
from training.checkpoint import EMA_FILE, MODEL_FILE

ROOT = Path(__file__).parents[1]
FIDELITY = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
FIDELITY |= {"kid_std": "kernel_inception_distance_std", "inception_score": "inception_score_mean"}
FIDELITY |= {
    "inception_score_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """No weights that happen to be on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_shards):
    """Folder with captions.txt and protocol.yaml: 12 captions, groups of 5, against the first shard."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), tiny_shards)


@pytest.fixture(scope="module")
def whole(chain, inputs, inception_file, tmp_path_factory):
    """Folder of an evaluation with images and all metrics; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(chain.folder, inputs, folder, "--inception-weights", inception_file)
    return folder


@pytest.fixture(scope="module")
def light(chain, inputs, tmp_path_factory):
    """The same with the Frechet distance of the tokenizer's latents alone, which takes no time."""
    folder = tmp_path_factory.mktemp("light")
    evaluate(chain.folder, inputs, folder, *LIGHT)
    return folder


# The numbers


@pytest.fixture(scope="module")
def fidelity(whole, tiny_shards, inception_file, tmp_path_factory):
    """torch-fidelity's numbers on the images that the program wrote, under our names."""
    import torch_fidelity

    from eval.images import ImageSet, iterate_images, list_images

    folder = tmp_path_factory.mktemp("reference")
    images = ImageSet(list_images([f"{tiny_shards}/train-00000.tar"]), 32, (), (255, 255, 255))
    for batch in iterate_images(images, 24, 0):
        for index, image in zip(batch["index"], batch["image"]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
    settings = {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    settings |= {
        "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(inception_file),
    }
    expected = torch_fidelity.calculate_metrics(
        input1=str(whole / "images"),
        input2=str(folder),
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        **{"kid_subsets": 4, "kid_subset_size": 8, "isc_splits": 3},
        **settings,
    )
    return {name: expected[theirs] for name, theirs in FIDELITY.items()}


def test_the_numbers_are_those_of_torch_fidelity_on_the_images_written(whole, fidelity):
    found = read(whole)["metrics"]
    assert found.keys() == fidelity.keys() and read(whole)["missing"] == {}
    assert found["fid"] > 1 and found["kid"] > 1e-3
    for name, expected in fidelity.items():
        assert found[name] == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_two_processes_make_the_images_and_numbers_of_one(
    chain, inputs, whole, fidelity, inception_file, tmp_path
):
    output = launch(
        chain.folder, inputs, tmp_path, "--inception-weights", inception_file, "--num-workers", 1
    )
    assert output.count("evaluation.json: 12 images, 12 made now") == 1  # one process talks
    assert pngs(tmp_path) == pngs(whole)
    found, expected = read(tmp_path), read(whole)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-8)
    assert found["metrics"] == pytest.approx(fidelity, rel=1e-3, abs=1e-6)
    assert found["num_processes"] == 2
    same = ("protocol", "sampling", "reference", "model", "weights", "captions_sha256")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}


def test_a_set_has_no_distance_to_itself(chain, inputs, whole, tmp_path):
    arguments = [
        "features=tokenizer",
        "metrics=[frechet,precision_recall]",
        f"reference=[{whole}/images]",
    ]
    metrics = evaluate(chain.folder, inputs, tmp_path, *arguments)["metrics"]
    assert abs(metrics["frechet_distance"]) < 1e-3 and (
        metrics["precision"],
        metrics["recall"],
    ) == (1, 1)


def test_the_fid_of_a_set_with_itself_is_zero(chain, inputs, whole, inception_file, tmp_path):
    shutil.copytree(whole, tmp_path / "out")  # with its features
    arguments = [
        f"reference=[{whole}/images]",
        "metrics=[frechet]",
        "--inception-weights",
        inception_file,
    ]
    assert (
        abs(evaluate(chain.folder, inputs, tmp_path / "out", *arguments)["metrics"]["fid"]) < 1e-3
    )


def test_two_checkpoints_in_one_process_do_not_mix(chain, inputs, light, tmp_path):
    other = tmp_path / "flowtok"
    shutil.copytree(chain.folder / "flowtok", other)
    shutil.rmtree(sorted((other / "checkpoints").iterdir())[-1])  # an earlier step of the same run
    second = evaluate(other, inputs, tmp_path / "other", *LIGHT)
    again = evaluate(chain.folder, inputs, tmp_path / "again", *LIGHT)
    assert again["metrics"] == read(light)["metrics"]
    assert second["metrics"] != again["metrics"] and second["model"] != again["model"]
    with pytest.raises(ValueError, match=r"holds images of another evaluation \(model differ\)"):
        evaluate(other, inputs, tmp_path / "again", *LIGHT)


def test_ema_weights_are_used(chain, inputs, whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(chain.folder / "flowtok", copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        (folder / MODEL_FILE).write_bytes(bytes((folder / MODEL_FILE).stat().st_size))
    found = evaluate(copy, inputs, tmp_path / "out", "metrics=[]")
    assert pngs(tmp_path / "out") == pngs(whole)
    newest = sorted((chain.folder / "flowtok" / "checkpoints").iterdir())[-1]
    assert found["model"]["ema_sha256"] == file_sha256(newest / EMA_FILE)


@pytest.mark.parametrize("when", ["load_pipeline", "load_reference"])
def test_the_report_names_the_weights_that_made_the_images_while_training_goes_on(
    chain, inputs, tmp_path, monkeypatch, when
):
    run = tmp_path / "flowtok"
    shutil.copytree(chain.folder / "flowtok", run)
    function, calls = main.__globals__[when], []

    def and_train(*arguments):
        calls.append(arguments)
        result = function(*arguments)
        if len(calls) == 1:
            train_on(run)
        return result

    monkeypatch.setitem(main.__globals__, when, and_train)
    found = evaluate(run, inputs, tmp_path / "out", *LIGHT)
    # what was loaded before the new checkpoint came is loaded again; what was loaded whole stays
    assert (found["model"]["checkpoint"], len(calls)) == {
        "load_pipeline": ("step_00000005", 2),
        "load_reference": ("step_00000004", 1),
    }[when]


def test_processes_that_loaded_different_checkpoints_are_stopped(
    chain, inputs, tmp_path, monkeypatch
):
    monkeypatch.setitem(
        main.__globals__, "gather_object", lambda mine: [*mine, "of another checkpoint"]
    )
    with pytest.raises(ValueError, match="the processes loaded different checkpoints"):
        evaluate(chain.folder, inputs, tmp_path / "out", *LIGHT)
    assert not (tmp_path / "out").exists()


# The images


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_images_are_the_same_bit_for_bit_in_any_batch(chain, inputs, whole, tmp_path, batch_size):
    evaluate(chain.folder, inputs, tmp_path, "--batch-size", batch_size, "metrics=[]")
    assert len(pngs(whole)) == CAPTIONS and pngs(tmp_path) == pngs(whole)


def test_an_image_does_not_depend_on_how_many_follow_it(chain, inputs, whole, tmp_path):
    evaluate(chain.folder, inputs, tmp_path, "choice=first", "num_captions=6", "metrics=[]")
    assert pngs(tmp_path) == {name: data for name, data in pngs(whole).items() if name < "000006"}


def test_images_are_those_of_the_pipeline_for_their_caption_and_number(chain, inputs, whole):
    from dataclasses import replace

    from training.loading import load_pipeline

    parts, sampling = load_pipeline(chain.folder, torch.device("cpu"))
    lines = (inputs / "captions.txt").read_text().splitlines()
    for number in (0, 7, 11):
        image = parts.generate([lines[number]], replace(sampling, steps=2), 0, [number])[0][0]
        found = (
            np.asarray(Image.open(whole / "images" / f"{number:06d}.png"))
            .transpose(2, 0, 1)
            .astype(float)
        )
        assert np.abs(found - (image * 255).round().numpy()).max() <= 1


def test_an_interrupted_evaluation_continues_and_ends_alike(
    chain, inputs, light, tmp_path, monkeypatch
):
    calls, generate = [], ImageGenerator.generate

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(ImageGenerator, "generate", counted)
    arguments = [*LIGHT, "--batch-size", 5]
    with pytest.raises(KeyboardInterrupt):
        evaluate(chain.folder, inputs, tmp_path, *arguments)
    (tmp_path / "images" / "000003.png").unlink()  # its group is made again
    (tmp_path / "images" / "000011.png").write_bytes(
        b"half"
    )  # without features: not taken as it is
    calls.clear()
    monkeypatch.setattr(
        ImageGenerator, "generate", lambda self, *a: calls.append(a) or generate(self, *a)
    )
    found = evaluate(chain.folder, inputs, tmp_path, *arguments)
    assert (len(calls), found["images_made"]) == (2, 7)
    assert pngs(tmp_path) == pngs(light)
    assert found["metrics"] == pytest.approx(read(light)["metrics"], rel=1e-5, abs=1e-8)
    found = evaluate(chain.folder, inputs, tmp_path, *arguments)
    assert (len(calls), found["images_made"], found["images_per_second"]) == (2, 0, None)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_image_among_the_finished_ones_is_said(chain, inputs, tmp_path):
    evaluate(chain.folder, inputs, tmp_path, *LIGHT)
    (tmp_path / "images" / "000003.png").write_bytes(b"half")
    with pytest.raises(ValueError, match="holds a damaged image among the first 12"):
        evaluate(chain.folder, inputs, tmp_path, *LIGHT)


def test_damaged_features_are_said(chain, inputs, tmp_path):
    evaluate(chain.folder, inputs, tmp_path, *LIGHT)
    (file := sorted(tmp_path.glob("features/*/*.npy"))[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{file} is damaged .*: delete it"):
        evaluate(chain.folder, inputs, tmp_path, *LIGHT)
    file.unlink()
    assert evaluate(chain.folder, inputs, tmp_path, *LIGHT)["images_made"] == 0


def test_features_alone_give_the_same_numbers(chain, inputs, light, tmp_path):
    found = evaluate(chain.folder, inputs, tmp_path, "--no-images", *LIGHT)
    assert found["metrics"] == read(light)["metrics"]
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "gallery.html").exists()


def test_without_weights_metrics_are_null_with_the_file_to_fetch_and_follow_when_it_has_come(
    chain, inputs, whole, inception_file, tmp_path
):
    found = evaluate(chain.folder, inputs, tmp_path)
    assert (
        set(found["metrics"].values()) == {None}
        and found["metrics"].keys() == read(whole)["metrics"].keys()
    )
    assert (
        "weights-inception-2015-12-05-6726825d.pth" in found["missing"]["fid"]
        and found["images_made"] == CAPTIONS
    )
    arguments = [
        "reference=[]",
        "metrics=[inception_score,frechet]",
        "--inception-weights",
        inception_file,
    ]
    found = evaluate(chain.folder, inputs, tmp_path, *arguments)
    assert found["images_made"] == 0
    assert found["metrics"]["inception_score"] == pytest.approx(
        read(whole)["metrics"]["inception_score"], rel=1e-5
    )
    assert found["metrics"]["fid"] is None and "names no reference" in found["missing"]["fid"]


def test_seed_steps_guidance_and_rounding_change_the_images(chain, inputs, whole, tmp_path):
    for number, change in enumerate(
        ("seed=1", "steps=3", "guidance=5", "rounding=truncate", "autocast=true")
    ):
        evaluate(chain.folder, inputs, tmp_path / str(number), change, "metrics=[]")
        assert pngs(tmp_path / str(number)) != pngs(whole), change


def test_the_report_says_what_was_done(whole, inception_file):
    found = read(whole)
    assert (
        found["num_images"] == found["images_made"] == CAPTIONS and found["images_per_second"] > 0
    )
    assert (found["sampling"]["steps"], found["sampling"]["guidance"], found["image_size"]) == (
        2,
        2.0,
        32,
    )
    assert found["weights"]["inception"]["sha256"] == file_sha256(inception_file)
    assert found["reference"]["num_images"] == 24 and found["protocol"]["group_size"] == 5
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (whole / "samples.png").is_file() and (whole / "gallery.html").read_text().count(
        "<figure>"
    ) == CAPTIONS


def test_a_sweep_loads_once_and_gives_a_row_a_point_and_a_picture(
    chain, inputs, tmp_path, monkeypatch, capsys
):
    loads, load = [], main.__globals__["load_pipeline"]
    monkeypatch.setitem(main.__globals__, "load_pipeline", lambda *a: loads.append(a) or load(*a))
    arguments = ["features=tokenizer", "metrics=[frechet]", "--guidance", "1,50", "--steps", "1,2"]
    assert evaluate(chain.folder, inputs, tmp_path, *arguments) is None
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["steps"], row["guidance"]) for row in rows] == [(1, 1), (1, 50), (2, 1), (2, 50)]
    for row in rows:
        point = read(tmp_path / f"guidance_{row['guidance']:g}_steps_{row['steps']}")
        assert row["frechet_distance"] == point["metrics"]["frechet_distance"] > 0
    values = [row["frechet_distance"] for row in rows]
    assert values[0] not in (values[1], values[2]) and len(loads) == 1
    table = (tmp_path / "sweep.md").read_text()
    assert table.startswith("| steps | guidance | frechet_distance | images_per_second |\n")
    assert table in capsys.readouterr().out
    assert Image.open(tmp_path / "sweep.png").size == (720, 480)


def test_geneval_gets_its_folders(chain, inputs, tmp_path):
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": f"a {n}"}
        for n in "xyz"
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reset_accelerate()
    words = [chain.folder, "--protocol", "geneval", f"captions=[{file}]", "steps=1", "group_size=5"]
    main(parse_args([*map(str, words), "--output", str(tmp_path / "out"), "--device", "cpu"]))
    folders = sorted((tmp_path / "out" / "images").iterdir())
    assert [folder.name for folder in folders] == ["00000", "00001", "00002"]
    # What evaluation/evaluate_images.py of djghosh13/geneval reads: every folder whose name is digits; its
    # metadata.jsonl as one JSON object with tag, prompt, include (and exclude); samples/ with names of digits and .png.
    for folder, row in zip(folders, rows):
        assert folder.name.isdigit() and {path.name for path in folder.iterdir()} == {
            "metadata.jsonl",
            "samples",
        }
        assert (
            json.loads((folder / "metadata.jsonl").read_text()) == row
            and {"tag", "prompt", "include"} <= row.keys()
        )
        assert all(re.fullmatch(r"\d+\.png", path.name) for path in (folder / "samples").iterdir())
        samples = sorted((folder / "samples").iterdir())
        assert [sample.name for sample in samples] == [
            "0000.png",
            "0001.png",
            "0002.png",
            "0003.png",
        ]
        assert len({sample.read_bytes() for sample in samples}) == 4


# Reference


def statistics(file, data, inception_file, *arguments):
    reset_accelerate()
    words = [
        file,
        *data,
        "--device",
        "cpu",
        "--num-workers",
        0,
        "--inception-weights",
        inception_file,
        *arguments,
    ]
    reference_stats.main(reference_stats.parse_args([*map(str, words)]))


def test_a_statistics_file_gives_the_numbers_of_its_images(
    chain, inputs, whole, tiny_shards, inception_file, tmp_path
):
    shard, arguments = f"{tiny_shards}/train-00000.tar", ["--inception-weights", inception_file]
    statistics(
        tmp_path / "full.npz", [shard], inception_file, "--image-size", 32, "--keep-features"
    )
    save_statistics(tmp_path / "plain.npz", *load_statistics(tmp_path / "full.npz"))
    out = tmp_path / "out"
    measures = "metrics=[frechet,kid,precision_recall]"
    found = evaluate(
        chain.folder, inputs, out, f"reference=[{tmp_path}/full.npz]", measures, *arguments
    )
    for name, value in found["metrics"].items():
        assert value == pytest.approx(read(whole)["metrics"][name], rel=1e-4, abs=1e-7)
    assert found["reference"]["images_sha256"] == read(whole)["reference"]["images_sha256"]
    found = evaluate(
        chain.folder,
        inputs,
        out,
        f"reference=[{tmp_path}/plain.npz]",
        "metrics=[kid,precision_recall]",
        *arguments,
    )
    assert found["missing"].keys() == {"kid", "kid_std", "precision", "recall"}
    assert "--keep-features" in found["missing"]["kid"]


def test_a_statistics_file_is_checked(tiny_shards, inception_file, tmp_path, capsys):
    shard, file = f"{tiny_shards}/train-00000.tar", tmp_path / "a.npz"
    statistics(file, [shard], inception_file, "--image-size", 32)
    statistics(file, [shard], inception_file, "--check")
    printed = capsys.readouterr().out
    assert "whole, and of these images" in printed and '"image_size": 32' in printed
    with pytest.raises(ValueError, match="is of other images: these hash to [0-9a-f]{64}"):
        statistics(file, [f"{tiny_shards}/train-00001.tar"], inception_file, "--check")
    gaussian, _ = load_statistics(file)
    save_statistics(
        tmp_path / "foreign.npz", Gaussian(gaussian.mean + 9, gaussian.covariance, None), {}
    )
    with pytest.raises(ValueError, match="foreign.npz is of other images or features: FID"):
        statistics(tmp_path / "foreign.npz", [shard], inception_file, "--check", "--image-size", 32)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is no statistics file, or cut short"):
        statistics(file, [], inception_file, "--check")
    for arguments, message in (([], "DATA is missing"), ([shard], "--image-size is missing")):
        with pytest.raises(ValueError, match=message):
            statistics(tmp_path / "b.npz", arguments, inception_file)
    with pytest.raises(ValueError, match="c.npz cannot be written: .*a.npz: Not a directory"):
        statistics(file / "c.npz", ["/nowhere"], inception_file, "--image-size", 32)
    assert not (tmp_path / "b.npz").exists()


def test_what_a_reference_lacks_is_said_without_what_a_terminal_would_obey(
    tiny_shards, inception_file, tmp_path, capsys
):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a\x1b[31m.png").write_bytes(b"no image")
    data = [f"{tiny_shards}/train-00000.tar", tmp_path / "photos"]
    statistics(tmp_path / "a.npz", data, inception_file, "--image-size", 32)
    assert "skipped " + str(tmp_path / "photos" / "a\\x1b[31m.png") in capsys.readouterr().out


def test_sigma_that_is_no_covariance_is_refused(inception_file, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=-np.eye(3))
    with pytest.raises(ValueError, match="sigma is no covariance"):
        statistics(tmp_path / "a.npz", [], inception_file, "--check")


def test_another_size_is_resized_to_by_the_references_rule(
    chain, inputs, whole, inception_file, tmp_path
):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert resize(images, 32) is images
    expected = Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize(
        (20, 20), Image.Resampling.BICUBIC
    )
    assert np.array_equal(resize(images, 20)[1].permute(1, 2, 0).numpy(), np.asarray(expected))
    arguments = [
        "image_size=20",
        "reference=[]",
        "metrics=[inception_score]",
        "--inception-weights",
        inception_file,
    ]
    found = evaluate(chain.folder, inputs, tmp_path, *arguments)
    score = read(whole)["metrics"]["inception_score"]
    assert (
        found["metrics"]["inception_score"] != pytest.approx(score, rel=1e-5)
        and found["image_size"] == 20
    )
    assert pngs(tmp_path) == pngs(whole)  # the images are kept as they were made


def test_retrieval_finds_the_own_image_among_the_reference(
    chain, inputs, tiny_shards, tmp_path, monkeypatch
):
    shards = [f"captions=[{tiny_shards}/train-00001.tar]", f"reference=[{tiny_shards}/*.tar]"]
    arguments = [*shards, "features=tokenizer", "metrics=[retrieval,frechet]"]
    found = evaluate(chain.folder, inputs, tmp_path / "a", *arguments)
    assert found["num_images"] == 24 and 0 <= found["metrics"]["retrieval_top1"] < 1
    from data.readers import ImageTextConfig, image_reader

    data = ImageTextConfig(shards=[f"{tiny_shards}/train-00001.tar"])
    batches = image_reader(data, 32, None).once(24)
    true = torch.cat([batch["image"] for batch in batches]).float() / 255
    monkeypatch.setattr(
        ImageGenerator, "generate", lambda self, c, s, seed, indices: (true[indices], None)
    )
    found = evaluate(chain.folder, inputs, tmp_path / "b", *arguments)
    assert found["metrics"]["retrieval_top1"] == found["metrics"]["retrieval_top5"] == 1


def test_retrieval_refuses_reference_images_of_one_name(chain, inputs, tiny_shards, tmp_path):
    samples = [*read_shard(tiny_shards / "train-00000.tar")][:3]
    write_shard(
        tmp_path / "a.tar", [{**x, "__key__": key} for x, key in zip(samples, ("0+1", "0_1", "2"))]
    )
    arguments = [
        f"captions=[{tmp_path}/a.tar]",
        f"reference=[{tmp_path}/a.tar]",
        "features=tokenizer",
    ]
    with pytest.raises(ValueError, match="two reference images of a shard have one name"):
        evaluate(chain.folder, inputs, tmp_path / "out", *arguments, "metrics=[retrieval]")
    assert (
        evaluate(chain.folder, inputs, tmp_path / "out", *arguments, "metrics=[frechet]")[
            "num_images"
        ]
        == 3
    )


# Protocols and errors


def test_the_protocols_that_come_along_are_whole():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {"coco30k", "mjhq30k", "demo", "geneval"}
    protocols = {name: load_protocol(name, []) for name in names}
    assert protocols["coco30k"].num_captions == protocols["mjhq30k"].num_captions == 30_000
    assert len(choose_captions(protocols["demo"])) == 150


def test_captions_come_from_text_jsonl_coco_and_mjhq(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "tag": 1}\n{"prompt": "two"}\n')
    coco = {"images": [], "annotations": [{"caption": "one"}, {"caption": " two"}]}
    mjhq = {"x": {"category": "a", "prompt": "one"}, "y": {"category": "b", "prompt": "two"}}
    for name, content in (("coco.json", coco), ("mjhq.json", mjhq)):
        (tmp_path / name).write_text(json.dumps(content))
    for name in ("a.txt", "a.jsonl", "coco.json", "mjhq.json"):
        captions = choose_captions(Protocol(captions=[str(tmp_path / name)]))
        assert [caption.text.strip() for caption in captions] == ["one", "two"]
        if name == "a.jsonl":
            assert captions[0].record == {"prompt": "one", "tag": 1}


@pytest.mark.parametrize(
    "content", ['{"annotations": [3]}', '{"annotations": 3}', "[1]", "{", '{"a": 3}']
)
def test_a_json_of_another_form_has_no_captions(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json: expected COCO's captions"):
        choose_captions(Protocol(captions=[str(tmp_path / "a.json")]))


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_note_of_what_a_folder_holds_is_named(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(ValueError, match="inputs.json is damaged"):
        claim_folder(tmp_path, {"seed": 0}, True)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_caption_with_a_line_separator_of_unicode_stays_one(tmp_path, name):
    texts = ["a cat\u2028on a mat", "a dog\x85", "a cow"]
    lines = (
        texts
        if name == "a.txt"
        else [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    )
    (tmp_path / name).write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    captions = choose_captions(Protocol(captions=[str(tmp_path / name)]))
    assert [caption.text.strip() for caption in captions] == [text.strip() for text in texts]


def test_captions_are_chosen_by_the_protocol(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(100))))

    def chosen(**values):
        found = choose_captions(Protocol(captions=[str(tmp_path / "a.txt")], **values))
        return [int(caption.text) for caption in found]

    assert chosen() == [*range(100)] and chosen(choice="first", num_captions=3) == [0, 1, 2]
    assert chosen(choice="spread", num_captions=4) == [0, 33, 66, 99]
    some = chosen(choice="random", num_captions=20)
    assert (
        some == sorted({*some})
        and len(some) == 20
        and some == chosen(choice="random", num_captions=20)
    )
    assert some != chosen(choice="random", num_captions=20, choice_seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_captions=13"], "has 12 captions, the protocol wants all of exactly 13"),
        (["num_captions=13", "choice=first"], "has 12 captions, the protocol wants 13"),
        (["captions=[]"], "no captions are named"),
        (["captions=[/nowhere.txt]"], "captions file /nowhere.txt does not exist"),
        (["capttions=[a.txt]"], "unknown key 'capttions'; did you mean 'captions'?"),
        (["choice=best"], "choice"),
        (["metrics=[fid]"], "unknown metrics fid; valid: frechet, frechet_by_category, kid"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["sampler=rk4"], "unknown sampler 'rk4'"),
        (["group_size=0"], "group_size must be at least 1"),
        (["reference=[/nowhere]"], "/nowhere"),
        (["reference=[/nowhere.npz]"], "statistics file /nowhere.npz does not exist"),
        (["metrics=[retrieval]"], "retrieval needs captions from folders or shards"),
        (["features=tokenizer"], "inception_score needs features=inception"),
        (
            ["features=dinov2", "metrics=[frechet]", "--dinov2-weights", "/nowhere.pth"],
            "--dinov2-weights: no file",
        ),
        (["layout=geneval"], "layout=geneval needs captions from a .jsonl"),
        (
            [*LIGHT, "image_size=48"],
            "features=tokenizer needs images of the tokenizer's 32 px, got image_size=48",
        ),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--guidance", "1,1"], "--guidance names a value twice"),
        (
            ["--output", "/dev/null/out"],
            "/dev/null/out/evaluation.json cannot be written: /dev/null: Not a directory",
        ),
        (["--inception-weights", "/nowhere.pth"], "--inception-weights: no file /nowhere.pth"),
    ],
)
def test_wrong_inputs_are_refused_before_an_image_is_made(
    chain, inputs, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(ImageGenerator, "generate", None)
    with pytest.raises(ValueError) as caught:
        evaluate(chain.folder, inputs, tmp_path, *arguments)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_references_that_cannot_serve_are_refused_before_an_image_is_made(
    chain, inputs, inception_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(ImageGenerator, "generate", None)
    gaussian = Gaussian(
        torch.zeros(INCEPTION_WIDTH).double(), torch.eye(INCEPTION_WIDTH).double(), 9
    )
    save_statistics(tmp_path / "big.npz", gaussian, {"image_size": 48})
    save_statistics(
        tmp_path / "other.npz", gaussian, {"image_size": 32, "weights_sha256": "0" * 64}
    )
    (tmp_path / "cut.npz").write_bytes((tmp_path / "big.npz").read_bytes()[:9000])
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for name, message in (
        ("big.npz", "is of images of 48 px, the generated ones have 32 px"),
        ("other.npz", "has weights_sha256 0000"),
        ("cut.npz", "is no statistics file, or cut short"),
        ("narrow.npz", "has statistics of 3 features"),
        ("empty", "holds no image"),
        ("broken", "reference: 0 images could be read"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments = [f"reference=[{tmp_path / name}]", "--inception-weights", inception_file]
            evaluate(chain.folder, inputs, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_finite_stops_it(chain, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ImageGenerator, "generate", lambda *a: (torch.full((5, 3, 32, 32), torch.nan), None)
    )
    with pytest.raises(FloatingPointError, match=r"an image among 0\.\.4 is not finite"):
        evaluate(chain.folder, inputs, tmp_path)
    assert not (tmp_path / "images").exists()


def test_a_users_error_ends_with_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generation", "/nowhere", "--protocol", "nothing"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "eval" / "generation.py"), run_name="__main__")
    assert caught.value.code == 2
    assert (
        "is neither a YAML file nor one of coco30k, demo, geneval, mjhq30k"
        in capsys.readouterr().err
    )
