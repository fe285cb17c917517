"""A grid of config overrides, several seeds each, unattended: one table, one chart for each metric.

    python research/sweep.py research/sweeps/FILE.yaml [--output runs/sweeps/FILE] [--only VARIANT ...] [--jobs 2]

The file (SweepConfig below) names an experiment, the stages that are run for every variant and seed, the finished
experiment whose earlier stages they start from, and what is read from the results. Each run is what a user would type,
`STAGES=... bash train_flowtok.sh EXPERIMENT experiment_dir=OUTPUT/VARIANT/SEED ...`; what it prints is in its log file.
Variants get equal steps, or with `gflop` equal work: max_steps is then the budget over the GFLOP of a step, as
scripts/plan.py counts them, without the text tower.
The same command goes on where it was: finished runs are read, an interrupted one resumes. A run that fails is named in
the table and the others go on; the exit status is then 1.
Writes OUTPUT/table.md (mean and deviation over the seeds, number of runs), results.json (every run) and METRIC.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

from configs.load import read_yaml
from data.files import write_json, write_text
from research.plots import save_dots
from scripts.plan import make_plan
from scripts.workload import load_stage
from training.errors import exit_on_error

ROOT = Path(__file__).resolve().parents[1]
COMMAND_FILE, RESULT_FILE = "command.json", "result.json"


@dataclass
class SweepConfig:
    """What is run and what is read."""

    experiment: str = "demo"  # a folder of configs/
    stages: list[str] = field(default_factory=list)  # run for every variant and seed, in this order
    start_from: str = ""  # finished experiment; its other stages are linked into each run
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2]
    )  # training.seed of every stage that is run
    gflop: dict[str, float] = field(
        default_factory=dict
    )  # training work of a stage; without: its config's max_steps
    overrides: list[str] = field(
        default_factory=list
    )  # of all variants, as on the command line of train_flowtok.sh
    variants: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides
    # name -> FILE:KEY of a run: a JSON file, or the last line of a .jsonl that has the key; KEY is dotted in a .json
    metrics: dict[str, str] = field(default_factory=dict)
    threads: int = 1  # of each run on a CPU


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--output", type=Path, help="folder (default: runs/sweeps/NAME OF THE FILE)"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run and show these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    return parser.parse_args(arguments)


def load_sweep(path: Path) -> SweepConfig:
    """Read and check a file.

    Raises:
        ValueError: unknown keys, nothing to run or to read, a missing start, or an override that a stage refuses.
    """
    try:
        sweep = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(SweepConfig), read_yaml(path))
        )
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", "") or ""
        raise ValueError(
            f"{path}: {key + ': ' if key else ''}{str(error).splitlines()[0]}"
        ) from error
    for name in ("stages", "seeds", "variants", "metrics"):
        if not getattr(sweep, name):
            raise ValueError(f"{path}: {name} is empty")
    wrong = [
        name
        for name in sweep.variants
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum()
    ]
    if wrong:
        raise ValueError(
            f"{path}: variants are names of folders; use letters, digits, '-', '_', '.' in {wrong}"
        )
    if sweep.start_from and not Path(sweep.start_from).is_dir():
        raise ValueError(f"{path}: start_from={sweep.start_from} is no folder; train it first")
    for variant, overrides in sweep.variants.items():
        for stage in sweep.stages:
            load_stage(config_file(sweep, stage), own_overrides(sweep, stage, overrides))
            if stage in sweep.gflop:
                budget_steps(sweep, stage, variant)
    return sweep


def config_file(sweep: SweepConfig, stage: str) -> Path:
    """The YAML of a stage."""
    return ROOT / "configs" / sweep.experiment / f"{stage}.yaml"


def own_overrides(sweep: SweepConfig, stage: str, overrides: list[str]) -> list[str]:
    """The overrides of a stage, without its name: those of all variants, then the variant's."""
    prefix = f"{stage}."
    return [
        item.removeprefix(prefix)
        for item in (*sweep.overrides, *overrides)
        if item.startswith(prefix)
    ]


@cache
def gflop_per_step(file: Path, overrides: tuple[str, ...]) -> float:
    """Training work of an optimiser step, without the text tower."""
    plan = make_plan(file, overrides, num_gpus=1)
    per_sample = plan["gflop_per_sample"]
    return (per_sample["total"] - per_sample["text_tower"]) * plan["run"]["batch_size"]


def budget_steps(sweep: SweepConfig, stage: str, variant: str) -> int:
    """Optimiser steps of a stage within its budget.

    Raises:
        ValueError: not one step fits.
    """
    overrides = tuple(own_overrides(sweep, stage, sweep.variants[variant]))
    steps = round(sweep.gflop[stage] / gflop_per_step(config_file(sweep, stage), overrides))
    if steps < 1:
        raise ValueError(
            f"gflop.{stage}={sweep.gflop[stage]} is less than one step of variant {variant}"
        )
    return steps


def command_of(sweep: SweepConfig, variant: str, seed: int, folder: Path) -> list[str]:
    """train_flowtok.sh with everything of a run."""
    command = ["bash", str(ROOT / "train_flowtok.sh"), sweep.experiment, f"experiment_dir={folder}"]
    trained = [s for s in sweep.stages if hasattr(load_stage(config_file(sweep, s)), "training")]
    command += [f"{stage}.training.seed={seed}" for stage in trained]
    command += [
        f"{stage}.training.max_steps={budget_steps(sweep, stage, variant)}" for stage in sweep.gflop
    ]
    return command + sweep.overrides + sweep.variants[variant]


def run_folder(output: Path, variant: str, seed: int) -> Path:
    """Where a run lives."""
    return (output / variant / str(seed)).resolve()


def check_folders(sweep: SweepConfig, output: Path, runs: list[tuple[str, int]]) -> None:
    """Nothing that another command made is continued.

    Raises:
        ValueError: names the folder.
    """
    for variant, seed in runs:
        folder = run_folder(output, variant, seed)
        made_by = folder / COMMAND_FILE
        known = json.loads(made_by.read_text()) if made_by.is_file() else None
        if folder.exists() and known != command_of(sweep, variant, seed, folder):
            raise ValueError(
                f"{folder} was made by another command: move it, or choose another --output"
            )


def run_one(sweep: SweepConfig, variant: str, seed: int, output: Path) -> dict:
    """Run a variant with a seed, or read what it gave before: {variant, seed, command, seconds, metrics or error}."""
    folder = run_folder(output, variant, seed)
    command = command_of(sweep, variant, seed, folder)
    finished = folder / RESULT_FILE
    if finished.is_file():
        return json.loads(finished.read_text()) | {"metrics": read_metrics(sweep, folder)}
    write_json(command, folder / COMMAND_FILE)
    link_start(sweep, folder)
    start = time.monotonic()
    variables = {
        "STAGES": " ".join(sweep.stages),
        "OMP_NUM_THREADS": str(sweep.threads),
        "VIRTUAL_ENV": sys.prefix,
    }
    with (folder / "log").open("a") as log:
        status = subprocess.run(
            command,
            env=os.environ | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ).returncode
    result = {
        "variant": variant,
        "seed": seed,
        "command": command,
        "seconds": time.monotonic() - start,
    }
    if status:
        return result | {
            "error": f"exit status {status}: {last_error(folder / 'log')}; see {folder / 'log'}"
        }
    write_json(result, finished)
    return result | {"metrics": read_metrics(sweep, folder)}


def link_start(sweep: SweepConfig, folder: Path) -> None:
    """Links to the finished stages of `start_from` that are not run."""
    for path in sorted(Path(sweep.start_from).resolve().iterdir()) if sweep.start_from else []:
        link = folder / path.name
        if path.is_dir() and path.name not in sweep.stages and not link.exists():
            link.symlink_to(path)


def last_error(log: Path) -> str:
    """The last line that says what went wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if line.startswith("error")),
        lines[-1] if lines else "no output",
    )


def read_metrics(sweep: SweepConfig, folder: Path) -> dict[str, float]:
    """What the sweep asks for.

    Raises:
        ValueError: a file without the key.
    """
    values = {}
    for name, place in sweep.metrics.items():
        file, _, key = place.partition(":")
        text = (folder / file).read_text()
        if file.endswith(".jsonl"):
            found = next(
                (row[key] for row in map(json.loads, reversed(text.splitlines())) if key in row),
                None,
            )
        else:
            found = json.loads(text)
            for part in key.split("."):
                found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, int | float):
            raise ValueError(f"metrics.{name}: {folder / file} has no number {key!r}")
        values[name] = found
    return values


def finished_runs(results: list[dict], variant: str) -> list[dict]:
    """Those of a variant that did not fail."""
    return [result for result in results if result["variant"] == variant and "metrics" in result]


def summarise(sweep: SweepConfig, results: list[dict]) -> str:
    """The table: a row for each variant, mean +- deviation over its seeds."""
    names = list(sweep.metrics)
    lines = [["variant", *names, "runs"], ["---"] * (len(names) + 2)]
    shown = {result["variant"] for result in results}
    for variant in (name for name in sweep.variants if name in shown):
        runs = finished_runs(results, variant)
        cells = [mean_and_deviation([run["metrics"][name] for run in runs]) for name in names]
        lines.append([variant, *cells, str(len(runs))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_deviation(values: list[float]) -> str:
    """A cell: mean, and the sample's standard deviation where there are two or more."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} +- {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def write_summary(sweep: SweepConfig, results: list[dict], output: Path) -> None:
    """table.md, results.json and a chart for each metric."""
    results = sorted(results, key=lambda r: (list(sweep.variants).index(r["variant"]), r["seed"]))
    write_json({"sweep": asdict(sweep), "results": results}, output / "results.json")
    table = summarise(sweep, results)
    failed = [f"{r['variant']}, seed {r['seed']}: {r['error']}" for r in results if "error" in r]
    write_text(table + "".join(f"\nfailed: {line}\n" for line in failed), output / "table.md")
    runs = {variant: finished_runs(results, variant) for variant in sweep.variants}
    if any(runs.values()):
        for name in sweep.metrics:
            dots = {variant: [run["metrics"][name] for run in runs[variant]] for variant in runs}
            save_dots(dots, name, output / f"{name}.png")


def main(args: argparse.Namespace) -> None:
    """Run what is left, then write."""
    sweep, output = load_sweep(args.file), args.output or ROOT / "runs" / "sweeps" / args.file.stem
    chosen = args.only or list(sweep.variants)
    unknown = [name for name in chosen if name not in sweep.variants]
    if unknown or args.jobs < 1:
        raise ValueError(
            f"--only {unknown}: no such variant; valid: {', '.join(sweep.variants)}; --jobs is at least 1"
        )
    todo = [
        (variant, seed) for seed in sweep.seeds for variant in chosen
    ]  # a first table after the first seed
    check_folders(sweep, output, todo)
    results, start = [], time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run_one, sweep, *one, output) for one in todo]
        for future in as_completed(futures):
            results.append(result := future.result())
            left = (time.monotonic() - start) / len(results) * (len(todo) - len(results))
            shown = result.get("error") or ", ".join(
                f"{k} {v:.4g}" for k, v in result["metrics"].items()
            )
            place = f"[{len(results)}/{len(todo)}] {result['variant']}, seed {result['seed']}"
            print(f"{place}: {shown} ({left / 60:.0f} min left)", flush=True)
            write_summary(sweep, results, output)
    print(summarise(sweep, results) + f"{output}: table.md, results.json and charts written")
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
