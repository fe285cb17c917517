"""Disks, data, workers, ranks and signals that fail a real training: one clear line, a whole checkpoint, and going on.

Every training is a process of its own (tests/forks.py). What a healthy run of the same command ends with is compared
bit for bit where the fault should leave no trace.
"""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import shape_sample
from forks import ROOT, Program, start_ranks
from test_checkpoint import write
from test_resume import environment, program, state
from test_stress import logged_step
from tiny_experiment import equal, metrics
from torch.utils.data import DataLoader

from training import checkpoint as ckpt
from training.metrics import WANDB_FILE
from training.supervise import STOPPED_STATUS, explained_deaths

ENDLESS = [
    "training.max_steps=1000000",
    "training.checkpoint_every_steps=4",
    "training.log_every_steps=1",
]
ENDLESS += ["training.sample_every_steps=0", "optimizer.schedule=constant", "data.num_workers=1"]


class Lab:
    """Starts stages of the tiny experiment into one folder."""

    def __init__(self, chain, folder):
        self.chain, self.folder, self.started = chain, folder, []

    def start(self, stage="tokenizer", *options, into=None, script=None, **variables):
        """A program, the stage's own if `script` names no other; `options` come after ENDLESS."""
        arguments = program(
            self.chain,
            into or self.folder,
            stage,
            *(ENDLESS if stage != "tokens" else []),
            *options,
        )
        script = (
            script or {"tokenizer": "train_tokenizer.py", "tokens": "scripts.encode_tokens"}[stage]
        )
        log = self.folder / f"log{len(self.started)}"
        self.started.append(Program(log, str(script), *arguments, **variables))
        return self.started[-1]

    def start_ranks(self, *options):
        """Two processes of one training."""
        arguments = program(self.chain, self.folder, "tokenizer", *ENDLESS, *options)
        ranks = start_ranks(
            self.folder / f"log{len(self.started)}", 2, "train_tokenizer.py", *arguments
        )
        self.started += ranks
        return ranks

    @property
    def run(self):
        return self.folder / "tokenizer"


@pytest.fixture
def lab(chain, tmp_path):
    lab = Lab(chain, tmp_path)
    yield lab
    for started in lab.started:
        started.kill_group()


def is_at_step(run, step):
    return lambda: logged_step(run) >= step


def has_checkpoint_and_step(run, step):
    """A checkpoint is whole (it is written in the background, aside), and the log has come to the step."""
    return lambda: logged_step(run) >= step and bool(ckpt.checkpoint_folders(run))


def check_error(running, *texts):
    """Status 2 and one line that says all of `texts`, no traceback."""
    assert running.wait() == 2, running.output
    lines = [line for line in running.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(text in lines[0] for text in texts), running.output
    assert "Traceback" not in running.output, running.output


def check_goes_on(lab, *options, into=None):
    """Nothing half-written is left, and the same command goes on from a whole checkpoint and ends like a whole run."""
    run = (into or lab.folder) / "tokenizer"
    step = ckpt.latest_checkpoint(run, verify=[ckpt.ALL_FILES])[0]
    assert not list((run / "checkpoints").glob("step_*.tmp"))
    last = f"training.max_steps={step + 6}"
    running = lab.start("tokenizer", *options, last, into=into)
    assert running.wait() == 0 and f"resuming at step {step}" in running.output, running.output
    whole = lab.start("tokenizer", *options, last, into=lab.folder / "whole")
    assert whole.wait() == 0, whole.output
    assert equal(state(run), state(lab.folder / "whole" / "tokenizer"))
    assert metrics(run) == metrics(lab.folder / "whole" / "tokenizer")


# The disk


@contextmanager
def mounted(folder, options):
    """A tmpfs with a size, say; skips the test where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_with_an_error_and_with_room_again_the_run_goes_on(lab, tmp_path):
    with mounted(tmp_path / "disk", "size=800k") as disk:  # two checkpoints and a half
        running = lab.start(into=disk)
        check_error(running, "cannot write checkpoint", "MB are free there; older ones stay")
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        check_goes_on(lab, into=disk)


def test_a_file_size_limit_inside_a_checkpoint_ends_with_an_error_and_a_whole_one_before(lab):
    running = lab.start()
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    largest = 60_000  # bytes; the weights have more, the logs of a few hundred steps less
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (largest, largest))
    check_error(running, "cannot write checkpoint", "File too large")
    check_goes_on(lab)


def test_a_log_that_cannot_be_written_ends_with_an_error_that_names_it(lab):
    running = lab.start()
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    os.kill(running.pid, signal.SIGSTOP)  # or it makes the file again in between
    (lab.run / "metrics.jsonl").unlink()
    (lab.run / "metrics.jsonl").mkdir()
    os.kill(running.pid, signal.SIGCONT)
    check_error(running, "Is a directory", "metrics.jsonl")
    (lab.run / "metrics.jsonl").rmdir()


def test_a_run_folder_that_cannot_be_made_is_refused_before_any_step(lab, tmp_path):
    (tmp_path / "file").touch()
    running = lab.start(into=tmp_path / "file" / "below")
    check_error(running, "Not a directory", str(tmp_path / "file"))
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        check_error(lab.start(into=disk), "Read-only file system", str(disk))


def test_a_folder_of_checkpoints_that_can_no_longer_be_written_ends_with_an_error_and_later_goes_on(
    lab, tmp_path
):
    running = lab.start()
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    (lab.run / "checkpoints").rename(tmp_path / "aside")
    (lab.run / "checkpoints").touch()
    check_error(running, str(lab.run / "checkpoints"))
    (lab.run / "checkpoints").unlink()
    (tmp_path / "aside").rename(lab.run / "checkpoints")
    shutil.rmtree(
        next((lab.run / "checkpoints").glob("*.tmp"), tmp_path / "none"), ignore_errors=True
    )
    check_goes_on(lab)


def test_rotation_keeps_the_newest_whole_checkpoint_though_a_damaged_one_is_newer(tmp_path):
    damaged = write(tmp_path, 8)
    (damaged / ckpt.MODEL_FILE).unlink()
    write(tmp_path, 4, keep=1)
    write(tmp_path, 6, keep=1)
    assert ckpt.latest_checkpoint(tmp_path)[0] == 6 and list(ckpt.checkpoint_folders(tmp_path)) == [
        6,
        8,
    ]


# Data and its workers


def test_shards_that_vanish_end_with_an_error_that_names_them_and_when_back_the_run_goes_on(
    lab, tiny_shards, tmp_path
):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    patterns = f"data.shards=[{shards}/*.tar]"
    running = lab.start("tokenizer", patterns)
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    shards.rename(tmp_path / "gone")
    check_error(running, "shard: unreadable", f"{shards}/train-0000", "No such file or directory")
    (tmp_path / "gone").rename(shards)
    step = ckpt.latest_checkpoint(lab.run, verify=[ckpt.ALL_FILES])[0]
    running = lab.start("tokenizer", patterns, f"training.max_steps={step + 3}")
    assert running.wait() == 0 and f"resuming at step {step}" in running.output, running.output
    check_error(lab.start("tokenizer", f"data.shards=[{tmp_path}/gone/*.tar]"), "matches no file")


def test_a_data_worker_that_is_killed_ends_with_an_error_that_says_so_and_the_run_goes_on(lab):
    running = lab.start()
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    (worker,) = running.children()
    os.kill(worker, signal.SIGKILL)
    check_error(
        running, f"a data worker (process {worker}) was killed (SIGKILL)", "if memory ran out"
    )
    check_goes_on(lab)


IMPATIENT = """
import runpy
from training import supervise
supervise.WORKER_GRACE_SECONDS = 1
runpy.run_path("train_tokenizer.py", run_name="__main__")
"""


def test_a_data_worker_that_is_killed_in_the_middle_of_a_message_ends_with_an_error_that_says_so(
    lab, tmp_path
):
    shards = tmp_path / "long"
    shards.mkdir()  # batches of some 300 kB: more than a pipe takes, so that a worker waits in the middle of one
    write_tar(
        shards / "long.tar",
        [shape_sample(number) | {"txt": "a red circle " * 3000} for number in range(24)],
    )
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    running = lab.start(
        "tokenizer", f"data.shards=[{shards}/*.tar]", script=tmp_path / "impatient.py"
    )
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    (worker,) = running.children()
    os.kill(running.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not is_writing_to_a_full_pipe(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    os.kill(running.pid, signal.SIGCONT)
    check_error(
        running, f"a data worker (process {worker}) was killed (SIGKILL)", "if memory ran out"
    )


def is_writing_to_a_full_pipe(pid):
    places = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/wchan")]
    return any("pipe_write" in place for place in places)


def test_a_data_worker_that_hangs_ends_with_an_error_after_the_time_limit_and_the_run_goes_on(lab):
    limit = "training.timeout_minutes=0.08"
    running = lab.start("tokenizer", limit)
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    os.kill(running.children()[0], signal.SIGSTOP)
    start = time.monotonic()
    check_error(
        running, limit, "hangs", "waits in metrics.py", "Run the same command again to continue"
    )
    assert 4 < time.monotonic() - start < 60
    check_goes_on(lab)


class Killer:
    """A dataset that ends the process which reads its last item."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index if index < 19 else os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_of_another_loader_that_is_killed_ends_with_an_error_that_says_so():
    reason = "a data worker ended while a batch|DataLoader worker .* exited unexpectedly"  # amid a batch or between two
    with (
        pytest.raises(ChildProcessError, match=f"({reason}).*Run the same command again"),
        explained_deaths(),
    ):
        list(DataLoader(Killer(), num_workers=2))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # no error comes up elsewhere


# Other ranks


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_other_with_an_error(lab, victim):
    ranks = lab.start_ranks()
    assert ranks[0].wait_until(has_checkpoint_and_step(lab.run, 6)), ranks[0].output
    ranks[victim].kill()
    check_error(ranks[1 - victim], "another training process ended; its own output says why")
    assert ckpt.latest_checkpoint(lab.run, verify=[ckpt.ALL_FILES])[0] >= 4


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_other_with_an_error_after_the_time_limit(lab, victim):
    limit = "training.timeout_minutes=0.08"
    ranks = lab.start_ranks(limit)
    assert ranks[0].wait_until(has_checkpoint_and_step(lab.run, 6)), ranks[0].output
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    start = time.monotonic()
    check_error(ranks[1 - victim], limit, "another process, the storage or a device hangs")
    assert 4 < time.monotonic() - start < 60
    ranks[victim].kill_group()
    assert ckpt.latest_checkpoint(lab.run, verify=[ckpt.ALL_FILES])[0] >= 4
    ranks = lab.start_ranks("training.max_steps=20")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
    assert "resuming at step" in ranks[0].output


def test_a_suspended_training_does_not_count_the_time_as_a_hang(lab):
    running = lab.start("tokenizer", "training.timeout_minutes=0.08")
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    running.signal_group(signal.SIGSTOP)
    time.sleep(7)
    step = logged_step(lab.run)
    running.signal_group(signal.SIGCONT)
    assert running.wait_until(is_at_step(lab.run, step + 50)), running.output


# Signals to everyone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_lets_workers_give_the_batches_of_the_last_step(lab, number):
    running = lab.start("tokenizer", "data.num_workers=2")
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    workers = running.children()
    running.signal_group(number)
    assert running.wait() == STOPPED_STATUS, running.output
    step = ckpt.latest_checkpoint(lab.run, verify=[ckpt.ALL_FILES])[0]
    assert f"stopped at step {step} (signal {signal.Signals(number).name})" in running.output
    assert "Traceback" not in running.output and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    check_goes_on(lab, "data.num_workers=2")


def test_two_starts_at_once_leave_the_first_ones_log_and_checkpoints_alone(lab):
    running = lab.start("tokenizer", "training.checkpoint_every_steps=1000000")
    assert running.wait_until(is_at_step(lab.run, 30)), running.output
    check_error(lab.start(), f"is being trained by another process: process {running.pid}")
    running.signal_group(signal.SIGTERM)
    assert running.wait() == STOPPED_STATUS, running.output
    last = ckpt.latest_checkpoint(lab.run)[0]
    assert [line["step"] for line in metrics(lab.run)] == list(range(1, last + 1))


def test_a_signal_stops_encoding_at_once_and_the_same_command_ends_with_the_same_tokens(
    lab, chain, tmp_path
):
    slow = "batch_size=1"
    running = lab.start("tokens", slow, "num_crops=6")
    folder = tmp_path / "tokens"
    assert running.wait_until(lambda: (folder / "source.json").exists()), running.output
    running.signal_group(signal.SIGUSR1)
    status = running.wait()
    assert status in (STOPPED_STATUS, -signal.SIGUSR1), (
        running.output
    )  # before it listens: nothing is lost either
    if status == STOPPED_STATUS:
        assert f"{folder}: stopped (signal SIGUSR1)" in running.output
    assert not (folder / "tokens.json").exists() and not list(folder.glob("*.tmp"))
    running = lab.start("tokens", slow, "num_crops=6")
    assert running.wait() == 0, running.output
    whole = lab.start("tokens", slow, "num_crops=6", into=tmp_path / "whole")
    assert whole.wait() == 0, whole.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole" / "tokens").iterdir()
    }


# wandb


def wandb_runs(run):
    """Ids of the offline runs in a run folder, in the order in which they were begun."""
    return [path.name.rpartition("-")[2] for path in sorted((run / "wandb").glob("offline-run-*"))]


def test_wandb_continues_its_run_after_a_kill_and_a_run_made_anew_has_another(lab, tmp_path):
    pytest.importorskip("wandb")
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    options = ["tokenizer", "logging.wandb=offline"]
    running = lab.start(*options, **quiet)
    assert running.wait_until(is_at_step(lab.run, 10)), running.output
    running.kill_group()
    time.sleep(1.1)  # folders of wandb runs are named by the second
    running = lab.start(*options, "training.max_steps=40", **quiet)
    assert running.wait() == 0 and "resuming at step" in running.output, running.output
    first, second = wandb_runs(lab.run)
    assert first == second == (lab.run / WANDB_FILE).read_text().strip()
    anew = tmp_path / "anew"
    assert lab.start(*options, "training.max_steps=4", into=anew, **quiet).wait() == 0
    assert len({first, *wandb_runs(anew / "tokenizer")}) == 2


def test_a_wandb_service_that_dies_does_not_end_the_training(lab):
    pytest.importorskip("wandb")
    running = lab.start(
        "tokenizer", "logging.wandb=offline", WANDB_MODE="offline", WANDB_SILENT="true"
    )
    assert running.wait_until(has_checkpoint_and_step(lab.run, 6)), running.output
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running.children()}
    os.kill(next(pid for pid, name in names.items() if b"wandb-core" in name), signal.SIGKILL)
    step = logged_step(lab.run)
    assert running.wait_until(is_at_step(lab.run, step + 100)), running.output
    assert "warning: wandb fails and is left out from here on" in running.output


# Names from data


def write_tar(path, samples):
    """A tar with any keys."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for extension in ("png", "txt"):
                data = sample[extension] if extension == "png" else sample[extension].encode()
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_keys_and_captions_with_escapes_do_not_reach_the_terminal(lab, tmp_path):
    evil = "a\x1b]0;owned\x07\x1b[2J/b\nerror: forged"
    shards = tmp_path / "evil"
    shards.mkdir()
    samples = [
        shape_sample(number) | {"__key__": f"{number}{evil}", "txt": f"a {evil}"}
        for number in range(24)
    ]
    write_tar(shards / "evil.tar", samples)
    options = ["tokenizer", f"data.shards=[{shards}/*.tar]", "training.sample_every_steps=1"]
    assert lab.start(*options, "training.max_steps=2").wait() == 0
    for option in ("optimizer.learning_rate=1e38", "data.max_bad_share=0.01"):
        write_tar(
            shards / "evil.tar",
            samples if "rate" in option else [{**s, "png": b"no image"} for s in samples] * 9,
        )
        running = lab.start(*options, option, into=tmp_path / option)
        check_error(running, ascii(evil)[1:8])
        assert "\x1b" not in running.output and "\nerror: forged" not in running.output


# The launcher


def launch(lab, *options, num_processes=1):
    """train_flowtok.sh on stage tokenizer of the tiny experiment, in a session of its own."""
    overrides = program(lab.chain, lab.folder, "tokenizer", *ENDLESS, *options)[2:]
    overrides = [f"tokenizer.{override}" for override in overrides]
    variables = {"STAGES": "tokenizer", "NUM_PROCESSES": str(num_processes)}
    return subprocess.Popen(
        ["bash", str(ROOT / "train_flowtok.sh"), f"{lab.chain.folder}/configs", *overrides],
        env=environment(VIRTUAL_ENV=sys.prefix, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = re.search(r"^SigCgt:\s*(\w+)", status, flags=re.MULTILINE)[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.timeout(0)  # how long two starts take depends on what else runs
@pytest.mark.parametrize(("number", "num_processes"), [(signal.SIGUSR1, 1), (signal.SIGINT, 2)])
def test_the_launcher_passes_a_signal_on_ends_with_status_75_and_goes_on(
    lab, number, num_processes
):
    process = launch(lab, num_processes=num_processes)
    while logged_step(lab.run) < 6 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # Slurm signals every process, a terminal the launcher's group
    output, _ = process.communicate()
    assert process.returncode == STOPPED_STATUS, output
    assert "bash train_flowtok.sh" in output.splitlines()[-1], output
    step = ckpt.latest_checkpoint(lab.run, verify=[ckpt.ALL_FILES])[0]
    assert step >= 6
    process = launch(lab, f"training.max_steps={step + 5}", num_processes=num_processes)
    output, _ = process.communicate()
    assert process.returncode == 0 and f"resuming at step {step}" in output, output
    assert [line["step"] for line in metrics(lab.run)] == list(range(1, step + 6))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_launcher_hears_a_warning_before_its_first_stage_trains(lab):
    process = launch(lab)
    while not catches(process.pid, signal.SIGUSR1):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == STOPPED_STATUS, output
    assert "bash train_flowtok.sh" in output.splitlines()[-1] and not lab.run.exists(), output
