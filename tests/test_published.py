"""modeling/published.py: where files of weights are found, wrong and absent ones, downloads."""

import hashlib

import pytest
import torch

from modeling.published import PublishedWeights


def published(content=b"weights"):
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = f"https://example.org/{name}"
    return PublishedWeights("Net", url, "--net-weights", "; --download fetches it")


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


def test_a_hash_in_the_name_is_checked(tmp_path, no_network):
    no_network.mkdir(parents=True)
    cached, given = (folder / published().cached.name for folder in (no_network, tmp_path))
    for file, name in ((cached, None), (given, str(given))):
        file.write_bytes(b"weights")
        assert published().find(name, download=False) == file
        file.write_bytes(b"half of")
        with pytest.raises(ValueError, match=f"{file.name} is damaged or another file"):
            published().find(name, download=False)
