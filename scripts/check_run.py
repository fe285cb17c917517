"""Verify a run folder, or all stages of an experiment folder, and print what is there.

    python scripts/check_run.py runs/emoji

A line per stage, then a line per problem. Every file of every checkpoint has the bytes that were
written; weights, EMA and moments of the newest whole one are finite; the steps of metrics.jsonl
rise without repeats. Token shards: all that tokens.json lists are there, with so many samples.
Exit status: 0 no problem, 1 problems, 2 no run in the folder.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import training.checkpoint as ckpt
from configs.load import one_line
from data.files import user_path
from data.tar import count_samples
from eval.programs import build_parser
from training.errors import exit_on_error, printable
from training.metrics import METRICS_FILE, step_of
from training.run import CONFIG_FILE, read_saved
from training.tokens import TOKENS_INFO_FILE, TokensInfo


def main(args: argparse.Namespace) -> int:
    problems = []
    for run in find_runs(args.run):
        name = run.resolve().name
        shown, found = check_folder(run)
        print(f"{name}: {shown}")
        problems += [f"problem: {name}: {text}" for text in found]
    print("\n".join(map(printable, problems)) or "no problem")
    return len(problems)


def find_runs(folder: Path) -> list[Path]:
    """The folder itself, or the runs in it, the oldest first; ValueError if there is none."""
    names = (CONFIG_FILE, "checkpoints", METRICS_FILE, TOKENS_INFO_FILE)  # of one, whole or not
    inside = list(folder.glob("*"))
    for candidates in ([folder], inside):
        if runs := [path for path in candidates if any((path / name).exists() for name in names)]:
            return sorted(runs, key=lambda run: (run.stat().st_mtime, run.name))
    found = ", ".join(sorted(path.name for path in inside)[:10])
    raise ValueError(f"{folder} is no run and holds none; in it: {found or 'nothing'}")


def check_folder(folder: Path) -> tuple[str, list[str]]:
    """(what is there, problems) of one run or token folder."""
    check = check_tokens if (folder / TOKENS_INFO_FILE).exists() else check_run
    try:
        return check(folder)
    except (ValueError, OSError, SafetensorError) as error:
        return "unreadable", [one_line(error)]


def check_tokens(folder: Path) -> tuple[str, list[str]]:
    """The same of a folder of token shards."""
    # Names and sizes first: counting samples reads every shard.
    info = TokensInfo.load(folder)
    damage = info.damage(folder)
    shown = f"{len(info.shards) - len(damage)} shards, {info.num_samples} samples"
    if damage:
        return shown, [f"{len(damage)} shards are damaged or missing, the first: {damage[0]}"]
    found = sum(count_samples(folder / name) for name in info.shards)
    if found == info.num_samples:
        return shown, []
    text = f"{TOKENS_INFO_FILE} says {info.num_samples} samples, the shards hold {found}"
    return shown, [text]


def check_run(run: Path) -> tuple[str, list[str]]:
    """The same of a run folder."""
    # Every file of every checkpoint, by its checksum
    config = read_saved(run / CONFIG_FILE)
    folders = ckpt.checkpoint_folders(run)
    damage = {step: ckpt.find_damage(folder, verify=True) for step, folder in folders.items()}
    problems = [f"checkpoint {step} is damaged: {text}" for step, text in damage.items() if text]

    # Resuming takes the newest whole one
    whole = [step for step, text in damage.items() if not text]
    newest = max(whole, default=0)
    if whole:
        folder = folders[newest]
        names = [name for name, tensor in tensors_of(folder) if not torch.isfinite(tensor).all()]
        problems += [f"{folder.name}/{name} is not finite" for name in names]
    if not damage:
        problems.append("it has no checkpoint yet")
    problems += check_metrics(run / METRICS_FILE)
    max_steps = config.get("training", {}).get("max_steps", newest)
    checkpoints = ", ".join(map(str, damage)) or "none"
    return f"step {newest} of {max_steps}, checkpoints {checkpoints}", problems


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights, EMA and the optimisers' moments of a whole checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            yield f"{path.name}: {name}", tensor
    # Mapped: moments are twice as large as the weights.
    for path in sorted(folder.glob(f"*{ckpt.OPTIMIZER_FILE}")):
        for index, moments in ckpt.load_plain(path, mmap=True)["state"].items():
            for name, moment in moments.items():
                yield f"{path.name}: {name} of weight {index}", moment


def check_metrics(path: Path) -> list[str]:
    """Problems of metrics.jsonl; a converted run has none."""
    if not path.is_file():
        return []
    steps = [step_of(line) for line in path.read_text(errors="replace").splitlines()]
    if None in steps:
        return [f"{path.name}: line {steps.index(None) + 1} is no JSON object with a step"]
    for before, after in pairwise(steps):
        if after <= before:
            return [f"{path.name}: step {after} comes after step {before}"]
    return []


if __name__ == "__main__":
    parser = build_parser(__doc__)
    help_text = "run folder, or a folder with run folders in it"
    parser.add_argument("run", type=user_path, help=help_text)
    arguments = parser.parse_args()
    sys.exit(1 if exit_on_error(lambda: main(arguments)) else 0)
