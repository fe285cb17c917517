"""eval/during_training.py in the real stages: each evaluation equals the programs' own on that checkpoint; stopping and
resuming; what is absent is said before training."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluations import CAPTIONS, evaluate, launch_two, read, write_inputs
from test_resume import Stop, spoil, state, stop
from tiny_experiment import equal, metrics, reset_accelerate

from eval import during_training
from eval.reconstruction import main as reconstruct
from eval.reconstruction import parse_args
from modeling.pipeline import ImageGenerator
from scripts.check_run import main as check_run
from scripts.check_run import parse_args as parse_check_args
from training import checkpoint as ckpt

MEASURES = ("features=tokenizer", "metrics=[frechet,precision_recall,clip_score]", "clip.model=own")
NAMES = {"frechet_distance", "precision", "recall", "clip_score"}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """No weights that happen to be on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_shards):
    return write_inputs(tmp_path_factory.mktemp("inputs"), tiny_shards)


def options(inputs, every=2):
    """Overrides that turn the evaluation of stage 3 on; a learning rate at which steps differ."""
    overrides = ",".join(f'"{measure}"' for measure in MEASURES)
    values = [f"evaluation.every_steps={every}", f"evaluation.protocol={inputs}/protocol.yaml"]
    values += [
        f"evaluation.overrides=[{overrides}]",
        "evaluation.num_workers=0",
        "evaluation.batch_size=7",
    ]
    return [
        *values,
        "training.keep_checkpoints=9",
        "optimizer.learning_rate=0.01",
        "optimizer.schedule=constant",
    ]


@pytest.fixture(scope="module")
def whole(chain, inputs, tmp_path_factory):
    """A run of stage 3 with an evaluation every 2 of 4 steps; tests leave it as it is."""
    return chain.run_in(tmp_path_factory.mktemp("whole"), "flowtok", *options(inputs))


def evaluations(run):
    """{step: values} of what was measured."""
    lines = {
        line["step"]: {name: v for name, v in line.items() if name.startswith("eval/")}
        for line in metrics(run)
    }
    return {step: values for step, values in lines.items() if values}


def at_step(run, step, folder):
    """A copy of a run whose newest checkpoint is of a step."""
    shutil.copytree(run, folder)
    for newer in (s for s in ckpt.checkpoint_folders(folder) if s > step):
        shutil.rmtree(ckpt.checkpoint_folders(folder)[newer])
    return folder


@pytest.mark.parametrize("step", [2, 4])
def test_each_evaluation_equals_the_programs_on_its_checkpoint_alone(whole, inputs, tmp_path, step):
    run = at_step(whole, step, tmp_path / "run" / "flowtok")
    expected = evaluate(run, inputs, tmp_path / "out", *MEASURES)
    assert expected["model"]["checkpoint"] == f"step_{step:08d}"
    found = evaluations(whole)[step]
    assert found == {f"eval/{name}": value for name, value in expected["metrics"].items()}
    assert found.keys() == {f"eval/{name}" for name in NAMES}


def test_two_checkpoints_of_one_process_differ_and_leave_their_reports_alone(whole):
    first, second = evaluations(whole)[2], evaluations(whole)[4]
    assert (
        first["eval/frechet_distance"] != second["eval/frechet_distance"]
        and len(evaluations(whole)) == 2
    )
    folders = sorted((whole / "evaluation").iterdir())
    assert [folder.name for folder in folders] == ["step_00000002", "step_00000004"]
    for folder, values in zip(folders, (first, second)):
        assert [path.name for path in folder.iterdir()] == ["evaluation.json"]
        report = read(folder)
        assert {f"eval/{name}": value for name, value in report["metrics"].items()} == values
        assert report["images_made"] == CAPTIONS and report["reference"]["num_images"] == 24


def test_the_log_has_one_line_a_step_and_the_run_is_whole(whole, capsys):
    assert [line["step"] for line in metrics(whole)] == [2, 4]
    check_run(parse_check_args([str(whole)]))
    assert "eval/" not in capsys.readouterr().err


def test_training_is_the_same_bit_for_bit_with_and_without(chain, whole, inputs, tmp_path):
    plain = chain.run_in(tmp_path, "flowtok", *options(inputs, every=0))
    assert (
        equal(state(plain), state(whole))
        and not evaluations(plain)
        and not (plain / "evaluation").exists()
    )
    without = [
        {name: v for name, v in line.items() if not name.startswith("eval/")}
        for line in metrics(whole)
    ]
    assert without == metrics(plain)


def test_a_stopped_and_resumed_run_neither_lacks_nor_repeats_one(
    chain, inputs, tmp_path, monkeypatch
):
    rhythm = [
        "training.max_steps=5",
        "training.log_every_steps=3",
        "training.checkpoint_every_steps=2",
    ]
    whole = chain.run_in(tmp_path / "whole", "flowtok", *options(inputs, every=1), *rhythm)
    with monkeypatch.context() as patch:
        spoil(
            patch, "flowtok", call=4, action=stop
        )  # after the evaluation of step 3, before its checkpoint
        with pytest.raises(Stop):
            chain.run_in(tmp_path / "parts", "flowtok", *options(inputs, every=1), *rhythm)
    assert [*evaluations(tmp_path / "parts" / "flowtok")] == [1, 2, 3]
    parts = chain.run_in(tmp_path / "parts", "flowtok", *options(inputs, every=1), *rhythm)
    assert [line["step"] for line in metrics(parts)] == [1, 2, 3, 4, 5]
    assert metrics(parts) == metrics(whole) and [*evaluations(parts)] == [1, 2, 3, 4, 5]
    assert equal(state(parts), state(whole))


def test_an_evaluation_that_was_killed_is_made_anew(chain, inputs, whole, tmp_path, monkeypatch):
    generate, calls = ImageGenerator.generate, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageGenerator, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            chain.run_in(tmp_path, "flowtok", *options(inputs))
    folder = tmp_path / "flowtok" / "evaluation" / "step_00000002"
    left = sorted(folder.rglob("*.npy"))
    assert left and not (folder / "evaluation.json").exists()
    for file in left:  # as if they were of other weights
        np.save(file, np.zeros_like(np.load(file)))
    again = chain.run_in(tmp_path, "flowtok", *options(inputs))
    assert evaluations(again) == evaluations(whole)


def test_random_numbers_and_settings_of_training_are_left_alone(
    chain, inputs, tmp_path, monkeypatch
):
    states = []
    call = during_training.FlowEvaluation.__call__

    def watched(self, model, step):
        before, tf32 = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
        values = call(self, model, step)
        states.append(
            (torch.equal(torch.get_rng_state(), before), torch.backends.cudnn.allow_tf32 == tf32)
        )
        return values

    monkeypatch.setattr(during_training.FlowEvaluation, "__call__", watched)
    chain.run_in(tmp_path, "flowtok", *options(inputs))
    assert states == [(True, True)] * 2


def test_two_processes_take_part(chain, inputs, tmp_path):
    settings = [*chain.inputs("flowtok"), f"experiment_dir={tmp_path}", *options(inputs)]
    output = launch_two("train_flowtok.py", "--config", chain.config_file("flowtok"), *settings)
    assert output.count("eval/frechet_distance") == 2  # one process talks
    report = read(tmp_path / "flowtok" / "evaluation" / "step_00000004")
    assert report["num_processes"] == 2
    found = evaluations(tmp_path / "flowtok")[4]
    expected = evaluate(tmp_path / "flowtok", inputs, tmp_path / "out", *MEASURES)["metrics"]
    assert found == pytest.approx(
        {f"eval/{name}": value for name, value in expected.items()}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["evaluation.protocol=coco40k"],
            "protocol coco40k is neither a YAML file nor one of coco30k, demo",
        ),
        (["evaluation.protocol=''"], "evaluation.every_steps needs evaluation.protocol"),
        (["evaluation.every_steps=-1"], "evaluation.every_steps must not be negative"),
        (["evaluation.batch_size=0"], "batch_size must be at least 1"),
        (
            ['evaluation.overrides=["captions=[/nowhere.txt]"]'],
            "captions file /nowhere.txt does not exist",
        ),
        (
            ['evaluation.overrides=["captoins=[a.txt]"]'],
            "unknown key 'captoins'; did you mean 'captions'?",
        ),
        (["evaluation.overrides=[]"], "InceptionV3's weights are absent: fetch https://"),
        (
            ["evaluation.inception_weights=/nowhere.pth", "evaluation.overrides=[]"],
            "no file /nowhere.pth",
        ),
        (
            ['evaluation.overrides=["metrics=[clip_score]","clip.model=local-dir:/nowhere"]'],
            "/nowhere holds no",
        ),
        (['evaluation.overrides=["metrics=[]"]'], "measures nothing: its metrics are empty"),
        (
            [
                "flow.null_probability=0",
                "sampling.guidance=1",
                'evaluation.overrides=["guidance=3"]',
            ],
            "guidance 3 needs an unconditional flow",
        ),
        (
            ['evaluation.overrides=["num_captions=13","features=tokenizer","metrics=[frechet]"]'],
            "has 12 captions",
        ),
    ],
)
def test_what_is_absent_is_said_before_training(chain, inputs, tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        chain.run_in(tmp_path, "flowtok", *options(inputs), *changes)
    assert message in str(caught.value)
    assert not (tmp_path / "flowtok" / "checkpoints").exists() and not list(
        tmp_path.rglob("metrics.jsonl")
    )


# Stage 1


def reconstruction_options(shards):
    values = [
        "evaluation.every_steps=3",
        f"evaluation.shards=[{shards}/train-00001.tar]",
        "evaluation.num_images=10",
    ]
    return [
        *values,
        "evaluation.num_workers=0",
        "evaluation.batch_size=4",
        "training.keep_checkpoints=9",
    ]


def test_stage_1_logs_the_psnr_and_ssim_of_the_program(chain, tiny_shards, tmp_path):
    run = chain.run_in(tmp_path, "tokenizer", *reconstruction_options(tiny_shards))
    assert [*evaluations(run)] == [3, 4] and [line["step"] for line in metrics(run)] == [2, 3, 4]
    reset_accelerate()
    words = [
        run,
        tiny_shards / "train-00001.tar",
        "--limit",
        10,
        "--batch-size",
        4,
        "--num-workers",
        0,
    ]
    reconstruct(
        parse_args([*map(str, words), "--device", "cpu", "--output", str(tmp_path / "report.json")])
    )
    expected = json.loads((tmp_path / "report.json").read_text())["metrics"]
    found = evaluations(run)
    assert found[4] == pytest.approx(
        {"eval/psnr_db": expected["psnr_db"], "eval/ssim": expected["ssim"]}, rel=1e-12
    )
    assert found[3] != found[4]


def test_stage_1_trains_the_same_with_and_without(chain, tiny_shards, tmp_path):
    on = chain.run_in(tmp_path / "on", "tokenizer", *reconstruction_options(tiny_shards))
    off = chain.run_in(tmp_path / "off", "tokenizer", "training.keep_checkpoints=9")
    assert equal(state(on), state(off))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["evaluation.shards=[]"],
            "evaluation.every_steps needs images: set evaluation.shards (or pictures.shards)",
        ),
        (["evaluation.shards=[/nowhere.tar]"], "/nowhere.tar"),
        (["evaluation.num_images=-1"], "evaluation.num_images must be at least 0, got -1"),
    ],
)
def test_stage_1_says_what_is_absent_before_training(
    chain, tiny_shards, tmp_path, changes, message
):
    with pytest.raises(ValueError) as caught:
        chain.run_in(tmp_path, "tokenizer", *reconstruction_options(tiny_shards), *changes)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))
