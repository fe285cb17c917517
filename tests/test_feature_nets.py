"""eval/feature_nets.py with made-up weights: resizing, precision, open_clip; wrong files."""

import pickle
import sys
from functools import partial

import pytest
import timm
import torch
from conftest import TINY_CLIP
from PIL import Image
from safetensors.torch import save_file
from sources import Evil

from eval import feature_nets
from eval.feature_nets import INCEPTION, ClipScorer, DinoFeatures, InceptionFeatures
from modeling.clip_weights import ClipConfig, build_clip

open_clip = pytest.importorskip("open_clip")
CPU = torch.device("cpu")
SMALL = "vit_small_patch14_dinov2"


def blots(count, seed, size=32):
    """Smooth random images, count x 3 x size x size uint8."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 256
    return torch.nn.functional.interpolate(small, size=size, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def inception(inception_file):
    return InceptionFeatures(inception_file)


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    """Weights of a small DINOv2 at its own 518 px, with positions that differ."""
    state = timm.create_model(SMALL, pretrained=False, num_classes=0).state_dict()
    state["pos_embed"] = torch.randn(state["pos_embed"].shape)
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(state, file)
    return file


@pytest.fixture
def dino(monkeypatch, dino_file):
    monkeypatch.setattr(feature_nets, "DINO_MODEL", SMALL)
    return DinoFeatures(dino_file)


@pytest.fixture
def clip(tiny_clip_dir):
    return ClipScorer(ClipConfig(f"local-dir:{tiny_clip_dir}"), CPU, download=False)


# Features


def test_inception_takes_resized_floats_as_it_takes_bytes_of_its_size(inception):
    image = blots(1, seed=0, size=299)
    torch.testing.assert_close(inception(image.float()), inception(image), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.rand(1, 3, 32, 32))  # neither bytes nor resized


def test_dinov2s_features_are_timms(dino, dino_file):
    overlay = {"file": str(dino_file), "source": "file"}
    reference = timm.create_model(SMALL, True, overlay, img_size=224, num_classes=0).eval()
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    config = timm.data.resolve_data_config(model=reference) | {"input_size": (3, 224, 224)}
    normalise = timm.data.create_transform(**config).transforms[-1]
    with torch.no_grad():
        expected = reference(normalise(images / 255))
    found = dino(images)
    assert (found.shape, dino.width, found.dtype) == ((2, 384), 384, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_cosines_are_open_clips_and_images_are_preprocessed_from_their_full_size(
    clip, tiny_clip_dir
):
    images, captions = blots(3, seed=0, size=40), ["a red circle", "a cat", "a blue square"]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip_dir}")
    pixels = [preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images]
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_clip_dir}")(captions)
    with torch.no_grad():
        embeddings = model.eval().encode_image(torch.stack(pixels)), model.encode_text(tokens)
    expected = torch.nn.functional.cosine_similarity(*embeddings)
    assert expected.std() > 1e-3
    torch.testing.assert_close(clip.cosines(images, captions)[:, 0], expected)


def test_clips_images_are_preprocessed_as_the_tag_of_the_weights_says(tmp_path, monkeypatch):
    (tmp_path / "tiny-of-nets.json").write_text(str(TINY_CLIP).replace("'", '"'))
    open_clip.add_model_config(tmp_path)
    save_file(build_clip(TINY_CLIP).state_dict(), tmp_path / "weights.safetensors")
    tag = {"url": "", "hf_hub": "someone/clip/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-of-nets", {"own": tag})
    cached = str(tmp_path / "weights.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: cached)
    scorer = ClipScorer(ClipConfig("tiny-of-nets", "own"), CPU, download=False)
    black = scorer.preprocess(Image.new("RGB", (40, 30)))
    assert black.shape == (3, 32, 32)
    assert torch.allclose(black.mean(dim=(1, 2)), torch.tensor([-0.2, -0.4, -0.6]))


@pytest.mark.parametrize("name", ["inception", "dino", "clip"])
def test_autocast_changes_nothing_and_no_gradient_is_kept(name, request):
    net, images = request.getfixturevalue(name), blots(2, seed=0)
    if name == "clip":
        net = partial(net.cosines, captions=["a", "b"])
    expected = net(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(images)
    assert torch.equal(found, expected) and not found.requires_grad


def test_building_draws_no_random_numbers(inception_file, dino_file, tiny_clip_dir, monkeypatch):
    monkeypatch.setattr(feature_nets, "DINO_MODEL", SMALL)
    state = torch.get_rng_state()
    InceptionFeatures(inception_file)
    DinoFeatures(dino_file)
    ClipScorer(ClipConfig(f"local-dir:{tiny_clip_dir}"), CPU, download=False)
    assert torch.equal(torch.get_rng_state(), state)


# Files


def test_files_that_would_execute_code_are_cut_or_of_another_net_are_refused(
    tmp_path, monkeypatch, inception_file, vgg_file, dino_file
):
    monkeypatch.setattr(feature_nets, "DINO_MODEL", SMALL)
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Evil()}, "evil.pth")
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1, 2], protocol=2))
    for net, right in ((InceptionFeatures, inception_file), (DinoFeatures, dino_file)):
        (tmp_path / "cut.pth").write_bytes(right.read_bytes()[:-5000])
        for file in (vgg_file, *map(tmp_path.joinpath, ("cut.pth", "list.pth", "evil.pth"))):
            with pytest.raises(ValueError, match=str(file)):
                net(file)
    assert not (tmp_path / "pwned").exists()
    torch.load("evil.pth", weights_only=False)["fc.weight"].close()
    assert (tmp_path / "pwned").exists()  # the file is dangerous indeed


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch, inception_file):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"torch-fidelity.*requirements-eval\.txt"):
        InceptionFeatures(inception_file)


def test_torch_fidelity_and_we_name_the_same_file():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert INCEPTION.url == URL_INCEPTION_V3
