"""The reader: a tiny Llama made here, frozen or trained; a Qwen2 that reads bytes; the stage."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_transformers_text import CAPTIONS, LONG, WORDS, transformers, word_tokenizer
from tiny_experiment import Experiment, equal, metrics, training, weights

from modeling import code_reader
from modeling.code_reader import IGNORED, CaptionTokenizer, CodeReader, LanguageModelConfig
from modeling.image_tokenizer import TransformerSize

LLAMA = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
BYTES = LanguageModelConfig(size=TransformerSize(32, 2, 2), freeze=False)
IDS = torch.tensor([[3, 5, 9, 1], [4, 1, IGNORED, IGNORED]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.generation_config.update(repetition_penalty=9.0)
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def make_reader(folder, start_id=4, freeze=True):
    model = code_reader.load_language_model(LanguageModelConfig(folder))
    return CodeReader(6, model, start_id, freeze)


@torch.no_grad()
def test_logits_are_the_models_own_behind_start_and_image_and_padding_says_nothing(folder):
    reader, tokens = make_reader(folder), torch.randn(2, 5, 6)
    model, found = reader.language_model, reader(tokens, IDS)
    for row, ids in enumerate([IDS[:1], IDS[1:, :2]]):
        start, words = map(model.get_input_embeddings(), (torch.tensor([[4]]), ids))
        inputs = torch.cat([start, reader.projector(tokens[row : row + 1]), words], dim=1)
        own = model(inputs_embeds=inputs).logits[0, 5:-1]
        torch.testing.assert_close(found[row, : ids.shape[1]], own)


def test_a_frozen_model_is_no_part_of_the_reader_and_a_trained_one_is(folder):
    for freeze in (True, False):
        reader = make_reader(folder, None, freeze).train()
        model = reader.language_model
        reader(torch.randn(2, 5, 6), IDS).sin().sum().backward()
        assert all(p.grad is not None for p in reader.parameters())
        assert any(p.requires_grad for p in model.parameters()) != freeze == (not model.training)
        assert (copy.deepcopy(reader).language_model is model) == freeze
        assert all("projector" in name for name in reader.state_dict()) == freeze


@torch.no_grad()
def test_each_word_read_is_the_likeliest_behind_those_before_it_up_to_the_end(folder):
    reader, tokens = make_reader(folder), torch.randn(3, 5, 6)
    torch.nn.init.normal_(reader.language_model.get_input_embeddings().weight)
    ids = reader.read(tokens, end_id=-1, max_length=7)
    assert torch.equal(reader(tokens, ids).argmax(-1), ids) and ids.shape == (3, 7)
    row = ids[0].tolist()
    first = row.index(row[2])
    ended = reader.read(tokens, row[2], max_length=7)[0].tolist()
    assert ended[: first + 1] == row[: first + 1] and {*ended[first:]} == {row[2]}


def test_captions_are_cut_with_the_end_kept_padded_counted_and_read_back(folder):
    tokenize = CaptionTokenizer(LanguageModelConfig(folder, caption_length=6))
    ids = pickle.loads(pickle.dumps(tokenize))([*CAPTIONS, LONG])
    assert ids[:, :4].tolist() == [[3, 5, 9, 1], [4, 6, 10, 1], [1, *[IGNORED] * 3], [4, 8, 11, 4]]
    assert ids[3].tolist() == [4, 8, 11, 4, 8, 1] and tokenize.num_tokens(LONG) == 19
    of_bytes = CaptionTokenizer(BYTES)
    (row,) = of_bytes(["ein Käfer"])
    assert of_bytes.decode(row) == "ein Käfer" and row[-1] == of_bytes.end_id


@pytest.mark.parametrize("kind", ["frozen", "trained", "bytes"])
def test_the_stage_resumes_bit_for_bit_and_draws_a_sheet(dual_chain, folder, tmp_path, kind):
    freeze = f"language_model.freeze={kind == 'frozen'}"
    llama = [f"language_model.model={folder}", "language_model.size=null", freeze]
    whole, again = (
        ["reader", f"run_dir={tmp_path}/{name}", *(llama if kind != "bytes" else [])]
        for name in ("whole", "again")
    )
    run = dual_chain.run(*whole)
    dual_chain.run(*again, "training.max_steps=2")
    assert equal(weights(run), weights(dual_chain.run(*again)))
    assert Image.open(run / "samples/step_00000004.png").width > 3 * 128
    # A model with random weights has no preference
    expected = np.log(259 if kind == "bytes" else len(WORDS))
    assert metrics(run)[0]["loss"] == pytest.approx(expected, rel=0.1)


def test_captions_are_learned_and_latents_are_read_as_well(
    dual_chain, tmp_path, tiny_shards, tiny_clip_dir
):
    steps = [*training(max_steps=60, log_every_steps=20), "optimizer.learning_rate=1e-2"]
    first, *_, last = metrics(dual_chain.run("reader", f"run_dir={tmp_path}/codes", *steps))
    assert last["loss"] < first["loss"] / 2 and last["top1"] > 0.7
    tower = f"text_encoder.model=local-dir:{tiny_clip_dir}"
    latents = Experiment(tmp_path, tiny_shards).run("tokenizer", tower, *training(max_steps=1))
    found = dual_chain.run("reader", f"run_dir={tmp_path}/latents", f"tokenizer_run={latents}")
    assert weights(found)["projector.0.weight"].shape == (32, 4)


def test_no_model_two_and_one_that_can_not_learn_are_refused():
    for config in (LanguageModelConfig(), replace(BYTES, model="x"), replace(BYTES, freeze=True)):
        with pytest.raises(ValueError, match="language_model"):
            config.check()
