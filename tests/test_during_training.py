"""Evaluations while a stage trains: the programs' own numbers; stopping, resuming, refusals."""

import json
from functools import partial

import pytest
import torch
from conftest import refusal
from evaluations import CAPTIONS, CPU, evaluate, launch_two, read, run_program
from test_resume import Stop, spoil, state, stop
from tiny_experiment import equal, metrics

from eval import generation, reconstruction
from modeling.pipeline import ImageGenerator

MEASURES = ("features=tokenizer", "metrics=[frechet,precision_recall,clip_score]", "clip.model=own")
NAMES = {"eval/frechet_distance", "eval/precision", "eval/recall", "eval/clip_score"}
# Other batches round float32 features otherwise, by some 1e-6, and a Frechet distance is a
# difference of larger traces.
NEAR = {"rel": 1e-5, "abs": 1e-7}


@pytest.fixture(autouse=True)
def no_reading_processes(monkeypatch, empty_cache):
    monkeypatch.setattr(generation, "NUM_WORKERS", 0)
    monkeypatch.setattr(reconstruction, "NUM_WORKERS", 0)


def options(inputs, every=2):
    """Overrides that turn the evaluation of stage 3 on; a learning rate at which steps differ."""
    overrides = ",".join(f'"{measure}"' for measure in MEASURES)
    return [
        f"evaluation.every_steps={every}",
        f"evaluation.protocol={inputs}/protocol.yaml",
        f"evaluation.overrides=[{overrides}]",
        "evaluation.batch_size=7",
        "optimizer.learning_rate=0.01",
        "optimizer.schedule=constant",
    ]


def settings():
    """What an evaluation must leave alone."""
    tf32 = torch.backends.cudnn.allow_tf32
    return torch.get_rng_state().tolist(), tf32, torch.get_float32_matmul_precision()


@pytest.fixture(scope="module")
def whole(chain, inputs, tmp_path_factory):
    """A run of stage 3 with an evaluation every 2 of 4 steps; tests leave it as it is."""
    call, changed = generation.FlowEvaluation.__call__, []

    def watched(self, model, step):
        before = settings()
        values = call(self, model, step)
        changed.append(settings() != before)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "NUM_WORKERS", 0)
        patch.setattr(generation.FlowEvaluation, "__call__", watched)
        run = chain.run_in(tmp_path_factory.mktemp("whole"), "flowtok", *options(inputs))
    assert changed == [False, False]
    return run


def evaluations(run):
    """{step: values} of what was measured."""
    found = {}
    for line in metrics(run):
        if values := {name: v for name, v in line.items() if name.startswith("eval/")}:
            found[line["step"]] = values
    return found


def logged(report):
    """The metrics of a report by their names in the log."""
    return {f"eval/{name}": value for name, value in report["metrics"].items()}


# Stage 3


def test_an_evaluation_equals_the_programs_on_its_checkpoint(whole, inputs, tmp_path):
    expected = evaluate(whole, inputs, tmp_path, *MEASURES)
    assert expected["model"]["checkpoint"] == "step_00000004"
    found = evaluations(whole)
    assert [*found] == [line["step"] for line in metrics(whole)] == [2, 4]
    assert found[4].keys() == NAMES and found[4] == pytest.approx(logged(expected), **NEAR)
    assert found[2]["eval/frechet_distance"] != found[4]["eval/frechet_distance"]


def test_each_checkpoint_has_its_own_report_and_no_image_stays(whole):
    for step, values in evaluations(whole).items():
        folder = whole / "evaluation" / f"step_{step:08d}"
        assert not [path for path in folder.iterdir() if path.is_dir()]
        report = read(folder)
        assert logged(report) == values
        assert report["images_made"] == CAPTIONS and report["reference"]["num_images"] == 24


def test_training_is_the_same_bit_for_bit_with_and_without(chain, whole, inputs, tmp_path):
    plain = chain.run_in(tmp_path, "flowtok", *options(inputs, every=0))
    assert equal(state(plain), state(whole)) and not (plain / "evaluation").exists()
    lines = [{name: line[name] for name in line.keys() - NAMES} for line in metrics(whole)]
    assert lines == metrics(plain)


def test_a_stopped_and_resumed_run_neither_lacks_nor_repeats_an_evaluation(
    chain, inputs, whole, tmp_path, monkeypatch
):
    run = partial(chain.run_in, tmp_path, "flowtok", *options(inputs, every=1))
    generate, calls = ImageGenerator.generate, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    # In the middle of the evaluation of step 2, of which images stay, as if of other weights
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageGenerator, "generate", killed)
        run()
    left = sorted((tmp_path / "flowtok" / "evaluation" / "step_00000002").rglob("*.png"))
    for file in left:
        file.write_bytes(left[0].read_bytes())
    # After that of step 3, before its checkpoint
    with monkeypatch.context() as patch, pytest.raises(Stop):
        spoil(patch, "flowtok", call=4, action=stop)
        run()
    assert [*evaluations(tmp_path / "flowtok")] == [1, 2, 3]
    again = run()
    assert [line["step"] for line in metrics(again)] == [1, 2, 3, 4]
    found, expected = evaluations(again), evaluations(whole)
    assert len(left) == 5 and [*found] == [1, 2, 3, 4]
    assert {step: found[step] for step in expected} == expected
    assert equal(state(again), state(whole))


def test_two_processes_take_part(chain, inputs, tmp_path):
    overrides = [*chain.inputs("flowtok"), f"experiment_dir={tmp_path}", *options(inputs, every=4)]
    words = ["--config", chain.config_file("flowtok"), *overrides]
    launch_two(tmp_path / "log", "train_flowtok.py", *words)
    run = tmp_path / "flowtok"
    assert read(run / "evaluation" / "step_00000004")["num_processes"] == 2
    expected = evaluate(run, inputs, tmp_path / "out", *MEASURES)
    assert evaluations(run)[4] == pytest.approx(logged(expected), **NEAR)


# Stage 1


def reconstruction_options(shards):
    """Overrides that turn the evaluation of stage 1 on."""
    keep = "training.keep_checkpoints=9"
    numbers = ["evaluation.every_steps=3", "evaluation.num_images=10"]
    return [f"evaluation.shards=[{shards}/train-00001.tar]", *numbers, keep]


def test_stage_1_logs_the_psnr_and_ssim_of_the_program_and_trains_the_same(
    chain, tiny_shards, tmp_path
):
    run = chain.run_in(tmp_path, "tokenizer", *reconstruction_options(tiny_shards))
    found = evaluations(run)
    assert [*found] == [3, 4] and [line["step"] for line in metrics(run)] == [2, 3, 4]
    words = [run, tiny_shards / "train-00001.tar", "--limit", 10, *CPU]
    run_program(reconstruction, *words, "--output", tmp_path / "report.json")
    expected = json.loads((tmp_path / "report.json").read_text())["metrics"]
    values = {"eval/psnr_db": expected["psnr_db"], "eval/ssim": expected["ssim"]}
    assert found[4] == pytest.approx(values, rel=1e-12) and found[3] != found[4]
    assert equal(state(run), state(chain.folder / "tokenizer"))


# Refusals

NO_CLIP = '["metrics=[clip_score]","clip.model=local-dir:/nowhere"]'
UNGUIDED = ["flow.null_probability=0", "sampling.guidance=1"]


@pytest.mark.parametrize(
    ("stage", "changes", "parts"),
    [
        ("flowtok", ["evaluation.protocol=coco40k"], ["coco40k", "coco30k"]),
        ("flowtok", ["evaluation.overrides=[]"], ["InceptionV3", "https://"]),
        ("flowtok", [f"evaluation.overrides={NO_CLIP}"], ["/nowhere"]),
        ("flowtok", ['evaluation.overrides=["metrics=[]"]'], ["metrics"]),
        ("flowtok", [*UNGUIDED, 'evaluation.overrides=["guidance=3"]'], ["guidance", "3"]),
        ("tokenizer", ["evaluation.shards=[]"], ["evaluation.every_steps", "evaluation.shards"]),
        ("tokenizer", ["evaluation.shards=[/nowhere.tar]"], ["/nowhere.tar"]),
        ("tokenizer", ["evaluation.num_images=-1"], ["evaluation.num_images", "-1"]),
    ],
)
def test_what_is_absent_is_refused_before_training(
    chain, inputs, tiny_shards, tmp_path, stage, changes, parts
):
    given = options(inputs) if stage == "flowtok" else reconstruction_options(tiny_shards)
    with refusal(*parts):
        chain.run_in(tmp_path, stage, *given, *changes)
    assert not list(tmp_path.rglob("checkpoints")) and not list(tmp_path.rglob("metrics.jsonl"))
