"""modeling/transformers_text.py: towers made here, of T5, CLIP and SigLIP; padding says nothing."""

import pickle
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from evaluations import run_program
from PIL import Image
from tiny_experiment import Experiment, draw, metrics, training
from torch import nn

from modeling import transformers_text
from modeling.clip_weights import AbsentWeights
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow, fill_in_sizes
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.text_encoder import TextEncoderConfig, load_text_encoder
from modeling.text_projector import TextProjectorConfig, TextWhitening
from modeling.transformers_text import build_tower
from scripts import export
from training.tokens import projector_sizes

transformers = pytest.importorskip("transformers", reason="requirements-text.txt is not installed")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "</s>", "<unk>", "a", "the", "red", "green", "blue", "black"]
WORDS += ["circle", "square", "triangle"]
CAPTIONS = ["a red circle", "the green square", ""]
LONG = "the black triangle " * 6
LENGTH, WIDTH = 10, 16
BLOCKS = {"vocab_size": len(WORDS), "num_layers": 2, "num_heads": 2}
T5 = {**BLOCKS, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "feed_forward_proj": "gated-gelu"}
CLIP = {"vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": 24}
CLIP |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
CLIP |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "siglip": lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**CLIP)),
}


def word_tokenizer():
    """One id for each of WORDS, and an end token."""
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, **special)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (folder of a model with random weights and its tokenizer, the model)."""
    made = {}
    for kind, build in MODELS.items():
        folder, model = tmp_path_factory.mktemp(kind), build().eval()
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        made[kind] = folder, model
    return made


def config_of(folders, kind, length=LENGTH):
    model = str(folders[kind][0])
    return TextEncoderConfig(family="transformers", model=model, context_length=length)


@pytest.mark.parametrize("kind", MODELS)
def test_states_are_the_packages_own_and_those_of_hidden_padding_zeros(folders, kind):
    model = folders[kind][1]
    encoder = load_text_encoder(config_of(folders, kind, LENGTH if "t5" in kind else 0))
    ids = encoder.tokenize(CAPTIONS)
    states = nn.ModuleList([encoder]).train()[0](ids)
    assert states.shape == (3, *encoder.shape) == (3, LENGTH, WIDTH)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.tower.training
    if encoder.masks_padding:
        model = getattr(model, "encoder", model)
        own = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        own = own * (ids != 0).unsqueeze(-1)
        alone = encoder(ids[:1, :4])  # the same caption without padding
        torch.testing.assert_close(states[:1, :4], alone)
        torch.testing.assert_close(states.any(-1), ids != 0)
    else:
        own = model(input_ids=ids).last_hidden_state
        assert states.any(-1).all()
    torch.testing.assert_close(states, own)


def test_the_identity_follows_weights_and_context_length(folders):
    configs = [config_of(folders, "t5"), config_of(folders, "t5"), config_of(folders, "t5", 8)]
    first, same, shorter = (load_text_encoder(config).identity for config in configs)
    other = build_tower(transformers.T5Config(**T5), LENGTH).identity
    assert first == same and len({first, shorter, other}) == 3


def test_ids_are_cut_padded_counted_read_back_and_the_tokenizer_is_pickled(folders):
    tokenize = load_text_encoder(config_of(folders, "t5", 6)).tokenize
    ids = tokenize([*CAPTIONS, LONG])
    assert ids.tolist()[::3] == [[3, 5, 9, 1, 0, 0], [4, 8, 11, 4, 8, 1]]
    assert [tokenize.num_tokens(caption) for caption in (*CAPTIONS, LONG)] == [4, 4, 1, 19]
    assert [tokenize.decode(row) for row in ids[:3]] == CAPTIONS
    assert torch.equal(pickle.loads(pickle.dumps(tokenize))(CAPTIONS), tokenize(CAPTIONS))
    assert tokenize.context_length == 6


# Padding


K, C, SIZE = 7, 4, {"width": 16, "depth": 1, "num_heads": 2}
TEXT = torch.tensor([[True] * 4 + [False] * 6, [True] * LENGTH])  # which positions are text


@pytest.mark.parametrize("num_tokens", [K, 0])  # 0: as many as the text has
@pytest.mark.parametrize("condition", ["none", "addition", "cross_attention", "concatenation"])
def test_a_masked_position_changes_nothing_downstream(condition, num_tokens):
    size = TransformerSize(16, 2, 2)
    tokenizer = ImageTokenizer(
        ImageTokenizerConfig(16, 8, num_tokens, C, size, size).for_text((LENGTH, WIDTH), True)
    )
    projector = TextProjectorConfig(mlp_width=16, **SIZE)
    projector = replace(projector, whiten_text=True, **projector_sizes(tokenizer.config))
    network = fill_in_sizes(
        FlowTokConfig(condition=condition, **SIZE), projector, tokenizer.config.num_tokens
    )
    flow = build_flow(projector, network, FlowConfig(null_probability=0.0)).eval()
    for parameter in flow.flowtok.parameters():
        nn.init.normal_(parameter, std=0.2)
    flow.projector.whitening.mean.normal_()  # padding is not zero any more

    # What any output says of a position, and of no other sample
    states = (torch.randn(2, LENGTH, WIDTH) * TEXT.unsqueeze(-1)).requires_grad_()
    latents = torch.randn(2, *flow.projector.shape)
    result = flow(states, latents)
    outputs = {
        "z_T": result.source.latents,
        "alignment": result.source.alignment,
        "velocity": result.velocity,
        "image": tokenizer.decode(latents, states),
    }
    for name, output in outputs.items():
        (gradient,) = torch.autograd.grad(output.sin().sum(), states, retain_graph=True)
        assert torch.equal(gradient.any(-1), TEXT), name


def test_whitening_is_measured_without_padding():
    with_padding, without = TextWhitening(WIDTH), TextWhitening(WIDTH)
    states = torch.randn(2, LENGTH, WIDTH)
    with_padding.fit([states * TEXT.unsqueeze(-1)])
    without.fit([states[TEXT].unsqueeze(0)])
    torch.testing.assert_close(with_padding.matrix.abs(), without.matrix.abs())


# Programs


def test_three_stages_and_sampling_run_with_a_t5(folders, tmp_path, tiny_shards):
    experiment = Experiment(tmp_path, tiny_shards)
    file = experiment.config_file("tokenizer")
    values = yaml.safe_load(file.read_text())
    values["text_encoder"] = vars(config_of(folders, "t5", 20))
    values["tokenizer"]["num_tokens"] = 16
    file.write_text(yaml.safe_dump(values))
    short = training(max_steps=2)
    for stage in ("tokenizer", "tokens", "text_projector", "flowtok"):
        experiment.run(stage, *(short if stage != "tokens" else []))
    projector = yaml.safe_load((tmp_path / "flowtok" / "config.yaml").read_text())["projector"]
    assert (projector["text_tokens"], projector["num_queries"]) == (20, 16)
    assert metrics(tmp_path / "flowtok")[-1]["alignment"] > 0

    picture = tmp_path / "picture.png"
    draw(tmp_path, "--prompts", "a red circle", "a blue square", "--output", picture)
    Image.open(picture).verify()
    run_program(export, tmp_path, "--output", tmp_path / "exported")
    again = tmp_path / "again.png"
    draw(tmp_path / "exported", "--prompts", "a red circle", "a blue square", "--output", again)
    assert again.read_bytes() == picture.read_bytes()
    with pytest.raises(ValueError, match="text_encoder.family=open_clip"):
        experiment.run("text_decoder")


# Errors


def test_without_the_package_one_line_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-text.txt"):
        load_text_encoder(config_of(folders, "t5"))


def test_a_folder_without_all_weights_is_refused(folders, tmp_path):
    weights = folders["siglip"][1].state_dict()
    name = "final_layer_norm.weight"
    model = MODELS["siglip"]()
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in weights.items() if k != name})
    config = TextEncoderConfig(family="transformers", model=str(tmp_path))
    # A tokenizer that can't be loaded is refused first: weights may have to be downloaded
    with pytest.raises(ValueError, match="cannot load text_encoder.model="):
        load_text_encoder(config)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"lacks weights: {name}"):
        load_text_encoder(config)


@pytest.mark.parametrize(
    ("model", "kind", "key"),
    [
        ("/nowhere/t5", AbsentWeights, "text_encoder.model=/nowhere/t5 is no folder"),
        ("no-one/t5", AbsentWeights, "HF_HUB_OFFLINE.* text_encoder.model=FOLDER"),
        ("EMPTY", ValueError, "cannot load text_encoder.model=.*empty"),
        ("BERT", ValueError, "text_encoder.model is a bert, expected one of t5, "),
    ],
)
def test_a_model_that_can_not_be_had_is_named(model, kind, key, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if model == "EMPTY":
        (tmp_path / "empty").mkdir()
        model = str(tmp_path / "empty")
    if model == "BERT":
        transformers.BertConfig().save_pretrained(tmp_path)
        model = str(tmp_path)
    with pytest.raises(kind, match=key):
        load_text_encoder(TextEncoderConfig(family="transformers", model=model))


def test_a_context_length_that_nobody_reads_or_that_is_too_long_is_refused(folders, monkeypatch):
    with pytest.raises(ValueError, match="context_length"):
        TextEncoderConfig(context_length=64)
    monkeypatch.setattr(transformers_text, "load_whole", None)  # before weights are downloaded
    with pytest.raises(ValueError, match=f"context_length=64: the tower has {LENGTH} places"):
        load_text_encoder(config_of(folders, "clip", 64))
