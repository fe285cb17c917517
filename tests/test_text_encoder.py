"""modeling/text_encoder.py: the states are open_clip's own, frozen; captions to ids and back; folders; errors."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_CLIP

from modeling.text_encoder import (
    CONFIG_FILE,
    TextEncoder,
    TextEncoderConfig,
    TextTokenizer,
    build_clip,
    clip_tokenizer,
    load_text_encoder,
    save_clip,
)

L, T = 16, 32
CAPTIONS = ["a red circle", "a black cat on a green sofa", ""]
LONG = " ".join(["circle"] * 40)


@pytest.fixture(scope="module")
def config(tiny_clip_dir):
    return TextEncoderConfig(model=f"local-dir:{tiny_clip_dir}")


@pytest.fixture(scope="module")
def tokenize(config):
    return TextTokenizer(config)


@pytest.fixture(scope="module")
def encoder(config):
    return load_text_encoder(config)


def test_states_pooled_at_the_end_token_and_projected_are_open_clips_text_features(tokenize):
    clip = build_clip(TINY_CLIP).eval()
    encoder, ids = TextEncoder(copy.deepcopy(clip)), tokenize(CAPTIONS)
    states = encoder(ids)
    assert states.shape == (len(CAPTIONS), L, T) and states.dtype == torch.float32
    pooled = states[torch.arange(len(CAPTIONS)), ids.argmax(dim=-1)]
    torch.testing.assert_close(pooled @ clip.text_projection, clip.encode_text(ids))


def test_tower_of_a_clip_that_keeps_it_in_text_is_found(tokenize):
    clip = build_clip(TINY_CLIP)
    wrapper = torch.nn.Module()
    wrapper.text = copy.deepcopy(clip)
    assert torch.equal(TextEncoder(wrapper)(tokenize(CAPTIONS)), TextEncoder(clip)(tokenize(CAPTIONS)))


def test_states_are_causal(encoder, tokenize):
    ids = tokenize(CAPTIONS[:1])
    changed = ids.clone()
    changed[0, 5:] = 1234
    before, after = encoder(ids), encoder(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert all(not torch.allclose(before[:, i], after[:, i]) for i in range(5, L))


def test_states_end_in_the_final_layer_norm(encoder, tokenize):
    assert torch.equal(encoder.ln_final.weight, torch.ones(T))  # as it starts
    states = encoder(tokenize(CAPTIONS))
    torch.testing.assert_close(states.mean(dim=-1), torch.zeros(len(CAPTIONS), L), rtol=0, atol=1e-5)
    torch.testing.assert_close(states.var(dim=-1, correction=0), torch.ones(len(CAPTIONS), L), rtol=0, atol=1e-2)


def test_tower_is_frozen_and_stays_in_eval_mode(encoder, tokenize):
    assert not any(p.requires_grad for p in encoder.parameters())
    parent = torch.nn.ModuleList([encoder]).train()
    assert parent.training and not any(module.training for module in encoder.modules())
    assert not encoder(tokenize(CAPTIONS)).requires_grad


def test_sizes_are_those_of_the_tower(encoder, tokenize):
    assert (encoder.context_length, encoder.width) == (L, T)
    assert tokenize.context_length == L


def test_folder_round_trip_gives_the_same_states(tmp_path, tokenize):
    clip = build_clip(TINY_CLIP)
    save_clip(clip, TINY_CLIP, tmp_path / "new" / "clip")
    loaded = load_text_encoder(TextEncoderConfig(model=f"local-dir:{tmp_path / 'new' / 'clip'}"))
    assert torch.equal(loaded(tokenize(CAPTIONS)), TextEncoder(clip)(tokenize(CAPTIONS)))


def test_a_folder_is_written_aside_and_takes_the_place_of_an_older_one(tmp_path, tokenize, monkeypatch):
    folder = tmp_path / "clip"
    old, new = build_clip(TINY_CLIP), build_clip(TINY_CLIP)
    save_clip(old, TINY_CLIP, folder)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modeling.text_encoder.save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            save_clip(new, TINY_CLIP, folder)
    model = TextEncoderConfig(model=f"local-dir:{folder}")
    assert torch.equal(load_text_encoder(model)(tokenize(CAPTIONS)), TextEncoder(old)(tokenize(CAPTIONS)))
    save_clip(new, TINY_CLIP, folder)
    assert torch.equal(load_text_encoder(model)(tokenize(CAPTIONS)), TextEncoder(new)(tokenize(CAPTIONS)))
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_a_model_with_another_tokenizer_than_clips_is_refused(monkeypatch):
    monkeypatch.setattr("open_clip.get_tokenizer", lambda model: SimpleNamespace(context_length=64))  # as HFTokenizer
    with pytest.raises(ValueError, match="text_encoder.model ViT-B-16-SigLIP has no CLIP BPE tokenizer"):
        TextTokenizer(TextEncoderConfig(model="ViT-B-16-SigLIP"))


def test_ids_are_those_of_the_clip_vocabulary_at_the_folders_context_length(tokenize):
    assert torch.equal(tokenize([*CAPTIONS, LONG]), clip_tokenizer(L)([*CAPTIONS, LONG]))
    assert torch.equal(tokenize(["a cat"])[0, :5], torch.tensor([49406, 320, 2368, 49407, 0]))  # OpenAI's ids


def test_cut_captions_keep_their_end_token(tokenize):
    ids = tokenize([LONG])
    assert ids.shape == (1, L) and ids[0, 0] == 49406 and ids[0, -1] == 49407
    assert (ids == 49407).sum() == 1


def test_num_tokens_counts_the_uncut_caption(tokenize):
    assert tokenize.num_tokens("") == 2
    assert tokenize.num_tokens("a cat") == 4 == (tokenize(["a cat"]) != 0).sum()
    assert tokenize.num_tokens(LONG) == 42


@pytest.mark.parametrize("caption", ["a red circle", "wow ! a cat", "!~", ""])
def test_decoding_gives_the_caption_back(tokenize, caption):
    assert tokenize.decode(tokenize([caption])[0]) == caption


def test_decoding_a_cut_caption_gives_its_first_words(tokenize):
    assert tokenize.decode(tokenize([LONG])[0]) == " ".join(["circle"] * (L - 2))


def test_decoding_ids_without_an_end_token_drops_the_padding(tokenize):
    assert tokenize.decode(torch.tensor([49406, 320, 2368, 0, 0])) == "a cat"


def test_tokenizer_survives_pickling(tokenize):
    copied = pickle.loads(pickle.dumps(tokenize))
    assert len(pickle.dumps(tokenize)) < 1000  # no vocabulary travels to the workers
    assert torch.equal(copied(CAPTIONS), tokenize(CAPTIONS)) and copied.context_length == L


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="unknown open_clip model 'ViT-L-14-337'"):
        load_text_encoder(TextEncoderConfig(model="ViT-L-14-337"))


def test_named_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="text_encoder.pretrained is empty"):
        load_text_encoder(TextEncoderConfig(model="ViT-B-32", pretrained=""))


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="cannot load the text tower 'ViT-B-32', pretrained 'opena1'"):
        load_text_encoder(TextEncoderConfig(model="ViT-B-32", pretrained="opena1"))


@pytest.mark.parametrize("load", [load_text_encoder, TextTokenizer])
def test_missing_folder_is_refused_with_the_way_to_make_it(tmp_path, load):
    with pytest.raises(ValueError, match=f"nowhere holds no {CONFIG_FILE}.*train_text_encoder"):
        load(TextEncoderConfig(model=f"local-dir:{tmp_path / 'nowhere'}"))


def test_folder_whose_writing_was_cut_short_is_refused(tmp_path):
    save_clip(build_clip(TINY_CLIP), TINY_CLIP, tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=f"holds no {CONFIG_FILE}"):
        load_text_encoder(TextEncoderConfig(model=f"local-dir:{tmp_path}"))


def test_folder_without_weights_is_refused_instead_of_giving_a_random_tower(tmp_path, tiny_clip_dir):
    (tmp_path / CONFIG_FILE).write_bytes((tiny_clip_dir / CONFIG_FILE).read_bytes())
    with pytest.raises(ValueError, match="cannot load the text tower"):
        load_text_encoder(TextEncoderConfig(model=f"local-dir:{tmp_path}"))


def test_model_without_a_token_embedding_is_refused():
    with pytest.raises(ValueError, match="Linear is no CLIP text transformer"):
        TextEncoder(torch.nn.Linear(2, 2))
