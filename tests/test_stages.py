"""The real main() of every stage on tiny sizes: what a chain leaves behind, that losses fall, that options act."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import shape_sample
from PIL import Image
from tiny_experiment import Experiment, equal, metrics, reset_accelerate, to_text, weights

from data.tar import read_shard, write_shard
from modeling.posterior import Posterior
from training.checkpoint import EMA_FILE, checkpoint_folders
from training.loading import load_tokenizer, text_encoder_config
from training.run import start_run
from training.tokens import TokensInfo, load_tokens_info, open_stored_tokens

RANDOM_PROJECTOR = ["projector_run=''", "projector.width=16", "projector.depth=1"]
RANDOM_PROJECTOR += ["projector.num_heads=2", "projector.mlp_width=32"]
TRAINED = ("text_encoder", "tokenizer", "text_projector", "text_decoder", "flowtok")


# What a chain leaves behind


@pytest.mark.parametrize("stage", TRAINED)
def test_a_trained_stage_leaves_config_metrics_and_the_last_checkpoint(chain, stage):
    run = chain.folder / stage
    assert list(checkpoint_folders(run)) == [2, 4]
    lines = metrics(run)
    assert [line["step"] for line in lines] == [2, 4]
    assert all({"loss", "gradient_norm", "learning_rate"} <= line.keys() for line in lines)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["stage"] == stage and saved["training"] == asdict(chain.config(stage).training)
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("stage", ["tokenizer", "text_projector", "flowtok"])
def test_pictures_are_png_files(chain, stage):
    for step in (2, 4):
        with Image.open(chain.folder / stage / "samples" / f"step_{step:08d}.png") as image:
            image.load()
            assert image.format == "PNG" and image.width > 128


def test_the_flow_stages_log_whether_the_text_latents_collapse(chain):
    lines = [*metrics(chain.folder / "text_projector"), *metrics(chain.folder / "flowtok")]
    assert all({"z_text_std", "z_text_between_captions_std"} <= line.keys() for line in lines)


def test_stored_tokens_hold_every_sample_and_their_measured_scale(chain, tiny_shards):
    info = TokensInfo.load(chain.folder / "tokens")
    assert (info.num_samples, info.num_tokens, info.token_channels, info.has_text_states) == (
        48,
        16,
        4,
        True,
    )
    for name in ("train-00000.tar", "train-00001.tar"):
        tokens, images = read_shard(chain.folder / "tokens" / name), read_shard(tiny_shards / name)
        assert [(s["__key__"], s["txt"]) for s in tokens] == [
            (s["__key__"], s["txt"]) for s in images
        ]
    assert weights(chain.folder / "flowtok")["latent_scale"].item() == pytest.approx(
        info.latent_scale
    )


def test_the_report_has_its_figures_and_pictures(chain):
    report = json.loads((chain.folder / "report.json").read_text())
    assert (report["num_train_captions"], report["num_pool_images"]) == (24, 48)
    assert report["train"]["captions"] == 6 and report["heldout"]["captions"] == 24
    assert report["tokenizer"]["heldout_psnr_db"] > 0
    for part in ("train", "heldout"):
        Image.open(chain.folder / f"report_{part}.png").verify()


def test_the_chain_ends_in_a_picture_of_samples(chain):
    Image.open(chain.folder / "samples.png").verify()


# Losses fall


@pytest.fixture(scope="module")
def few(tmp_path_factory, chain):
    """Text encoder, tokenizer and tokens of four samples: one batch, seen again and again."""
    shards = tmp_path_factory.mktemp("few")
    write_shard(shards / "train-00000.tar", [shape_sample(number) for number in (0, 1, 6, 11)])
    experiment = Experiment(tmp_path_factory.mktemp("few_experiment"), shards)
    for stage in ("text_encoder", "tokenizer", "tokens"):
        experiment.run(stage, *([] if stage == "tokens" else LONG[stage]))
    return experiment


OVERFIT = ["training.batch_size=4", "training.log_every_steps=10", "training.sample_every_steps=0"]
OVERFIT += ["training.checkpoint_every_steps=1000", "optimizer.learning_rate=0.005"]
WIDE = ["tokenizer.encoder.width=32", "tokenizer.decoder.width=32", "tokenizer.init_std=0"]
WIDE += ["tokenizer.initial_logvar=-4", "tokenizer.latent_grid=true", "tokenizer.query_key_bias=1"]
LONG = {
    "text_encoder": [
        *OVERFIT,
        "training.max_steps=150",
        "data.flip_probability=0",
        "optimizer.learning_rate=0.0005",
    ],
    "tokenizer": [*OVERFIT, "training.max_steps=150", "data.flip_probability=0", *WIDE],
    "text_projector": [
        *OVERFIT,
        "training.max_steps=100",
        "projector.dropout=0",
        "losses.kl_weight=0",
    ],
    "flowtok": [*OVERFIT, "training.max_steps=150"],
}


def fall(run, name):
    """Last value of a metric over its first."""
    lines = metrics(run)
    return lines[-1][name] / lines[0][name]


def test_one_batch_is_overfitted_by_the_text_encoder(few):
    assert fall(few.folder / "text_encoder", "loss") < 0.3
    assert metrics(few.folder / "text_encoder")[-1]["top1"] > 0.9


def test_one_batch_is_overfitted_by_the_tokenizer(few):
    assert fall(few.folder / "tokenizer", "l2") < 0.4


def test_one_batch_is_overfitted_by_the_projector(few):
    run = few.run("text_projector", *LONG["text_projector"])
    assert fall(run, "alignment") < 0.2
    assert fall(run, "image_regression") < 0.2


def test_one_batch_is_overfitted_by_the_flow(few, tmp_path):
    few.run("text_projector", *LONG["text_projector"])
    options = [
        "flow.projector=frozen",
        "flow.sample_image_latent=false",
        "flow.sample_text_latent=false",
    ]
    options += ["flow.null_probability=0", "sampling.guidance=1"]
    run = few.run_in(tmp_path, "flowtok", *LONG["flowtok"], *options)
    assert fall(run, "flow_matching") < 0.5


# Options act


def last_weights(chain, tmp_path, stage, options):
    """Weights after a short run with each of several overrides."""
    runs = {}
    for index, option in enumerate(options):
        run = chain.run_in(
            tmp_path / str(index), stage, "training.sample_every_steps=0", *option.split()
        )
        assert [line["step"] for line in metrics(run)] == [2, 4]
        runs[option] = weights(run)
    return runs


def all_different(runs):
    values = list(runs.values())
    return not any(equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_every_projector_mode_runs_and_frozen_keeps_the_weights_bit_for_bit(chain, tmp_path):
    modes = [f"flow.projector={mode}" for mode in ("joint", "detached", "frozen")]
    projectors = last_weights(chain, tmp_path, "flowtok", modes)
    projectors = {
        mode: {
            name.removeprefix("projector."): x
            for name, x in tensors.items()
            if name.startswith("projector.")
        }
        for mode, tensors in projectors.items()
    }
    assert all_different(projectors)
    source = weights(chain.folder / "text_projector", EMA_FILE)
    assert equal(projectors["flow.projector=frozen"], source)
    frozen_ema = weights(tmp_path / "2" / "flowtok", EMA_FILE)
    assert equal({name: frozen_ema[f"projector.{name}"] for name in source}, source)
    assert "alignment" not in metrics(tmp_path / "2" / "flowtok")[0]


def test_without_stage_2_the_projector_starts_from_random_weights(chain, tmp_path):
    run = chain.run_in(tmp_path, "flowtok", *RANDOM_PROJECTOR)
    assert [line["step"] for line in metrics(run)] == [2, 4]


@pytest.mark.parametrize(
    "options",
    [
        [f"flow.time_distribution={name}" for name in ("uniform", "logit_normal", "power")],
        ["flow.null_probability=0 sampling.guidance=1", "flow.null_probability=0.5"],
        [
            "training.seed=0",
            "flow.sample_text_latent=false",
            "flow.sample_image_latent=false",
        ],  # the first: as it is
        [
            "losses.alignment_weight=0",
            "losses.kl_weight=0",
            "losses.kl_weight=0 losses.alignment_weight=0",
        ],
        ["training.max_gradient_norm=0", "training.max_gradient_norm=0.01"],
        ["training.gradient_accumulation=1", "training.gradient_accumulation=4", "training.seed=1"],
    ],
    ids=lambda options: options[-1].partition("=")[0],
)
def test_options_of_the_flow_stage_run_and_change_the_weights(chain, tmp_path, options):
    assert all_different(last_weights(chain, tmp_path, "flowtok", options))


def test_the_ablations_of_the_alignment_run_and_change_the_weights(chain, tmp_path):
    base = weights(chain.run_in(tmp_path / "base", "flowtok", *RANDOM_PROJECTOR))
    cosine = weights(
        chain.run_in(
            tmp_path / "cosine",
            "flowtok",
            *RANDOM_PROJECTOR,
            "losses.alignment_form=cosine_margin",
        )
    )
    assert not equal(base, cosine)
    name = "projector.alignment.log_temperature"
    assert not torch.equal(base[name], cosine[name])
    pool = (*RANDOM_PROJECTOR, "projector.alignment_target=average_pool")
    pooled = weights(chain.run_in(tmp_path / "pool", "flowtok", *pool))
    assert not any("alignment.mlp" in key for key in pooled) and not equal(base, pooled)


def test_fine_tuning_starts_from_ema_weights_at_step_0_and_resumes_from_itself(chain, tmp_path):
    pretrained = chain.folder / "flowtok"
    options = (
        "projector_run=''",
        f"init_from={pretrained}",
        "optimizer.learning_rate=1e-30",
        "optimizer.warmup_steps=0",
    )
    run = chain.run_in(
        tmp_path, "flowtok", *options, "training.max_steps=2", "optimizer.weight_decay=0"
    )
    start, tuned = weights(pretrained, EMA_FILE), weights(run)
    assert all(
        torch.allclose(tuned[name], start[name], atol=1e-6) for name in start
    )  # a learning rate of nothing
    assert [line["step"] for line in metrics(run)] == [2]
    more = chain.run_in(
        tmp_path, "flowtok", *options, "training.max_steps=4"
    )  # resume: not from init_from again
    assert [line["step"] for line in metrics(more)] == [2, 4]
    assert list(checkpoint_folders(more)) == [2, 4]


def test_weights_of_another_network_or_from_two_sources_are_refused(chain, tmp_path):
    source = f"init_from={chain.folder}/flowtok"
    with pytest.raises(ValueError, match="another network .*: flowtok.depth: 1 -> 2$"):
        chain.run_in(tmp_path, "flowtok", "projector_run=''", source, "flowtok.depth=2")
    with pytest.raises(ValueError, match="init_from=.* has a projector, and projector_run="):
        chain.run_in(tmp_path, "flowtok", source)
    with pytest.raises(ValueError, match="is a run of stage 'tokenizer': .*'flowtok'"):
        chain.run_in(tmp_path, "flowtok", "projector_run=''", f"init_from={chain.folder}/tokenizer")


def test_a_fine_tuned_run_is_refused_when_its_start_was_trained_anew(chain, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(chain.folder / "flowtok", start)
    options = ("projector_run=''", f"init_from={start}")
    chain.run_in(tmp_path, "flowtok", *options)
    shutil.rmtree(start)
    other = chain.run_in(tmp_path / "other", "flowtok", "training.seed=5")
    shutil.copytree(other, start)
    with pytest.raises(
        ValueError,
        match="an earlier stage has changed since .*: init_from was",
    ):
        chain.run_in(tmp_path, "flowtok", *options)


@pytest.mark.parametrize("stage", ["tokenizer", "flowtok"])
def test_activation_checkpointing_trains_the_same_weights_bit_for_bit(chain, tmp_path, stage):
    for mode in ("selective", "full"):
        run = chain.run_in(tmp_path / mode, stage, f"activation_checkpointing={mode}")
        assert equal(weights(run), weights(chain.folder / stage))


def test_every_form_of_the_kl_runs_and_changes_the_weights(chain, tmp_path):
    forms = ("gaussian", "wall", "variance")
    options = [f"losses.kl_weight=0.01 losses.kl_form={form}" for form in forms]
    assert all_different(last_weights(chain, tmp_path, "text_projector", options))


def test_the_projector_is_trained_with_and_without_the_image_regression(chain, tmp_path):
    options = [f"losses.image_regression_weight={weight}" for weight in (0, 1)]
    assert all_different(last_weights(chain, tmp_path, "text_projector", options))
    assert not (tmp_path / "0" / "text_projector" / "samples").exists()  # z_T is no picture then
    assert list((tmp_path / "1" / "text_projector" / "samples").iterdir())


def test_options_of_the_tokenizer_stage_run_and_change_the_weights(chain, tmp_path):
    losses = [
        "losses.l1_weight=1",
        "losses.gradient_weight=1",
        "losses.kl_weight=0.1",
        "losses.l2_weight=0.5",
    ]
    sizes = [
        "tokenizer.latent_grid=true",
        "tokenizer.query_key_bias=1",
        "tokenizer.initial_logvar=-2",
    ]
    data = ["data.flip_probability=0", "data.shuffle_buffer=1"]
    assert all_different(
        last_weights(chain, tmp_path, "tokenizer", ["training.seed=0", *losses, *sizes, *data])
    )


@pytest.mark.parametrize("stage", ["tokenizer", "flowtok"])
def test_bf16_trains_float32_weights_and_differs_from_float32(chain, tmp_path, stage):
    run = chain.run_in(tmp_path, stage, "training.precision=bf16")
    trained, reference = weights(run), weights(chain.folder / stage)
    assert all(
        x.dtype == torch.float32 for x in [*trained.values(), *weights(run, EMA_FILE).values()]
    )
    assert not equal(trained, reference)
    low, full = metrics(run)[-1]["loss"], metrics(chain.folder / stage)[-1]["loss"]
    assert low == pytest.approx(full, rel=0.1)


def test_two_passes_of_half_the_batch_are_one_pass_of_the_whole(chain, tmp_path, monkeypatch):
    # The noise of the posterior differs between the two; everything else in this stage is a mean over samples.
    monkeypatch.setattr(Posterior, "sample", lambda self, generator=None: self.mean)
    options = ["training.log_every_steps=1", "training.max_steps=3"]
    one = chain.run_in(tmp_path / "one", "tokenizer", *options)
    two = chain.run_in(tmp_path / "two", "tokenizer", *options, "training.gradient_accumulation=2")
    for whole, halves in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "l2", "kl", "gradient_norm"):
            assert halves[name] == pytest.approx(whole[name], rel=1e-3), name


# Image to text


def test_each_direction_of_the_flow_trains_other_weights(chain, captioner, tiny_shards, tmp_path):
    options = [o for o in to_text(chain.folder, tiny_shards) if "flow.direction" not in o]
    image = weights(chain.run_in(tmp_path, "flowtok", *options))
    text = weights(captioner)
    assert image.keys() == text.keys() and not equal(image, text)


def test_one_batch_is_overfitted_by_the_flow_to_text(few, tmp_path):
    few.run(
        "text_decoder",
        "projector.dropout=0",
        "losses.kl_weight=0",
        "training.batch_size=4",
        "heldout_shards=[]",
    )
    shards = few.config("tokens").data.shards[0].removesuffix("/*.tar")
    options = [
        *to_text(few.folder, shards),
        "flow.sample_text_latent=false",
        "flow.sample_image_latent=false",
    ]
    run = few.run_in(
        tmp_path,
        "flowtok",
        *LONG["flowtok"],
        *options,
        "flow.null_probability=0",
        "sampling.guidance=1",
    )
    assert fall(run, "flow_matching") < 0.5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("flow.projector=joint", "image_to_text with flow.projector=joint"),
        ("losses.kl_weight=0.1", "image_to_text has no loss but the flow's"),
        ("text_decoder_run=''", "set text_decoder_run"),
        ("pictures.images=[]", "pictures.images"),
        ("pictures.images=[nowhere.tar]", "nowhere.tar"),
        ("pictures.num_images=0", "pictures.num_images must be at least 1"),
        ("flow.direction=joint", "flow.direction: .*'joint'"),
        ("projector_run=CHAIN/text_projector", "reads another projector's z_T than that of"),
        ("text_decoder_run=CHAIN/flowtok", "is a run of stage 'flowtok': .*'text_decoder'"),
    ],
)
def test_a_flow_to_text_that_could_not_be_read_is_refused(
    chain, tiny_shards, tmp_path, option, message
):
    option = option.replace("CHAIN", str(chain.folder))
    with pytest.raises(ValueError, match=message):
        chain.run_in(tmp_path, "flowtok", *to_text(chain.folder, tiny_shards), option)
    assert not list(tmp_path.rglob("step_*"))


def test_a_flow_to_the_latents_of_a_projector_that_was_trained_anew_is_refused(
    chain, tiny_shards, tmp_path
):
    decoder = tmp_path / "text_decoder"
    shutil.copytree(chain.folder / "text_decoder", decoder)
    options = [
        o.replace(f"{chain.folder}/text_decoder", str(decoder))
        for o in to_text(chain.folder, tiny_shards)
    ]
    chain.run_in(tmp_path, "flowtok", *options)
    shutil.rmtree(decoder)
    shutil.copytree(chain.run_in(tmp_path / "other", "text_decoder", "training.seed=5"), decoder)
    with pytest.raises(ValueError, match="an earlier stage has changed since .*projector was"):
        chain.run_in(tmp_path, "flowtok", *options)


# Stages fit together, or are refused


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
        with pytest.raises(
            ValueError, match="was written with another tokenizer .* delete the folder"
        ):
            chain.run_in(tmp_path, stage, f"tokenizer_run={other}")
    with pytest.raises(
        ValueError, match="holds tokens of another source: tokenizer_fingerprint was .*Delete it"
    ):
        chain.run("tokens", f"tokenizer_run={other}")


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("tokenizer", "tokenizer.text_tokens=8", "tokenizer.text_tokens can't be set"),
        ("flowtok", "projector.width=32", "projector is as in .*text_projector"),
        ("flowtok", "data.shards=[nowhere/*.tar]", "nowhere/tokens.json does not exist"),
        ("tokenizer", "data.shards=[nowhere.tar]", "nowhere.tar, which does not exist"),
        (
            "tokenizer",
            "training.batch_size=9 training.gradient_accumulation=2",
            "9 is not divisible by processes",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused_naming_both_sides(
    chain, tmp_path, stage, override, message
):
    with pytest.raises(ValueError, match=message):
        chain.run_in(tmp_path, stage, *override.split())
    assert not list(tmp_path.rglob("step_*"))
