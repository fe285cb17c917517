"""Verify a run folder, or all stages of an experiment folder, and print what is there.

    python scripts/check_run.py runs/demo
    python scripts/check_run.py runs/demo/flowtok --quick      names and sizes only

A line per stage, then a line per problem. Every file of every checkpoint has the bytes that were
written; weights, EMA and moments of the newest whole one are finite; metrics.jsonl rises without
repeats up to it. Token shards: all that tokens.json lists are there, with so many samples.
Exit status: 0 no problem, 1 problems, 2 no run in the folder.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Run as a file, Python looks into scripts/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training.checkpoint as ckpt
from configs.load import one_line
from data.files import user_path
from data.tar import count_samples
from training.errors import exit_on_error, printable
from training.metrics import step_of
from training.run import CONFIG_FILE, read_saved
from training.tokens import TOKENS_INFO_FILE, TokensInfo

METRICS_FILE = "metrics.jsonl"
COLUMNS = ("run", "steps", "size", "checkpoints", "last loss")


@dataclass
class Report:
    """What there is to say about one run."""

    name: str
    steps: str = "-"
    size: str = "-"
    checkpoints: str = "-"
    loss: str = "-"
    problems: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        """The cells of its line."""
        return [self.name, self.steps, self.size, self.checkpoints, self.loss]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=user_path, help="run folder, or a folder with run folders in it"
    )
    parser.add_argument("--quick", action="store_true", help="names and sizes only")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> int:
    """Check all runs, print, and return the number of problems."""
    reports = [check_folder(run, args.quick) for run in find_runs(args.run)]
    table = [list(COLUMNS), *(report.row() for report in reports)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    problems = [f"problem: {report.name}: {text}" for report in reports for text in report.problems]
    print("\n".join(map(printable, problems)) or "no problem")
    return len(problems)


def find_runs(folder: Path) -> list[Path]:
    """The folder itself, or the runs in it, the oldest first.

    Raises:
        ValueError: there is none.
    """
    if is_run(folder):
        return [folder]
    runs = [path for path in folder.glob("*") if is_run(path)]
    if not runs:
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:10])
        raise ValueError(f"{folder} is no run and holds none; in it: {found or 'nothing'}")
    return sorted(runs, key=lambda run: (run.stat().st_mtime, run.name))


def is_run(folder: Path) -> bool:
    """Whether a folder is meant to be a run or tokens, whole or not."""
    names = (CONFIG_FILE, "checkpoints", METRICS_FILE, TOKENS_INFO_FILE)
    return any((folder / name).exists() for name in names)


def check_folder(folder: Path, quick: bool) -> Report:
    """Check one run or token folder."""
    report = Report(folder.resolve().name)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    report.size = f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
    is_tokens = (folder / TOKENS_INFO_FILE).exists()
    check = check_tokens if is_tokens else check_run
    try:
        report.problems += check(folder, quick, report)
    except (ValueError, OSError, SafetensorError) as error:
        report.problems.append(one_line(error))
    return report


def check_tokens(folder: Path, quick: bool, report: Report) -> Iterator[str]:
    """Problems of a folder of token shards."""
    info = TokensInfo.load(folder)
    damage = info.damage(folder)
    whole = len(info.shards) - len(damage)
    report.checkpoints = f"{whole} shards, {info.num_samples} samples"
    if damage:
        yield f"{len(damage)} shards are damaged or missing, the first: {damage[0]}"
    elif not quick:
        found = sum(count_samples(folder / name) for name in info.shards)
        if found != info.num_samples:
            yield f"{TOKENS_INFO_FILE} says {info.num_samples} samples, the shards hold {found}"


def check_run(run: Path, quick: bool, report: Report) -> Iterator[str]:
    """Problems of a run folder; fills in what the report shows."""
    config = read_saved(run / CONFIG_FILE)
    verify = [] if quick else [ckpt.ALL_FILES]
    damage = {
        step: ckpt.find_damage(folder, verify)
        for step, folder in ckpt.checkpoint_folders(run).items()
    }
    whole = [step for step, reason in damage.items() if not reason]
    shown = [str(step) if step in whole else f"{step} (damaged)" for step in damage]
    report.checkpoints = ", ".join(shown) or "none"
    for step, reason in damage.items():
        if reason:
            yield f"checkpoint {step} is damaged: {reason}"
    if not damage:
        yield "it has no checkpoint yet"
    newest = max(whole, default=0)
    max_steps = config.get("training", {}).get("max_steps", newest)
    report.steps = f"{newest}/{max_steps}"
    if whole and not quick:
        yield from check_finite(ckpt.checkpoint_folders(run)[newest])
    yield from check_metrics(run / METRICS_FILE, report)


def check_finite(folder: Path) -> Iterator[str]:
    """Weights and moments that are no numbers."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if not is_finite(tensor):
                yield f"{folder.name}/{path.name}: {name} is not finite"
    for path in sorted(folder.glob(f"*{ckpt.OPTIMIZER_FILE}")):
        try:
            moments = [
                (index, name, moment)
                for index, values in ckpt.load_plain(path, mmap=True)["state"].items()
                for name, moment in values.items()
            ]
            bad = [(index, name) for index, name, moment in moments if not is_finite(moment)]
        except (KeyError, TypeError, AttributeError):
            yield f"{folder.name}/{path.name} holds no moments"
            continue
        for index, name in bad:
            yield f"{folder.name}/{path.name}: {name} of weight {index} is not finite"
    for path in sorted(folder.glob("rank_*.pt")):
        saved = ckpt.load_plain(path)
        if not isinstance(saved, dict) or not {"loader", "metrics"} <= saved.keys():
            yield f"{folder.name}/{path.name} holds no data position"


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are numbers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def check_metrics(path: Path, report: Report) -> Iterator[str]:
    """Problems of metrics.jsonl; a converted run has none. Fills in the last loss."""
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").splitlines()
    steps = [step_of(line) for line in lines]
    if None in steps:
        yield f"{path.name}: line {steps.index(None) + 1} is no JSON object with a step"
        return
    for before, after in pairwise(steps):
        if after <= before:
            yield f"{path.name}: step {after} comes after step {before}"
            return
    loss = json.loads(lines[-1]).get("loss") if lines else None
    if isinstance(loss, int | float):
        report.loss = f"{loss:.4g}"


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(1 if exit_on_error(lambda: main(arguments)) else 0)
