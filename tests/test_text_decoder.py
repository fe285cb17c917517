"""modeling/text_decoder.py, train_text_decoder.py: what counts, vocabulary, gradients, main()."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_experiment import equal, metrics, training, weights

from modeling.text_decoder import (
    CLIP_VOCABULARY,
    TextAutoencoder,
    TextDecoder,
    TextDecoderConfig,
    caption_losses,
    correct_tokens,
    counted_positions,
)
from modeling.text_encoder import ClipTokenizer
from modeling.text_projector import TextProjectorConfig
from training.checkpoint import EMA_FILE
from training.pipelines import load_projector

L, T, C, V = 8, 24, 4, 40
PROJECTOR = TextProjectorConfig(
    L, T, width=T, depth=1, num_heads=2, mlp_width=20, token_channels=C, dropout=0.0
)
DECODER = TextDecoderConfig(
    width=16, depth=1, num_heads=2, mlp_width=20, dropout=0.0, vocabulary_size=V
)
START, END = 49406, 49407
VOCABULARY = {START, END, *range(100, 138)}


def build(**options):
    model = TextAutoencoder(PROJECTOR, replace(DECODER, **options))
    model.decoder.fit_vocabulary([torch.tensor([[START, END, *range(100, 138)]])])
    return model


def ids(*words):
    """Start token, words, end token, padding: L ids."""
    return torch.tensor([START, *words, END] + [0] * (L - 2 - len(words)))


# What counts


def test_positions_count_up_to_the_end_token_and_padding_never_does():
    # Id 0 inside a caption is a "!".
    batch = torch.stack([ids(100), ids(101, 0, 102), ids(*range(100, 106))])
    assert counted_positions(batch).tolist() == [0, 1, 2, 8, 9, 10, 11, 12, *range(16, 24)]
    row = ClipTokenizer(L)(["hi !"])[0]
    assert row.argmax() == 3 and row.max() == END == CLIP_VOCABULARY - 1


def test_the_loss_is_the_cross_entropy_of_known_tokens():
    logits = torch.randn(3, V, dtype=torch.float64)
    terms = caption_losses(logits, torch.tensor([4, -1, 7]))
    expected = -(logits.float().log_softmax(-1)[[0, 2], [4, 7]]).mean()
    torch.testing.assert_close(terms["cross_entropy"], expected)
    right = caption_losses(torch.eye(V)[:3], torch.tensor([0, -1, 2]))
    assert right["token_accuracy"].item() == pytest.approx(2 / 3)
    nothing = caption_losses(torch.zeros(2, V), torch.tensor([-1, -1]))
    assert nothing["cross_entropy"] == 0 and nothing["token_accuracy"] == 0


def test_a_caption_is_right_if_all_its_tokens_are_whatever_follows_the_end():
    truth = torch.stack([ids(100, 101), ids(100, 101), ids(100)])
    predicted = truth.clone()
    predicted[0, 4:], predicted[0, 0] = 7, 7  # after the end, and the start token
    predicted[1, 1] = 102
    right, counted = correct_tokens(predicted, truth)
    assert right.tolist() == [3, 2, 2] and counted.tolist() == [3, 3, 2]


# The vocabulary


def test_a_small_vocabulary_has_the_most_frequent_ids_in_rising_order():
    decoder = TextDecoder(replace(DECODER, vocabulary_size=3), L, C)
    batches = [torch.tensor([[9, 5, 5], [7, 7, 1]]), torch.tensor([[5, 7, 2]])]
    assert decoder.fit_vocabulary(batches) == 2
    assert decoder.token_ids.tolist() == [1, 5, 7]  # of those that occur once, the smallest
    assert decoder.classes_of(torch.tensor([[5, 9], [1, 2]])).tolist() == [[1, -1], [0, -1]]


# Training pass


def forward(model, sample=False, noise=0.0):
    torch.manual_seed(1)
    batch = torch.stack([ids(100, 101), ids(102)])
    counted = counted_positions(batch)
    return model(torch.randn(2, L, T), counted, batch.flatten()[counted], sample, noise)


def test_gradients_reach_decoder_and_projector_but_not_the_unused_alignment():
    model = build()
    out = forward(model, sample=True)
    loss = caption_losses(out.logits, out.classes)["cross_entropy"]
    (loss + out.mean.sum() + out.logvar.sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("projector.alignment"), name


def test_the_logits_of_the_training_pass_are_those_of_decoding():
    model = build().eval()
    out, batch = forward(model), torch.stack([ids(100, 101), ids(102)])
    predicted = model.decoder(out.mean)
    assert predicted.shape == (2, L) and {*predicted.flatten().tolist()} <= VOCABULARY
    expected = model.decoder.token_ids[out.logits.argmax(-1)]
    assert torch.equal(expected, predicted.flatten()[counted_positions(batch)])


# The stage


def accuracy(run, step):
    return json.loads((run / "samples" / f"step_{step:08d}.json").read_text())


def test_accuracies_are_reported_while_training_and_on_held_out_captions(chain):
    run = chain.folder / "text_decoder"
    names = {"cross_entropy", "kl", "token_accuracy", "z_text_between_captions_std"}
    assert all(names <= line.keys() for line in metrics(run))
    for step in (2, 4):
        report = accuracy(run, step)
        assert report["train"]["captions"] == 48 and report["heldout"]["captions"] == 24
        assert {*report["heldout"]["examples"][0]} == {"caption", "decoded"}


def test_captions_come_back_from_their_own_latents(chain, tmp_path):
    options = ["optimizer.learning_rate=0.01", "losses.kl_weight=0", "projector.dropout=0"]
    options += training(max_steps=120, log_every_steps=20, checkpoint_every_steps=120)
    options += training(sample_every_steps=0)
    run = chain.run_in(tmp_path, "text_decoder", *options, "text_decoder.dropout=0")
    assert metrics(run)[-1]["cross_entropy"] < 0.2 * metrics(run)[0]["cross_entropy"]
    report = accuracy(run, 120)
    assert report["train"]["caption_accuracy"] == 1.0
    assert all(e["caption"] == e["decoded"] for e in report["train"]["examples"])


def test_captions_of_image_shards_serve_as_well_as_stored_text_states(chain, tmp_path, tiny_shards):
    stored = weights(chain.folder / "text_decoder")
    shards = [f"data.shards=[{tiny_shards}/*.tar]", "heldout_shards=[]"]
    run = chain.run_in(tmp_path, "text_decoder", *shards)
    assert "heldout" not in accuracy(run, 4)
    for name, x in weights(run).items():  # states are stored as float16
        torch.testing.assert_close(x, stored[name], rtol=0.05, atol=5e-3)


def test_a_frozen_projector_is_that_of_the_run_bit_for_bit(chain, tmp_path):
    source = chain.folder / "text_projector"
    start = [f"projector_run={source}", "projector=null"]
    frozen = ["freeze_projector=true", "losses.kl_weight=0"]
    for name, options in (("frozen", frozen), ("free", [])):
        run = chain.run_in(tmp_path / name, "text_decoder", *start, *options)
        found = dict(load_projector(run).state_dict())
        assert equal(found, weights(source, EMA_FILE)) == (name == "frozen")


def test_a_vocabulary_that_is_too_small_is_said(chain, tmp_path, capsys):
    run = chain.run_in(tmp_path, "text_decoder", "text_decoder.vocabulary_size=5")
    assert "text_decoder.vocabulary_size=5: the 5 rarest ids" in capsys.readouterr().out
    assert accuracy(run, 4)["train"]["token_accuracy"] < 1
