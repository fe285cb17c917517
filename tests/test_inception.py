"""eval/inception.py with made-up weights: torch-fidelity's FID as reference, and what a wrong or absent file says."""

import hashlib
import pickle
import socket
import sys
import urllib.error
from dataclasses import replace

import pytest
import torch

from eval.frechet import FeatureStatistics, frechet_distance
from eval.inception import INCEPTION, INCEPTION_WIDTH, VGG16, InceptionFeatures, PublishedWeights


@pytest.fixture(scope="module")
def net(inception_file):
    return InceptionFeatures(inception_file)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache of torch's, and downloads that fail; returns the cache's folder."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror("no such host"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


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
    exact.net.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    found = exact(images)
    assert inputs == [torch.float64] and found.dtype == torch.float32 and found.shape == (2, INCEPTION_WIDTH)
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
        ValueError, match=r"weights.pth (is no file of weights alone|holds something else than tensors)"
    ):
        InceptionFeatures(tmp_path / "weights.pth")


def test_a_truncated_file_and_another_nets_file_are_refused(tmp_path, inception_file, vgg_file):
    cut = tmp_path / "weights.pth"
    cut.write_bytes(inception_file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="weights.pth is no file of weights alone, or cut short"):
        InceptionFeatures(cut)
    with pytest.raises(ValueError, match="vgg16-made-up.pth has other weights than InceptionV3's: .*Missing key"):
        InceptionFeatures(vgg_file)


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch, inception_file):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="need torch-fidelity .*: pip install -r requirements-eval.txt"):
        InceptionFeatures(inception_file)


def test_torch_fidelity_and_we_name_the_same_file():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert INCEPTION.url == URL_INCEPTION_V3


# Where files are found


def published(content=b"weights"):
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    return PublishedWeights("Net", f"https://example.org/{name}", "--net-weights")


def test_absent_weights_are_none_and_nothing_is_downloaded_unasked(no_network):
    assert published().find(None, download=False) is None
    assert not no_network.exists()
    for part in (published().url, str(no_network), "--net-weights", "--download"):
        assert part in published().ways_out


def test_a_download_is_asked_for_its_hash_and_kept(no_network, monkeypatch):
    calls = []

    def download(url, file, hash_prefix):
        calls.append((url, hash_prefix))
        with open(file, "wb") as stream:
            stream.write(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    expected = no_network / published().cached.name
    assert [published().find(None, download=True) for _ in range(2)] == [expected, expected]
    assert published().find(None, download=False) == expected
    assert calls == [(published().url, hashlib.sha256(b"weights").hexdigest()[:8])]


def test_a_failed_download_is_an_error_that_names_the_ways_out(no_network):
    with pytest.raises(ValueError, match="Net was not downloaded .*no such host.*--net-weights"):
        published().find(None, download=True)


def test_a_named_file_must_be_there(tmp_path, no_network):
    with pytest.raises(ValueError, match="--net-weights: no file .*absent.pth"):
        published().find(str(tmp_path / "absent.pth"), download=True)


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_hash_in_the_name_is_checked(tmp_path, no_network, in_cache):
    folder = no_network if in_cache else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / published().cached.name
    given = None if in_cache else str(file)
    file.write_bytes(b"weights")
    assert published().find(given, download=False) == file
    file.write_bytes(b"half of")
    with pytest.raises(
        ValueError, match=f"{file.name} is damaged or another file: by its name, its SHA-256 starts with"
    ):
        published().find(given, download=False)


def test_a_name_without_a_hash_is_taken_as_it_is(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"weights")
    assert published().find(str(tmp_path / "mine.pth"), download=False) == tmp_path / "mine.pth"


@pytest.mark.parametrize(("weights", "digits"), [(VGG16, "397923af"), (INCEPTION, "6726825d")])
def test_the_published_names_carry_their_hash(weights, digits, no_network):
    no_network.mkdir(parents=True)
    weights.cached.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"starts with {digits}, but it is"):
        weights.find(None, download=False)
    assert replace(weights, title="x").cached == weights.cached
