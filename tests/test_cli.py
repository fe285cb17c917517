"""Errors of programs end in one line: alone, under accelerate, torchrun and train_flowtok.sh."""

import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist

from configs.load import load_config, parse_stage_args
from scripts.run_experiment import stages
from train_tokenizer import TokenizerStage
from training.errors import LAUNCHERS, exit_on_error, program_of

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
TOKENIZER = ROOT / "configs/emoji/tokenizer.yaml"


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    return exit_on_error(lambda: parse_stage_args(TokenizerStage, "What it does."))


def test_the_printed_config_loads_again(tmp_path, capsys, monkeypatch):
    option = "training.max_steps=7"
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--config", TOKENIZER, option, "--print")
    assert not stop.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_config(TokenizerStage, tmp_path / "printed.yaml")
    assert config == load_config(TokenizerStage, TOKENIZER, [option])
    assert config == parse(monkeypatch, "--config", TOKENIZER, option)


def test_a_bad_command_line_ends_with_one_line_and_status_2(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and "--config" in line


@pytest.mark.parametrize("stage", stages.PROGRAMS)
def test_a_stage_that_cannot_start_ends_with_one_line_and_status_2(stage, capsys, monkeypatch):
    module, _ = stages.PROGRAMS[stage]
    file = next(ROOT.glob(f"configs/*/{stage}.yaml"))
    monkeypatch.setattr(sys, "argv", [module, "--config", str(file), "bad=1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{module.replace('.', '/')}.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: command line: bad: ")


@pytest.mark.parametrize("kind", [ValueError, FloatingPointError, OSError])
def test_errors_of_users_data_and_machines_end_in_one_line_that_no_terminal_obeys(kind, capsys):
    def fail():
        raise kind("two\nlines\x1b]0;owned\x07")

    with pytest.raises(SystemExit) as stop:
        exit_on_error(fail)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "two lines\\x1b" in line and "test_cli.py" in line


@pytest.mark.parametrize("error", [RuntimeError("crash"), SystemExit(75)])
def test_crashes_and_stops_are_left_to_the_launcher_to_report(error, capsys):
    def end():
        raise error

    with pytest.raises(type(error)) as caught:
        exit_on_error(end)
    assert caught.value is error and not capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_group_is_ended_unless_others_may_hang(tmp_path, fails):
    def run():
        dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
        if fails:
            raise ValueError
        return 3

    try:
        with pytest.raises(SystemExit) if fails else nullcontext():
            assert exit_on_error(run) == 3
        assert dist.is_initialized() == fails
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# How programs start

PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("*/**/*.py")
    if not {"tests", ".venv", "runs"} & {*path.relative_to(ROOT).parts}
    and 'if __name__ == "__main__":' in path.read_text()
)


def test_programs_in_a_folder_look_for_our_modules_in_the_repository():
    top = r"^from (configs|data|eval|modeling|research|scripts|training)\.|\Z"
    for path in PROGRAMS:
        before, *_ = re.split(top, (ROOT / path).read_text(), maxsplit=1, flags=re.MULTILINE)
        assert "sys.path.insert(" in before or path.startswith(("assets/", "eval/")), path


def test_a_program_in_a_folder_starts_as_a_file_and_its_help_imports_nothing_slow():
    program = ["scripts/encode_tokens.py", "--help"]
    status, output = launch(sys.executable, "-X", "importtime", *program)
    times, said = [], []
    for line in output.splitlines():
        (times if line.startswith("import time: ") else said).append(line)
    assert status == 0 and said[0].startswith("usage: "), said
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in times}
    assert "torch" in imported and not {"open_clip", "timm", "torchvision"} & imported


# Under launchers

PROGRAM = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training.errors import exit_on_error

rank, folder = int(os.environ.get("RANK", "0")), Path(__file__).parent
def main():
    (folder / f"started.{rank}").touch()
    if sys.argv[2] == "last" and rank == 0:
        time.sleep(300)  # until it is ended
    number = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    while not all((folder / f"started.{i}").exists() for i in range(number)):
        time.sleep(0.001)  # an error at the same time
    raise ValueError("key=1 is wrong")
exit_on_error(main)
"""
ACCELERATE = [SCRIPTS / "accelerate", "launch", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "--cpu", "--num_processes=1"]
TORCHRUN = [SCRIPTS / "torchrun", "--standalone", "--nproc_per_node=2"]


def launch(*words, **variables):
    """Status and output of a command; it returns when all that it started has closed its output."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*map(str, words)],
        cwd=ROOT,
        env={**os.environ, **settings, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return [tmp_path / "program.py", ROOT]


# torchrun's two with the same error: that one prints it is tested under our own launcher, below.
@pytest.mark.parametrize(("launcher", "behaviour"), [(ACCELERATE, "all"), (TORCHRUN, "last")])
def test_the_error_is_the_last_word_of_a_launcher_and_no_process_is_left(
    program, launcher, behaviour
):
    status, output = launch(*launcher, *program, behaviour)
    assert status != 0 and output.count("error: ") == 1, output
    assert output.splitlines()[-1].startswith("error: key=1 is wrong"), output


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        ("python -u -m torch.distributed.run train.py", True),
        ("python -m scripts.run_experiment torchrun", False),
        ("python train.py -m torchrun", False),
    ],
)
def test_launchers_are_known_by_their_command_line(command, is_launcher):
    assert (program_of(command.split()) in LAUNCHERS) == is_launcher


def test_a_parent_that_is_no_launcher_lives_on(program):
    parent = (
        "import subprocess, sys; print(subprocess.run([sys.executable, *sys.argv[2:]]).returncode)"
    )
    variables = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "1"}
    words = [sys.executable, "-c", parent, "torchrun", *program, "all"]
    status, output = launch(*words, **variables)
    assert status == 0 and output.splitlines()[-1] == "2", output


# What train_flowtok.sh becomes; that program's imports take seconds.
RUN_EXPERIMENT = """
import os, sys
sys.path.insert(0, sys.argv[2])
from scripts.run_experiment.processes import Runner, find_job
environments = find_job({"NUM_PROCESSES": "2"}, 0, 2).environments(os.environ)
sys.exit(Runner().run([sys.executable, *sys.argv[1:]], environments))
"""


@pytest.mark.parametrize("behaviour", ["all", "last"])
def test_an_error_under_our_own_launcher_is_the_last_line_and_its_status(
    program, tmp_path, behaviour
):
    (tmp_path / "run_experiment").write_text(RUN_EXPERIMENT)
    status, output = launch(sys.executable, tmp_path / "run_experiment", *program, behaviour)
    assert status == 2 and output.count("error: ") == 1, output
    assert output.splitlines()[-1].startswith("error: key=1 is wrong"), output
