"""configs/check.py: what is wrong in any stage is found before the first runs, naming stage and values."""

from pathlib import Path

import pytest
import yaml
from tiny_experiment import Experiment

from configs import check
from configs.cli import exit_on_error
from configs.load import load_config

ROOT = Path(__file__).parents[1]
ORDER = ("text_encoder", "tokenizer", "tokens", "text_projector", "flowtok", "flowtok_finetune")
ORDER += ("text_decoder", "flowtok_caption", "report")
FOLDERS = {path.parent.name for path in (ROOT / "configs").glob("*/*.yaml")}
EXPERIMENTS = sorted(FOLDERS)


def groups(folder, overrides=()):
    """Arguments for the stages of a folder of configs, as train_flowtok.sh gives them; overrides: STAGE.key=value."""
    words = []
    for stage in ORDER:
        own = [o.removeprefix(f"{stage}.") for o in overrides if o.startswith(f"{stage}.")]
        if (folder / f"{stage}.yaml").is_file():
            words += ["--", str(folder / f"{stage}.yaml"), *own]
    return words[1:]


@pytest.fixture
def tiny(tmp_path, tiny_shards):
    """Folder of the configs of a tiny experiment."""
    Experiment(tmp_path, tiny_shards)
    return tmp_path / "configs"


def error_of(folder, *overrides, num_processes=1):
    with pytest.raises(ValueError) as caught:
        check.main([str(num_processes), *groups(folder, overrides)])
    return str(caught.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shipped_experiments_fit_together(experiment, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = [
        path for path in (ROOT / "configs" / experiment).glob("*.yaml") if path.stem != "common"
    ]
    stages = {path.stem: load_config(path) for path in paths}
    assert stages
    check.check_batches(stages, 8)
    check.check_run_dirs(stages)
    check.check_sizes(stages)


def test_the_demo_passes_with_its_images(monkeypatch):
    monkeypatch.chdir(ROOT)
    check.main(["1", *groups(ROOT / "configs" / "demo")])


def test_a_tiny_experiment_passes_before_any_stage_has_run(tiny):
    check.main(["4", *groups(tiny)])
    assert sorted(path.name for path in tiny.parent.iterdir()) == ["configs"]


@pytest.mark.parametrize("stage", ["text_encoder", "tokenizer", "text_projector", "flowtok"])
def test_a_batch_that_does_not_divide_names_stage_and_values(tiny, stage):
    message = error_of(tiny, f"{stage}.training.gradient_accumulation=3", num_processes=2)
    assert message == (
        f"stage {stage}: training.batch_size 8 is not divisible by processes x gradient_accumulation = 2 x 3"
    )


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.data.shards",
        "tokenizer.data.shards",
        "tokenizer.pictures.shards",
        "tokens.data.shards",
    ]
    + [f"report.{part}_shards" for part in ("train", "heldout", "distractor")],
)
def test_missing_images_name_stage_and_file(tiny, key):
    message = error_of(tiny, f"{key}=[/nowhere/missing.tar]")
    assert message.startswith(f"stage {key.split('.')[0]}: ") and "/nowhere/missing.tar" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tokenizer.tokenizer.text_tokens=8"],
            "text tokens: stage text_encoder has 16, stage tokenizer has 8; they must agree",
        ),
        (
            ["tokenizer.tokenizer.text_width=64"],
            "text width: stage text_encoder has 32, stage tokenizer has 64; they must agree",
        ),
        (
            ["text_projector.projector.text_width=48"],
            "text width: stage text_encoder has 32, stage text_projector has 48; they must agree",
        ),
        (
            ["text_projector.projector.token_channels=8"],
            "channels: stage tokenizer has 4, stage text_projector has 8; they must agree",
        ),
        (
            ["tokenizer.tokenizer.num_tokens=9"],
            "image tokens: stage tokenizer has 9, stage text_projector has 16; they must agree",
        ),
        (
            ["flowtok.projector.token_channels=8", "flowtok.flowtok.token_channels=8"],
            "channels: stage tokenizer has 4, stage flowtok has 8; they must agree",
        ),
    ],
)
def test_sizes_that_differ_name_both_stages_and_values(tiny, overrides, message):
    assert error_of(tiny, *overrides) == message


def test_without_text_guidance_the_decoder_has_no_text_states_to_compare(tiny):
    overrides = ["tokenizer.tokenizer.text_guidance=false", "tokenizer.tokenizer.text_tokens=8"]
    check.main(["1", *groups(tiny, overrides)])


def test_a_typo_in_the_last_stage_ends_the_program_with_status_2(tiny, capsys):
    arguments = ["1", *groups(tiny, ["report.batch_siz=4"])]
    with pytest.raises(SystemExit) as stop:
        exit_on_error(lambda: check.main(arguments))
    assert stop.value.code == 2
    assert "unknown key 'batch_siz'; did you mean 'batch_size'?" in capsys.readouterr().err


# Runs that a stage reads


def add_round(folder, name="flowtok_finetune", **values):
    """A further round of stage flowtok."""
    values = {"run_dir": "${experiment_dir}/" + name, "projector_run": ""} | values
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"base": "flowtok.yaml", **values}))


def test_a_round_may_start_from_a_run_that_an_earlier_stage_makes(tiny):
    add_round(tiny, init_from="${experiment_dir}/flowtok")
    check.main(["1", *groups(tiny)])


def add_caption_round(folder, **values):
    """A round of stage flowtok from image to text."""
    run = "${experiment_dir}/text_decoder"
    to_text = {
        "flow": {"direction": "image_to_text", "projector": "frozen"},
        "pictures": {"images": ["x/*.tar"]},
    }
    weights = {
        "losses": {"alignment_weight": 0, "kl_weight": 0},
        "projector_run": run,
        "text_decoder_run": run,
    }
    folder_of = {"run_dir": "${experiment_dir}/flowtok_caption"}
    add_round(folder, "flowtok_caption", **folder_of, **to_text, **weights, **values)


def test_a_flow_to_text_reads_the_text_decoder_that_an_earlier_stage_makes(tiny):
    add_caption_round(tiny)
    check.main(["1", *groups(tiny)])
    message = error_of(tiny, "flowtok_caption.text_decoder_run=/nowhere")
    assert message.startswith("stage flowtok_caption: text_decoder_run=/nowhere does not exist")


def test_a_text_decoder_of_other_sizes_or_without_its_held_out_captions_is_refused(tiny):
    message = error_of(tiny, "text_decoder.projector.token_channels=8")
    assert message == "channels: stage tokenizer has 4, stage text_decoder has 8; they must agree"
    assert error_of(tiny, "text_decoder.heldout_shards=[nowhere.tar]").startswith(
        "stage text_decoder: "
    )


def test_a_run_that_nobody_makes_names_stage_key_and_folder(tiny):
    add_round(tiny, init_from="${experiment_dir}/../other/flowtok")
    expected = f"stage flowtok_finetune: init_from={tiny.parents[1]}/other/flowtok does not exist"
    assert error_of(tiny).startswith(expected)
    assert error_of(tiny, "flowtok.tokenizer_run=/nowhere").startswith(
        "stage flowtok: tokenizer_run=/nowhere does not"
    )


def test_two_stages_in_one_folder_are_refused(tiny):
    add_round(tiny, run_dir="${experiment_dir}/flowtok")
    assert "stages flowtok and flowtok_finetune have the same run_dir" in error_of(tiny)


def test_a_flow_round_whose_folder_has_another_name_is_refused(tiny):
    add_round(tiny, run_dir="${experiment_dir}/second")
    assert f"stage flowtok_finetune: run_dir is {tiny.parent}/second, expected" in error_of(tiny)


def test_a_finished_stage_needs_its_images_no_more(chain):
    folder, gone = chain.folder / "configs", "data.shards=[/nowhere/missing.tar]"
    check.main(
        [
            "1",
            *groups(
                folder, [f"{stage}.{gone}" for stage in ("text_encoder", "tokenizer", "tokens")]
            ),
        ]
    )
    longer = "tokenizer.training.max_steps=5"
    with pytest.raises(ValueError, match="stage tokenizer: .*missing"):
        check.main(["1", *groups(folder, [f"tokenizer.{gone}", longer])])


def test_a_full_size_experiment_without_data_says_what_to_set_and_how_to_make_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    message = error_of(ROOT / "configs" / "flowtok_xl", "tokenizer.data_dir=/nowhere/shards")
    assert message.startswith(
        "stage tokenizer: shards: '/nowhere/shards/tokenizer/*.tar' matches no file"
    )
    for hint in (
        "scripts/make_shards.py",
        "data_dir=FOLDER (now /nowhere/shards)",
        "tokenizer.data.shards=[FOLDER/*.tar]",
    ):
        assert hint in message
