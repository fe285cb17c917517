"""What train_flowtok.sh checks before the first stage: what will fail later is named."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import refusal

from scripts.run_experiment import checks, stages

CONFIGS = Path(__file__).parents[1] / "configs"


def read(*words, wanted=""):
    return stages.read_stages(words, wanted, CONFIGS)


def test_shipped_experiments_fit_together():
    names = sorted(path.name for path in CONFIGS.iterdir() if stages.stage_files(path))
    shipped = [read(name) for name in names]
    made = {stage.config.run_dir for found in shipped for stage in found}
    converted = ("runs/released_xl", "runs/released_small")
    made |= {f"{run}/{part}" for run in converted for part in ("tokenizer", "flowtok")}
    for found in shipped:
        checks.check_configs(found, num_processes=8)
        for stage in found:
            assert made.issuperset(stage.config.earlier_runs().values()), stage
            tokens = stage.config.token_shards()
            assert made.issuperset(os.path.dirname(path) for path in tokens), stage


@pytest.fixture
def tiny(tmp_path, tiny_shards):
    """Folder of the configs of a tiny experiment, none of whose stages has run."""
    from tiny_experiment import Experiment

    Experiment(tmp_path, tiny_shards)
    return tmp_path / "configs"


def check(folder, *overrides, num_processes=1):
    """All that train_flowtok.sh checks for an experiment."""
    found, _ = checks.skip_stages(read(f"{folder}/", *overrides))
    checks.check_configs(found, num_processes)
    checks.check_inputs(found)


def add_round(folder, name, **values):
    """A further round of stage flowtok."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"base": "flowtok.yaml", **values}))


def test_an_experiment_passes_before_any_of_its_stages_has_run(tiny):
    add_round(tiny, "flowtok_finetune", init_from="${experiment_dir}/flowtok", projector_run="")
    check(tiny, num_processes=4)
    assert [path.name for path in tiny.parent.iterdir()] == ["configs"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("flowtok.training.batch_size=9", ["configs/flowtok", "training.batch_size 9"]),
        ("tokenizer.data.shards=[/gone/a.tar]", ["configs/tokenizer", "/gone/a.tar"]),
        ("report.heldout_shards=[/gone/*.tar]", ["configs/report", "/gone/*.tar"]),
        ("flowtok.tokenizer_run=/gone", ["configs/flowtok", "tokenizer_run=/gone"]),
        ("tokenizer.text_encoder.model=local-dir:/gone/clip", ["text_encoder.model=/gone/clip"]),
        ("flowtok.run_dir=${experiment_dir}/tokens", ["configs/tokens", "configs/flowtok"]),
        ("flowtok.run_dir=/dev/null/below", ["/dev/null/below"]),
        # token shards: of a stage of this command, of nobody
        (
            "flowtok.data.shards=['${experiment_dir}/tokens/base-*.tar']",
            ["configs/flowtok", "base-*.tar", "tokens/train-00000.tar"],
        ),
        (
            "flowtok.data.shards=['${experiment_dir}/tokens/train-0000{0..2}.tar']",
            ["configs/flowtok", "train-00002.tar", "train-00001.tar"],
        ),
        ("flowtok.data.shards=['${experiment_dir}/tokenizer/*.tar']", ["tokenizer/*.tar"]),
    ],
)
def test_what_will_fail_is_found_before_the_first_stage(tiny, override, said):
    with refusal(*said):
        check(tiny, override, num_processes=2)


def test_images_that_an_earlier_stage_makes_are_known_beforehand(tmp_path):
    where = f"experiment_dir={tmp_path}/run[1]"
    check(CONFIGS / "artists", where)
    check(CONFIGS / "scenes", where)
    assert not any(tmp_path.iterdir())
    for override in (
        "tokenizer.data.shards=['${experiment_dir}/scenes/seem-*.tar']",
        "tokens.data.shards=['${experiment_dir}/scene/train-*.tar']",
        "flowtok.data.shards=['${experiment_dir}/tokens/seen-*.tar']",
    ):
        with pytest.raises(ValueError, match=override.split("/")[-1].split("*")[0]):
            check(CONFIGS / "scenes", where, override)
    # Those that are to be there already are looked for all the same
    mixed = "tokenizer.data.shards=['${experiment_dir}/scenes/train-*.tar',/gone/a.tar]"
    with pytest.raises(ValueError, match="/gone/a.tar"):
        check(CONFIGS / "scenes", where, mixed)


ODD_NAMES = ["a[1]", "a{1..3}", "*? #1, b: c"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_of_ours_is_never_a_pattern(tiny, tiny_shards, tmp_path, name):
    folder = tmp_path / "results" / name
    check(tiny, f"experiment_dir={folder}")
    images = tmp_path / "images" / name
    shutil.copytree(tiny_shards, images)
    check(tiny, f"experiment_dir={folder}", f"tokenizer.data.shards=['{images}/train-*.tar']")
    with pytest.raises(ValueError, match="train-00002.tar"):
        check(tiny, f"experiment_dir={folder}", f"tokens.data.shards=['{images}/train-00002.tar']")
    with pytest.raises(ValueError, match=r"base-\*.tar"):
        tokens = "flowtok.data.shards=['${experiment_dir}/tokens/base-*.tar']"
        check(tiny, f"experiment_dir={folder}", tokens)


def test_stages_write_and_read_below_a_folder_that_looks_like_a_pattern(chain, tmp_path):
    folder = tmp_path / "a[1]{b,c} #"
    shutil.copytree(chain.folder / "tokenizer", folder / "tokenizer")
    where = f"experiment_dir={folder}"
    tokens = chain.run("tokens", where)
    assert tokens == folder / "tokens"
    run = chain.run("text_projector", where, "training.max_steps=1")
    assert (run / "checkpoints" / "step_00000001").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_finished_stages_need_their_data_no_more(chain):
    gone = "data.shards=[/gone/a.tar]"
    stages_done = [f"{name}.{gone}" for name in ("text_encoder", "tokenizer", "tokens", "flowtok")]
    check(chain.folder / "configs", *stages_done)
    with pytest.raises(ValueError, match="/gone/a.tar"):
        check(chain.folder / "configs", *stages_done, "flowtok.training.max_steps=9")
    # the tokens are there: their files count, not what the stage would write
    with pytest.raises(ValueError, match=r"base-\*.tar"):
        tokens = "flowtok.data.shards=['${experiment_dir}/tokens/base-*.tar']"
        check(chain.folder / "configs", tokens, "flowtok.training.max_steps=9")


def test_images_that_are_missing_below_data_dir_can_be_moved_by_that(tmp_path):
    with pytest.raises(ValueError, match=f"data_dir=.*{tmp_path}.*tokenizer.data.shards"):
        check(CONFIGS / "tokenizer_bl77_256", f"data_dir={tmp_path}")


def test_a_text_tower_that_the_tokenizer_does_not_use_is_skipped(tiny):
    other = ["tokenizer.text_encoder.model=ViT-B-32", "tokenizer.text_encoder.pretrained=openai"]
    kept, reasons = checks.skip_stages(read(f"{tiny}/", *other))
    assert "text_encoder" not in [stage.name for stage in kept]
    assert len(reasons) == 1 and "ViT-B-32" in reasons[0]
    assert checks.skip_stages(read(f"{tiny}/"))[1] == []
    only = read(f"{tiny}/", "text_encoder.training.seed=1", wanted="text_encoder")
    assert checks.skip_stages(only) == (only, [])


def test_a_reader_is_skipped_without_its_package_unless_it_is_all_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    found, alone = read("emoji_dual"), read("emoji_dual", wanted="reader")
    kept, (reason,) = checks.skip_stages(found)
    assert kept == [stage for stage in found if stage.name != "reader"]
    assert "emoji_dual/reader" in reason
    assert checks.skip_stages(alone) == (alone, [])
