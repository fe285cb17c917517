"""modeling/perceptual.py with made-up weights: the lpips package as reference, gradients, files."""

import warnings

import lpips
import pytest
import torch
from conftest import refusal
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import functional as TF

from modeling import perceptual
from modeling.perceptual import LPIPS, PerceptualConfig, PerceptualLoss

SIZE = 32


def lpips_only(vgg_file):
    return PerceptualConfig(convnext_weight=0.0, vgg_weights=str(vgg_file))


@pytest.fixture
def both(vgg_file, convnext_file):
    files = {"vgg_weights": str(vgg_file), "convnext_weights": str(convnext_file)}
    return PerceptualLoss(PerceptualConfig(**files))


def image_pair(count=2, size=SIZE):
    return torch.rand(2, count, 3, size, size)


def reference_lpips(vgg_file):
    """The lpips package's net with the same VGG16 weights, and its own heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in an old way
        package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    weights = torch.load(vgg_file, weights_only=True)
    for name, parameter in package.net.named_parameters():  # slice1.0.weight, ...
        parameter.data = weights[f"features.{name.split('.', 1)[1]}"]
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
    reconstruction, target = image_pair(1, size=256) * torch.tensor([0.2, 1.0]).view(2, 1, 1, 1, 1)
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


def test_gradients_reach_the_reconstruction_only_and_the_nets_stay_in_eval_mode_and_float32(both):
    reconstruction, target = (images.requires_grad_() for images in image_pair(1).unbind())
    terms = both.train()(reconstruction, target)
    for name in ("lpips", "convnext"):
        (gradient,) = torch.autograd.grad(terms[name], reconstruction, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    terms["perceptual"].backward()
    assert not any(module.training for part in both.parts.values() for module in part.modules())
    assert target.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in both.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(both(reconstruction, target)["lpips"], terms["lpips"])


def test_gradients_are_finite_where_images_are_black_and_where_features_are_all_zero(vgg_file):
    net, dead = LPIPS(vgg_file), LPIPS(vgg_file)
    black, target = torch.zeros(1, 3, SIZE, SIZE), torch.rand(1, 3, SIZE, SIZE)
    for layer in dead.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.fill_(0)
    dead.features[0].bias.fill_(-1e3)  # no feature of the first layer is ever above zero
    assert not any(features.any() for features in dead.describe(target))
    for distance in (net, dead):
        for other in (target, black):
            images = black.clone().requires_grad_()
            distance(images, other).sum().backward()
            assert images.grad.isfinite().all()


def test_a_part_of_weight_zero_is_neither_looked_for_nor_built(vgg_file, no_network, monkeypatch):
    monkeypatch.setattr(models, "convnext_small", None)
    state = torch.get_rng_state()
    config = PerceptualConfig(0.5, 0.0, vgg_weights=str(vgg_file), convnext_weights="absent.pth")
    loss = PerceptualLoss(config)
    assert set(loss.parts) == {"lpips"}
    assert torch.equal(torch.get_rng_state(), state)  # no random number was drawn
    with torch.no_grad():
        terms = loss(*image_pair())
    torch.testing.assert_close(terms["perceptual"], terms["lpips"])  # divided by 0.5 only


def test_absent_files_are_named_with_every_way_out(tmp_path, no_network):
    absent, cache = tmp_path / "vgg.pth", "$TORCH_HOME/hub/checkpoints"
    for config, parts in (
        (lpips_only(absent), (absent, no_network, cache, perceptual.VGG16_URL, "vgg_weights")),
        (PerceptualConfig(0.0), (no_network, "no such host", perceptual.CONVNEXT_URL)),
    ):
        with refusal(*parts):
            PerceptualLoss(config)


def test_torchvision_and_we_name_the_same_files():
    assert models.VGG16_Weights.IMAGENET1K_V1.url == perceptual.VGG16_URL
    assert models.ConvNeXt_Small_Weights.IMAGENET1K_V1.url == perceptual.CONVNEXT_URL


def test_a_file_with_other_weights_or_none_is_refused(tmp_path, vgg_file):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_bytes(b"no weights at all")
    for file in (vgg_file, *tmp_path.iterdir()):
        config = PerceptualConfig(lpips_weight=0.0, convnext_weights=str(file))
        with pytest.raises(ValueError, match=f"{file.name} has no weights for this net"):
            PerceptualLoss(config)


def test_two_weights_of_zero_are_refused():
    with pytest.raises(ValueError, match="lpips_weight and convnext_weight"):
        PerceptualLoss(PerceptualConfig(0.0, 0.0))
