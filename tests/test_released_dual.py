"""Conversion of the published TokenFlow tokenizers: names and shapes on the meta device, values."""

import gzip
import json

import pytest
import torch
from conftest import TINY_CLIP
from evaluations import run_program
from test_dual_tokenizer import TIMM
from tokenflow_vectors import FOLDER

from modeling import released_dual
from modeling.dual_quantizer import QuantizerConfig
from modeling.dual_tokenizer import DualTokenizer, DualTokenizerConfig
from modeling.image_tower import TeacherConfig
from modeling.pixel_nets import ConvolutionSize
from modeling.released_dual import IN_PROJ, SCALE, SHIFT, USED, convert_dual, published_names
from scripts import convert_checkpoint
from training.loading import load_dual_tokenizer

CLIP, SIGLIP = "tokenflow_clipb_32k_enhanced.pt", "tokenflow_siglip_32k.pt"


@pytest.mark.parametrize(
    ("file", "number", "millions", "grid", "size"),
    [(CLIP, 649, 376.57, 16, 256), (SIGLIP, 848, 554.01, 27, 384)],
)
def test_every_tensor_of_a_published_file_has_its_place(file, number, millions, grid, size):
    shapes = json.loads(gzip.decompress((FOLDER / "tensors.json.gz").read_bytes()))[file]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(tensors) == number
    converted = convert_dual(tensors)
    config = converted.networks["dual"]
    assert (config.grid_size, config.image_size) == (grid, size)
    found = sum(x.numel() for name, x in converted.tensors.items() if name != "quantizer.counts")
    # Theirs counts neither the log of used codes nor SigLIP's fixed mean and deviation
    assert found / 1e6 == pytest.approx(millions, abs=0.01)
    if file == SIGLIP:  # whose blocks have the tanh form of GELU
        with torch.device("meta"):
            blocks = DualTokenizer(config).semantic_encoder.visual.trunk.blocks
        assert {block.mlp.act.approximate for block in blocks} == {"tanh"}


@pytest.fixture(params=["clip", "siglip"])
def small(request, monkeypatch):
    """A little dual tokenizer, and a file of its weights by the published names."""
    tower = {"clip": TINY_CLIP, "siglip": TIMM}[request.param]
    tower = {name: tower[name] for name in ("embed_dim", "vision_cfg")}
    monkeypatch.setattr(released_dual, "describe_tower", lambda *a, **k: json.dumps(tower))
    size = tower["vision_cfg"]["image_size"]
    scales = [1, size // 16]
    published = (TeacherConfig("tiny", ""), size, scales)
    monkeypatch.setattr(released_dual, "PUBLISHED", {True: published, False: published})
    monkeypatch.setattr(released_dual, "HEADS", 2)
    convolutions = ConvolutionSize(32, [1, 1, 2, 1, 1], 1, 32, 1)
    config = DualTokenizerConfig(
        image_size=size,
        semantic_depth=1,
        semantic_heads=2,
        convolutions=convolutions,
        quantizer=QuantizerConfig(64, 6, 4, scales),
        tower=json.dumps(tower),
    )
    tokenizer = DualTokenizer(config).eval()
    return tokenizer, published_file(tokenizer, request.param)


def published_file(tokenizer, kind):
    """The state of a tokenizer by the published names."""
    file = {USED: torch.zeros(131072)}
    if kind == "siglip":
        file |= dict.fromkeys((SHIFT, SCALE), torch.full((1, 3, 1, 1), 0.5))
    for name, tensor in tokenizer.state_dict().items():
        if name == "quantizer.counts":
            continue
        theirs = published_names(name)
        tensor = tensor[0] if name.endswith("trunk.pos_embed") else tensor
        file |= dict(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    for leaf in ("weight", "bias") if kind == "siglip" else ():
        parts = [file.pop(f"{IN_PROJ}{leaf}:{part}") for part in ("q", "kv")]
        file[IN_PROJ + leaf] = torch.cat(parts)
    return file


@torch.no_grad()
def test_a_file_becomes_a_run_that_gives_the_same(small, tiny_clip_dir, tmp_path, capsys):
    tokenizer, tensors = small
    torch.save({"ema": tensors, "optimizer": {}}, tmp_path / "file.pt")
    tower = ["--text-encoder-model", f"local-dir:{tiny_clip_dir}"]
    run_program(convert_checkpoint, tmp_path / "file.pt", tmp_path / "run", *tower)
    found = load_dual_tokenizer(tmp_path / "run")
    images = torch.rand(1, 3, tokenizer.config.image_size, tokenizer.config.image_size)
    coded, expected = (one.encode(images) for one in (found, tokenizer))
    assert torch.equal(coded.indices, expected.indices)
    torch.testing.assert_close(found.decode(coded.mean), tokenizer.decode(expected.mean))


def test_what_is_not_as_published_is_refused(small):
    _, tensors = small
    some = next(name for name in tensors if name.startswith("decoder_vqkd.blocks.0.attn"))
    cases = [("more is unknown", {"more": torch.zeros(1)}), (some, {some: torch.zeros(3)})]
    if SCALE in tensors:
        cases.append((SCALE, {SCALE: torch.full((1, 3, 1, 1), 0.6)}))
    for match, change in cases:
        with pytest.raises(ValueError, match=match):
            convert_dual(tensors | change)
    del tensors[some]
    with pytest.raises(ValueError, match=f"{some} is missing"):
        convert_dual(tensors)


def test_siglips_packed_weights_are_in_timms_order():
    name = "semantic_encoder.visual.trunk.blocks.3.attn.qkv.bias"
    layer = "encoder_vqkd.vision_model.encoder.layers.3.self_attn."
    assert published_names(name) == [f"{layer}{part}_proj.bias" for part in "qkv"]
