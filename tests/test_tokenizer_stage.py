"""train_tokenizer.py: the adversarial game, its resume, perceptual loss, weights to start from."""

from functools import partial

import pytest
import torch
from conftest import shape_sample
from safetensors.torch import load_file
from test_resume import interrupt, state
from tiny_experiment import equal, metrics, training, weights

import train_tokenizer
from data import shards
from data.images import ImageTextConfig, image_reader
from data.tar import write_shard
from modeling import perceptual
from modeling.discriminator import Discriminator
from modeling.image_tokenizer import ImageTokenizerConfig, TextContrast
from modeling.text_encoder import load_text_encoder
from training import checkpoint as ckpt
from training.loading import load_tokenizer, text_encoder_config
from training.pictures import SheetConfig

GAME = ("adversarial.weight=0.1", "adversarial.start_step=2")
GAME += (*training(log_every_steps=1, checkpoint_every_steps=1, keep_checkpoints=9),)
DISCRIMINATOR_FILE = "discriminator_model.safetensors"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A step of the discriminator's own width, 128, takes most of a second."""
    monkeypatch.setattr(train_tokenizer, "Discriminator", partial(Discriminator, width=32))


def discriminator_at(run, step):
    return load_file(ckpt.checkpoint_folders(run)[step] / DISCRIMINATOR_FILE)


def test_the_adversarial_part_switches_on_at_its_step_and_changes_both_networks(chain, tmp_path):
    game = chain.run_in(tmp_path / "game", "tokenizer", *GAME)
    plain = chain.run_in(tmp_path / "plain", "tokenizer", *GAME, "adversarial.weight=0")
    lines = metrics(game)
    for name in ("adversarial", "discriminator/gradient_norm"):
        assert [name in line for line in lines] == [False, False, True, True]
    assert all("adversarial" not in line for line in metrics(plain))
    assert not list(plain.rglob("*discriminator*"))

    def model_at(run, step):
        return load_file(ckpt.checkpoint_folders(run)[step] / ckpt.MODEL_FILE)

    same = [equal(model_at(game, step), model_at(plain, step)) for step in (1, 2, 3)]
    assert same == [True, True, False]  # equal up to the start
    before, first, second = (discriminator_at(game, step) for step in (2, 3, 4))
    assert not equal(before, first) and not equal(first, second)
    assert before["lecam.ema_real"] == 0 != first["lecam.ema_real"]
    assert lines[2]["discriminator/hinge"] == pytest.approx(1, abs=0.5)  # logits are near 0


def test_the_generator_leaves_no_gradient_in_the_discriminator(chain, tmp_path, monkeypatch):
    seen = []
    original = train_tokenizer.descend

    def checked(network, *rest):
        if isinstance(network.module, Discriminator):
            seen.append([p.grad is None and p.requires_grad for p in network.module.parameters()])
        return original(network, *rest)

    monkeypatch.setattr(train_tokenizer, "descend", checked)
    chain.run_in(tmp_path, "tokenizer", *GAME)
    assert len(seen) == 2 and all(map(all, seen))


def test_a_game_with_every_loss_that_is_stopped_resumes_bit_for_bit(
    chain, tmp_path, monkeypatch, vgg_file, convnext_file
):
    monkeypatch.setattr(perceptual, "CONVNEXT_SIZE", 64)  # 224 take a twelfth of a second a pass
    options = [*GAME, "training.batch_size=2", "training.gradient_accumulation=2"]
    options += ["losses.perceptual_weight=1.1", f"perceptual.vgg_weights={vgg_file}"]
    options += [f"perceptual.convnext_weights={convnext_file}", "losses.l1_weight=0.1"]
    whole = chain.run_in(tmp_path / "whole", "tokenizer", *options)
    call = 2 * 3 + 2  # in the second pass of step 4
    interrupt(monkeypatch, call, chain, tmp_path / "parts", "tokenizer", *options)
    parts = chain.run_in(tmp_path / "parts", "tokenizer", *options)
    last = max(ckpt.checkpoint_folders(whole))
    assert equal(state(parts), state(whole)) and metrics(parts) == metrics(whole)
    assert equal(discriminator_at(parts, last), discriminator_at(whole, last))
    line = metrics(whole)[-1]
    names = {"weighted/adversarial", "discriminator/lecam", "weighted/perceptual", "convnext"}
    assert names <= line.keys()
    weighted = [value for name, value in line.items() if name.startswith("weighted/")]
    assert line["loss"] == pytest.approx(sum(weighted), rel=1e-5)
    assert line["weighted/perceptual"] == pytest.approx(1.1 * line["perceptual"], rel=1e-5)


def test_the_discriminators_schedule_begins_at_its_start(chain, tmp_path):
    schedule = {"warmup_steps": 1000, "weight_decay": 0, "learning_rate": 1.0}
    options = [f"discriminator_optimizer.{name}={value}" for name, value in schedule.items()]
    run = chain.run_in(tmp_path, "tokenizer", *GAME, *options)
    before, after = (discriminator_at(run, step) for step in (2, 3))
    moved = max((after[name] - before[name]).abs().max() for name in before if "lecam" not in name)
    # Adam's first step has the size of the learning rate, 1/1000 of the peak.
    assert 0 < moved <= 1.01e-3


def test_the_log_shows_the_use_of_the_channels(chain):
    line = metrics(chain.folder / "tokenizer")[-1]
    assert 0 <= line["channels_in_use"] <= 1
    per_channel = [line[f"posterior_std/{c}"] for c in range(4)]
    assert line["posterior_std"] == pytest.approx(sum(per_channel) / 4, rel=1e-5)


def test_latents_learn_to_tell_their_captions_apart(chain, tmp_path):
    options = ["losses.contrast_weight=0.1", *training(max_steps=40, log_every_steps=1)]
    run = chain.run_in(tmp_path, "tokenizer", *options, "optimizer.learning_rate=3e-3")
    values = [line["contrast"] for line in metrics(run)]
    assert sum(values[-5:]) < sum(values[:5]) - 1
    assert equal(load_tokenizer(run).state_dict(), weights(run, ckpt.EMA_FILE))


def test_padding_has_no_part_in_the_contrast():
    contrast = TextContrast(ImageTokenizerConfig(text_width=8, token_channels=4))
    states, latents = torch.randn(2, 5, 8), torch.randn(2, 3, 4)
    states[:, 3:] = 0
    expected = contrast(latents, states[:, :3])
    for value, other in zip(contrast(latents, states), expected):
        torch.testing.assert_close(value, other)


# Other weights to start from


def test_weights_of_another_size_are_taken_over_as_far_as_they_fit_and_the_rest_is_listed(
    chain, tmp_path, capsys
):
    source = chain.folder / "tokenizer"
    options = [f"init_from={source}", "tokenizer.image_size=64", "tokenizer.token_channels=6"]
    options += ["training.max_steps=1", "optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]
    run = chain.run_in(tmp_path, "tokenizer", *options, "tokenizer.encoder.depth=2")
    output = capsys.readouterr().out
    own, old = weights(run), weights(source, ckpt.EMA_FILE)
    differing = {name for name in old if own[name].shape != old[name].shape}
    moments = {"encoder.to_moments.weight", "encoder.to_moments.bias"}
    assert differing == moments | {"decoder.embed_tokens.weight"}
    for name in differing | (own.keys() - old.keys()):
        there = tuple(old[name].shape) if name in old else None
        assert f"not taken: {name}: here {tuple(own[name].shape)}, there {there}\n" in output
    assert f"{len(old) - 3} of {len(own)} tensors come from {source}" in output
    assert all(torch.allclose(own[name], old[name], atol=1e-6) for name in old.keys() - differing)
    assert load_tokenizer(run).encode(torch.rand(1, 3, 64, 64)).mean.shape == (1, 16, 6)


def test_a_frozen_encoder_keeps_its_weights_while_the_decoder_learns(chain, tmp_path):
    source = chain.folder / "tokenizer"
    options = (f"init_from={source}", "freeze_encoder=true", "losses.kl_weight=0")
    own = weights(chain.run_in(tmp_path, "tokenizer", *options))
    for name, old in weights(source, ckpt.EMA_FILE).items():
        assert torch.equal(own[name], old) == name.startswith("encoder."), name


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ("freeze_encoder=true init_from=x", "freeze_encoder=true .*losses.kl_weight=0"),
        ("adversarial.weight=0.1 adversarial.start_step=4", "start_step=4 .*max_steps=4"),
        ("init_from=CHAIN/flowtok", "flowtok .*'flowtok'.*'tokenizer'"),
        ("losses.perceptual_weight=1 perceptual.vgg_weights=/gone.pth", "vgg_weights: .*/gone.pth"),
    ],
)
def test_what_can_not_be_trained_is_refused(chain, tmp_path, options, keys):
    options = options.replace("CHAIN", str(chain.folder)).split()
    with pytest.raises(ValueError, match=keys):
        chain.run_in(tmp_path, "tokenizer", *options)
    assert not (tmp_path / "tokenizer").exists()


def test_the_sheets_images_are_read_before_the_first_step(chain, tmp_path):
    empty = tmp_path / "empty.tar"
    empty.touch()
    with pytest.raises(ValueError, match="no usable sample"):
        chain.run_in(tmp_path / "run", "tokenizer", f"pictures.shards=[{empty}]")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_of_shards_behind_the_last_image_of_a_sheet_none_is_opened(tiny_shards, monkeypatch):
    opened = []
    open_shard = shards.open_shard
    monkeypatch.setattr(shards, "open_shard", lambda path: opened.append(path) or open_shard(path))
    files = [f"{tiny_shards}/train-0000{number}.tar" for number in (0, 1)]
    reader = image_reader(ImageTextConfig(shards=files), 32, None)
    assert len(SheetConfig(num_samples=4).read(reader)["image"]) == 4
    assert opened == files[:1]


def test_eight_images_are_overfitted_to_30_db(chain, tmp_path):
    """A small net, seconds: the gradient reaches everything that a reconstruction needs."""
    file = tmp_path / "shards" / "eight.tar"
    file.parent.mkdir()
    write_shard(file, [shape_sample(number) for number in range(8)])
    size = "{width: 64, depth: 2, num_heads: 2}"
    tokenizer = {"encoder": size, "decoder": size, "token_channels": 8, "latent_grid": "true"}
    tokenizer |= {"query_key_bias": 2, "initial_logvar": -6}
    options = [f"tokenizer.{name}={value}" for name, value in tokenizer.items()]
    options += [f"data.shards=[{file}]", "data.flip_probability=0", "data.random_crop=false"]
    options += ["optimizer.learning_rate=3e-3", "optimizer.warmup_steps=10"]
    rhythm = ("max_steps", "log_every_steps", "checkpoint_every_steps")
    options += training(**dict.fromkeys(rhythm, 300), sample_every_steps=0)
    run = chain.run_in(tmp_path / "run", "tokenizer", *options, "losses.kl_weight=1e-8")
    net, text_encoder = load_tokenizer(run), load_text_encoder(text_encoder_config(run))
    reader = image_reader(ImageTextConfig(shards=[str(file)]), 32, text_encoder.tokenize)
    batch = next(reader.once(8))
    images = batch["image"].float() / 255
    with torch.no_grad():
        decoded = net.decode(net.encode(images).mean, text_encoder(batch["token_ids"]))
    errors = (decoded.clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
    assert (-10 * errors.log10()).mean() >= 30
