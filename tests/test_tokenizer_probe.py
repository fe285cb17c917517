"""A tokenizer is judged by what flows from it: regression and a small flow."""

import json
from types import SimpleNamespace

import pytest
import torch
from evaluations import run_program

import scripts.run_experiment.__main__ as run_experiment
from data.files import write_json
from eval import tokenizer_probe
from scripts import make_scenes


@pytest.fixture
def trained(chain, monkeypatch):
    """The probe's stages have run: they are those of the tiny experiment."""

    def link(experiment, folder, tokenizer, data):
        folder.mkdir(parents=True, exist_ok=True)
        for stage in ("tokens", "flowtok"):
            (folder / stage).symlink_to(chain.folder / stage)

    monkeypatch.setattr(tokenizer_probe, "train_flow", link)


def test_a_tokenizer_of_scenes_is_probed(chain, trained, tmp_path, capsys):
    data = tmp_path / "data"
    make_scenes.main(
        make_scenes.ScenesStage(
            run_dir=str(data), captions=4, heldout_captions=4, images_per_caption=1, image_size=32
        )
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer").symlink_to(chain.folder / "tokenizer")
    options = ("--data", data, "--captions", 2, "--num-images", 40, "--device", "cpu")
    run_program(tokenizer_probe, run, *options)
    figures = json.loads((run / "probe" / "probe.json").read_text())
    assert -5 < figures["ridge_r2"] < 1 and 0 <= figures["ridge_top1"] <= figures["ridge_top5"] <= 1
    for split in ("seen", "new", "pairs", "relations", "counts"):
        assert 0 <= figures[f"generated_{split}"] <= 1
        assert 0 <= figures[f"reconstructed_{split}"] <= 1
    assert f"| {run} | {figures['ridge_r2']:.3f} |" in capsys.readouterr().out


def test_the_share_that_is_explained():
    true = torch.randn(50, 3, 2)
    mean = true.mean(0)
    assert tokenizer_probe.explained(true, true, mean) == 1
    assert tokenizer_probe.explained(mean.expand_as(true), true, mean) == pytest.approx(0, abs=1e-6)


def test_absent_images_and_figures_of_other_data_are_named_before_any_work(tmp_path, tiny_shards):
    with pytest.raises(ValueError, match=r"new-\*\.tar"):
        run_program(tokenizer_probe, tmp_path, "--data", tmp_path)
    write_json({"protocol": {"data": ["other"]}}, tmp_path / "probe" / "probe.json")
    with pytest.raises(ValueError, match="probe.json"):
        run_program(tokenizer_probe, tmp_path, "--heldout", f"{tiny_shards}/*.tar")


@pytest.mark.parametrize("experiment", ["probe_scenes", "probe_256"])
def test_the_experiments_take_the_probes_overrides(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tokenizer_probe.ROOT)
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(run_experiment, "Runner", lambda: SimpleNamespace(requests=0))
    overrides = [f"{key}={tmp_path}" for key in ("experiment_dir", "tokenizer_run", "data_dir")]
    run_experiment.main([experiment, *overrides])
    assert capsys.readouterr().out.count(str(tmp_path)) >= 6
