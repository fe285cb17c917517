"""training/loading.py: the tokenizer and text tower a flow is sampled with, with and without fingerprints."""

import json
from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import TINY_CLIP

from modeling.flow_model import FlowModel
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.pipeline import SamplingConfig
from modeling.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    build_clip,
    load_text_encoder,
    save_clip,
)
from modeling.text_projector import TextProjectorConfig
from training.checkpoint import (
    EMA_FILE,
    STATE_FILE,
    begin_checkpoint,
    commit_checkpoint,
    save_weights,
)
from training.loading import fingerprint, load_pipeline

SIZE = TransformerSize(16, 1, 2)
PROJECTOR = TextProjectorConfig(
    text_tokens=16, text_width=32, width=16, depth=1, num_heads=2, token_channels=4
)
CPU = torch.device("cpu")


def write_run(folder, module, inputs, **sections):
    """A run folder with one checkpoint; returns the module."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    checkpoint = begin_checkpoint(folder, 1)
    save_weights(module, checkpoint / EMA_FILE)
    (checkpoint / STATE_FILE).write_text(json.dumps({"inputs": inputs}))
    commit_checkpoint(checkpoint, keep=1)
    return module


def write_tokenizer(folder, **changes):
    """A run of stage 1."""
    sizes = {
        "image_size": 32,
        "num_tokens": 16,
        "token_channels": 4,
        "text_tokens": 16,
        "text_width": 32,
        **changes,
    }
    config = ImageTokenizerConfig(encoder=SIZE, decoder=SIZE, **sizes)
    return write_run(folder, ImageTokenizer(config), {}, tokenizer=asdict(config), text_encoder={})


def write_flow(folder, inputs, tokenizer_run, tower):
    """A run of stage 3."""
    flowtok = FlowTokConfig(num_tokens=16, token_channels=4, width=16, depth=1, num_heads=2)
    return write_run(
        folder,
        FlowModel(PROJECTOR, flowtok),
        inputs,
        projector=asdict(PROJECTOR),
        flowtok=asdict(flowtok),
        sampling=asdict(SamplingConfig(steps=2)),
        tokenizer_run=str(tokenizer_run),
        text_encoder=asdict(TextEncoderConfig(model=f"local-dir:{tower}")),
    )


def test_a_flow_without_fingerprints_takes_the_tokenizer_that_its_config_names(
    tmp_path, tiny_clip_dir
):
    named = write_tokenizer(tmp_path / "named")
    write_tokenizer(tmp_path / "tokenizer")
    write_flow(tmp_path / "flowtok", {}, tmp_path / "named", tiny_clip_dir)
    parts, sampling = load_pipeline(tmp_path, CPU)
    assert fingerprint(parts.tokenizer) == fingerprint(named) and sampling.steps == 2
    assert parts.generate(["a cat"], sampling)[0].shape == (1, 3, 32, 32)


def test_a_flow_without_fingerprints_takes_the_parts_beside_it_if_the_named_ones_are_gone(tmp_path):
    beside = write_tokenizer(tmp_path / "tokenizer")
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, tmp_path / "text_encoder" / "clip")
    write_flow(tmp_path / "flowtok", {}, tmp_path / "gone", tmp_path / "gone" / "clip")
    parts, _ = load_pipeline(tmp_path / "flowtok", CPU)
    assert fingerprint(parts.tokenizer) == fingerprint(beside)


def test_a_flow_without_fingerprints_never_takes_a_tower_beside_it_for_one_of_the_hub(
    tmp_path, monkeypatch
):
    write_tokenizer(tmp_path / "tokenizer")
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, tmp_path / "text_encoder" / "clip")
    write_flow(tmp_path / "flowtok", {}, tmp_path / "tokenizer", "")
    config = tmp_path / "flowtok" / "config.yaml"
    config.write_text(
        config.read_text().replace("model: 'local-dir:'", "model: ViT-L-14-336-quickgelu")
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_session", None)  # no network
    with pytest.raises(
        ValueError, match="cannot load the text tower ViT-L-14-336-quickgelu, openai"
    ):
        load_pipeline(tmp_path, CPU)


def test_a_flow_without_any_tokenizer_says_where_one_is_looked_for(tmp_path, tiny_clip_dir):
    write_flow(tmp_path / "flowtok", {}, tmp_path / "gone", tiny_clip_dir)
    message = f"no tokenizer at {tmp_path}/gone or {tmp_path}/tokenizer: .*convert_checkpoint.*or set tokenizer_run in"
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path, CPU)


def test_fingerprints_choose_among_the_parts_and_none_but_the_right_ones_will_do(
    tmp_path, tiny_clip_dir
):
    tower = fingerprint(load_text_encoder(TextEncoderConfig(model=f"local-dir:{tiny_clip_dir}")))
    write_tokenizer(tmp_path / "named")
    beside = write_tokenizer(tmp_path / "tokenizer")
    inputs = {"tokenizer": fingerprint(beside), "text_encoder": tower}
    write_flow(tmp_path / "flowtok", inputs, tmp_path / "named", tiny_clip_dir)
    assert fingerprint(load_pipeline(tmp_path, CPU)[0].tokenizer) == inputs["tokenizer"]
    for name in inputs:
        write_flow(
            tmp_path / name / "flowtok",
            inputs | {name: "0" * 16},
            tmp_path / "tokenizer",
            tiny_clip_dir,
        )
        with pytest.raises(
            ValueError, match=f"was trained with the {name.replace('_encoder', ' tower')} 0000"
        ):
            load_pipeline(tmp_path / name, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_tokens": 15},
            "the flow makes 16 x 4 tokens, the tokenizer reads 15 x 4: set tokenizer_run",
        ),
        ({"token_channels": 8}, "the flow makes 16 x 4 tokens, the tokenizer reads 16 x 8"),
        (
            {"text_width": 64},
            "gives 16 x 32 states, .* expect 16 x 32 and 16 x 64: set text_encoder",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_drawn(
    tmp_path, tiny_clip_dir, changes, message
):
    write_tokenizer(tmp_path / "tokenizer", **changes)
    write_flow(tmp_path / "flowtok", {}, tmp_path / "tokenizer", tiny_clip_dir)
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path, CPU)


def test_a_tower_of_the_wrong_size_is_refused_but_a_tokenizer_without_text_needs_none(tmp_path):
    config = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | {"context_length": 8}}
    save_clip(build_clip(config), config, tmp_path / "clip")
    write_tokenizer(tmp_path / "tokenizer", text_guidance=False, text_tokens=7)
    write_flow(tmp_path / "flowtok", {}, tmp_path / "tokenizer", tmp_path / "clip")
    with pytest.raises(
        ValueError, match="gives 8 x 32 states, .* expect 16 x 32: set text_encoder"
    ):
        load_pipeline(tmp_path, CPU)


def test_towers_of_the_same_weights_and_another_activation_have_another_fingerprint():
    exact, quick = build_clip(TINY_CLIP), build_clip(TINY_CLIP | {"quick_gelu": True})
    quick.load_state_dict(exact.state_dict())
    assert fingerprint(TextEncoder(exact)) != fingerprint(TextEncoder(quick))
