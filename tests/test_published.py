"""modeling/published.py: where files of weights are found, wrong and absent ones, downloads."""

import hashlib
import socket
import urllib.error
from dataclasses import replace

import pytest
import torch

from eval.feature_nets import DOWNLOAD, INCEPTION, VGG16
from modeling.published import PublishedWeights


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache of torch's, and downloads that fail; returns the cache's folder."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror("no such host"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


def published(content=b"weights"):
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    return PublishedWeights("Net", f"https://example.org/{name}", "--net-weights", DOWNLOAD)


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
        ValueError,
        match=f"{file.name} is damaged or another file: by its name, its SHA-256 starts with",
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
