"""eval/clip_score.py: open_clip's own numbers on the images written, in one process and two; absent weights."""

import json
import shutil

import pytest
import torch
from conftest import TINY_CLIP
from evaluations import CAPTIONS, evaluate, launch, pngs, read, write_inputs
from PIL import Image
from safetensors.torch import save_file

from eval.clip_score import ClipScorer, clip_score
from eval.generation import load_protocol
from modeling.pipeline import ImageGenerator
from modeling.text_encoder import ClipConfig, build_clip

open_clip = pytest.importorskip("open_clip")
ALONE = ("metrics=[clip_score]", "clip.model=own")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_shards):
    return write_inputs(tmp_path_factory.mktemp("inputs"), tiny_shards)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """No weights that happen to be on this machine, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub"))
    )
    monkeypatch.setattr("huggingface_hub.get_session", None)


@pytest.fixture(scope="module")
def whole(chain, inputs, tmp_path_factory):
    """Folder of an evaluation with the run's own CLIP; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(chain.folder, inputs, folder, *ALONE)
    return folder


def cosines(model, images, captions):
    """open_clip's of some PNG files and captions; model: a name, or local-dir:FOLDER."""
    clip, _, preprocess = open_clip.create_model_and_transforms(model)
    pixels = torch.stack([preprocess(Image.open(file)) for file in images])
    with torch.no_grad():
        image, text = (
            clip.eval().encode_image(pixels),
            clip.encode_text(open_clip.get_tokenizer(model)(captions)),
        )
    return torch.nn.functional.cosine_similarity(image, text)


def test_the_score_is_open_clips_on_the_images_written(chain, inputs, whole):
    captions = (inputs / "captions.txt").read_text().splitlines()
    files = sorted((whole / "images").glob("*.png"))
    expected = cosines(f"local-dir:{chain.folder}/text_encoder/clip", files, captions)
    assert len(expected) == CAPTIONS and expected.std() > 1e-3
    assert read(whole)["metrics"]["clip_score"] == pytest.approx(
        100 * expected.clamp(min=0).mean().item(), rel=1e-5
    )


def test_negative_cosines_count_as_zero():
    assert clip_score(torch.tensor([[-0.5], [0.5]])) == 25


def test_two_processes_give_the_number_of_one(chain, inputs, whole, tmp_path):
    launch(chain.folder, inputs, tmp_path, *ALONE, "--no-images")
    found, expected = read(tmp_path), read(whole)
    assert found["num_processes"] == 2 and found["weights"] == expected["weights"]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


def test_the_report_names_model_weights_and_scale(chain, whole):
    described = read(whole)["weights"]["clip"]
    assert described["model"] == f"local-dir:{chain.folder}/text_encoder/clip"
    assert described["scale"] == "100 * mean over the images of max(cosine of image and caption, 0)"
    assert len(described["weights_fingerprint"]) == 16


def test_it_comes_beside_other_metrics_and_is_not_measured_twice(
    chain, inputs, whole, tmp_path, monkeypatch
):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(ImageGenerator, "generate", None)
    found = evaluate(
        chain.folder,
        inputs,
        tmp_path / "out",
        "features=tokenizer",
        "metrics=[frechet,clip_score]",
        ALONE[1],
    )
    assert found["metrics"]["clip_score"] == read(whole)["metrics"]["clip_score"]
    assert found["metrics"]["frechet_distance"] > 0 and found["images_made"] == 0
    monkeypatch.setattr(ClipScorer, "cosines", None)
    again = evaluate(chain.folder, inputs, tmp_path / "out", *ALONE)
    assert again["metrics"] == read(whole)["metrics"]


def test_another_clip_and_other_captions_change_the_score(
    chain, inputs, whole, tiny_clip_dir, tmp_path
):
    found = evaluate(
        chain.folder, inputs, tmp_path, ALONE[0], f"clip.model=local-dir:{tiny_clip_dir}"
    )
    assert pngs(tmp_path) == pngs(whole)
    assert (
        found["weights"]["clip"]["weights_fingerprint"]
        != read(whole)["weights"]["clip"]["weights_fingerprint"]
    )
    assert found["metrics"]["clip_score"] != read(whole)["metrics"]["clip_score"]


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory):
    """A name of open_clip's for the tiny CLIP, and a file with weights for it."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny-of-clip-score.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "configs")
    save_file(build_clip(TINY_CLIP).state_dict(), folder / "weights.safetensors")
    return "tiny-of-clip-score", folder / "weights.safetensors"


def test_a_model_of_open_clip_with_a_weights_file_serves(chain, inputs, whole, tiny_name, tmp_path):
    name, file = tiny_name
    found = evaluate(
        chain.folder, inputs, tmp_path, ALONE[0], f"clip.model={name}", f"clip.pretrained={file}"
    )
    described = found["weights"]["clip"]
    assert (described["model"], described["pretrained"]) == (name, str(file))
    assert 0 <= found["metrics"]["clip_score"] < 100


def test_images_are_preprocessed_as_the_tag_of_the_weights_says(tiny_name, monkeypatch):
    name, file = tiny_name
    tag = {"url": "", "hf_hub": "someone/clip/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"own": tag})
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, name: str(file)
    )
    scorer = ClipScorer(ClipConfig(name, "own"), torch.device("cpu"), download=False)
    black = scorer.preprocess(Image.new("RGB", (40, 30)))
    assert black.shape == (3, 32, 32)
    assert torch.allclose(black.mean(dim=(1, 2)), torch.tensor([-0.2, -0.4, -0.6]))


# What is absent


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            [],
            [
                "open_clip_model.safetensors",
                "timm/vit_base_patch32_clip_224.openai",
                "clip.pretrained=PATH",
            ],
        ),
        (
            ["clip.pretrained=/nowhere/clip.safetensors"],
            ["clip.pretrained=/nowhere/clip.safetensors is neither a file"],
        ),
        (
            ["clip.model=local-dir:/nowhere"],
            ["clip.model: /nowhere holds no open_clip_config.json"],
        ),
        (
            ["clip.model=hf-hub:someone/clip"],
            [WEIGHTS, "someone/clip", "clip.model=local-dir:FOLDER"],
        ),
    ],
)
def test_absent_weights_give_null_with_the_file_to_fetch_and_the_rest_is_there(
    chain, inputs, tmp_path, arguments, parts
):
    measures = ["features=tokenizer", "metrics=[frechet,clip_score]"]
    found = evaluate(chain.folder, inputs, tmp_path, *measures, *arguments)
    assert found["metrics"]["clip_score"] is None and found["metrics"]["frechet_distance"] > 0
    for part in parts:
        assert part in found["missing"]["clip_score"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip.model=ViT-B-33"], "clip.model: unknown open_clip model 'ViT-B-33'"),
        (
            ["clip.model=ViT-B-32"],
            "want QuickGELU, ViT-B-32 has the exact GELU: set clip.model=ViT-B-32-quickgelu",
        ),
        (["clip.modell=x"], "unknown key 'clip.modell'; did you mean 'clip.model'?"),
    ],
)
def test_a_wrong_model_is_an_error_before_an_image_is_made(
    chain, inputs, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(ImageGenerator, "generate", None)
    with pytest.raises(ValueError) as caught:
        evaluate(chain.folder, inputs, tmp_path, "metrics=[clip_score]", *arguments)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_truncated_weights_file_is_an_error(chain, inputs, tiny_name, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(tiny_name[1].read_bytes()[:5000])
    arguments = [f"clip.model={tiny_name[0]}", f"clip.pretrained={tmp_path}/cut.safetensors"]
    with pytest.raises(ValueError, match="cannot load the CLIP tiny-of-clip-score"):
        evaluate(chain.folder, inputs, tmp_path / "out", ALONE[0], *arguments)


def test_loading_draws_no_random_numbers(tiny_clip_dir):
    state = torch.get_rng_state()
    ClipScorer(ClipConfig(f"local-dir:{tiny_clip_dir}"), torch.device("cpu"), download=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_demos_protocol_has_a_score_without_downloads():
    protocol = load_protocol("demo", [])
    assert "clip_score" in protocol.metrics and protocol.clip.model == "own"
