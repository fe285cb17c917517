"""training/run.py: the run folder, and which config changes a resumed run takes."""

from dataclasses import asdict, dataclass, field

import pytest
import yaml

from eval.programs import start_processes
from training.run import CONFIG_FILE, locked, save_config, start_run


@dataclass
class Model:
    width: int = 8
    sizes: list = field(default_factory=lambda: [1, 2])
    new: bool = False


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    learning_rate: float = 0.1
    max_steps: int = 5

    stage = "toy"
    networks = ("model",)


def start(folder, config=None, has_checkpoint=True):
    run = start_run(folder, "fp32", seed=0)
    save_config(run, config or Config(), has_checkpoint)
    return run


def saved(folder):
    return yaml.safe_load((folder / CONFIG_FILE).read_text())


def values(config=None):
    return {"stage": "toy", **asdict(config or Config())}


def test_engines_that_the_environment_asks_for_are_refused(monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        for begin in (lambda: start_run("a", "fp32", seed=0), lambda: start_processes("cpu")):
            with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{name}=true: "):
                patch.setenv(name, "true")
                begin()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    start_processes("cpu")


def test_a_network_key_that_did_not_exist_yet_counts_as_its_default(tmp_path, capsys):
    start(tmp_path)
    older = values()
    del older["model"]["new"]
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(older))
    with pytest.raises(ValueError, match="model.new: False -> True"):
        start(tmp_path, Config(model=Model(new=True)))
    start(tmp_path)
    assert not capsys.readouterr().out


def test_other_changes_are_printed_and_saved(tmp_path, capsys):
    start(tmp_path)
    config = Config(learning_rate=0.2, max_steps=9)
    start(tmp_path, config)
    printed = capsys.readouterr().out
    assert "learning_rate: 0.1 -> 0.2" in printed and "max_steps: 5 -> 9" in printed
    assert saved(tmp_path) == values(config)


def test_a_running_training_keeps_its_config(tmp_path):
    start(tmp_path)
    with (
        locked(start_run(tmp_path, "fp32", seed=0)),
        pytest.raises(ValueError, match=f"{tmp_path} is being written by another process"),
    ):
        start(tmp_path, Config(learning_rate=0.2))
    assert saved(tmp_path) == values()
