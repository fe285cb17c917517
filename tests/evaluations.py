"""Evaluations of generated images as tests run them: captions and a protocol on disk, the program, what it wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from tiny_experiment import reset_accelerate

from eval.generation import main, parse_args
from training.checkpoint import MANIFEST_FILE, STATE_FILE

ROOT = Path(__file__).parents[1]
CAPTIONS = 12
LIGHT = ("features=tokenizer", "metrics=[frechet]")


def write_inputs(folder: Path, shards: Path) -> Path:
    """captions.txt and protocol.yaml: 12 captions, groups of 5, against the first shard. Returns the folder."""
    colours, shapes = ("red", "green", "blue"), ("circle", "square", "cat", "dog")
    lines = [f"a {colour} {shape}" for colour in colours for shape in shapes]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    values = {
        "captions": [str(folder / "captions.txt")],
        "reference": [f"{shards}/train-00000.tar"],
    }
    values |= {
        "group_size": 5,
        "kid_subsets": 4,
        "kid_subset_size": 8,
        "inception_splits": 3,
        "steps": 2,
    }
    (folder / "protocol.yaml").write_text(yaml.safe_dump(values))
    return folder


def evaluate(run: Path, inputs: Path, output: Path, *arguments) -> dict | None:
    """Run the program; its report, or None of a sweep."""
    reset_accelerate()
    words = [
        run,
        "--protocol",
        inputs / "protocol.yaml",
        "--output",
        output,
        "--device",
        "cpu",
        "--num-workers",
        0,
    ]
    main(parse_args([*map(str, words), *map(str, arguments)]))
    return read(output) if (output / "evaluation.json").is_file() else None


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def train_on(run: Path) -> None:
    """A checkpoint of the next step appears in a run, as if its training went on."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    step = int(newest.name.removeprefix("step_")) + 1
    copy = newest.with_name(f"step_{step:08d}")
    shutil.copytree(newest, copy)
    state = json.loads((copy / STATE_FILE).read_text()) | {"step": step}
    (copy / STATE_FILE).write_text(json.dumps(state))
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest[STATE_FILE]["bytes"] = (copy / STATE_FILE).stat().st_size
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))


def pngs(folder: Path) -> dict[str, bytes]:
    """Bytes of each image by its name."""
    root = folder / "images"
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))
    }


def launch(run: Path, inputs: Path, output: Path, *arguments) -> str:
    """The program in two processes; what it printed."""
    words = [
        run,
        "--protocol",
        inputs / "protocol.yaml",
        "--output",
        output,
        "--device",
        "cpu",
        *arguments,
    ]
    return launch_two("--module", "eval.generation", *words)


def launch_two(*words) -> str:
    """A program in two processes on the CPU; what it printed."""
    flags = (
        "--num_processes 2 --num_machines 1 --multi_gpu --main_process_port 0 --mixed_precision no"
    )
    flags += " --dynamo_backend no --num_cpu_threads_per_process 1"
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *map(str, words)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ACCELERATE_"))}
    environment = kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
