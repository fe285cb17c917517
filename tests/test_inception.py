"""eval/inception.py with made-up weights: torch-fidelity's FID as reference, and what a wrong or absent file says."""

import pickle
import sys

import pytest
import torch

from eval.frechet import FeatureStatistics, frechet_distance
from eval.inception import INCEPTION, INCEPTION_WIDTH, InceptionFeatures


@pytest.fixture(scope="module")
def net(inception_file):
    return InceptionFeatures(inception_file)


def blots(count, seed, brightness=256):
    """Smooth random images, count x 3 x 32 x 32 uint8."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * brightness
    return torch.nn.functional.interpolate(small, size=32, mode="bilinear").to(torch.uint8)


# Features


class Images(torch.utils.data.Dataset):
    """What torch-fidelity takes as a set of images."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_fid_is_that_of_torch_fidelity(net, inception_file):
    import torch_fidelity

    first, second = blots(7, seed=0), blots(8, seed=1, brightness=200)
    gaussians = []
    for images in (first, second):
        statistics = FeatureStatistics(INCEPTION_WIDTH)
        for batch in images.split(5):
            statistics.add(net(batch))
        gaussians.append(statistics.gaussian())
    expected = torch_fidelity.calculate_metrics(
        input1=Images(first),
        input2=Images(second),
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        feature_extractor_weights_path=str(inception_file),
    )["frechet_inception_distance"]
    assert expected > 1
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-4)
    assert abs(frechet_distance(gaussians[0], gaussians[0])) < 1e-3


def test_float64_is_computed_in_float64_and_agrees(net, inception_file):
    exact, images = InceptionFeatures(inception_file, "float64"), blots(2, seed=0)
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    inputs = []
    exact.net.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].dtype)
    )
    found = exact(images)
    assert (
        inputs == [torch.float64]
        and found.dtype == torch.float32
        and found.shape == (2, INCEPTION_WIDTH)
    )
    torch.testing.assert_close(found, net(images), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, net(images))


def test_autocast_changes_nothing_and_no_gradient_is_kept(net):
    images = blots(2, seed=0)
    expected = net(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(images)
    assert torch.equal(found, expected) and not found.requires_grad


def test_an_image_has_its_features_in_any_batch(net):
    images = blots(3, seed=0)
    torch.testing.assert_close(net(images)[1:2], net(images[1:2]), rtol=1e-4, atol=1e-5)


def test_images_that_are_not_uint8_are_refused(net):
    with pytest.raises(ValueError, match="uint8"):
        net(torch.rand(1, 3, 32, 32))


def test_building_draws_no_random_numbers(inception_file):
    state = torch.get_rng_state()
    InceptionFeatures(inception_file)
    assert torch.equal(torch.get_rng_state(), state)


# Files


class Malicious:
    """Unpickled, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_file_that_would_execute_code_is_refused_and_executes_nothing(tmp_path):
    file, marker = tmp_path / "weights.pth", tmp_path / "executed"
    torch.save({"fc.weight": Malicious(marker)}, file)
    with pytest.raises(ValueError, match="weights.pth is no file of weights alone, or cut short"):
        InceptionFeatures(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)["fc.weight"].close()
    assert marker.exists()  # the file is dangerous indeed


@pytest.mark.parametrize("content", [b"", b"no weights at all", pickle.dumps([1, 2], protocol=2)])
def test_a_file_without_weights_is_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"weights.pth (is no file of weights alone|holds something else than tensors)",
    ):
        InceptionFeatures(tmp_path / "weights.pth")


def test_a_truncated_file_and_another_nets_file_are_refused(tmp_path, inception_file, vgg_file):
    cut = tmp_path / "weights.pth"
    cut.write_bytes(inception_file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="weights.pth is no file of weights alone, or cut short"):
        InceptionFeatures(cut)
    with pytest.raises(
        ValueError, match="vgg16-made-up.pth has other weights than InceptionV3's: .*Missing key"
    ):
        InceptionFeatures(vgg_file)


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch, inception_file):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(
        ValueError, match="need torch-fidelity .*: pip install -r requirements-eval.txt"
    ):
        InceptionFeatures(inception_file)


def test_torch_fidelity_and_we_name_the_same_file():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert INCEPTION.url == URL_INCEPTION_V3
