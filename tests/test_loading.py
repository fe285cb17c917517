"""training/loading.py, pipelines.py: the parts that a flow is sampled with, moved or not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY_CLIP
from test_resume import alter

from modeling.clip_weights import build_clip, save_clip
from modeling.layers import fingerprint
from training.checkpoint import STATE_FILE, latest_checkpoint
from training.loading import find_text_encoder, load_tokenizer, text_encoder_config, trained_with
from training.pipelines import (
    check_parts,
    direction_of,
    load_captioner,
    load_flow,
    load_pipeline,
    load_projector,
)

CPU = torch.device("cpu")
NONE = "0" * 16  # a fingerprint that nothing has


@pytest.fixture
def moved(chain, captioner, tmp_path):
    """The tiny experiment in another folder than its configs say, where nothing is left."""
    folder = tmp_path / "moved"
    for stage in ("text_encoder", "tokenizer", "text_decoder", "flowtok"):
        shutil.copytree(chain.folder / stage, folder / stage, symlinks=True)
    shutil.copytree(captioner, folder / "flowtok_caption", symlinks=True)
    for run in folder.iterdir():
        set_config(run, str(chain.folder), str(tmp_path / "gone"))
    return folder


def set_config(run, old, new):
    """Another text in a run's config."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(old, new))


def set_inputs(run, **inputs):
    """Other fingerprints of the parts that a run was trained with; none: a converted run."""
    path = latest_checkpoint(run)[1] / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": inputs}))


def other_weights(run, folder):
    """A copy of a run with other EMA weights."""
    shutil.copytree(run, folder, symlinks=True)
    alter(folder)
    return folder


def test_a_run_says_how_its_flow_was_trained(chain, captioner):
    flow = load_flow(chain.folder / "flowtok")
    assert flow.config == chain.config("flowtok").flow
    assert not any(p.requires_grad for p in flow.parameters()) and not flow.training
    assert direction_of(chain.folder / "flowtok") == "text_to_image"
    assert direction_of(captioner) == "image_to_text"


@pytest.mark.parametrize("with_fingerprints", [False, True])
def test_in_a_moved_experiment_the_parts_are_beside_the_flow(chain, moved, with_fingerprints):
    if not with_fingerprints:
        set_inputs(moved / "flowtok")
    parts, sampling = load_pipeline(moved, CPU)
    assert fingerprint(parts.tokenizer) == fingerprint(load_tokenizer(chain.folder / "tokenizer"))
    assert parts.text_encoder.identity == trained_with(chain.folder / "tokenizer")["text_encoder"]
    model = f"local-dir:{moved}/text_encoder/clip"
    assert text_encoder_config(moved / "tokenizer").model == model
    assert sampling.steps == 3
    assert parts.generate(["a cat"], sampling)[0].shape == (1, 3, 32, 32)


def test_without_fingerprints_the_parts_are_those_that_the_config_names(moved, tmp_path):
    named = other_weights(moved / "tokenizer", tmp_path / "gone" / "tokenizer")
    shutil.copytree(moved / "text_encoder", tmp_path / "gone" / "text_encoder")
    set_inputs(moved / "flowtok")
    parts, _ = load_pipeline(moved, CPU)
    assert fingerprint(parts.tokenizer) == fingerprint(load_tokenizer(named))


def test_fingerprints_choose_among_the_parts_and_none_but_the_right_ones_will_do(moved, tmp_path):
    other_weights(moved / "tokenizer", tmp_path / "gone" / "tokenizer")
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, tmp_path / "gone" / "text_encoder" / "clip")
    inputs = trained_with(moved / "flowtok")
    parts, _ = load_pipeline(moved, CPU)
    assert fingerprint(parts.tokenizer) == inputs["tokenizer"]
    assert parts.text_encoder.identity == inputs["text_encoder"]
    for name in ("tokenizer", "text_encoder"):
        set_inputs(moved / "flowtok", **inputs | {name: NONE})
        with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} {NONE}"):
            load_pipeline(moved, CPU)


def test_a_tokenizer_knows_its_own_text_encoder(moved):
    known = trained_with(moved / "tokenizer")["text_encoder"]
    assert find_text_encoder(moved / "tokenizer").identity == known
    set_inputs(moved / "tokenizer", text_encoder=NONE)
    with pytest.raises(ValueError, match=f"text encoder {NONE}.*{moved}"):
        find_text_encoder(moved / "tokenizer")


def test_a_tower_beside_is_never_taken_for_one_of_the_hub(moved, tmp_path, monkeypatch):
    clip = f"local-dir:{tmp_path}/gone/text_encoder/clip"
    set_config(moved / "tokenizer", clip, "ViT-L-14-336-quickgelu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_session", None)  # no network
    with pytest.raises(ValueError, match="ViT-L-14-336-quickgelu, openai"):
        load_pipeline(moved, CPU)


def test_a_flow_without_any_tokenizer_says_where_one_is_looked_for(moved, tmp_path):
    shutil.rmtree(moved / "tokenizer")
    places = f"{tmp_path}/gone/tokenizer .*{moved}/tokenizer.*tokenizer_run"
    with pytest.raises(ValueError, match=places):
        load_pipeline(moved, CPU)


def test_parts_of_other_sizes_are_refused(chain):
    parts, _ = load_pipeline(chain.folder, CPU)
    right = parts.tokenizer.config
    for changes, keys in (
        ({"num_tokens": 15}, r"\(16, 4\) .*\(15, 4\): set tokenizer_run"),
        ({"text_width": 32}, r"\(16, 64\) .*\(16, 32\): set text_encoder"),
    ):
        parts.tokenizer.config = replace(right, **changes)
        with pytest.raises(ValueError, match=keys):
            check_parts(parts.flow, parts.tokenizer, parts.text_encoder)


def test_a_captioner_finds_the_text_decoder_of_its_own_projector(moved, tmp_path):
    parts, sampling = load_captioner(moved, CPU)
    assert len(parts.captions(torch.rand(2, 3, 32, 32), sampling)) == 2
    (moved / "text_decoder").rename(tmp_path / "away")
    other_weights(tmp_path / "away", moved / "text_decoder")
    projector = fingerprint(load_projector(tmp_path / "away"))
    with pytest.raises(ValueError, match=f"{projector}.*text_decoder_run"):
        load_captioner(moved, CPU)


def test_a_damaged_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("[1")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.yaml is damaged"):
        load_flow(tmp_path)
