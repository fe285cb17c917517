"""Real trainings, ended by SIGKILL at random moments: they end bit for bit like undisturbed ones.

As `python train_tokenizer.py` runs them (tests/forks.py), with a data worker.
"""

import os
import random
import signal
import time

import pytest
from forks import Program
from test_resume import program, state
from tiny_experiment import equal, metrics, training

from training import checkpoint as ckpt
from training.metrics import step_of

# At random moments; of these, at least so many inside the writing of a checkpoint.
KILLS, KILLS_INSIDE = 10, 3
MAX_STEPS, EVERY_STEPS = 200, 4
OPTIONS = training(max_steps=MAX_STEPS, checkpoint_every_steps=EVERY_STEPS, log_every_steps=3)
OPTIONS += ["training.sample_every_steps=50", "training.gradient_accumulation=2"]

pytestmark = pytest.mark.slow


def logged_step(run):
    """The last step in the log; 0 if there is none."""
    path = run / "metrics.jsonl"
    steps = map(step_of, path.read_text().splitlines()) if path.is_file() else []
    return max((step for step in steps if step is not None), default=0)


def is_writing(run):
    """Whether a checkpoint is begun and not yet whole."""
    return any((run / "checkpoints").glob("step_*.tmp"))


def start(chain, folder, *options):
    """A training into a folder: (program, run)."""
    arguments = program(chain, folder, "tokenizer", *OPTIONS, "data.num_workers=1", *options)
    log = folder.with_suffix(".log")
    return Program(log, "train_tokenizer.py", *arguments), folder / "tokenizer"


def kill_somewhere(running, run, draw):
    """Kill the program at a drawn moment: (where, was it writing a checkpoint, exit status)."""
    where = draw.choice(["at the start", "between steps", "in a checkpoint", "in a checkpoint"])
    if where != "at the start":
        target = min(logged_step(run) + draw.randint(1, 12), MAX_STEPS - 40)
        assert running.wait_until(lambda: logged_step(run) >= target), running.output
    if where == "in a checkpoint":
        # It stands still between two looks: on a busy machine it would run past the moment.
        while not is_writing(run):
            os.kill(running.pid, signal.SIGCONT)
            time.sleep(0.002)
            os.kill(running.pid, signal.SIGSTOP)
        os.kill(running.pid, signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.01))
    else:
        time.sleep(draw.uniform(0, 1.0 if where == "at the start" else 0.05))
    # Out of memory, or the machine died.
    status = running.kill() if draw.random() < 0.5 else running.kill_group()
    return where, is_writing(run), status


def compare(run, whole):
    """Assert that two runs ended alike, bit for bit."""
    assert metrics(run) == metrics(whole)
    assert equal(state(run), state(whole))
    folders = [ckpt.latest_checkpoint(one, verify=True)[1] for one in (run, whole)]
    for name in (ckpt.MODEL_FILE, ckpt.EMA_FILE):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_kills_at_random_moments_change_no_bit(chain, tmp_path):
    running, whole = start(chain, tmp_path / "whole")
    assert running.wait() == 0, running.output
    draw, kills, inside = random.Random(0), 0, 0
    while kills < KILLS or inside < KILLS_INSIDE:
        running, run = start(chain, tmp_path / "killed")
        where, was_writing, status = kill_somewhere(running, run, draw)
        assert status == -signal.SIGKILL, (where, running.output)
        kills += 1
        inside += was_writing
        assert kills < 3 * KILLS, f"only {inside} inside the writing of a checkpoint"
    assert logged_step(run) < MAX_STEPS - 30  # there was something left to kill, up to the end
    running, run = start(chain, tmp_path / "killed")
    assert running.wait() == 0, running.output
    assert not is_writing(run)
    compare(run, whole)
