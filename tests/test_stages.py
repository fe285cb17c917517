"""The real main() of every stage on tiny sizes: what it leaves, that losses fall, options act."""

import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import reset_accelerate, shape_sample
from PIL import Image
from tiny_experiment import (
    Experiment,
    all_different,
    equal,
    last_weights,
    metrics,
    to_text,
    training,
    weights,
)

from data.tar import read_shard, write_shard
from modeling.layers import Posterior
from train_flowtok import load_source
from training.checkpoint import EMA_FILE, checkpoint_folders
from training.loading import load_tokenizer, text_encoder_config
from training.metrics import MetricLog
from training.run import start_run
from training.tokens import TokensInfo, load_tokens_info, open_stored_tokens

RANDOM_PROJECTOR = "projector_run='' projector.width=16 projector.depth=1 projector.num_heads=2"
RANDOM_PROJECTOR = [*RANDOM_PROJECTOR.split(), "projector.mlp_width=32"]
TRAINED = ("text_encoder", "tokenizer", "text_projector", "text_decoder", "flowtok")


# What a chain leaves behind


@pytest.mark.parametrize("stage", TRAINED)
def test_a_trained_stage_leaves_config_metrics_pictures_and_the_last_checkpoint(chain, stage):
    run, lines = chain.folder / stage, metrics(chain.folder / stage)
    assert list(checkpoint_folders(run)) == [line["step"] for line in lines] == [2, 4]
    names = {"loss", "gradient_norm", "learning_rate"}
    if stage in ("text_projector", "flowtok"):
        names |= {"z_text_std", "z_text_between_captions_std"}
    else:  # text that is tokenized here, not read as stored states
        names |= {"captions_cut"}
    assert all(names <= line.keys() for line in lines)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["stage"] == stage and saved["training"] == asdict(chain.config(stage).training)
    if stage in ("tokenizer", "text_projector", "flowtok"):
        for step in (2, 4):
            Image.open(run / "samples" / f"step_{step:08d}.png").verify()
    assert not list(run.rglob("*.tmp"))


def test_no_process_leaves_while_the_log_is_being_closed(chain, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(MetricLog, "close", lambda log: order.append("closed"))
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda _: order.append("all are here"))
    chain.run_in(tmp_path, "text_projector", "training.max_steps=1")
    assert order[-2:] == ["closed", "all are here"]


def test_stored_tokens_have_their_sizes_and_their_measured_scale(chain):
    info = TokensInfo.load(chain.folder / "tokens")
    assert (info.num_samples, info.num_tokens, info.token_channels) == (48, 16, 4)
    scale = weights(chain.folder / "flowtok")["latent_scale"].item()
    assert scale == pytest.approx(info.latent_scale)
    for name in ("report_train", "report_heldout", "samples"):
        Image.open(chain.folder / f"{name}.png").verify()


# Losses fall


@pytest.fixture(scope="module")
def few(tmp_path_factory, chain):
    """All stages up to the projector on four samples: one batch, seen again and again."""
    shards = tmp_path_factory.mktemp("few")
    write_shard(shards / "train-00000.tar", [shape_sample(number) for number in (0, 1, 6, 11)])
    experiment = Experiment(tmp_path_factory.mktemp("few_experiment"), shards)
    for stage in ("text_encoder", "tokenizer", "tokens", "text_projector"):
        experiment.run(stage, *LONG[stage])
    return experiment


OVERFIT = training(batch_size=4, log_every_steps=10, sample_every_steps=0, max_steps=120)
OVERFIT += [*training(checkpoint_every_steps=1000), "optimizer.learning_rate=0.005"]
STILL = "data.flip_probability=0"
NO_NOISE = ["flow.sample_image_latent=false", "flow.sample_text_latent=false"]
NO_NOISE += ["flow.null_probability=0", "sampling.guidance=1"]
LONG = {
    "text_encoder": [*OVERFIT, STILL, "optimizer.learning_rate=0.0005"],
    "tokenizer": ["training.batch_size=4"],
    "tokens": [],
    "text_projector": [*OVERFIT, "projector.dropout=0", "losses.kl_weight=0"],
    "flowtok": [*OVERFIT, *NO_NOISE],
}


def fall(run, name):
    """Last value of a metric over its first."""
    lines = metrics(run)
    return lines[-1][name] / lines[0][name]


@pytest.mark.parametrize(
    ("stage", "name", "share"),
    [
        ("text_encoder", "loss", 0.3),
        ("text_projector", "alignment", 0.2),
        ("text_projector", "image_regression", 0.2),
    ],
)
def test_one_batch_is_overfitted(few, stage, name, share):
    assert fall(few.folder / stage, name) < share


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_one_batch_is_overfitted_by_the_flow(few, tmp_path, direction):
    options = ["flow.projector=frozen"]
    if direction == "image_to_text":
        decoder = ["projector.dropout=0", "losses.kl_weight=0", "heldout_shards=[]"]
        few.run("text_decoder", *decoder, "training.batch_size=4")
        shards = few.config("tokens").data.shards[0].removesuffix("/*.tar")
        options = to_text(few.folder, shards)
    run = few.run_in(tmp_path, "flowtok", *LONG["flowtok"], *options)
    assert fall(run, "flow_matching") < 0.5


# Options act


def test_every_projector_mode_runs_and_frozen_keeps_the_weights_bit_for_bit(chain, tmp_path):
    modes = [f"flow.projector={mode}" for mode in ("detached", "frozen")]
    runs = last_weights(chain, tmp_path, "flowtok", modes)
    runs["joint"] = weights(chain.folder / "flowtok")

    def projector_of(tensors):
        return {n.removeprefix("projector."): x for n, x in tensors.items() if "projector." in n}

    projectors = {mode: projector_of(tensors) for mode, tensors in runs.items()}
    assert all_different(projectors)
    source = weights(chain.folder / "text_projector", EMA_FILE)
    assert equal(projectors["flow.projector=frozen"], source)
    assert equal(projector_of(weights(tmp_path / "1" / "flowtok", EMA_FILE)), source)
    assert "alignment" not in metrics(tmp_path / "1" / "flowtok")[0]


OFF = "losses.kl_weight=0 losses.alignment_weight=0"
OPTIONS = [
    ("flowtok", ["flow.time_distribution=logit_normal", "flow.time_distribution=power"]),
    ("flowtok", ["flow.null_probability=0 sampling.guidance=1", "flow.null_probability=0.5"]),
    ("flowtok", ["flow.sample_text_latent=false", "flow.sample_image_latent=false"]),
    ("flowtok", [*OFF.split(), OFF, "training.max_gradient_norm=0.01"]),
    ("flowtok", ["training.gradient_accumulation=4", "training.seed=1"]),
    ("text_projector", ["losses.kl_weight=1", "losses.kl_weight=1 losses.kl_form=wall"]),
    ("tokenizer", ["losses.l1_weight=1", "losses.gradient_weight=1", "losses.kl_weight=0.1"]),
    ("tokenizer", [STILL, "data.shuffle_buffer=1", "tokenizer.query_key_bias=1"]),
    ("tokenizer", ["tokenizer.initial_logvar=-4", "tokenizer.latent_grid=true"]),
    ("text_decoder", ["losses.kl_weight=0.1", "losses.latent_noise=0.5"]),
    ("text_decoder", ["text_decoder.dropout=0", "text_decoder.pre_norm=true"]),
    ("text_decoder", ["text_decoder.vocabulary_size=49408"]),
]


@pytest.mark.parametrize(("stage", "options"), OPTIONS)
def test_options_run_and_change_the_weights(chain, tmp_path, stage, options):
    runs = last_weights(chain, tmp_path, stage, options)
    assert all_different({"as it is": weights(chain.folder / stage), **runs})


def test_the_ablations_of_the_alignment_run_and_change_the_weights(chain, tmp_path):
    start = " ".join(RANDOM_PROJECTOR)  # without stage 2
    options = ("losses.alignment_form=cosine_margin", "projector.alignment_target=average_pool")
    runs = last_weights(chain, tmp_path, "flowtok", [start, *(f"{start} {o}" for o in options)])
    assert all_different(runs)
    base, cosine, pooled = runs.values()
    name = "projector.alignment.log_temperature"
    assert not torch.equal(base[name], cosine[name])
    assert not any("alignment.mlp" in key for key in pooled)


def test_fine_tuning_starts_from_ema_weights_at_step_0_and_resumes_from_itself(chain, tmp_path):
    pretrained = chain.folder / "flowtok"
    options = ["projector_run=''", f"init_from={pretrained}", "optimizer.weight_decay=0"]
    options += ["optimizer.learning_rate=1e-30", "optimizer.warmup_steps=0"]  # nothing is learned
    run = chain.run_in(tmp_path, "flowtok", *options, "training.max_steps=2")
    start, tuned = weights(pretrained, EMA_FILE), weights(run)
    assert all(torch.allclose(tuned[name], start[name], atol=1e-6) for name in start)
    assert [line["step"] for line in metrics(run)] == [2]
    more = chain.run_in(tmp_path, "flowtok", *options)  # resumes: not from init_from again
    assert [line["step"] for line in metrics(more)] == [2, 4]


def test_another_path_than_that_of_the_weights_to_start_from_is_said(chain, tmp_path, capsys):
    pretrained = chain.folder / "flowtok"
    config = chain.config("flowtok", "projector_run=''", f"init_from={pretrained}")
    run = start_run(tmp_path / "run", "fp32", seed=0)
    load_source(config, run)
    assert "flow.source" not in capsys.readouterr().out
    config.flow.source = "noise"
    load_source(config, run)
    assert f"{pretrained} was trained with flow.source=text" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "mode"), [("tokenizer", "selective"), ("flowtok", "full")])
def test_activation_checkpointing_trains_the_same_weights_bit_for_bit(chain, tmp_path, stage, mode):
    run = chain.run_in(tmp_path, stage, f"activation_checkpointing={mode}")
    assert equal(weights(run), weights(chain.folder / stage))


def test_without_the_image_regression_other_weights_are_trained_and_no_picture_is_drawn(
    chain, tmp_path
):
    run = chain.run_in(tmp_path, "text_projector", "losses.image_regression_weight=0")
    assert not equal(weights(run), weights(chain.folder / "text_projector"))
    assert not (run / "samples").exists()  # z_T is no picture then


def test_two_passes_of_half_the_batch_are_one_pass_of_the_whole(chain, tmp_path, monkeypatch):
    # The posterior's noise differs between the two; all else in this stage is a mean over samples.
    monkeypatch.setattr(Posterior, "sample", lambda self, generator=None: self.mean)
    options = training(log_every_steps=1, max_steps=3)
    one = chain.run_in(tmp_path / "one", "tokenizer", *options)
    two = chain.run_in(tmp_path / "two", "tokenizer", *options, "training.gradient_accumulation=2")
    for whole, halves in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "l2", "kl", "gradient_norm"):
            assert halves[name] == pytest.approx(whole[name], rel=1e-3), name


# Stages fit together, or are refused


def test_states_in_shards_of_unknown_origin_are_not_taken_for_the_towers(chain, tmp_path):
    shard = next((chain.folder / "tokens").glob("*.tar"))
    assert "text.npy" in next(read_shard(shutil.copy(shard, tmp_path)))
    unknown = ["data.any_tokenizer=true", "data.latent_scale=1", f"data.shards=[{tmp_path}/*.tar]"]
    config = chain.config("flowtok", *unknown, "data.captions.window=sentences")
    run = start_run(tmp_path / "run", "fp32", seed=0)
    info = load_tokens_info(config.data, load_tokenizer(config.tokenizer_run), "")
    tower = text_encoder_config(config.tokenizer_run)
    tokens = open_stored_tokens(run, config.data, config.training, info, tower)
    batch = next(iter(tokens.loader))
    assert "token_ids" in batch and "text_states" not in batch


def test_text_states_are_the_same_stored_or_encoded(chain, tmp_path):
    chain.run_in(tmp_path, "tokens", "store_text_states=false")
    states = []
    for folder in (chain.folder, tmp_path):
        reset_accelerate()
        config = chain.config("flowtok", f"data.shards=[{folder}/tokens/*.tar]")
        run = start_run(tmp_path / "run", "fp32", seed=0)
        tokenizer = load_tokenizer(config.tokenizer_run)
        info = load_tokens_info(config.data, tokenizer, config.tokenizer_run)
        text_config = text_encoder_config(config.tokenizer_run)
        tokens = open_stored_tokens(run, config.data, config.training, info, text_config)
        assert (tokens.text_encoder is None) == (folder == chain.folder)
        batch = next(iter(tokens.loader))
        states.append((batch["key"], tokens.text_states(batch)))
    (keys, stored), (other_keys, encoded) = states
    assert keys == other_keys and stored.shape == (8, 16, 64)
    torch.testing.assert_close(stored, encoded, rtol=1e-3, atol=1e-3)


def test_tokens_of_another_tokenizer_are_refused(chain, tmp_path):
    other = chain.run_in(tmp_path, "tokenizer", "training.seed=1", "training.max_steps=1")
    for stage in ("text_projector", "flowtok"):
        with pytest.raises(ValueError, match=f"written with another tokenizer .*{other}"):
            chain.run_in(tmp_path, stage, f"tokenizer_run={other}")
    with pytest.raises(ValueError, match="another source: tokenizer_fingerprint was "):
        chain.run("tokens", f"tokenizer_run={other}")


def test_a_projector_of_another_tokenizers_sizes_is_refused(chain, tmp_path):
    config = (chain.folder / "tokenizer" / "config.yaml").read_text()
    assert "token_channels: 4" in config
    (tmp_path / "config.yaml").write_text(config.replace("token_channels: 4", "token_channels: 6"))
    source = [f"projector_run={chain.folder}/text_projector", "projector=null"]
    with pytest.raises(ValueError, match=f"'token_channels': 4.*{tmp_path} .*'token_channels': 6"):
        chain.run_in(tmp_path, "text_decoder", f"tokenizer_run={tmp_path}", *source)


NO_TRAINING = {  # stage -> (options, keys)
    "tokenizer": [
        ("data.shards=[nowhere.tar]", "nowhere.tar, which does not exist"),
        ("training.batch_size=9 training.gradient_accumulation=2", "batch_size 9 .*1 x 2"),
    ],
    "text_decoder": [
        ("freeze_projector=true projector_run=x projector=null", "losses.kl_weight=0"),
        ("projector_run=CHAIN/text_projector projector.depth=2", "projector .*text_projector"),
        ("heldout_shards=[absent.tar]", "absent.tar"),
        ("projector_run=nowhere projector=null", "nowhere is no run folder"),
    ],
    "flowtok": [
        ("projector_run='' init_from=CHAIN/flowtok flowtok.depth=2", "flowtok.depth: 1 -> 2$"),
        ("init_from=CHAIN/flowtok", "init_from=.* has a projector, and projector_run="),
        ("projector_run='' init_from=CHAIN/tokenizer", "stage 'tokenizer': .*'flowtok'"),
        ("projector.width=32", "projector is as in .*text_projector"),
        ("data.shards=[nowhere/*.tar]", "nowhere/tokens.json does not exist"),
        ("TO_TEXT flow.projector=joint", "image_to_text with flow.projector=joint"),
        ("TO_TEXT text_decoder_run=''", "set text_decoder_run"),
        ("TO_TEXT pictures.images=[]", "pictures.images"),
        ("TO_TEXT pictures.images=[nowhere.tar]", "nowhere.tar"),
        ("TO_TEXT flow.direction=joint", "flow.direction: .*'joint'"),
        ("TO_TEXT projector_run=CHAIN/text_projector", "text decoder of .*CHAIN/text_projector"),
        ("TO_TEXT text_decoder_run=CHAIN/flowtok", "stage 'flowtok': .*'text_decoder'"),
    ],
}


@pytest.mark.parametrize(
    ("stage", "options", "keys"),
    [(stage, *case) for stage, cases in NO_TRAINING.items() for case in cases],
)
def test_what_cannot_be_trained_is_refused_before_a_step(
    chain, tiny_shards, tmp_path, stage, options, keys
):
    words = options.removeprefix("TO_TEXT ").replace("CHAIN", str(chain.folder)).split()
    start = to_text(chain.folder, tiny_shards) if options.startswith("TO_TEXT") else []
    with pytest.raises(ValueError, match=keys.replace("CHAIN", str(chain.folder))):
        chain.run_in(tmp_path, stage, *start, *words)
    assert not list(tmp_path.rglob("step_*"))
