"""A grid of config overrides, several seeds each, unattended: one table.

    python research/sweep.py research/sweeps/FILE.yaml [--only VARIANT ...] [--jobs 2]

FILE is a SweepConfig (below): an experiment, the stages that are run for every variant and seed,
the finished experiment whose earlier stages they start from, and what is read from the results.
Each run is what a user would type, `STAGES=... bash train_flowtok.sh EXPERIMENT
experiment_dir=OUTPUT/VARIANT/SEED ...`; its log file has what it prints. Variants get equal steps,
or with `gflop` equal work: max_steps is then the budget over the GFLOP of a step without the text
tower, as scripts/plan.py counts them.
Run the same command again to go on: finished runs are read, an interrupted one resumes. A run that
fails is named in the table and the others go on; the exit status is then 1.
Writes OUTPUT/table.md (mean and deviation over the seeds) and results.json (every run).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from configs.load import load_dataclass
from data.files import integer, write_json, write_text
from eval.programs import build_parser, markdown_table
from scripts.plan import make_plan
from scripts.run_experiment.stages import read_stages
from training import metrics
from training.errors import ROOT, exit_on_error
from training.stage import TrainedStage

COMMAND_FILE, RESULT_FILE = "command.json", "result.json"


@dataclass
class SweepConfig:
    """What is run and what is read."""

    experiment: str = "emoji"  # a folder of configs/
    stages: list[str] = field(default_factory=list)  # run for every variant and seed
    start_from: str = ""  # finished experiment; its other stages are linked into each run
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # training.seed of every stage
    # training work of a stage; without: its config's max_steps
    gflop: dict[str, float] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)  # of all variants
    variants: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides
    # name -> FILE:KEY of a run: a JSON file with a dotted KEY, or a .jsonl, whose last line that
    # has the KEY counts
    metrics: dict[str, str] = field(default_factory=dict)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="folder; default: runs/sweeps/NAME OF THE FILE")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run and show these")
    parser.add_argument("--jobs", type=integer(1), default=1, help="runs at the same time")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Run what is left, then write; SystemExit: a run failed.

    ValueError: a wrong file, an unknown variant, or folders that another command made.
    """
    sweep = load_sweep(args.file)
    output = args.output or ROOT / "runs" / "sweeps" / args.file.stem
    chosen = args.only or list(sweep.variants)
    if unknown := [name for name in chosen if name not in sweep.variants]:
        valid = ", ".join(sweep.variants)
        raise ValueError(f"--only {unknown}: no such variant; valid: {valid}")

    # All variants with the first seed come first, so that there is an early table
    todo = []
    for seed, variant in product(sweep.seeds, chosen):
        folder = (output / variant / str(seed)).resolve()
        command = command_of(sweep, variant, seed, folder)
        made_by = folder / COMMAND_FILE
        known = json.loads(made_by.read_text()) if made_by.is_file() else None
        if folder.exists() and known != command:
            raise ValueError(
                f"{folder} was made by another command: move it, or choose another --output"
            )
        todo.append((variant, seed, folder, command))

    # The table is written after each run
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run_one, sweep, *one) for one in todo]
        try:
            for future in as_completed(futures):
                result = future.result()
                results.append(result)
                shown = result.get("error") or result["metrics"]
                place = f"[{len(results)}/{len(todo)}] {result['variant']}, seed {result['seed']}"
                print(f"{place}: {shown}", flush=True)
                write_summary(sweep, results, output)
        finally:
            # Or Ctrl-C and a wrong metric would be heeded after the last run
            pool.shutdown(cancel_futures=True)
    print(f"{summarise(sweep, results)}{output}: table.md and results.json written")
    if any("error" in result for result in results):
        raise SystemExit(1)


# What is to be run


def load_sweep(path: Path) -> SweepConfig:
    """Read and check a file.

    Raises:
        ValueError: unknown keys, nothing to run or to read, a missing start, or an override that a
            stage refuses.
    """
    sweep = load_dataclass(SweepConfig, path)
    for name in ("stages", "seeds", "variants", "metrics"):
        if not getattr(sweep, name):
            raise ValueError(f"{path}: {name} is empty")
    for name in sweep.variants:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{path}: variants: {name!r} is no name of a folder")
    if idle := sweep.gflop.keys() - {*sweep.stages}:
        raise ValueError(f"{path}: gflop has {sorted(idle)}, which are not among stages")
    if sweep.start_from and not Path(sweep.start_from).is_dir():
        raise ValueError(f"{path}: start_from={sweep.start_from} is no folder; train it first")
    # Each variant's overrides are checked by the stages that would get them
    for variant in sweep.variants:
        command_of(sweep, variant, seed=0, folder=Path())
    return sweep


def command_of(sweep: SweepConfig, variant: str, seed: int, folder: Path) -> list[str]:
    """train_flowtok.sh with everything of a run.

    ValueError: an override that a stage refuses, or a budget of not one step.
    """
    overrides = sweep.overrides + sweep.variants[variant]
    words = [sweep.experiment, *overrides]
    command = ["bash", str(ROOT / "train_flowtok.sh"), sweep.experiment, f"experiment_dir={folder}"]
    for stage in read_stages(words, " ".join(sweep.stages), ROOT / "configs"):
        if isinstance(stage.config, TrainedStage):
            command.append(f"{stage.name}.training.seed={seed}")
        # Equal work: a larger network makes fewer steps
        if budget := sweep.gflop.get(stage.name):
            steps = round(budget / gflop_per_step(stage.file, stage.overrides))
            if steps < 1:
                raise ValueError(
                    f"gflop.{stage.name}={budget} is less than one step of variant {variant}"
                )
            command.append(f"{stage.name}.training.max_steps={steps}")
    return command + overrides


@cache
def gflop_per_step(file: Path, overrides: tuple[str, ...]) -> float:
    """Training work of an optimiser step, without the text tower."""
    plan = make_plan(file, overrides, num_gpus=1)
    per_sample = plan["gflop_per_sample"]
    return (per_sample["total"] - per_sample["text_tower"]) * plan["run"]["batch_size"]


# Runs


def run_one(
    sweep: SweepConfig, variant: str, seed: int, folder: Path, command: list[str]
) -> dict[str, Any]:
    """Run a variant with a seed, or read what it gave before.

    Returns variant, seed, command, seconds, and metrics or error.
    """
    finished = folder / RESULT_FILE
    log = folder / "log"
    if finished.is_file():
        return json.loads(finished.read_text()) | {"metrics": read_metrics(sweep, folder)}
    write_json(command, folder / COMMAND_FILE)
    # The finished stages of `start_from` that are not run
    for path in sorted(Path(sweep.start_from).resolve().iterdir()) if sweep.start_from else []:
        link = folder / path.name
        if path.is_dir() and path.name not in sweep.stages and not link.exists():
            link.symlink_to(path)
    start = time.monotonic()
    status = run_command(sweep, command, log)
    seconds = time.monotonic() - start
    result = {"variant": variant, "seed": seed, "command": command, "seconds": seconds}
    # Without a result the same command runs it again, which resumes it
    if status:
        return result | {"error": f"exit status {status}: {last_error(log)}; see {log}"}
    write_json(result, finished)
    return result | {"metrics": read_metrics(sweep, folder)}


def run_command(sweep: SweepConfig, command: list[str], log: Path) -> int:
    variables = {"STAGES": " ".join(sweep.stages), "OMP_NUM_THREADS": "1"}
    variables |= {"VIRTUAL_ENV": sys.prefix}
    with log.open("a") as file:
        return subprocess.run(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode


def last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()] or ["no output"]
    return ([line for line in lines if line.startswith("error")] or lines)[-1]


def read_metrics(sweep: SweepConfig, folder: Path) -> dict[str, float]:
    """What the sweep asks for; ValueError: a file without the key."""
    values = {}
    for name, place in sweep.metrics.items():
        file, _, key = place.partition(":")
        # Of a log the last line that has the key, of a report the value at the dotted path
        if file.endswith(".jsonl"):
            _, value = metrics.read_metrics(folder / file).get(key, [(0, None)])[-1]
        else:
            value = json.loads((folder / file).read_text())
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            raise ValueError(f"metrics.{name}: {folder / file} has no number {key!r}")
        values[name] = value
    return values


# Summary


def summarise(sweep: SweepConfig, results: list[dict]) -> str:
    """The table: a row for each variant, mean +- the sample's deviation over its seeds."""
    lines = [["variant", *sweep.metrics, "runs"]]
    shown = {result["variant"] for result in results}
    for variant in (name for name in sweep.variants if name in shown):
        runs = [run for run in results if run["variant"] == variant and "metrics" in run]
        cells = []
        for name in sweep.metrics:
            values = [run["metrics"][name] for run in runs]
            mean = f"{statistics.fmean(values):.4g}" if values else ""
            has_spread = len(values) > 1
            cells.append(f"{mean} +- {statistics.stdev(values):.2g}" if has_spread else mean)
        lines.append([variant, *cells, str(len(runs))])
    return markdown_table(lines)


def write_summary(sweep: SweepConfig, results: list[dict], output: Path) -> None:
    results = sorted(results, key=lambda r: (list(sweep.variants).index(r["variant"]), r["seed"]))
    write_json({"sweep": asdict(sweep), "results": results}, output / "results.json")
    failed = [f"{r['variant']}, seed {r['seed']}: {r['error']}" for r in results if "error" in r]
    lines = "".join(f"\nfailed: {line}\n" for line in failed)
    write_text(summarise(sweep, results) + lines, output / "table.md")


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
