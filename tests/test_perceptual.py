"""modeling/perceptual.py with made-up weights: the lpips package as reference, gradients, files."""

import hashlib
import socket
import urllib.error
import warnings
from dataclasses import replace

import lpips
import pytest
import torch
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import functional as TF

from modeling import perceptual
from modeling.perceptual import LPIPS, PerceptualConfig, PerceptualLoss, check_weights

SIZE = 32


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache of torch's, and downloads that fail; returns the cache's folder."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror("no such host"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


def lpips_only(vgg_file):
    return PerceptualConfig(convnext_weight=0.0, vgg_weights=str(vgg_file))


@pytest.fixture
def both(vgg_file, convnext_file):
    files = {"vgg_weights": str(vgg_file), "convnext_weights": str(convnext_file)}
    return PerceptualLoss(PerceptualConfig(**files))


def image_pair(count=2, size=SIZE):
    return torch.rand(2, count, 3, size, size)


def reference_lpips(vgg_file):
    """The lpips package's net with the same VGG16 weights."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it calls torchvision in an old way
        package = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    package.to_empty(device="cpu").eval()
    package.scaling_layer = lpips.ScalingLayer()
    state = torch.load(vgg_file, weights_only=True)
    for layers in package.net.children():
        for index, layer in layers.named_children():
            for part, parameter in layer.named_parameters():
                parameter.data = state[f"features.{index}.{part}"]
    heads_file = f"{lpips.__path__[0]}/weights/v0.1/vgg.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    for index in range(5):
        package.lins[index].model[1].weight.data = heads[f"lin{index}.model.1.weight"]
    return package


def test_lpips_agrees_with_the_lpips_package(vgg_file):
    reconstruction, target = image_pair(3)
    with torch.no_grad():
        expected = reference_lpips(vgg_file)(reconstruction, target, normalize=True).flatten()
        found = LPIPS(vgg_file)(reconstruction, target)
    assert found.shape == (3,) and expected.min() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_convnext_part_is_the_mean_squared_error_of_logits_at_224_pixels(convnext_file):
    config = PerceptualConfig(lpips_weight=0.0, convnext_weights=str(convnext_file))
    reconstruction, target = image_pair(2, size=256) * torch.tensor([0.2, 1.0]).view(2, 1, 1, 1, 1)
    net = models.convnext_small()
    net.load_state_dict(torch.load(convnext_file, weights_only=True))
    preset = models.ConvNeXt_Small_Weights.IMAGENET1K_V1.transforms()
    images = torch.cat([reconstruction, target])
    images = TF.resize(images, [224, 224], TF.InterpolationMode.BILINEAR, antialias=True)
    with torch.no_grad():
        a, b = net.eval()(TF.normalize(images, preset.mean, preset.std)).chunk(2)
        terms = PerceptualLoss(config)(reconstruction, target)
    assert set(terms) == {"convnext", "perceptual"}
    assert terms["convnext"] > 1e-4
    torch.testing.assert_close(terms["convnext"], F.mse_loss(a, b), rtol=1e-4, atol=0)


def test_both_parts_are_averaged_by_weight_and_vanish_for_equal_images_only(both):
    reconstruction, target = image_pair(1)
    with torch.no_grad():
        terms, same = both(reconstruction, target), both(target, target)
    assert set(terms) == {"lpips", "convnext", "perceptual"}
    assert all(term.shape == () and term > 0 for term in terms.values())
    assert all(term == 0 for term in same.values())
    expected = (terms["lpips"] + 0.1 * terms["convnext"]) / 1.1
    torch.testing.assert_close(terms["perceptual"], expected)


def test_the_mean_divides_by_the_weights_in_use_only(vgg_file):
    with torch.no_grad():
        terms = PerceptualLoss(PerceptualConfig(0.5, 0.0, vgg_weights=str(vgg_file)))(*image_pair())
    torch.testing.assert_close(terms["perceptual"], terms["lpips"])


def test_gradients_reach_the_reconstruction_only(both):
    reconstruction, target = (images.requires_grad_() for images in image_pair(1).unbind())
    terms = both(reconstruction, target)
    for name in ("lpips", "convnext"):
        (gradient,) = torch.autograd.grad(terms[name], reconstruction, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    terms["perceptual"].backward()
    assert target.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in both.parameters())


def test_it_stays_in_eval_mode(both):
    both.train()
    assert not any(module.training for part in both.parts.values() for module in part.modules())


def test_autocast_changes_nothing(vgg_file):
    loss, (reconstruction, target) = PerceptualLoss(lpips_only(vgg_file)), image_pair().bfloat16()
    with torch.no_grad():
        expected = loss(reconstruction.float(), target.float())["lpips"]
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(reconstruction, target)["lpips"]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_gradients_are_finite_where_images_are_black_and_where_features_are_all_zero(vgg_file):
    net, dead = LPIPS(vgg_file), LPIPS(vgg_file)
    black, target = torch.zeros(1, 3, SIZE, SIZE), torch.rand(1, 3, SIZE, SIZE)
    for layer in dead.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.fill_(0)
    dead.features[0].bias.fill_(-1e3)  # no feature of the first layer is ever above zero
    for distance in (net, dead):
        for other in (target, black):
            images = black.clone().requires_grad_()
            distance(images, other).sum().backward()
            assert images.grad.isfinite().all()
    with torch.no_grad():
        assert not any(features.any() for features in dead.describe(target))


def test_building_draws_no_random_numbers(vgg_file):
    state = torch.get_rng_state()
    PerceptualLoss(lpips_only(vgg_file))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("off", "net", "file"),
    [("lpips", "vgg16", "vgg_weights"), ("convnext", "convnext_small", "convnext_weights")],
)
def test_a_part_of_weight_zero_is_neither_looked_for_nor_built(
    off, net, file, vgg_file, convnext_file, no_network, monkeypatch
):
    monkeypatch.setattr(models, net, None)
    options = {"vgg_weights": str(vgg_file), "convnext_weights": str(convnext_file)}
    options |= {file: "absent.pth", f"{off}_weight": 0.0}
    loss = PerceptualLoss(PerceptualConfig(**options))
    assert set(loss.parts) == {"lpips", "convnext"} - {off}


def test_absent_files_are_named_with_every_way_out(tmp_path, no_network):
    absent, cache = tmp_path / "vgg.pth", "$TORCH_HOME/hub/checkpoints"
    for config, parts in (
        (lpips_only(absent), (absent, no_network, cache, perceptual.VGG16_URL, "vgg_weights")),
        (PerceptualConfig(0.0), (no_network, "no such host", perceptual.CONVNEXT_URL)),
    ):
        with pytest.raises(ValueError) as caught:
            check_weights(config)
        assert all(str(part) in str(caught.value) for part in parts)


def test_an_absent_file_is_downloaded_to_the_cache_once_and_its_hash_is_asked_for(
    no_network, monkeypatch
):
    calls = []

    def download(url, file, hash_prefix):
        calls.append((url, hash_prefix))
        with open(file, "wb") as stream:
            stream.write(b"weights")

    url = "https://example.org/" + hashed_name(b"weights")
    monkeypatch.setattr(perceptual, "VGG16_FILE", replace(perceptual.VGG16_FILE, url=url))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    config = PerceptualConfig(convnext_weight=0.0)
    expected = no_network / hashed_name(b"weights")
    assert check_weights(config) == check_weights(config) == {"lpips": expected}
    assert calls == [(url, hashlib.sha256(b"weights").hexdigest()[:8])]


def hashed_name(content):
    return f"vgg16-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_a_hash_in_the_name_is_checked(tmp_path):
    right, wrong = tmp_path / hashed_name(b"weights"), tmp_path / "vgg16-397923af.pth"
    for file in (right, wrong):
        file.write_bytes(b"weights")
    assert check_weights(lpips_only(right)) == {"lpips": right}
    with pytest.raises(ValueError, match="perceptual.vgg_weights: .*vgg16-397923af.pth"):
        check_weights(lpips_only(wrong))


@pytest.mark.parametrize("content", [b"", b"no weights at all", "list", "vgg"])
def test_a_file_with_other_weights_or_none_is_refused(tmp_path, content, vgg_file):
    file = tmp_path / "convnext.pth"
    if content == "list":
        torch.save([torch.zeros(3)], file)
    else:
        file.write_bytes(vgg_file.read_bytes() if content == "vgg" else content)
    config = PerceptualConfig(lpips_weight=0.0, convnext_weights=str(file))
    with pytest.raises(ValueError, match="convnext.pth has no weights for this net"):
        PerceptualLoss(config)


def test_negative_weights_and_two_weights_of_zero_are_refused():
    for name in ("lpips_weight", "convnext_weight"):
        with pytest.raises(ValueError, match=f"^{name} .*-1.0"):
            PerceptualConfig(**{name: -1.0})
    with pytest.raises(ValueError, match="lpips_weight and convnext_weight"):
        check_weights(PerceptualConfig(0.0, 0.0))
