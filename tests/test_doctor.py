"""scripts/doctor.py: right verdicts on sound and on sick machines."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import shape_sample
from tiny_experiment import Experiment

from data.tar import write_shard
from scripts import doctor
from scripts.run_experiment.processes import Job
from scripts.run_experiment.stages import read_stages

ROOT = Path(__file__).parents[1]
CPU = Job(1, 0, 1, "127.0.0.1", 29400, on_gpus=False, num_threads=1)
SHORT = 0.1  # seconds of a step
# One block everywhere, a small batch: what is looked at takes seconds
SMALL = {
    "tokenizer": [
        *("tokenizer.encoder.depth=1", "tokenizer.decoder.depth=1"),
        *("losses.perceptual_weight=0", "adversarial.weight=0"),
        *("training.batch_size=8", "training.gradient_accumulation=1"),
    ],
    "flowtok": ["flowtok.depth=1", "training.batch_size=8"],
}


def small(stage, *more):
    """Overrides of a stage of full size."""
    return [f"{stage}.{option}" for option in (*SMALL[stage], *more)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("scripts.benchmark.MM_SIZES", {"cpu": (64,)})
    monkeypatch.setattr("scripts.benchmark.MM_SECONDS", 0.001)


def examine(words, wanted="", job=CPU):
    """Found text by (verdict, what)."""
    stages = read_stages(words, wanted, ROOT / "configs")
    rows = list(doctor.examine(stages, job, SHORT))
    return {(row.verdict, row.what): row.found for row in rows}


def stops(rows):
    return {what for verdict, what in rows if verdict == "STOP"}


@pytest.fixture
def no_step(monkeypatch):
    """A real step is measured on the emoji: one of full size takes a minute."""
    monkeypatch.setattr(doctor, "look_at_step", lambda *args: (doctor.Row("ok", "step", ""), 0.0))


def test_nothing_stops_the_demo(tmp_path):
    rows = examine(["emoji", f"runs_dir={tmp_path}"])
    assert not stops(rows)
    for stage in ("text_encoder", "tokenizer", "text_projector", "flowtok"):
        assert "hours" in rows["ok", f"emoji/{stage} step"]
    assert "GiB for checkpoints" in rows["ok", f"disk of {tmp_path}"]
    assert ("note", "devices") in rows
    assert not list(tmp_path.iterdir())


def test_what_has_no_plan_is_a_note(tmp_path, no_step):
    rows = examine(["emoji_dual", f"runs_dir={tmp_path}"])
    assert not stops(rows)
    for stage in ("tokenizer", "next_scale", "reader"):
        assert "dual" in rows["note", f"emoji_dual/{stage} step"]


@pytest.fixture
def made_up(tmp_path):
    """A folder of shards as the configs of full size expect them, ten images each."""
    for name in ("tokenizer", "pretrain"):
        (tmp_path / "data" / name).mkdir(parents=True)
        samples = ({**shape_sample(i), "__key__": f"{i:05d}"} for i in range(10))
        write_shard(tmp_path / "data" / name / "00000.tar", samples)
    return [f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}/runs"]


def test_flowtok_xl_is_sound_with_its_shards_and_clip(made_up, tiny_clip_dir, no_step):
    clip = f"text_encoder.model=local-dir:{tiny_clip_dir}"
    words = ["tokenizer_bl77_256", "flowtok_xl", *made_up]
    words += [*small("tokenizer", clip), *small("flowtok")]
    assert not stops(examine(words, "tokenizer tokens flowtok"))


def test_absent_weights_stop_xl_only_if_the_trainer_cannot_fetch_them(
    made_up, monkeypatch, no_network, no_step
):
    words = ["tokenizer_bl77_256", *made_up]
    words += small("tokenizer", "losses.perceptual_weight=1")
    parts = {f"tokenizer_bl77_256/tokenizer {part}" for part in ("text tower", "VGG16", "ConvNeXt")}
    monkeypatch.setattr(doctor, "why_hub_is_silent", lambda: "no network")
    assert stops(examine(words, "tokenizer")) == parts
    monkeypatch.setattr(doctor, "why_hub_is_silent", lambda: "")
    rows = examine(words, "tokenizer")
    assert not stops(rows) and all(("note", part) in rows for part in parts)
    # A file that is named is not fetched.
    absent = ["tokenizer.text_encoder.pretrained=/nowhere.safetensors"]
    assert stops(examine([*words, *absent], "tokenizer")) == {
        "tokenizer_bl77_256/tokenizer text tower"
    }


def test_absent_shards_and_runs_and_batches_that_do_not_fit_stop(
    tmp_path, tiny_clip_dir, monkeypatch
):
    folder = Experiment(tmp_path, tmp_path / "nowhere").folder / "configs"
    monkeypatch.setattr(doctor, "process_memory_gib", lambda job: 0.01)
    clip = f"tokenizer.text_encoder.model=local-dir:{tiny_clip_dir}"
    rows = examine([str(folder), clip], "tokenizer flowtok")
    assert "nowhere" in rows["STOP", "configs/tokenizer inputs"]
    assert "training.gradient_accumulation" in rows["STOP", "configs/flowtok step"]
    two = Job(1, 0, 2, "127.0.0.1", 29400, on_gpus=False, num_threads=1)
    rows = examine([str(folder), clip, "training.batch_size=9"], "tokenizer", two)
    assert "batch_size 9" in rows["STOP", "configs"]
    assert "GB/s between 2 processes by gloo" in rows["ok", "all-reduce"]


@pytest.mark.parametrize(
    ("place", "cure"), [("runs", "training.keep_checkpoints"), ("/dev/shm", "--shm-size")]
)
def test_a_full_disk_and_a_small_shared_memory_stop(
    tmp_path, tiny_shards, tiny_clip_dir, monkeypatch, capsys, place, cure
):
    folder = Experiment(tmp_path, tiny_shards).folder / "configs"
    (tmp_path / "runs").mkdir()
    full = str(tmp_path / "runs") if place == "runs" else place

    def disk_usage(path):
        return SimpleNamespace(free=100_000 if str(path) == full else 1e12)

    monkeypatch.setattr(doctor.shutil, "disk_usage", disk_usage)
    monkeypatch.setenv("STAGES", "tokenizer")
    clip = f"tokenizer.text_encoder.model=local-dir:{tiny_clip_dir}"
    words = [f"experiment_dir={tmp_path}/runs", clip, "training.batch_size=48"]
    words = [str(folder), *words, "data.num_workers=2"]
    assert doctor.main(SimpleNamespace(words=words, seconds=SHORT)) == 1
    lines = capsys.readouterr().out.splitlines()
    (stop,) = [line for line in lines if line.startswith("STOP")]
    assert full in stop and cure in stop
    assert lines[-1] == f"1 of {len(lines) - 1} would stop the run"
