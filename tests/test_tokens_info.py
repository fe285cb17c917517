"""training/tokens.py: which token shards a stage accepts, and their latent scale."""

from dataclasses import replace

import pytest
from conftest import refusal

from data.config import SourceConfig
from data.readers import TokenTextConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.layers import fingerprint
from training.tokens import LatentStats, load_tokens_info, unknown_tokens

K, C = 8, 4


@pytest.fixture(scope="module")
def tokenizer():
    size = TransformerSize(width=16, depth=1, num_heads=2)
    sizes = {"num_tokens": K, "text_tokens": K, "text_width": 6, "token_channels": C}
    return ImageTokenizer(
        ImageTokenizerConfig(image_size=32, patch_size=8, encoder=size, decoder=size, **sizes)
    )


def save(folder, **changed):
    folder.mkdir(exist_ok=True)
    names = {"tokenizer_fingerprint": "t", "text_encoder_fingerprint": "e", "num_samples": 10}
    replace(unknown_tokens(K, C, latent_scale=1.0), **names | changed).save(folder)


def refused(data, tokenizer, *texts):
    with refusal(*texts):
        load_tokens_info(data, tokenizer, "the/run")


def test_tokens_of_the_tokenizer_are_accepted_those_of_another_only_on_request(tokenizer, tmp_path):
    data = TokenTextConfig(shards=[f"{tmp_path}/*.tar"])
    save(tmp_path, tokenizer_fingerprint=fingerprint(tokenizer))
    assert load_tokens_info(data, tokenizer, "the/run").num_samples == 10
    save(tmp_path)
    refused(data, tokenizer, str(tmp_path), "the/run", "any_tokenizer")
    data.any_tokenizer = True
    assert load_tokens_info(data, tokenizer, "the/run").tokenizer_fingerprint == "t"


def test_tokens_of_another_shape_or_place_are_refused(tokenizer, tmp_path):
    save(tmp_path, num_tokens=K + 1)
    data = TokenTextConfig(shards=[f"{tmp_path}/*.tar"], any_tokenizer=True)
    refused(data, tokenizer, f"{K + 1} x {C}", f"{K} x {C}")
    for shards in ([f"{tmp_path}/none/*.tar"], ["https://host/{0..3}.tar"]):
        data = TokenTextConfig(shards=shards, any_tokenizer=True)
        refused(data, tokenizer, "tokens.json", "latent_scale")


def test_tokens_of_unknown_origin_need_consent_and_a_scale(tokenizer):
    data = TokenTextConfig(shards=["elsewhere/*.tar"], any_tokenizer=True, latent_scale=1.0143)
    info = load_tokens_info(data, tokenizer, "the/run")
    assert (info.latent_scale, info.tokenizer_fingerprint) == (1.0143, "unknown")
    assert (info.num_tokens, info.token_channels, info.has_text_states) == (K, C, False)


def test_the_scale_over_several_folders_is_that_of_all_samples(tokenizer, tmp_path):
    sources = {name: SourceConfig([f"{tmp_path}/{name}/*.tar"]) for name in "ab"}
    data = TokenTextConfig(sources=sources, any_tokenizer=True)
    for name, count, deviation in (("a", 30, 1.0), ("b", 10, 3.0)):
        stats = LatentStats(count, [0.0], [1.0], 1 / deviation)
        save(tmp_path / name, num_samples=count, stats=stats)
    info = load_tokens_info(data, tokenizer, "the/run")
    expected = (0.75 * 1 + 0.25 * 9) ** -0.5
    assert info.num_samples == 40 and info.latent_scale == pytest.approx(expected)
    data.latent_scale = 2.0
    assert load_tokens_info(data, tokenizer, "the/run").latent_scale == 2.0
    save(tmp_path / "b", text_encoder_fingerprint="other")
    refused(data, tokenizer, "text_encoder_fingerprint", f"{tmp_path}/a", f"{tmp_path}/b")
