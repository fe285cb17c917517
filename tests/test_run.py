"""training/run.py: the run folder, and which config changes a resumed run takes."""

import pytest
import yaml

from training.run import CONFIG_FILE, list_changes, save_config, start_run

CONFIG = {
    "model": {"width": 8, "sizes": [1, 2]},
    "optimizer": {"learning_rate": 0.1},
    "training": {"max_steps": 5},
}


def start(folder, config, has_checkpoint=True, defaults=None):
    run = start_run(folder, "fp32", seed=0)
    save_config(run, config, defaults or {}, ["model"], has_checkpoint)
    return run


def changed(**parts):
    return {name: values | parts.get(name, {}) for name, values in CONFIG.items()}


def test_starting_alone_writes_nothing(tmp_path):
    start_run(tmp_path / "a", "fp32", seed=0)
    assert not list(tmp_path.iterdir())


def test_a_config_without_a_checkpoint_is_replaced_by_any_other(tmp_path, capsys):
    start(tmp_path, CONFIG, has_checkpoint=False)
    config = changed(model={"width": 16})
    start(tmp_path, config, has_checkpoint=False)
    assert yaml.safe_load((tmp_path / CONFIG_FILE).read_text()) == config
    assert not capsys.readouterr().out


def test_a_first_start_makes_the_folder_with_the_resolved_config(tmp_path, capsys):
    run = start(tmp_path / "a" / "b", CONFIG, has_checkpoint=False)
    assert (
        run.folder == tmp_path / "a" / "b"
        and run.is_main
        and run.device.type in ("cpu", "cuda", "mps")
    )
    assert [path.name for path in run.folder.iterdir()] == [CONFIG_FILE]
    assert yaml.safe_load((run.folder / CONFIG_FILE).read_text()) == CONFIG
    assert not capsys.readouterr().out


def test_the_same_config_again_says_nothing(tmp_path, capsys):
    start(tmp_path, CONFIG)
    start(tmp_path, CONFIG)
    assert not capsys.readouterr().out


def test_another_network_is_refused_by_its_keys_and_the_folder_is_left_as_it_was(tmp_path):
    start(tmp_path, CONFIG)
    with pytest.raises(ValueError) as caught:
        start(tmp_path, changed(model={"width": 16, "sizes": [1, 3]}, training={"max_steps": 9}))
    message = str(caught.value)
    assert "model.width: 8 -> 16" in message and "model.sizes: [1, 2] -> [1, 3]" in message
    assert str(tmp_path) in message and "max_steps" not in message
    assert yaml.safe_load((tmp_path / CONFIG_FILE).read_text()) == CONFIG


def test_a_network_key_that_did_not_exist_yet_counts_as_its_default(tmp_path, capsys):
    start(tmp_path, CONFIG)
    defaults = {"model": {"width": 1, "new": False}, "other": {"x": 1}}
    new = changed(model={"new": False}) | {"other": {"x": 1}}
    start(tmp_path, new, defaults=defaults)
    assert not capsys.readouterr().out
    start(tmp_path, CONFIG, has_checkpoint=False)
    with pytest.raises(ValueError, match="model.new: False -> True"):
        start(tmp_path, changed(model={"new": True}), defaults=defaults)


def test_other_changes_are_printed_and_saved(tmp_path, capsys):
    start(tmp_path, CONFIG)
    config = changed(optimizer={"learning_rate": 0.2}, training={"max_steps": 9})
    start(tmp_path, config)
    assert capsys.readouterr().out.splitlines() == [
        "config changed since the last start: optimizer.learning_rate: 0.1 -> 0.2",
        "config changed since the last start: training.max_steps: 5 -> 9",
    ]
    assert yaml.safe_load((tmp_path / CONFIG_FILE).read_text()) == config


def test_changes_name_new_lost_and_nested_keys():
    assert list_changes({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "e": 4}, "d": 3}) == [
        ("a.c", "a.c: 2 -> None"),
        ("a.e", "a.e: None -> 4"),
    ]
    assert list_changes({"a": 1}, {"a": {"b": 1}}) == [("a", "a: 1 -> {'b': 1}")]
