"""The dual tokenizer: its decoders, its towers, round trips, and its training as stage 1."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_CLIP
from dual_experiment import DUAL
from evaluations import run_program
from omegaconf import OmegaConf
from tiny_experiment import equal, metrics, weights
from tokenflow_vectors import arrays, vectors
from torch.nn import functional as F

from eval import reconstruction
from modeling import image_tower
from modeling.clip_weights import build_clip, build_image_tower, save_clip
from modeling.dual_tokenizer import DualTokenizer, DualTokenizerConfig, SemanticDecoder
from modeling.image_tower import ImageTower, Teacher, TeacherConfig, describe_tower
from modeling.layers import fingerprint
from training import checkpoint as ckpt
from training.loading import load_dual_tokenizer, load_tokenizer
from training.optim import decay_groups

VISION = {"image_size": 160, "timm_model_name": "test_vit"}
TIMM = {"embed_dim": 48, "vision_cfg": {**VISION, "timm_pool": "map", "timm_proj": "none"}}


def config_of(folder, **changes):
    values = {**DUAL, "teacher": {"model": f"local-dir:{folder}", "pretrained": ""}, **changes}
    config = OmegaConf.to_object(OmegaConf.merge(DualTokenizerConfig, values))
    return replace(config, tower=describe_tower(config.teacher))


@pytest.fixture
def tokenizer(tiny_clip_dir):
    return DualTokenizer(config_of(tiny_clip_dir))


# Networks


def test_the_semantic_decoder_is_the_originals_on_its_own_grid_and_on_another():
    decoder = SemanticDecoder(channels=8, width=24, depth=2, num_heads=3, grid=4)
    prefix = "semantic/decoder/weights/"
    names = [name for name in arrays() if name.startswith(prefix)]
    decoder.load_state_dict({n.removeprefix(prefix): vectors(n).float() for n in names})
    codes = vectors("semantic/codes")
    for name, x in (("decoded", codes), ("decoded_5x5", F.pad(codes, (0, 1, 0, 1)))):
        torch.testing.assert_close(decoder(x), vectors(f"semantic/{name}"), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_semantic_encoder_starts_as_the_teacher(tokenizer):
    teacher = Teacher(tokenizer.config.teacher)
    images = torch.rand(2, 3, 32, 32)
    tokenizer.start_from(teacher)
    tokens = tokenizer.semantic_encoder(images * 2 - 1)  # the tiny CLIP's mean and deviation: 0.5
    torch.testing.assert_close(tokens @ teacher.tower.visual.proj, teacher(images))
    assert teacher(images).shape == tokenizer(images)[1].shape == (2, 4, 24)


@torch.no_grad()
def test_a_clips_patch_tokens_are_those_that_open_clip_gives():
    visual = build_clip(TINY_CLIP).visual.eval()
    tower = ImageTower(visual)
    images = torch.randn(2, 3, 32, 32)
    tokens = tower(images)
    visual.output_tokens = True
    torch.testing.assert_close(tokens, visual(images)[1])
    assert tower(torch.randn(1, 3, 48, 48)).shape == (1, 9, 32)  # positions interpolated


@torch.no_grad()
def test_a_tower_of_timm_gives_the_tokens_before_its_last_block():
    tower = ImageTower.build(json.dumps(TIMM)).drop_unused().eval()
    images, trunk = torch.randn(1, 3, 160, 160), tower.visual.trunk
    states = []
    trunk.blocks[-1].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    trunk.forward_features(images)
    tokens = tower(images)
    torch.testing.assert_close(tokens, states[0][:, -100:])  # without a class token
    assert tokens.shape == (1, 100, tower.width)


def test_teacher_and_encoder_of_siglip_have_the_published_form_of_gelu(monkeypatch):
    clip = SimpleNamespace(visual=build_image_tower(TIMM))
    monkeypatch.setattr(image_tower, "load_clip", lambda config: clip)
    still = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)
    monkeypatch.setattr(image_tower, "preprocessing_of", lambda config, clip: still)
    for name, form in (("test_vit", "none"), ("vit_base_patch16_siglip_224", "tanh")):
        vision = {"timm_model_name": name}
        monkeypatch.setattr(image_tower, "model_config", lambda config, v=vision: {"vision_cfg": v})
        config = TeacherConfig("tiny", "")
        assert ("tanh_gelu" in json.loads(describe_tower(config))) == (form == "tanh")
        blocks = Teacher(config).tower.visual.trunk.blocks
        assert {block.mlp.act.approximate for block in blocks} == {form}


# 2 cells of 16 pixels, nets of stride 2: they see 4 x 4 pixels
SIZES = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "decoder_channels": 32}


@pytest.mark.parametrize(
    "nets", [{}, {"pixel_nets": "convolutional", "convolutions": SIZES}], ids=["patches", "resized"]
)
@torch.no_grad()
def test_indices_stand_for_the_tokens(tiny_clip_dir, nets):
    tokenizer = DualTokenizer(config_of(tiny_clip_dir, **nets)).eval()
    assert tokenizer.net_size == (4 if nets else 32)
    coded = tokenizer.encode(torch.rand(3, 3, 32, 32))
    assert coded.indices.shape == (3, 5)
    maps = tokenizer.quantizer.decode(coded.indices)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), coded.mean)
    assert tokenizer.decode(coded.mean).shape == (3, 3, 32, 32)


def test_gradients_reach_every_weight_that_is_trained(tokenizer):
    images, features, quantised = tokenizer.eval()(torch.rand(8, 3, 32, 32))
    losses = quantised.codebook + quantised.commitment
    (images.sum() + features.square().sum() + losses).backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None]


def test_weight_decay_spares_the_codebooks(tokenizer):
    decayed, spared = (group["params"] for group in decay_groups(tokenizer, 0.1))
    for codes in (tokenizer.quantizer.semantic_codes, tokenizer.quantizer.pixel_codes):
        assert any(codes is weight for weight in spared)


# The stage


@pytest.fixture
def train(dual_chain, tmp_path):
    """Runs stage 1 into a folder, with overrides."""
    return lambda name, *overrides: dual_chain.run(
        "tokenizer", f"run_dir={tmp_path / name}", *overrides
    )


def test_stage_1_trains_resumes_and_reconstructs(dual_chain, train, tiny_shards):
    whole = dual_chain.folder / "tokenizer"
    parted = train("parted", "training.max_steps=2")
    assert weights(parted)["quantizer.counts"].sum() > 0
    train("parted")
    for file in (ckpt.MODEL_FILE, ckpt.EMA_FILE):
        assert equal(weights(whole, file), weights(parted, file))

    line = metrics(whole)[-1]
    parts = [line[f"weighted/{name}"] for name in ("l2", "semantic", "codebook", "commitment")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert line["cosine_to_teacher"] == pytest.approx(1 - line["semantic"], abs=1e-5)
    assert 0 < line["usage/1"] <= line["usage"] <= 1 <= line["perplexity/2"] <= 32
    assert line["eval/psnr_db"] > 0

    run_program(reconstruction, whole, f"{tiny_shards}/train-00000.tar", "--limit", 3)
    report = json.loads((whole / "reconstruction.json").read_text())
    assert report["metrics"]["psnr_db"] > 0
    with pytest.raises(ValueError, match="dual"):
        load_tokenizer(whole)


def test_frozen_parts_keep_their_weights(train, tiny_clip_dir):
    tower = train("tower", "freeze_tower=true")
    own = load_dual_tokenizer(tower).semantic_encoder.state_dict()
    start = Teacher(TeacherConfig(f"local-dir:{tiny_clip_dir}", "")).tower.state_dict()
    assert equal(own, {name: start[name] for name in own})
    decoder = train("decoder", f"init_from={tower}", "freeze_encoder=true")
    before, after = (load_dual_tokenizer(run) for run in (tower, decoder))
    assert fingerprint(before.semantic_decoder) == fingerprint(after.semantic_decoder)
    assert fingerprint(before.pixel_encoder) == fingerprint(after.pixel_encoder)
    assert fingerprint(before.pixel_decoder) != fingerprint(after.pixel_decoder)
    assert "semantic" not in metrics(decoder)[-1]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["tokenizer.patch_size=8"], "tokenizer and dual"),
        (["dual=null", "freeze_tower=true"], "freeze_tower"),
        (["dual=null", "dual_losses.semantic_weight=2"], "dual_losses"),
        (["dual_losses.codebook_weight=0"], "codebook_weight"),
        (["dual.image_size=40"], "image_size"),
        (["dual.image_size=64"], "quantizer.scales"),
        (["dual.patch_size=32", "dual.quantizer.scales=[1]"], "dual.patch_size"),
        (["dual.semantic_heads=3"], "semantic_heads"),
        (["dual.convolutions.multipliers=[]"], "multipliers"),
        (["dual.teacher.model=no-such-model"], "dual.teacher.model"),
    ],
)
def test_what_does_not_fit_together_is_refused(train, overrides, key):
    with pytest.raises(ValueError, match=key):
        train("refused", *overrides)


def test_a_run_does_not_go_on_with_another_teacher_and_is_loaded_without(
    train, tiny_clip_dir, tmp_path
):
    copy = shutil.copytree(tiny_clip_dir, tmp_path / "copy")
    teacher = f"dual.teacher.model=local-dir:{copy}"
    run = train("run", teacher, "training.max_steps=2")
    source, expected = run / "source.json", describe_tower(TeacherConfig(f"local-dir:{copy}", ""))
    noted = json.loads(source.read_text())
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, copy)
    with pytest.raises(ValueError, match=f"teacher was {noted.pop('teacher')}, is "):
        train("run", teacher)
    # That of an older run is not known
    source.write_text(json.dumps(noted))
    assert metrics(train("run", teacher))[-1]["step"] == 4
    assert "teacher" in json.loads(source.read_text())
    shutil.rmtree(copy)
    assert load_dual_tokenizer(run).config.tower == expected
