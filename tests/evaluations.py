"""Evaluations as tests run them: captions and a protocol on disk, the program, what it wrote."""

import json
import shutil
import time
from pathlib import Path

import torch
import yaml
from conftest import reset_accelerate
from forks import PACE, start_ranks

from eval import generation
from eval.feature_nets import FeatureNet
from training.checkpoint import STATE_FILE, checkpoint_folders

CAPTIONS = 12
LIGHT = ("features=tokenizer", "metrics=[frechet]")  # takes no time
CPU = ("--device", "cpu", "--num-workers", 0)


class QuickInception(FeatureNet):
    """In place of Inception where its numbers do not matter: the means of 9 x 9 squares."""

    width = 243

    def __init__(self, weights=None):
        super().__init__()
        self.identity = {"features": "inception", "weights_sha256": "quick"}

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 9).flatten(1)

    def logits(self, features):
        return features.double() * 10


def write_inputs(folder: Path, shards: Path) -> Path:
    """captions.txt and protocol.yaml: 12 captions, groups of 5, against the first shard."""
    colours, shapes = ("red", "green", "blue"), ("circle", "square", "cat", "dog")
    lines = [f"a {colour} {shape}\n" for colour in colours for shape in shapes]
    (folder / "captions.txt").write_text("".join(lines))
    values = {
        "captions": [str(folder / "captions.txt")],
        "reference": [f"{shards}/train-00000.tar"],
        "group_size": 5,
        "kid_subsets": 4,
        "kid_subset_size": 8,
        "inception_splits": 3,
        "steps": 2,
    }
    (folder / "protocol.yaml").write_text(yaml.safe_dump(values))
    return folder


def run_program(program, *words) -> None:
    """main(parse_args(...)) of a module, as its command line would."""
    reset_accelerate()
    program.main(program.parse_args([*map(str, words)]))


def words_of(run: Path, inputs: Path, output: Path, *arguments) -> tuple:
    """Command line of an evaluation by the protocol of `inputs`."""
    return (run, "--protocol", inputs / "protocol.yaml", "--output", output, *CPU, *arguments)


def evaluate(run: Path, inputs: Path, output: Path, *arguments) -> dict | None:
    """Run the program; its report, or None of a sweep."""
    run_program(generation, *words_of(run, inputs, output, *arguments))
    return read(output) if (output / "evaluation.json").is_file() else None


def launch(run: Path, inputs: Path, output: Path, *arguments) -> str:
    """The program in two processes; what they printed."""
    words = words_of(run, inputs, output, *arguments)
    return launch_two(output.with_name("log"), "eval.generation", *words)


def launch_two(log: Path, script: str, *words) -> str:
    """A script, or a module, in two processes on the CPU; what they printed."""
    ranks = start_ranks(log, 2, script, *map(str, words))
    # One that fails leaves the other waiting for it
    deadline = time.monotonic() + 120
    while None in (statuses := [rank.process.exitcode for rank in ranks]):
        if any(statuses) or time.monotonic() > deadline:
            break
        time.sleep(PACE)
    printed = "".join(rank.output for rank in ranks)
    if statuses != [0, 0]:
        for rank in ranks:
            rank.kill_group()
        raise AssertionError(f"exit statuses {statuses}:\n{printed}")
    return printed


def read(folder: Path) -> dict:
    """The report of an evaluation."""
    return json.loads((folder / "evaluation.json").read_text())


def pngs(folder: Path) -> dict[str, bytes]:
    """Bytes of each image by its name."""
    root = folder / "images"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}


def train_on(run: Path) -> None:
    """A checkpoint of the next step appears in a run, as if its training went on."""
    step, newest = max(checkpoint_folders(run).items())
    copy = newest.with_name(f"step_{step + 1:08d}")
    shutil.copytree(newest, copy)
    state = json.loads((copy / STATE_FILE).read_text()) | {"step": step + 1}
    (copy / STATE_FILE).write_text(json.dumps(state))
