"""training/loading.py, pipelines.py: the parts that a flow is sampled with, moved or not."""

from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import TINY_CLIP
from safetensors.torch import save_file

from modeling.clip_weights import build_clip, save_clip
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.layers import fingerprint
from modeling.pipeline import SamplingConfig
from modeling.text_decoder import TextAutoencoder, TextDecoderConfig
from modeling.text_encoder import TextEncoderConfig, load_text_encoder
from modeling.text_projector import TextProjectorConfig
from training.checkpoint import EMA_FILE, begin_checkpoint, commit_checkpoint
from training.loading import find_text_encoder, text_encoder_config
from training.pipelines import (
    direction_of,
    load_captioner,
    load_flow,
    load_pipeline,
    load_projector,
)

CPU = torch.device("cpu")
SIZE = {"width": 16, "depth": 1, "num_heads": 2}
TRANSFORMER = TransformerSize(**SIZE)
PROJECTOR = TextProjectorConfig(text_tokens=16, text_width=32, token_channels=4, **SIZE)
FLOWTOK = FlowTokConfig(num_tokens=16, token_channels=4, **SIZE)
DECODER = TextDecoderConfig(mlp_width=16, vocabulary_size=8, **SIZE)


def write_run(folder, module, inputs, **sections):
    """A run folder with one checkpoint; returns the module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    checkpoint = begin_checkpoint(folder, 1)
    save_file(module.state_dict(), checkpoint / EMA_FILE)
    state = {"step": 1, "ema_updates": 1, "num_processes": 1, "inputs": inputs}
    commit_checkpoint(checkpoint, state, keep=1)
    return module


def write_tower(folder):
    """A text tower with weights of its own."""
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, folder)
    return folder


def write_tokenizer(folder, tower, inputs=(), **changes):
    """A run of stage 1."""
    sizes = {"num_tokens": 16, "token_channels": 4, "text_tokens": 16, "text_width": 32}
    parts = {"encoder": TRANSFORMER, "decoder": TRANSFORMER}
    config = ImageTokenizerConfig(32, **parts, **(sizes | changes))
    text_encoder = TextEncoderConfig(model=f"local-dir:{tower}")
    sections = {"tokenizer": asdict(config), "text_encoder": asdict(text_encoder)}
    return write_run(folder, ImageTokenizer(config), dict(inputs), **sections)


def write_flow(folder, inputs, tokenizer_run, text_decoder_run="", **flow):
    """A run of stage 3."""
    flow = FlowConfig(**flow)
    parts = {"projector": PROJECTOR, "flowtok": FLOWTOK, "flow": flow}
    sections = {name: asdict(config) for name, config in parts.items()}
    sections |= {"sampling": asdict(SamplingConfig(steps=2)), "tokenizer_run": str(tokenizer_run)}
    sections["text_decoder_run"] = str(text_decoder_run)
    return write_run(folder, build_flow(PROJECTOR, FLOWTOK, flow), inputs, **sections)


def identity(tower):
    return load_text_encoder(TextEncoderConfig(model=f"local-dir:{tower}")).identity


def test_a_run_says_how_its_flow_was_trained(tmp_path):
    options = {"null_probability": 0.3, "sigma_min": 0.1, "direction": "image_to_text"}
    saved = write_flow(tmp_path, {}, "", **options)
    flow = load_flow(tmp_path)
    assert flow.config == FlowConfig(**options) and direction_of(tmp_path) == "image_to_text"
    assert fingerprint(flow) == fingerprint(saved)
    assert not any(p.requires_grad for p in flow.parameters()) and not flow.training


def test_without_fingerprints_the_parts_are_those_that_the_config_names(tmp_path, tiny_clip_dir):
    named = write_tokenizer(tmp_path / "named", tiny_clip_dir)
    write_tokenizer(tmp_path / "tokenizer", tiny_clip_dir)
    write_flow(tmp_path / "flowtok", {}, tmp_path / "named")
    parts, sampling = load_pipeline(tmp_path, CPU)
    assert fingerprint(parts.tokenizer) == fingerprint(named) and sampling.steps == 2
    assert parts.text_encoder.identity == identity(tiny_clip_dir)
    assert parts.generate(["a cat"], sampling)[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("with_fingerprints", [False, True])
def test_in_a_moved_experiment_the_parts_are_beside_the_flow(tmp_path, with_fingerprints):
    old, new = tmp_path / "old", tmp_path / "new"
    tower = write_tower(old / "text_encoder" / "clip")
    inputs = {"text_encoder": identity(tower)} if with_fingerprints else {}
    tokenizer = write_tokenizer(old / "tokenizer", tower, inputs)
    inputs |= {"tokenizer": fingerprint(tokenizer)} if with_fingerprints else {}
    flow = write_flow(old / "flowtok", inputs, old / "tokenizer")
    expected = identity(tower)
    old.rename(new)
    parts, _ = load_pipeline(new, CPU)
    found = (fingerprint(parts.tokenizer), parts.text_encoder.identity, fingerprint(parts.flow))
    assert found == (fingerprint(tokenizer), expected, fingerprint(flow))
    model = f"local-dir:{new}/text_encoder/clip"
    assert text_encoder_config(new / "tokenizer").model == model


def test_fingerprints_choose_among_the_parts_and_none_but_the_right_ones_will_do(tmp_path):
    other, tower = write_tower(tmp_path / "clip"), write_tower(tmp_path / "text_encoder" / "clip")
    write_tokenizer(tmp_path / "named", other)
    beside = write_tokenizer(tmp_path / "tokenizer", other)
    inputs = {"tokenizer": fingerprint(beside), "text_encoder": identity(tower)}
    write_flow(tmp_path / "flowtok", inputs, tmp_path / "named")
    parts, _ = load_pipeline(tmp_path, CPU)
    assert fingerprint(parts.tokenizer) == inputs["tokenizer"]
    assert parts.text_encoder.identity == inputs["text_encoder"]
    for name in inputs:
        wrong = inputs | {name: "0" * 16}
        write_flow(tmp_path / f"of_{name}" / "flowtok", wrong, tmp_path / "tokenizer")
        with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} 0000000000000000"):
            load_pipeline(tmp_path / f"of_{name}", CPU)


def test_a_tokenizer_knows_its_own_text_encoder(tmp_path, tiny_clip_dir):
    write_tokenizer(tmp_path / "right", tiny_clip_dir, {"text_encoder": identity(tiny_clip_dir)})
    assert find_text_encoder(tmp_path / "right").identity == identity(tiny_clip_dir)
    write_tokenizer(tmp_path / "wrong", tiny_clip_dir, {"text_encoder": "0" * 16})
    with pytest.raises(ValueError, match=f"text encoder 0000000000000000.*{tiny_clip_dir}"):
        find_text_encoder(tmp_path / "wrong")


def test_a_tower_beside_is_never_taken_for_one_of_the_hub(tmp_path, monkeypatch):
    write_tower(tmp_path / "text_encoder" / "clip")
    write_tokenizer(tmp_path / "tokenizer", "")
    config = tmp_path / "tokenizer" / "config.yaml"
    config.write_text(config.read_text().replace("'local-dir:'", "ViT-L-14-336-quickgelu"))
    write_flow(tmp_path / "flowtok", {}, tmp_path / "tokenizer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_session", None)  # no network
    with pytest.raises(ValueError, match="ViT-L-14-336-quickgelu, openai"):
        load_pipeline(tmp_path, CPU)


def test_a_flow_without_any_tokenizer_says_where_one_is_looked_for(tmp_path):
    write_flow(tmp_path / "flowtok", {}, tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{tmp_path}/gone .*{tmp_path}/tokenizer.*tokenizer_run"):
        load_pipeline(tmp_path, CPU)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"num_tokens": 15}, r"\(16, 4\) .*\(15, 4\): set tokenizer_run"),
        ({"text_width": 64}, r"\(16, 32\) .*\(16, 64\): set text_encoder"),
    ],
)
def test_parts_of_other_sizes_are_refused(tmp_path, tiny_clip_dir, changes, keys):
    write_tokenizer(tmp_path / "tokenizer", tiny_clip_dir, **changes)
    write_flow(tmp_path / "flowtok", {}, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=keys):
        load_pipeline(tmp_path, CPU)


def write_captioner(folder, tower):
    """An experiment that flows from image to text; returns its text decoder."""
    inputs = {"tokenizer": fingerprint(write_tokenizer(folder / "tokenizer", tower))}
    runs = [folder / "tokenizer", folder / "text_decoder"]
    options = {"direction": "image_to_text", "projector": "frozen"}
    flow = write_flow(folder / "flowtok_caption", inputs, *runs, **options)
    model = TextAutoencoder(PROJECTOR, DECODER)
    model.projector.load_state_dict(flow.projector.state_dict())
    sections = {"projector": asdict(PROJECTOR), "text_decoder": asdict(DECODER)}
    return write_run(folder / "text_decoder", model, {}, **sections).decoder


def test_a_captioner_finds_the_text_decoder_of_its_own_projector(tmp_path, tiny_clip_dir):
    decoder = write_captioner(tmp_path / "old", tiny_clip_dir)
    moved = (tmp_path / "old").rename(tmp_path / "new")
    parts, sampling = load_captioner(moved, CPU)
    assert fingerprint(parts.decoder) == fingerprint(decoder)
    assert len(parts.captions(torch.rand(2, 3, 32, 32), sampling)) == 2
    (moved / "text_decoder").rename(tmp_path / "away")
    write_captioner(tmp_path / "other", tiny_clip_dir)
    (tmp_path / "other" / "text_decoder").rename(moved / "text_decoder")
    projector = fingerprint(load_projector(tmp_path / "away"))
    with pytest.raises(ValueError, match=f"{projector}.*text_decoder_run"):
        load_captioner(moved, CPU)


def test_a_damaged_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("[1")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.yaml is damaged"):
        load_flow(tmp_path)
