"""What train_flowtok.sh runs, where, and what it refuses; how programs end; environment.sh."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import refusal
from forks import wait_for_end

import scripts.run_experiment.__main__ as run_experiment
from scripts.run_experiment import stages
from scripts.run_experiment.processes import KEEP_FREED_MEMORY, find_job
from training.errors import STOPPED_STATUS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DEMO = ["scenes", "text_encoder", "tokenizer", "tokens", "text_projector", "flowtok"]
EXPERIMENTS = sorted(path.name for path in CONFIGS.iterdir() if stages.stage_files(path))


def read(*words, wanted="", configs=CONFIGS):
    return stages.read_stages(words, wanted, configs)


# Which stages, with which overrides


@pytest.mark.parametrize(
    ("words", "wanted", "expected"),
    [
        ([], "", [f"scenes/{name}" for name in DEMO]),
        (["runs_dir=/elsewhere"], "tokens tokenizer", ["scenes/tokenizer", "scenes/tokens"]),
        (["configs/emoji/"], "flowtok", ["emoji/flowtok"]),
        (
            ["tokenizer_bl77_256", "data_dir=/data", "flowtok_b"],
            "tokens_finetune flowtok_finetune",
            ["tokenizer_bl77_256/tokens_finetune", "flowtok_b/flowtok_finetune"],
        ),
    ],
)
def test_stages_run_in_order_one_experiment_after_the_other(words, wanted, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [str(stage) for stage in read(*words, wanted=wanted)] == expected


def test_a_round_runs_the_program_of_its_stage_with_its_own_overrides():
    first, finetune, large = read("flowtok_xl", "runs_dir=/a b", "flowtok_512.training.seed=3")
    program = ["train_flowtok.py", "--config"]
    files = [str(CONFIGS / "flowtok_xl" / f"{name}.yaml") for name in ("flowtok", "flowtok_512")]
    assert first.command == [*program, files[0], "runs_dir=/a b"]
    assert large.command == [*program, files[1], "runs_dir=/a b", "training.seed=3"]
    assert finetune.config.run_dir == "/a b/flowtok_xl/flowtok_finetune"


@pytest.mark.parametrize(
    ("words", "wanted", "said"),
    [
        (["dmeo"], "", ["'dmeo'", *EXPERIMENTS]),
        (["emoji"], "tokeniser", ["STAGES=tokeniser", "text_encoder, tokenizer"]),
        (["small", "text_encoder.path=x"], "", ["tokenizer.text_encoder.path=x"]),
        (["small", "flowtok.lr=1"], "", ["stage small/flowtok", "lr", "optimizer.learning_rate"]),
        (["scenes", "training.seed=5"], "", ["stage scenes/scenes", "STAGE.training.seed=5"]),
    ],
)
def test_what_cannot_run_is_refused_with_the_valid_choices(words, wanted, said):
    with refusal(*said):
        read(*words, wanted=wanted)


# Machines and processes

HAND = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MAIN_PROCESS_IP": "node0"}
SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
TORCHRUN = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"}
TORCHRUN |= {"MASTER_ADDR": "node0", "MASTER_PORT": "1234", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "num_gpus", "machines", "processes_and_threads", "main"),
    [
        ({}, 0, (1, 0), (2, 4), ("127.0.0.1", None)),
        ({"NUM_PROCESSES": "", "OMP_NUM_THREADS": "3"}, 8, (1, 0), (8, 3), ("127.0.0.1", None)),
        (HAND, 8, (2, 1), (16, 1), ("node0", 29500)),
        (HAND | {"NUM_PROCESSES": "4", "MAIN_PROCESS_PORT": "1"}, 8, (2, 1), (4, 1), ("node0", 1)),
        (SLURM | HAND | {"MACHINE_RANK": "0"}, 8, (2, 0), (16, 1), ("node0", 29500)),
        (TORCHRUN, 8, (2, 1), (16, 1), ("node0", 1234)),
    ],
)
def test_the_job_follows_from_variables_gpus_cores_and_the_wanted_processes(
    variables, num_gpus, machines, processes_and_threads, main
):
    job = find_job(variables, num_gpus, num_cores=8, cpu_processes=2)
    assert (job.num_machines, job.machine_rank) == machines
    assert (job.num_processes, job.num_threads) == processes_and_threads
    assert job.host == main[0] and job.port == (main[1] or job.port) > 0
    assert find_job({}, num_gpus=0, num_cores=1, cpu_processes=2).num_processes == 1


def test_the_first_host_of_a_slurm_job_is_asked_for(tmp_path, monkeypatch):
    text = '#!/bin/sh\n[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n'
    write_program(tmp_path / "scontrol", text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_job(SLURM | {"SLURM_JOB_NODELIST": "gpu[3-4]"}, 8, 8).host == "gpu3"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NUM_MACHINES": "2"}, ["MAIN_PROCESS_IP", "NUM_MACHINES=2"]),
        ({"NUM_MACHINES": "two"}, ["NUM_MACHINES=two"]),
        (HAND | {"MACHINE_RANK": "2"}, ["MACHINE_RANK=2", "NUM_MACHINES=2"]),
        (HAND | {"NUM_PROCESSES": "3"}, ["NUM_PROCESSES=3", "NUM_MACHINES=2"]),
        ({"NUM_PROCESSES": "9"}, ["NUM_PROCESSES=9", "8"]),
        (SLURM | {"SLURM_LOCALID": "1"}, ["--ntasks-per-node 1"]),
    ],
)
def test_impossible_machines_are_refused(variables, said):
    with refusal(*said):
        find_job(variables, num_gpus=8, num_cores=8)


def test_processes_find_each_other_and_nothing_of_another_launcher():
    names = ("TORCHELASTIC_USE_AGENT_STORE", "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE")
    names += ("FSDP_VERSION", "FORK_LAUNCHED", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_RANK")
    left = TORCHRUN | dict.fromkeys(names, "1") | {"HOME": "/root", "MALLOC_TOP_PAD_": "1"}
    (alone,) = find_job({}, 0, 8).environments(left)
    expected = {"HOME": "/root", "OMP_NUM_THREADS": "8", "ACCELERATE_USE_CPU": "true"}
    assert alone == KEEP_FREED_MEMORY | expected | {"MALLOC_TOP_PAD_": "1"}
    ranks = find_job(HAND | {"NUM_PROCESSES": "4"}, 8, 8).environments(left)
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}
    common |= {"MASTER_PORT": "29500", "OMP_NUM_THREADS": "1", "HOME": "/root"}
    common |= {"MALLOC_TOP_PAD_": "1"}
    expected = [common | {"RANK": rank, "LOCAL_RANK": local} for rank, local in ("20", "31")]
    assert ranks == expected


# Running programs

RUN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from scripts.run_experiment.processes import Runner
environments = [dict(os.environ, RANK=str(rank)) for rank in range(2)]
sys.exit(Runner().run([sys.executable, "-c", sys.argv[2]], environments))
"""
PROGRAM = """
import os, signal, sys, time
first = os.environ["RANK"] == "0"
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
{}
print(os.getpid(), file=open("listens." + os.environ["RANK"], "w"))
time.sleep(300)
"""
DEAF = "signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
STUBBORN = f"{DEAF}; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def start_runner(folder, behaviour):
    """A program with a Runner, as train_flowtok.sh is, of two processes."""
    command = [sys.executable, "-c", RUN, str(ROOT), PROGRAM.format(behaviour)]
    return subprocess.Popen(command, cwd=folder)


def wait_until_both_listen(folder):
    """Their process ids."""
    paths = [folder / "listens.0", folder / "listens.1"]
    while not all(path.exists() and path.read_text() for path in paths):
        time.sleep(0.01)
    return [path.read_text().strip() for path in paths]


@pytest.mark.parametrize(
    ("first", "status"),
    [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)],
)
def test_the_status_is_that_of_the_first_failure_which_ends_the_others(tmp_path, first, status):
    assert start_runner(tmp_path, f"if first: {first}").wait() == status


@pytest.mark.parametrize(
    ("behaviour", "signals", "status"),
    [
        ("", [signal.SIGTERM], STOPPED_STATUS),
        (DEAF, [signal.SIGINT, signal.SIGUSR1], 128 + signal.SIGTERM),
        (STUBBORN, [signal.SIGHUP, signal.SIGINT, signal.SIGTERM], 128 + signal.SIGKILL),
    ],
)
def test_the_first_request_stops_the_second_ends_the_third_kills(
    tmp_path, behaviour, signals, status
):
    process = start_runner(tmp_path, behaviour)
    wait_until_both_listen(tmp_path)
    for number in signals:
        process.send_signal(number)
    assert process.wait() == status


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of it")
def test_a_launcher_that_is_killed_takes_its_programs_with_it(tmp_path):
    process = start_runner(tmp_path, STUBBORN)
    children = wait_until_both_listen(tmp_path)
    process.kill()
    wait_for_end(children)


@pytest.mark.parametrize(
    ("statuses", "status", "last"),
    [
        ({}, 0, "eval.report"),
        ({"train_flowtok.py": STOPPED_STATUS}, STOPPED_STATUS, "train_flowtok.py"),
        ({"scripts.encode_tokens": 2}, 2, "scripts.encode_tokens"),
    ],
)
def test_stages_run_until_one_fails_then_results_are_listed(
    chain, monkeypatch, capsys, statuses, status, last
):
    commands = []

    class FakeRunner:
        requests = 0

        def run(self, command, environments):
            program = command[2] if command[1] == "-m" else command[1]
            commands.append(program)
            return statuses.get(program, 0)

    monkeypatch.setattr(run_experiment, "Runner", FakeRunner)
    monkeypatch.setenv("NUM_PROCESSES", "1")
    with pytest.raises(SystemExit) if status else nullcontext() as stop:
        run_experiment.main([f"{chain.folder}/configs"])
    assert not status or stop.value.code == status
    assert commands[-1] == last  # no sample.py: the picture is newer than the checkpoints
    output = capsys.readouterr().out
    assert (f"  {chain.folder}/samples.png" in output.splitlines()) == (status == 0)
    assert ("bash train_flowtok.sh" in output) == (status == STOPPED_STATUS)


def test_a_dry_run_prints_the_commands_of_all_stages_and_of_the_samples(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(run_experiment, "Runner", lambda: SimpleNamespace(requests=0))
    run_experiment.main(["small", "runs_dir=/gone", "flowtok.training.seed=7"])
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line)[2:] for line in lines if line[:2] == "+ "]
    assert [words[-2:] for words in commands] == [
        ["configs/small/tokenizer.yaml", "runs_dir=/gone"],
        ["configs/small/tokens.yaml", "runs_dir=/gone"],
        ["configs/small/text_projector.yaml", "runs_dir=/gone"],
        ["runs_dir=/gone", "training.seed=7"],
        ["--output", "/gone/small/samples.png"],
    ]
    assert not Path("/gone").exists()


# The shell part


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def bash(folder, *command, **variables):
    """No variables of the machine that runs the tests, say a Slurm job or an environment."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(folder), **variables}
    return subprocess.run(
        ["bash", *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_help_prints_the_launch_manual(tmp_path):
    result = bash(tmp_path, str(ROOT / "train_flowtok.sh"), "--help")
    assert result.returncode == 0
    assert "NUM_PROCESSES" in result.stdout and "set -euo" not in result.stdout


SET_UP = f"set -euo pipefail; source {ROOT}/scripts/environment.sh; "
SET_UP += "set_up_environment $1; echo PYTHON=$PYTHON"


def test_an_active_environment_that_lacks_packages_is_refused_by_name(tmp_path):
    (tmp_path / "few.txt").write_text("no-such-package>=1  # why\npytest>=1.0\n# a comment\n")
    (tmp_path / "more.txt").write_text("-r few.txt\npytest-xdist>=999.0\n")
    result = bash(tmp_path, "-c", SET_UP, "_", "more.txt", VIRTUAL_ENV=sys.prefix)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    said = ("no-such-package, pytest-xdist>=999.0", f"{sys.prefix}/bin/python -m pip install")
    assert all(part in result.stderr for part in said)
    (tmp_path / "few.txt").write_text("pytest>=1.0\n")
    result = bash(tmp_path, "-c", SET_UP, "_", "few.txt", VIRTUAL_ENV=sys.prefix)
    assert (result.returncode, result.stdout) == (0, f"PYTHON={sys.prefix}/bin/python\n")


def test_the_own_environment_is_made_once(tmp_path):
    text = """#!/bin/sh
case "$*" in
    *venv*) mkdir -p .venv/bin; cp bin/python3 .venv/bin/python ;;
    *"pip install"*) touch installed ;;
    "- few.txt") [ -f installed ] || echo no-such-package ;;
esac
"""
    write_program(tmp_path / "bin/python3", text)
    (tmp_path / "few.txt").touch()
    first = bash(tmp_path, "-c", SET_UP, "_", "few.txt")
    assert first.returncode == 0, first.stderr
    assert [line for line in first.stdout.splitlines() if line[:2] == "+ "] == [
        "+ python3 -m venv --clear .venv",
        "+ .venv/bin/python -m pip install -r few.txt",
    ]
    second = bash(tmp_path, "-c", SET_UP, "_", "few.txt")
    assert (second.returncode, second.stdout) == (0, "PYTHON=.venv/bin/python\n")


def test_an_old_python_is_refused_with_its_version(tmp_path):
    text = '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n'
    write_program(tmp_path / "bin/python3", text)
    (tmp_path / "few.txt").touch()
    result = bash(tmp_path, "-c", SET_UP, "_", "few.txt")
    assert result.returncode == 2 and "3.8.1" in result.stderr


# Words that macOS's bash 3.2 does not have, and programs that only GNU has.
NOT_ON_MACOS = [
    r"\b(mapfile|readarray|coproc|nproc|realpath|tac|timeout|readlink +-f|sed +-i)\b",
    r"\b(declare|local|typeset|readonly) +-\w*[Agnlu]",
    r"\$\{\w+(\[[^]]*\])?(,|\^|@[A-Za-z])",
    r"(\[|\btest) +(! +)?-[vR] |\bwait +-[nfp]|&>>|\|&|;&",
    r'"\$\{\w+\[@\]\}"',  # of an empty array, under set -u
]
SHELL = ("*.sh", "scripts/*.sh", "scripts/*.sbatch", ".ci/*")


@pytest.mark.parametrize("path", [p for name in SHELL for p in ROOT.glob(name)], ids=str)
def test_scripts_use_no_word_that_macos_lacks(path):
    lines = [s for s in path.read_text().splitlines() if not s.lstrip().startswith("#")]
    assert [s for s in lines if any(re.search(word, s) for word in NOT_ON_MACOS)] == []
