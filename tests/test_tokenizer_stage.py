"""train_tokenizer.py: the adversarial game and its resume, the perceptual loss, other weights to start from."""

import math

import pytest
import torch
from conftest import shape_sample
from safetensors.torch import load_file
from test_resume import Stop, spoil, state, stop
from tiny_experiment import equal, metrics, weights

import train_tokenizer
from data.images import ImageTextConfig, image_reader
from data.tar import write_shard
from modeling.text_encoder import load_text_encoder
from training import checkpoint as ckpt
from training.loading import load_tokenizer, text_encoder_config

GAME = (
    "adversarial.weight=0.1",
    "adversarial.start_step=2",
    "training.log_every_steps=1",
    "training.checkpoint_every_steps=1",
    "training.keep_checkpoints=9",
)
DISCRIMINATOR_FILE = "discriminator_model.safetensors"


def discriminator_at(run, step):
    return load_file(ckpt.checkpoint_folders(run)[step] / DISCRIMINATOR_FILE)


def test_the_adversarial_part_switches_on_at_its_step_and_changes_both_networks(chain, tmp_path):
    game = chain.run_in(tmp_path / "game", "tokenizer", *GAME)
    plain = chain.run_in(tmp_path / "plain", "tokenizer", *GAME, "adversarial.weight=0")
    lines = metrics(game)
    assert ["adversarial" in line for line in lines] == [False, False, True, True]
    assert ["discriminator/gradient_norm" in line for line in lines] == [False, False, True, True]
    assert all("adversarial" not in line for line in metrics(plain))
    names = [path.name for path in ckpt.latest_checkpoint(plain)[1].iterdir()]
    assert not any("discriminator" in name for name in names)
    for step in (1, 2):  # equal up to the start
        folders = [ckpt.checkpoint_folders(run)[step] for run in (game, plain)]
        assert equal(*(load_file(folder / ckpt.MODEL_FILE) for folder in folders))
    assert not equal(weights(game), weights(plain))
    before, first, second = (discriminator_at(game, step) for step in (2, 3, 4))
    assert not equal(before, first) and not equal(first, second)
    assert before["lecam.ema_real"] == 0 != first["lecam.ema_real"]
    assert lines[2]["discriminator/hinge"] == pytest.approx(
        1, abs=0.5
    )  # nearly untrained: logits near 0


def test_the_generator_leaves_no_gradient_in_the_discriminator(chain, tmp_path, monkeypatch):
    original, seen = train_tokenizer.discriminator_terms, []

    def checked(config, adversary, real, fake):
        seen.append([p.grad is None and p.requires_grad for p in adversary.parameters()])
        return original(config, adversary, real, fake)

    monkeypatch.setattr(train_tokenizer, "discriminator_terms", checked)
    chain.run_in(tmp_path, "tokenizer", *GAME)
    assert len(seen) == 2 and all(map(all, seen))


def test_a_game_that_is_stopped_resumes_bit_for_bit(chain, tmp_path, monkeypatch):
    options = [*GAME, "training.max_steps=6", "training.gradient_accumulation=2"]
    whole = chain.run_in(tmp_path / "whole", "tokenizer", *options)
    with monkeypatch.context() as patch:
        spoil(patch, "tokenizer", call=2 * 3 + 2, action=stop)  # in the second pass of step 4
        with pytest.raises(Stop):
            chain.run_in(tmp_path / "parts", "tokenizer", *options)
    parts = chain.run_in(tmp_path / "parts", "tokenizer", *options)
    assert equal(state(parts), state(whole))
    assert equal(discriminator_at(parts, 6), discriminator_at(whole, 6))
    assert metrics(parts) == metrics(whole)


def test_a_tokenizer_with_all_losses_on_resumes_bit_for_bit(
    chain, tmp_path, monkeypatch, vgg_file, convnext_file
):
    options = [
        *GAME,
        "training.batch_size=2",
        "losses.perceptual_weight=1.1",
        "losses.l1_weight=0.1",
    ]
    options += [
        f"perceptual.vgg_weights={vgg_file}",
        f"perceptual.convnext_weights={convnext_file}",
    ]
    whole = chain.run_in(tmp_path / "whole", "tokenizer", *options)
    with monkeypatch.context() as patch:
        spoil(patch, "tokenizer", call=4, action=stop)
        with pytest.raises(Stop):
            chain.run_in(tmp_path / "parts", "tokenizer", *options)
    parts = chain.run_in(tmp_path / "parts", "tokenizer", *options)
    assert equal(state(parts), state(whole)) and equal(
        discriminator_at(parts, 4), discriminator_at(whole, 4)
    )
    assert metrics(parts) == metrics(whole)
    assert {
        "weighted/perceptual",
        "weighted/adversarial",
        "lpips",
        "convnext",
        "discriminator/lecam",
    } <= {*metrics(whole)[-1]}


def test_the_discriminators_schedule_begins_at_its_start(chain, tmp_path):
    options = (
        "discriminator_optimizer.warmup_steps=1000",
        "discriminator_optimizer.weight_decay=0",
    )
    run = chain.run_in(
        tmp_path, "tokenizer", *GAME, *options, "discriminator_optimizer.learning_rate=1.0"
    )
    before, after = (discriminator_at(run, step) for step in (2, 3))
    moved = max((after[name] - before[name]).abs().max() for name in before if "lecam" not in name)
    assert (
        0 < moved <= 1.01e-3
    )  # Adam's first step has the size of the learning rate, 1/1000 of the peak


def test_a_start_beyond_the_end_is_refused(chain):
    with pytest.raises(
        ValueError, match=r"adversarial.start_step=4 is not before training.max_steps=4"
    ):
        chain.config("tokenizer", "adversarial.weight=0.1", "adversarial.start_step=4")


def test_the_log_shows_raw_and_weighted_terms_and_the_use_of_the_channels(chain, capsys):
    line = metrics(chain.folder / "tokenizer")[-1]
    assert line["loss"] == pytest.approx(line["weighted/l2"] + line["weighted/kl"], rel=1e-5)
    assert line["weighted/kl"] == pytest.approx(1e-6 * line["kl"], rel=1e-5)
    assert 0 <= line["channels_in_use"] <= 1
    per_channel = [line[f"posterior_std/{c}"] for c in range(4)]
    assert line["posterior_std"] == pytest.approx(sum(per_channel) / 4, rel=1e-5)


# Perceptual loss


def test_the_perceptual_loss_teaches_and_absent_weights_stop_before_training(
    chain, tmp_path, vgg_file
):
    options = (
        "losses.perceptual_weight=1.1",
        "perceptual.convnext_weight=0",
        "training.max_steps=1",
    )
    run = chain.run_in(tmp_path, "tokenizer", *options, f"perceptual.vgg_weights={vgg_file}")
    line = metrics(run)[-1]
    assert line["perceptual"] == pytest.approx(line["lpips"]) and math.isfinite(line["lpips"])
    assert line["loss"] == pytest.approx(
        sum(v for n, v in line.items() if n.startswith("weighted/")), rel=1e-5
    )
    with pytest.raises(ValueError, match="perceptual.vgg_weights: no file /nowhere.pth"):
        chain.run_in(
            tmp_path / "other", "tokenizer", *options, "perceptual.vgg_weights=/nowhere.pth"
        )
    assert not (tmp_path / "other").exists()


# Other weights to start from


def test_weights_of_another_size_are_taken_over_as_far_as_they_fit_and_the_rest_is_listed(
    chain, tmp_path, capsys
):
    source = chain.folder / "tokenizer"
    options = (
        f"init_from={source}",
        "tokenizer.image_size=64",
        "tokenizer.token_channels=6",
        "training.max_steps=1",
    )
    nothing = ("optimizer.learning_rate=1e-30", "optimizer.weight_decay=0")
    run = chain.run_in(tmp_path, "tokenizer", *options, *nothing)
    output = capsys.readouterr().out
    own, old = weights(run), weights(source, ckpt.EMA_FILE)
    differing = {name for name in old if own[name].shape != old[name].shape}
    assert differing == {
        "encoder.to_moments.weight",
        "encoder.to_moments.bias",
        "decoder.embed_tokens.weight",
    }
    assert all(
        f"starts afresh: {name} {tuple(own[name].shape)}, there" in output for name in differing
    )
    assert f"{len(old) - 3} of {len(own)} tensors come from {source}" in output
    assert all(torch.allclose(own[name], old[name], atol=1e-6) for name in old.keys() - differing)
    assert (
        "encoder.latent_positions" not in differing
    )  # positions of the latents stay at any resolution
    assert load_tokenizer(run).encode(torch.rand(1, 3, 64, 64)).mean.shape == (1, 16, 6)


def test_weights_that_have_no_place_any_more_are_listed(chain, tmp_path, capsys):
    short = "training.max_steps=1"
    source = chain.run_in(tmp_path / "deep", "tokenizer", "tokenizer.encoder.depth=2", short)
    chain.run_in(tmp_path, "tokenizer", f"init_from={source}", short)
    output = capsys.readouterr().out
    old, own = weights(source, ckpt.EMA_FILE), weights(tmp_path / "tokenizer")
    lost = old.keys() - own.keys()
    assert lost and all(
        f"left behind: {name} {tuple(old[name].shape)}\n" in output for name in lost
    )


def test_a_frozen_encoder_keeps_its_weights_while_the_decoder_learns(chain, tmp_path):
    source = chain.folder / "tokenizer"
    options = (f"init_from={source}", "freeze_encoder=true", "losses.kl_weight=0")
    own, old = (
        weights(chain.run_in(tmp_path, "tokenizer", *options)),
        weights(source, ckpt.EMA_FILE),
    )
    for name in old:
        assert torch.equal(own[name], old[name]) == name.startswith("encoder."), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["freeze_encoder=true"], "needs a trained encoder: set init_from"),
        (["freeze_encoder=true", "init_from=x"], "set losses.kl_weight=0"),
    ],
)
def test_a_frozen_encoder_without_sense_is_refused(chain, options, message):
    with pytest.raises(ValueError, match=message):
        chain.config("tokenizer", *options)


def test_a_run_of_another_kind_gives_no_tokenizer(chain, tmp_path):
    with pytest.raises(ValueError, match="flowtok .*'flowtok'.*'tokenizer'"):
        chain.run_in(tmp_path, "tokenizer", f"init_from={chain.folder}/flowtok")


def test_eight_images_are_overfitted_to_30_db(chain, tmp_path):
    """A small net, seconds: the losses and the gradient reach everything that a reconstruction needs."""
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "eight.tar", [shape_sample(number) for number in range(8)])
    size = "{width: 64, depth: 2, num_heads: 2}"
    options = [
        f"data.shards=[{tmp_path}/shards/eight.tar]",
        "data.flip_probability=0",
        "data.random_crop=false",
    ]
    options += [
        f"tokenizer.encoder={size}",
        f"tokenizer.decoder={size}",
        "tokenizer.token_channels=8",
    ]
    options += [
        "tokenizer.latent_grid=true",
        "tokenizer.query_key_bias=2",
        "tokenizer.initial_logvar=-6",
    ]
    options += [
        "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=10",
        "training.max_steps=300",
    ]
    options += [
        "training.log_every_steps=300",
        "training.checkpoint_every_steps=300",
        "training.sample_every_steps=0",
    ]
    run = chain.run_in(tmp_path / "run", "tokenizer", *options, "losses.kl_weight=1e-8")
    error = metrics(run)[-1]["l2"]
    tokenizer, text = load_tokenizer(run), text_encoder_config(run)
    assert tokenizer.config.latent_grid
    text_encoder = load_text_encoder(text)
    config = ImageTextConfig(shards=[f"{tmp_path}/shards/eight.tar"])
    batch = next(image_reader(config, 32, text_encoder.tokenize).once(8))
    images = batch["image"].float() / 255
    with torch.no_grad():
        states = text_encoder(batch["token_ids"])
        decoded = tokenizer.decode(tokenizer.encode(images).mean, states)
    errors = (decoded.clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
    assert (-10 * errors.log10()).mean() >= 30, error
