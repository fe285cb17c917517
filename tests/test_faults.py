"""Disks, data, workers, ranks, signals that fail a real training: one line, and the run goes on.

Every training is a process of its own (tests/forks.py). After a signal and a full disk its end is
compared bit for bit with that of an undisturbed run.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import shape_sample
from forks import Program, start_ranks
from sources import tar_of
from test_resume import contents, program, start, state
from test_stress import logged_step
from tiny_experiment import equal, metrics, training

from training import checkpoint as ckpt
from training.errors import STOPPED_STATUS

ENDLESS = training(max_steps=1000000, checkpoint_every_steps=4, log_every_steps=1)
ENDLESS += training(sample_every_steps=0)
ENDLESS += ["optimizer.schedule=constant", "data.num_workers=1"]
FAST_LIMIT = "training.timeout_minutes=0.08"


class Lab:
    """Starts stages of the tiny experiment into one folder."""

    def __init__(self, chain, folder):
        self.chain, self.folder, self.started = chain, folder, []
        self.run = folder / "tokenizer"

    def start(self, *options, stage="tokenizer", into=None, script=None, **variables):
        """A program, the stage's own if `script` names no other; `options` come after ENDLESS."""
        options = options if stage == "tokens" else [*ENDLESS, *options]
        arguments = program(self.chain, into or self.folder, stage, *options)
        own = {"tokenizer": "train_tokenizer.py", "tokens": "scripts.encode_tokens"}[stage]
        log = self.folder / f"log{len(self.started)}"
        self.started.append(Program(log, str(script or own), *arguments, **variables))
        return self.started[-1]

    def train(self, *options, **others):
        """A training that has a whole checkpoint."""
        running = self.start(*options, **others)
        assert running.wait_until(has_checkpoint_and_step(self.run, 6)), running.output
        return running

    def start_ranks(self, *options):
        """Two processes of one training."""
        arguments = program(self.chain, self.folder, "tokenizer", *ENDLESS, *options)
        log = self.folder / f"log{len(self.started)}"
        ranks = start_ranks(log, 2, "train_tokenizer.py", *arguments)
        self.started += ranks
        return ranks


@pytest.fixture
def lab(chain, tmp_path):
    lab = Lab(chain, tmp_path)
    yield lab
    for started in lab.started:
        started.kill_group()


def has_checkpoint_and_step(run, step):
    """A checkpoint is whole (it is written in the background), and the log has come to the step."""
    return lambda: logged_step(run) >= step and bool(ckpt.checkpoint_folders(run))


def check_error(running, *texts):
    """Status 2 and one line that says all of `texts`, no traceback."""
    assert running.wait() == 2, running.output
    lines = [line for line in running.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(text in lines[0] for text in texts), running.output
    assert "Traceback" not in running.output, running.output


def check_goes_on(lab, *options):
    """Nothing half-written is left, and the same command goes on; the option of its last step."""
    step = ckpt.latest_checkpoint(lab.run, verify=True)[0]
    assert not list((lab.run / "checkpoints").glob("step_*.tmp"))
    last = f"training.max_steps={step + 6}"
    running = lab.start(*options, last)
    assert running.wait() == 0 and f"resuming at step {step}" in running.output, running.output
    return last


def check_log_is_whole(lab):
    """No step lacks, none is there twice. That a kill changes no bit: test_stress.py."""
    steps = [line["step"] for line in metrics(lab.run)]
    assert steps == [*range(1, ckpt.latest_checkpoint(lab.run)[0] + 1)]


def check_end(lab, *options):
    """The run has ended as an undisturbed one does, bit for bit."""
    whole = lab.start(*options, into=lab.folder / "whole")
    assert whole.wait() == 0, whole.output
    assert equal(state(lab.run), state(lab.folder / "whole" / "tokenizer"))
    assert metrics(lab.run) == metrics(lab.folder / "whole" / "tokenizer")


# The disk


def test_a_file_size_limit_inside_a_checkpoint_ends_with_an_error_and_a_whole_one_before(lab):
    running = lab.train()
    largest = 60_000  # bytes; the weights have more, the logs of a few hundred steps less
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (largest, largest))
    check_error(running, "cannot write checkpoint", "File too large", "MB are free there")
    check_end(lab, check_goes_on(lab))


def test_a_log_that_can_no_longer_be_written_is_named_and_later_the_run_goes_on(lab, tmp_path):
    running = lab.train()
    os.kill(running.pid, signal.SIGSTOP)  # or it makes the file again in between
    path = (lab.run / "metrics.jsonl").rename(tmp_path / "aside")
    (lab.run / "metrics.jsonl").mkdir()
    os.kill(running.pid, signal.SIGCONT)
    check_error(running, str(lab.run / "metrics.jsonl"))
    (lab.run / "metrics.jsonl").rmdir()
    path.rename(lab.run / "metrics.jsonl")
    check_goes_on(lab)
    check_log_is_whole(lab)


# Data and its workers


IMPATIENT = """
import runpy
from training import supervise
supervise.WORKER_GRACE_SECONDS = 1
runpy.run_path("train_tokenizer.py", run_name="__main__")
"""


def test_a_data_worker_that_is_killed_in_the_middle_of_a_message_ends_with_an_error_that_says_so(
    lab, tmp_path
):
    # Batches of some 300 kB: more than a pipe takes, so that a worker waits in the middle of one.
    shards = tmp_path / "long"
    shards.mkdir()
    long = {"txt": "a red circle " * 3000}
    members = members_of(shape_sample(n) | long for n in range(24))
    (shards / "long.tar").write_bytes(tar_of(members))
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    running = lab.train(f"data.shards=[{shards}/*.tar]", script=script)
    (worker,) = running.children()
    os.kill(running.pid, signal.SIGSTOP)
    wait_for(lambda: is_writing_to_a_full_pipe(worker), seconds=60)
    os.kill(worker, signal.SIGKILL)
    os.kill(running.pid, signal.SIGCONT)
    check_error(running, f"a data worker (process {worker}) was killed (SIGKILL)", "memory ran out")


def wait_for(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


def is_writing_to_a_full_pipe(pid):
    places = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/wchan")]
    return any("pipe_write" in place for place in places)


def test_a_data_worker_that_hangs_ends_with_an_error_after_the_time_limit_and_the_run_goes_on(lab):
    running = lab.train(FAST_LIMIT)
    os.kill(running.children()[0], signal.SIGSTOP)
    start = time.monotonic()
    check_error(running, FAST_LIMIT, "hangs", "waits in metrics.py", "Run the same command again")
    assert 4 < time.monotonic() - start < 60
    check_goes_on(lab)
    check_log_is_whole(lab)


# Other ranks


@pytest.mark.parametrize(("how", "victim"), [("dies", 0), ("dies", 1), ("hangs", 1)])
def test_a_rank_that_dies_or_hangs_ends_the_other_with_an_error_and_both_go_on(lab, how, victim):
    ranks = lab.start_ranks(*([FAST_LIMIT] if how == "hangs" else []))
    assert ranks[0].wait_until(has_checkpoint_and_step(lab.run, 6)), ranks[0].output
    start = time.monotonic()
    if how == "dies":
        ranks[victim].kill()
        check_error(ranks[1 - victim], "another training process ended; its own output says why")
    else:
        os.kill(ranks[victim].pid, signal.SIGSTOP)
        check_error(ranks[1 - victim], FAST_LIMIT, "another process, the storage or a device hangs")
        assert 4 < time.monotonic() - start < 60
        ranks[victim].kill_group()
    step = ckpt.latest_checkpoint(lab.run, verify=True)[0]
    ranks = lab.start_ranks(f"training.max_steps={step + 6}")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
    assert "resuming at step" in ranks[0].output


def test_a_suspended_training_does_not_count_the_time_as_a_hang(lab):
    running = lab.train(FAST_LIMIT)
    running.signal_group(signal.SIGSTOP)
    time.sleep(7)
    step = logged_step(lab.run)
    running.signal_group(signal.SIGCONT)
    assert running.wait_until(lambda: logged_step(lab.run) >= step + 50), running.output


# Signals to everyone


# Ctrl-C and Slurm tell the data workers as well, which let the batches of the last step come.
@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGINT, True), (signal.SIGUSR1, True), (signal.SIGTERM, False)]
)
def test_a_signal_ends_with_a_checkpoint_and_the_run_goes_on_undisturbed(lab, number, to_group):
    options = ["data.num_workers=2", "training.log_every_steps=7"]
    running = lab.train(*options)
    workers = [Path(f"/proc/{pid}") for pid in running.children()]
    if to_group:
        running.signal_group(number)
    else:
        os.kill(running.pid, number)
    assert running.wait() == STOPPED_STATUS, running.output
    step = ckpt.latest_checkpoint(lab.run, verify=True)[0]
    assert f"stopped at step {step} (signal {signal.Signals(number).name})" in running.output
    assert "Traceback" not in running.output and len(workers) == 2
    wait_for(lambda: not any(worker.exists() for worker in workers), seconds=20)
    assert not any(worker.exists() for worker in workers)
    check_end(lab, *options, check_goes_on(lab, *options))


def test_two_processes_stop_together_when_one_is_told_to(lab):
    ranks = lab.start_ranks()
    assert ranks[0].wait_until(lambda: logged_step(lab.run) >= 6), ranks[0].output
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [STOPPED_STATUS] * 2, ranks[0].output
    step, folder = ckpt.latest_checkpoint(lab.run, verify=True)
    assert f"stopped at step {step}" in ranks[0].output
    assert all((folder / ckpt.rank_file(rank)).is_file() for rank in (0, 1))


def test_two_starts_at_once_leave_the_first_ones_log_and_checkpoints_alone(lab):
    running = lab.start("training.checkpoint_every_steps=1000000")
    assert running.wait_until(lambda: logged_step(lab.run) >= 30), running.output
    said = f"is being written by another process: process {running.pid}"
    config = (lab.run / "config.yaml").read_bytes()
    check_error(lab.start("training.seed=7"), said)
    assert (lab.run / "config.yaml").read_bytes() == config
    ranks = lab.start_ranks()
    assert [rank.wait() for rank in ranks] == [2, 2]
    output = "".join(rank.output for rank in ranks)
    assert output.count(said) == output.count("rror") == 1, output
    running.signal_group(signal.SIGTERM)
    assert running.wait() == STOPPED_STATUS, running.output
    last = ckpt.latest_checkpoint(lab.run)[0]
    assert [line["step"] for line in metrics(lab.run)] == list(range(1, last + 1))


def test_a_signal_stops_encoding_at_once_and_the_same_command_ends_with_the_same_tokens(
    lab, tmp_path
):
    slow, folder = ["batch_size=1", "num_crops=6"], tmp_path / "tokens"
    running = lab.start(*slow, stage="tokens")
    assert running.wait_until(lambda: (folder / "source.json").exists()), running.output
    running.signal_group(signal.SIGUSR1)
    # Before it listens the signal ends it as any program: nothing is lost either.
    status = running.wait()
    assert status in (STOPPED_STATUS, -signal.SIGUSR1), running.output
    if status == STOPPED_STATUS:
        assert f"{folder}: stopped (signal SIGUSR1)" in running.output
    assert not (folder / "tokens.json").exists() and not list(folder.glob("*.tmp"))
    for into in (tmp_path, tmp_path / "whole"):
        running = lab.start(*slow, stage="tokens", into=into)
        assert running.wait() == 0, running.output
    assert contents(folder) == contents(tmp_path / "whole" / "tokens")


# wandb


def test_a_wandb_service_that_dies_does_not_end_the_training(lab):
    pytest.importorskip("wandb")
    running = lab.train("logging.wandb=offline", WANDB_MODE="offline", WANDB_SILENT="true")
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running.children()}
    os.kill(next(pid for pid, name in names.items() if b"wandb-core" in name), signal.SIGKILL)
    step = logged_step(lab.run)
    assert running.wait_until(lambda: logged_step(lab.run) >= step + 100), running.output
    assert "warning: wandb fails" in running.output


# Names from data


def members_of(samples):
    """For tar_of, which takes any keys."""
    return [(f"{s['__key__']}.{name}", s[name]) for s in samples for name in ("png", "txt")]


@pytest.mark.parametrize("fault", ["optimizer.learning_rate=1e38", "data.max_bad_share=0.01"])
def test_keys_and_captions_with_escapes_do_not_reach_the_terminal(lab, tmp_path, fault):
    evil = "a\x1b]0;owned\x07\x1b[2J/b\nerror: forged"
    shards = tmp_path / "evil"
    shards.mkdir()
    names = {"txt": f"a {evil}"}
    samples = [shape_sample(n) | names | {"__key__": f"{n}{evil}"} for n in range(24)]
    if "bad" in fault:
        samples = [sample | {"png": b"no image"} for sample in samples] * 9
    (shards / "evil.tar").write_bytes(tar_of(members_of(samples)))
    running = lab.start(f"data.shards=[{shards}/*.tar]", "training.sample_every_steps=1", fault)
    check_error(running, ascii(evil)[1:8])
    assert "\x1b" not in running.output and "\nerror: forged" not in running.output


# The launcher


@pytest.mark.slow
@pytest.mark.timeout(0)  # how long a start takes depends on what else runs
def test_the_launcher_passes_a_signal_on_and_ends_with_status_75(lab):
    overrides = program(lab.chain, lab.folder, "tokenizer", *ENDLESS)[2:]
    overrides = [f"tokenizer.{override}" for override in overrides]
    process = start(
        ["bash", "train_flowtok.sh", f"{lab.chain.folder}/configs", *overrides],
        VIRTUAL_ENV=sys.prefix,
        STAGES="tokenizer",
        NUM_PROCESSES="2",
    )
    while logged_step(lab.run) < 6 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the launcher's group
    output, _ = process.communicate()
    assert process.returncode == STOPPED_STATUS, output
    assert "bash train_flowtok.sh" in output.splitlines()[-1], output
    assert ckpt.latest_checkpoint(lab.run, verify=True)[0] >= 6
