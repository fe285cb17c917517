"""eval/dinov2.py with made-up weights of a small net: timm's own loading and transform as reference; wrong files."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from eval import dinov2
from eval.dinov2 import DinoFeatures
from eval.features import dinov2_extractor

SMALL = "vit_small_patch14_dinov2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the small net at its own 518 px, with positions that differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = timm.create_model(SMALL, pretrained=False, num_classes=0).state_dict()
        state["pos_embed"] = torch.randn(state["pos_embed"].shape)
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(dinov2, "MODEL", SMALL)


def test_features_are_those_of_timm(weights):
    overlay = {"file": str(weights), "source": "file"}
    reference = timm.create_model(SMALL, True, overlay, img_size=224, num_classes=0).eval()
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(model=reference) | {"input_size": (3, 224, 224)}
    )
    normalised = transform.transforms[-1](images / 255)
    with torch.no_grad():
        expected = reference(normalised)
    found = DinoFeatures(weights)(images)
    assert found.shape == (2, 384) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_any_size_is_resized_and_autocast_changes_nothing(weights):
    extractor = dinov2_extractor(weights, torch.device("cpu"))
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    expected = extractor.features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor.features(images), expected)
    assert extractor.width == 384 and extractor.identity["features"] == "dinov2"


def test_wrong_and_truncated_files_are_refused(weights, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is no safetensors file, or cut short"):
        DinoFeatures(tmp_path / "cut.safetensors")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has other weights than DINOv2's"):
        DinoFeatures(tmp_path / "other.pth")
