"""scripts/export.py: a folder that gives a run's own pixels, also to the installed package."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY_CLIP
from evaluations import run_program
from PIL import Image
from safetensors.torch import save_file
from tiny_experiment import draw

import sample
from modeling import clip_weights
from modeling.clip_weights import build_clip
from modeling.pipeline import FlowTokPipeline
from modeling.text_encoder import TextEncoderConfig, load_text_encoder
from scripts import export

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "a blue square", "a cat"]
USER = """
import sys
from flowtok.pipeline import FlowTokPipeline

pipeline = FlowTokPipeline.from_pretrained(sys.argv[1], "cpu")
for number, image in enumerate(pipeline(sys.argv[2:], steps=5, guidance=1.5, seed=3)):
    image.save(f"{number}.png")
foreign = {"modeling", "data", "eval", "training", "scripts"} & {*sys.modules}
print(sys.modules["flowtok"].__file__, *foreign)
"""


run_script = partial(run_program, export)


def pixels(folder):
    """Pixels of a folder's images, in order."""
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def equal(left, right):
    return len(left) == len(right) > 0 and all(map(np.array_equal, left, right))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, both_ways):
    """The experiment's exported folder, of both directions."""
    folder = tmp_path_factory.mktemp("exported") / "shapes"
    run_script(both_ways, "--output", folder)
    return folder


def test_the_wheel_in_a_fresh_environment_gives_the_pixels_of_the_run(
    both_ways, exported, tmp_path
):
    settings = ["--steps", "5", "--guidance", "1.5", "--seed", "3", "--output", tmp_path / "x.png"]
    for name, run in (("run", both_ways), ("folder", exported)):
        draw(run, "--prompts", *PROMPTS, *settings, "--save-dir", tmp_path / name)
    assert equal(pixels(tmp_path / "run"), pixels(tmp_path / "folder"))

    # From a copy: setuptools takes leftovers of earlier builds from the folder.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "modeling", source / "modeling")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, timeout=120)
    [wheel] = tmp_path.glob("flowtok-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert tops == {"flowtok", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
        venv.create(tmp_path / "venv", symlinks=True)
        [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        archive.extractall(packages)

    # The packages that the wheel needs are those of this environment, the network's stand-in.
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-I", "-c", USER, exported, *PROMPTS],
        cwd=tmp_path / "out",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(packages / "flowtok" / "__init__.py")]
    assert equal(pixels(tmp_path / "run"), pixels(tmp_path / "out"))


def test_a_dependency_of_the_wheel_has_the_bound_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("#")[0].strip() for line in lines}
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("dependencies = [")[1].split("]")[0]
    found = {line.strip(' ",') for line in block.splitlines()[1:] if line.strip()}
    assert len(found) > 5 and found <= required


def test_captions_and_what_the_run_draws_by_itself_are_those_of_the_run(
    both_ways, exported, pictures, tmp_path
):
    for run in (both_ways, exported):
        folder = tmp_path / run.parent.name
        draw(run, "--caption", pictures, "--output", folder / "x.jsonl")
        draw(run, "--output", folder / "own.png")  # the captions of its pictures
        ends = ["--interpolate", *PROMPTS[:2], "--frames", "3"]
        draw(run, *ends, "--output", folder / "walk.png")
    left, right = (tmp_path / run.parent.name for run in (both_ways, exported))
    assert (left / "x.jsonl").read_text() == (right / "x.jsonl").read_text()
    assert equal(pixels(left), pixels(right)) and len(pixels(left)) == 2
    with pytest.raises(ValueError, match="shapes comes without pictures: give --caption"):
        sample.caption(sample.parse_args(["--run", str(exported)]))
    with pytest.raises(ValueError, match="shapes is no run folder"):
        run_script(exported, "--output", tmp_path / "again")


def test_the_card_says_what_it_is_and_what_was_measured(both_ways, exported):
    card = (exported / "README.md").read_text()
    assert str(both_ways.parents[1]) not in (exported / "config.json").read_text()
    report = json.loads((both_ways / "report.json").read_text())
    assert "# shapes\n" in card and "pipeline_tag: text-to-image" in card
    assert f"| `tokenizer.heldout_psnr_db` | {report['tokenizer']['heldout_psnr_db']:.4g} |" in card
    assert "| flowtok_caption | 4 | 8 | `tokens/*.tar` |" in card
    assert str(both_ways.parent) not in card and "pipeline('a red circle', steps=3" in card
    newest = both_ways / "flowtok" / "samples" / "step_00000004.png"
    assert (exported / "samples.png").read_bytes() == newest.read_bytes()
    names = {path.name for path in exported.iterdir()}
    parts = ("tokenizer", "text_to_image", "image_to_text", "text_decoder")
    files = {f"{part}.safetensors" for part in parts}
    assert names == files | {"README.md", "config.json", "samples.png", "text_encoder"}


def test_one_direction_is_exported_alone_and_figures_of_another_flow_are_not(
    chain, captioner, both_ways, tmp_path
):
    run_script(captioner, "--output", tmp_path / "to_text")
    pipeline = FlowTokPipeline.from_pretrained(tmp_path / "to_text", "cpu")
    sampling = pipeline.config.image_to_text.sampling
    assert len(pipeline.captioner.captions(torch.rand(2, 3, 32, 32), sampling)) == 2
    with pytest.raises(ValueError, match="to_text does not flow from text to image"):
        pipeline("a cat")

    other = shutil.copytree(both_ways, tmp_path / "other")
    shutil.rmtree(other / "flowtok_caption")
    shutil.rmtree(other / "flowtok")
    chain.run_in(other, "flowtok", "training.max_steps=1", "training.sample_every_steps=0")
    run_script(other, "--output", tmp_path / "to_image")
    card = (tmp_path / "to_image" / "README.md").read_text()
    assert "psnr" not in card and not (tmp_path / "to_image" / "image_to_text.safetensors").exists()


def test_a_text_tower_of_a_file_goes_along_and_one_of_a_hub_is_named(tmp_path):
    (tmp_path / "tiny-tower.json").write_text(json.dumps(TINY_CLIP))
    clip_weights.open_clip.add_model_config(tmp_path)
    save_file(build_clip(TINY_CLIP).state_dict(), tmp_path / "weights.safetensors")
    named = TextEncoderConfig("tiny-tower", str(tmp_path / "weights.safetensors"))
    packed = export.pack_tower(named, tmp_path / "text_encoder")
    assert str(tmp_path) not in str(packed)
    there = TextEncoderConfig(f"local-dir:{tmp_path / 'text_encoder'}")
    assert load_text_encoder(there).identity == load_text_encoder(named).identity
    hub = TextEncoderConfig()
    assert export.pack_tower(hub, tmp_path / "none") == hub and not (tmp_path / "none").exists()


def test_what_is_pushed_comes_back_from_the_hubs_cache(chain, tmp_path, monkeypatch):
    hub = Mock()
    place = tmp_path / "hub" / "models--user--shapes"

    def upload(repo_id, folder_path):
        """Files at once where a download would put them."""
        shutil.copytree(folder_path, place / "snapshots" / "abc")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")
        return Mock()

    hub.upload_folder = upload
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", lambda: hub)
        patch.setattr(export, "why_hub_is_silent", lambda: "")
        run_script(chain.folder, "--output", tmp_path / "out", "--push", "user/shapes")
    hub.create_repo.assert_called_once_with("user/shapes", private=True, exist_ok=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_session", None)  # no network
    monkeypatch.chdir(tmp_path)
    for name, run in (("id", "user/shapes"), ("folder", tmp_path / "out")):
        where = ["--output", tmp_path / "x.png", "--save-dir", tmp_path / name]
        draw(run, "--prompts", *PROMPTS, *where)
    assert equal(pixels(tmp_path / "id"), pixels(tmp_path / "folder"))
    with pytest.raises(ValueError, match="user/none is no folder here.*(does not answer|OFFLINE)"):
        FlowTokPipeline.from_pretrained("user/none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "full"], "full exists already"),
        (["--output", "new", "--push", "shapes"], "--push shapes: expected USER/NAME"),
        (["--output", "new", "--push", "a/b"], "--push a/b: .*(does not answer|HF_HUB_OFFLINE)"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_anything_is_loaded(
    arguments, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_session", None)
    (tmp_path / "full" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=said):
        run_script("nowhere", *arguments)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("tokenizer", "patches", 3, "config.json.*patches"),
        ("text_encoder", "model", "hf-hub:user/${oc.env:HOME}", "config.json.*refused"),
        ("tokenizer", "token_channels", 5, "tokenizer.safetensors does not fit"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(exported, tmp_path, section, key, value, said):
    folder = shutil.copytree(exported, tmp_path / "copy")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values[section][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        FlowTokPipeline.from_pretrained(folder, "cpu")("a cat")
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="config.json"):
        FlowTokPipeline.from_pretrained(folder)
