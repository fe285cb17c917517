"""train_flowtok.sh and scripts/environment.sh: what they would run (DRY_RUN=1), in a copy with made-up configs."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGES = [
    "text_encoder",
    "tokenizer",
    "tokens",
    "text_projector",
    "flowtok",
    "report",
]  # of the demo
ROUNDS = [
    "tokens_finetune",
    "flowtok_finetune",
    "tokenizer_512",
    "tokens_512",
    "flowtok_512",
]  # after flowtok
ROUNDS += ["text_decoder", "flowtok_caption"]
PROGRAMS = {
    "text_encoder": "--module scripts.train_text_encoder",
    "tokenizer": "train_tokenizer.py",
    "tokens": "--module scripts.encode_tokens",
    "text_projector": "train_text_projector.py",
    "text_decoder": "train_text_decoder.py",
    "flowtok": "train_flowtok.py",
    "report": "-m eval.report",
}


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Copy:
    """A copy of the launcher with experiments `demo` (all stages) and `small` (two), on a made-up machine."""

    def __init__(self, root):
        self.root, self.bin = root / "repo", root / "bin"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(REPO / "train_flowtok.sh", self.root)
        shutil.copy(REPO / "scripts" / "environment.sh", self.root / "scripts")
        for experiment, stages in {
            "demo": STAGES,
            "small": ["tokenizer", "flowtok"],
            "none": [],
        }.items():
            (self.root / "configs" / experiment).mkdir(parents=True)
            for stage in stages:
                (self.root / "configs" / experiment / f"{stage}.yaml").touch()
        self.set_gpus(0)
        write_program(self.bin / "nproc", "#!/bin/sh\necho 8\n")

    def set_gpus(self, num):
        write_program(
            self.bin / "nvidia-smi",
            f"#!/bin/sh\nfor i in $(seq {num}); do echo GPU $i: some name; done\n",
        )

    def bash(self, *command, cwd=None, **variables):
        # No variables of the machine that runs the test: it may itself be a Slurm job or an active environment.
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(self.root), **{k: str(v) for k, v in variables.items()}}
        return subprocess.run(
            ["bash", *map(str, command)],
            cwd=cwd or self.root,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def all_commands(self, *args, **variables):
        """The commands of a dry run, as strings: the check of the configs, then the stages."""
        result = self.bash(self.root / "train_flowtok.sh", *args, DRY_RUN=1, **variables)
        assert result.returncode == 0, result.stderr
        return [
            line.removeprefix("+ ") for line in result.stdout.splitlines() if line.startswith("+ ")
        ]

    def commands(self, *args, **variables):
        """Those after the check."""
        check, *others = self.all_commands(*args, **variables)
        assert " -m configs.check " in check and not any(
            "configs.check" in command for command in others
        )
        return others

    def error(self, *args, **variables):
        """The message of a run that is refused before any command."""
        result = self.bash(self.root / "train_flowtok.sh", *args, DRY_RUN=1, **variables)
        assert result.returncode == 2
        assert "+ " not in result.stdout
        return result.stderr


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def flag(command, name):
    words = shlex.split(command)
    return words[words.index(name) + 1]


def stage_of(command):
    return Path(flag(command, "--config")).stem if "--config" in command else command.split()[1]


# --- What runs ---


def test_all_stages_of_the_demo_run_in_order_then_samples_are_drawn(copy):
    commands = copy.commands()
    assert [stage_of(c) for c in commands] == [*STAGES, "sample.py"]
    for stage, command in zip(STAGES, commands, strict=False):
        assert f"{PROGRAMS[stage]} --config configs/demo/{stage}.yaml" in command
        assert ("accelerate.commands.launch" in command) == (stage != "report")
    assert (
        commands[-1]
        == ".venv/bin/python sample.py --run runs/demo/flowtok --output runs/demo/samples.png"
    )


def test_a_dry_run_leaves_nothing_behind(copy):
    before = sorted(copy.root.rglob("*"))
    copy.commands()
    assert sorted(copy.root.rglob("*")) == before


def test_an_experiment_runs_the_stages_that_it_configures(copy):
    assert [stage_of(c) for c in copy.commands("small")] == ["tokenizer", "flowtok", "sample.py"]


def test_further_rounds_run_their_stages_program_and_each_flow_draws_samples(copy):
    for stage in ("tokenizer", "tokens", "flowtok", *ROUNDS):
        (copy.root / "configs" / "none" / f"{stage}.yaml").touch()
    commands = copy.commands("none", "flowtok_512.a.b=1", "tokens_finetune.c=2")
    samples = [c.split("sample.py ")[1] for c in commands[-4:]]
    assert samples == [
        f"--run runs/none/flowtok{x} --output runs/none/samples{x}.png"
        for x in ("", "_finetune", "_512", "_caption")
    ]
    stages = dict(zip(["tokenizer", "tokens", "flowtok", *ROUNDS], commands[:-4], strict=True))
    for stage, command in stages.items():
        program = PROGRAMS.get(stage) or PROGRAMS[stage.split("_")[0]]
        assert f"{program} --config configs/none/{stage}.yaml" in command
    assert [stage for stage, command in stages.items() if command.endswith(" a.b=1")] == [
        "flowtok_512"
    ]
    assert [stage for stage, command in stages.items() if command.endswith(" c=2")] == [
        "tokens_finetune"
    ]


def test_chosen_stages_keep_their_order_and_only_flowtok_draws_samples(copy):
    assert [stage_of(c) for c in copy.commands(STAGES="tokens tokenizer")] == [
        "tokenizer",
        "tokens",
    ]
    assert [stage_of(c) for c in copy.commands(STAGES="flowtok")] == ["flowtok", "sample.py"]


def test_it_works_from_another_folder(copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert copy.commands("small", cwd=elsewhere) == copy.commands("small")


def test_an_active_environment_is_used(copy):
    copy.set_gpus(1)  # on a CPU, malloc's settings come first
    assert all(
        c.startswith("/some/env/bin/python ")
        for c in copy.commands("small", VIRTUAL_ENV="/some/env")
    )
    assert all(
        c.startswith("/some/conda/bin/python ")
        for c in copy.commands("small", CONDA_PREFIX="/some/conda")
    )


def test_help_prints_the_launch_manual(copy):
    result = copy.bash("train_flowtok.sh", "--help")
    assert result.returncode == 0
    assert "bash train_flowtok.sh [EXPERIMENT] [key=value ...]" in result.stdout
    assert "set -euo" not in result.stdout


# --- Overrides ---


def test_plain_overrides_reach_every_chosen_stage_and_prefixed_ones_their_own(copy):
    commands = copy.commands(
        "small", "seed=1", "flowtok.flowtok.width=768", "tokenizer.seed=2", "text=a b"
    )
    tails = {stage_of(c): shlex.split(c.split(".yaml ")[-1]) for c in commands[:2]}
    assert tails == {
        "tokenizer": ["experiment_dir=runs/small", "seed=1", "seed=2", "text=a b"],
        "flowtok": ["experiment_dir=runs/small", "seed=1", "flowtok.width=768", "text=a b"],
    }


def test_every_stage_is_checked_with_its_overrides_before_the_first_runs(copy):
    arguments = ["small", "tokenizer.seed=2", "text=a b", "experiment_dir=/some/dir"]
    check, *stages = copy.all_commands(*arguments, NUM_PROCESSES=2)
    words = shlex.split(check)
    assert words[:4] == [".venv/bin/python", "-m", "configs.check", "2"]
    tokenizer, flowtok = " ".join(words[4:]).split(" -- ")
    assert tokenizer == "configs/small/tokenizer.yaml experiment_dir=/some/dir seed=2 text=a b"
    assert flowtok == "configs/small/flowtok.yaml experiment_dir=/some/dir text=a b"
    for group, command in zip((tokenizer, flowtok), stages, strict=False):
        assert " ".join(shlex.split(command)).endswith(f"--config {group}")


def test_a_plain_key_that_begins_like_a_stage_is_no_prefix(copy):
    for command in copy.commands("small", "tokens=3", "tokenizer_run=x")[:2]:
        assert command.endswith(".yaml experiment_dir=runs/small tokens=3 tokenizer_run=x")


def test_the_experiment_can_be_left_out(copy):
    commands = copy.commands("seed=1")
    assert len(commands) == len(STAGES) + 1
    assert all(c.endswith("seed=1") for c in commands[:-1])


def test_experiment_dir_reaches_the_stages_and_the_samples(copy):
    *stages, sample = copy.commands("small", "experiment_dir=/some/dir")
    assert all(c.endswith(".yaml experiment_dir=/some/dir") for c in stages)
    assert sample.endswith("sample.py --run /some/dir/flowtok --output /some/dir/samples.png")


# --- Errors name the valid choices ---


def test_an_unknown_experiment_lists_those_that_have_stages(copy):
    message = copy.error("dmeo")
    assert "'dmeo'" in message
    assert message.split("valid:")[1].split() == ["demo", "small"]


def test_an_unknown_or_missing_stage_lists_the_valid_ones(copy):
    assert f"valid: {' '.join([*STAGES[:-1], *ROUNDS, STAGES[-1]])}" in copy.error(
        STAGES="tokeniser"
    )
    assert "small has no tokens.yaml; its stages: tokenizer flowtok" in copy.error(
        "small", STAGES="tokens"
    )
    assert "the stages of small: tokenizer flowtok" in copy.error("small", STAGES=" ")


@pytest.mark.parametrize("argument", ["flowtok", "--seed", "=1"])
def test_an_argument_without_key_and_value_is_refused(copy, argument):
    assert f"'{argument}' is not of the form key=value" in copy.error("demo", argument)


def test_an_override_for_a_stage_that_does_not_run_is_refused(copy):
    message = copy.error("small", "text_encoder.path=x")
    assert "not among those to run: tokenizer flowtok" in message
    assert "tokenizer.text_encoder.path=x" in message


# --- Machines, processes, GPUs ---


def launch_of(copy, **variables):
    return copy.commands("small", **variables)[0]


def test_without_gpus_one_process_takes_all_cores(copy):
    command = launch_of(copy)
    assert "--cpu " in command and "--multi_gpu" not in command
    assert (flag(command, "--num_processes"), flag(command, "--num_cpu_threads_per_process")) == (
        "1",
        "8",
    )


def test_two_processes_on_the_cpu_share_the_cores(copy):
    command = launch_of(copy, NUM_PROCESSES=2)
    assert "ACCELERATE_USE_CPU=true" in shlex.split(command)
    assert "--multi_gpu" in command and "--cpu " not in command
    assert (flag(command, "--num_processes"), flag(command, "--num_cpu_threads_per_process")) == (
        "2",
        "4",
    )
    assert (
        flag(launch_of(copy, NUM_PROCESSES=2, OMP_NUM_THREADS=3), "--num_cpu_threads_per_process")
        == "3"
    )


@pytest.mark.parametrize(
    ("variables", "num_processes"),
    [
        ({}, 8),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "5"}, 1),
        ({"NUM_PROCESSES": 4}, 4),
    ],
)
def test_one_process_runs_on_each_visible_gpu(copy, variables, num_processes):
    copy.set_gpus(8)
    command = launch_of(copy, **variables)
    assert flag(command, "--num_processes") == str(num_processes)
    assert ("--multi_gpu" in command) == (num_processes > 1)
    assert "CPU" not in command and "--cpu" not in command
    assert (flag(command, "--mixed_precision"), flag(command, "--dynamo_backend")) == ("no", "no")
    assert flag(command, "--main_process_port") == "0"  # a free one


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_mean_the_cpu(copy, hidden):
    copy.set_gpus(8)
    assert "--cpu " in launch_of(copy, CUDA_VISIBLE_DEVICES=hidden)


MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": 2**35,
    "MALLOC_TRIM_THRESHOLD_": 2**35,
    "MALLOC_TOP_PAD_": 2**30,
}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_on_a_cpu_under_linux_malloc_keeps_what_is_freed_unless_told_otherwise(copy, num_processes):
    def settings(**variables):
        command = launch_of(copy, NUM_PROCESSES=num_processes, OSTYPE="linux-gnu", **variables)
        words = shlex.split(command)
        assert words[0] == "env"
        assigned = dict(word.split("=") for word in words[1 : words.index(".venv/bin/python")])
        return {name: int(value) for name, value in assigned.items() if name.startswith("MALLOC_")}

    assert settings() == MALLOC
    own = {"MALLOC_TRIM_THRESHOLD_": 1000, "MALLOC_TOP_PAD_": ""}  # set, if to nothing
    assert settings(**own) == {name: value for name, value in MALLOC.items() if name not in own}
    assert settings(**MALLOC) == {}


def test_malloc_is_left_alone_on_gpus_and_other_systems(copy):
    assert "MALLOC" not in launch_of(copy, OSTYPE="darwin22")
    copy.set_gpus(1)
    assert "MALLOC" not in launch_of(copy, OSTYPE="linux-gnu")


def machines(command):
    names = [
        "--num_processes",
        "--num_machines",
        "--machine_rank",
        "--main_process_ip",
        "--main_process_port",
    ]
    return [flag(command, name) for name in names]


def test_two_machines_by_hand(copy):
    copy.set_gpus(8)
    hand = {"NUM_MACHINES": 2, "MACHINE_RANK": 1, "MAIN_PROCESS_IP": "node0"}
    assert machines(launch_of(copy, **hand)) == ["16", "2", "1", "node0", "29500"]
    assert machines(launch_of(copy, **hand, MAIN_PROCESS_PORT=1234, NUM_PROCESSES=4)) == [
        "4",
        "2",
        "1",
        "node0",
        "1234",
    ]


def test_only_the_first_machine_reports_and_samples(copy):
    hand = {"NUM_MACHINES": 2, "MAIN_PROCESS_IP": "node0"}
    assert [stage_of(c) for c in copy.commands(**hand, MACHINE_RANK=0)] == [*STAGES, "sample.py"]
    assert [stage_of(c) for c in copy.commands(**hand, MACHINE_RANK=1)] == STAGES[:-1]


def test_slurm_variables_are_read_and_own_ones_come_first(copy):
    copy.set_gpus(8)
    write_program(
        copy.bin / "scontrol",
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n',
    )
    slurm = {
        "SLURM_NNODES": 2,
        "SLURM_NODEID": 1,
        "SLURM_LOCALID": 0,
        "SLURM_JOB_NODELIST": "gpu[3-4]",
    }
    assert machines(launch_of(copy, **slurm)) == ["16", "2", "1", "gpu3", "29500"]
    assert machines(launch_of(copy, **slurm, MAIN_PROCESS_IP="me", MACHINE_RANK=0)) == [
        "16",
        "2",
        "0",
        "me",
        "29500",
    ]


def test_torchrun_variables_are_read(copy):
    torchrun = {
        "WORLD_SIZE": 16,
        "LOCAL_WORLD_SIZE": 8,
        "GROUP_RANK": 1,
        "MASTER_ADDR": "node0",
        "MASTER_PORT": 1234,
    }
    copy.set_gpus(8)
    assert machines(launch_of(copy, **torchrun)) == ["16", "2", "1", "node0", "1234"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_MACHINES": 2}, "set MAIN_PROCESS_IP"),
        ({"NUM_MACHINES": "two"}, "NUM_MACHINES=two is not a number"),
        ({"MACHINE_RANK": 1}, "must be below NUM_MACHINES=1"),
        (
            {"NUM_MACHINES": 2, "MAIN_PROCESS_IP": "a", "NUM_PROCESSES": 3},
            "must be a multiple of NUM_MACHINES=2",
        ),
        ({"NUM_PROCESSES": 9}, "needs 9 GPUs a machine; here are 8"),
        ({"NUM_PROCESSES": 0}, "NUM_PROCESSES=0 is not a number"),
        ({"SLURM_NNODES": 2, "SLURM_LOCALID": 1}, "started more than once on this machine"),
    ],
)
def test_impossible_machines_are_refused(copy, variables, message):
    copy.set_gpus(8)
    assert message in copy.error("small", **variables)


# --- Real runs, with a stand-in for Python ---

STAND_IN = """#!/bin/sh
case "$*" in
    *device_count*) echo 0 ;;
    "- requirements.txt") ;;
    *{failing}*) exit 3 ;;
esac
"""


def test_the_first_failure_stops_the_run_and_says_how_to_resume(copy, tmp_path):
    write_program(tmp_path / "env/bin/python", STAND_IN.format(failing="encode_tokens"))
    result = copy.bash(
        "train_flowtok.sh", "demo", "tokens.batch_size=4", VIRTUAL_ENV=tmp_path / "env"
    )
    assert result.returncode == 3
    assert "stage tokens failed (exit status 3)" in result.stderr
    assert (
        "run the same command again: bash train_flowtok.sh demo tokens.batch_size=4"
        in result.stderr
    )
    assert "encode_tokens" in result.stdout and "train_text_projector.py" not in result.stdout


def test_a_failed_check_stops_before_the_first_stage(copy, tmp_path):
    write_program(tmp_path / "env/bin/python", STAND_IN.format(failing="configs.check"))
    result = copy.bash("train_flowtok.sh", "small", VIRTUAL_ENV=tmp_path / "env")
    assert result.returncode == 3
    assert "configs.check" in result.stdout and "train_tokenizer" not in result.stdout


def test_a_finished_run_lists_its_results(copy, tmp_path):
    write_program(tmp_path / "env/bin/python", STAND_IN.format(failing="nothing-fails"))
    for folder in ("tokenizer", "flowtok"):
        (copy.root / "runs/small" / folder).mkdir(parents=True)
    (copy.root / "runs/small/samples.png").touch()
    result = copy.bash("train_flowtok.sh", "small", VIRTUAL_ENV=tmp_path / "env")
    assert result.returncode == 0, result.stderr
    listed = result.stdout.split("Results in runs/small:")[1].split()
    assert listed == ["runs/small/samples.png", "runs/small/tokenizer", "runs/small/flowtok"]


def this_python(folder):
    """An active environment that is the Python of the tests."""
    write_program(folder / "bin/python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    return folder


GATHER = """
import sys
import torch
from accelerate import Accelerator

accelerator = Accelerator()
ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
if accelerator.is_main_process:
    print("ranks", ranks, "threads", torch.get_num_threads(), sys.argv[1:])
accelerator.end_training()
"""


def test_two_cpu_processes_really_form_one_group(copy, tmp_path):
    (copy.root / "requirements.txt").touch()
    (copy.root / "configs/check.py").touch()
    (copy.root / "train_tokenizer.py").write_text(GATHER)
    result = copy.bash(
        "train_flowtok.sh",
        *("small", "tokenizer.seed=1"),
        VIRTUAL_ENV=this_python(tmp_path / "env"),
        STAGES="tokenizer",
        NUM_PROCESSES=2,
        OMP_NUM_THREADS=1,
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr
    assert (
        "ranks [0, 1] threads 1 ['--config', 'configs/small/tokenizer.yaml', 'experiment_dir=runs/small', 'seed=1']"
        in result.stdout
    )


# --- scripts/environment.sh ---

SET_UP = 'set -euo pipefail; source scripts/environment.sh; set_up_environment "$1"; echo "PYTHON=$PYTHON"'


def test_an_active_environment_that_lacks_packages_is_refused_by_name(copy, tmp_path):
    (copy.root / "requirements.txt").write_text(
        "no-such-package>=1  # why\npytest>=1.0\n# a comment\n"
    )
    (copy.root / "requirements-dev.txt").write_text("-r requirements.txt\npytest-xdist>=999.0\n")
    env = this_python(tmp_path / "env")
    result = copy.bash("-c", SET_UP, "_", "requirements-dev.txt", VIRTUAL_ENV=env)
    assert result.returncode == 2
    assert "lacks: no-such-package, pytest-xdist>=999.0 (it has " in result.stderr
    assert f"{env}/bin/python -m pip install -r requirements-dev.txt" in result.stderr
    (copy.root / "requirements.txt").write_text("pytest>=1.0\n")
    result = copy.bash("-c", SET_UP, "_", "requirements.txt", VIRTUAL_ENV=env)
    assert (result.returncode, result.stdout) == (0, f"PYTHON={env}/bin/python\n")


def test_the_own_environment_is_filled_only_when_the_requirements_changed(copy):
    write_program(copy.bin / "python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    requirements = copy.root / "requirements.txt"
    requirements.write_text("# nothing\n")

    def set_up():
        result = copy.bash("-c", SET_UP, "_", "requirements.txt")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "PYTHON=.venv/bin/python"
        return [line for line in result.stdout.splitlines() if line.startswith("+ ")]

    make, fill = (
        "+ python3 -m venv --clear .venv",
        "+ .venv/bin/python -m pip install -r requirements.txt",
    )
    assert set_up() == [make, fill]
    assert set_up() == []
    requirements.write_text("# still nothing\n")
    assert set_up() == [fill]
    (copy.root / ".venv/installed-requirements.txt.cksum").unlink()  # as after an interruption
    assert set_up() == [fill]


def test_an_old_python_is_refused_with_its_version(copy):
    write_program(
        copy.bin / "python3", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n'
    )
    (copy.root / "requirements.txt").touch()
    result = copy.bash("-c", SET_UP, "_", "requirements.txt")
    assert result.returncode == 2
    assert "Python >= 3.10 is needed; python3 is Python 3.8.1" in result.stderr
