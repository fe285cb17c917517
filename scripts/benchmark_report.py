"""scripts/benchmark.py all, and what it prints on the console: a line a measurement."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch

from scripts.benchmark_timing import describe_machine

ROOT = Path(__file__).resolve().parents[1]
# Recomputation is not useful work, and at these batches all activations fit. Two trainings of XL side by side do not
# fit into 24 GB. Each step of a sampler takes as long as the next: few stand for all.
ALL = [
    "train --config configs/flowtok_b/flowtok.yaml --batch-size 16 --baseline",
    "train --config configs/flowtok_xl/flowtok.yaml --batch-size 4 activation_checkpointing=none",
    "sample --config configs/flowtok_b/flowtok.yaml --batch-size 16 --baseline sampling.steps=2",
    "sample --config configs/flowtok_b/flowtok.yaml --batch-size 1 --baseline sampling.sampler=adams2 sampling.steps=6",
    "sample --config configs/flowtok_xl/flowtok.yaml --batch-size 16 sampling.steps=1",
    "tokenizer --config configs/tokenizer_bl77_256/tokenizer.yaml --repeats 2 activation_checkpointing=none",
    "text",
    "growth",
    "memory --config configs/flowtok_h/flowtok.yaml",
]


def about(args: argparse.Namespace) -> dict:
    """Where, when and by which command figures were measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = [args.part]
    for name, value in vars(args).items():
        if name in ("part", "overrides", "json") or value in (None, False):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *(relative(str(value)) for value in values)]
    words += getattr(args, "overrides", [])
    command = shlex.join(["python", "scripts/benchmark.py", *words])
    now = datetime.now().astimezone().isoformat(timespec="minutes")
    return {"command": command, "date": now, "machine": describe_machine(device)}


def relative(value: str) -> str:
    """A path in this repository from its root; anything else as it is."""
    return value.removeprefix(f"{ROOT}{os.sep}")


def measure_all(args: argparse.Namespace) -> dict:
    """The parts of ALL, each in a process of its own, so that none has another's memory; a part that fails says why."""
    options = ["--seconds", str(args.seconds), "--repeats", str(args.repeats)]
    options += ["--precision", args.precision] if args.precision else []
    parts = []
    for line in ALL:
        if args.only and line.split()[0] not in args.only:
            continue
        print(f"{line} ...", file=sys.stderr, flush=True)
        part, *words = line.split()
        parts.append(run_part([part, *options, *words]))  # the part's own options count
    return {"parts": parts}


def run_part(words: list[str]) -> dict:
    """What `benchmark.py WORDS --json` prints, or {"part", "error"}."""
    program = [sys.executable, str(ROOT / "scripts/benchmark.py"), *words, "--json"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-2:]
        return {"part": shlex.join(words), "error": f"status {done.returncode}: {' '.join(lines)}"}
    return json.loads(done.stdout.splitlines()[-1])


def show(result: dict) -> None:
    """Print the figures of a part, or of all."""
    for part in result.get("parts", [result]):
        show_part(part)
    machine = result["machine"]
    threads = (
        f"{machine['threads']} threads on {machine['cores']} cores, load {machine['load']:.1f}"
    )
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    malloc = "".join(f", {name}={value}" for name, value in machine["malloc"].items())
    print(
        f"{gpu}{machine['cpu']}, {threads}, torch {machine['torch']}{malloc}; {result['date']}; {result['command']}"
    )


def show_part(part: dict) -> None:
    """Print the figures of one part."""
    if "error" in part:
        print(f"{part['part']}: failed, {part['error']}")
        return
    size = f", batch {part['batch_size']}" if "batch_size" in part else ""
    print(
        f"{part['part']} {relative(part['config'])} {part.get('sampler', '')}{size}, {part['precision']}"
    )
    if "growth" in part:
        show_growth(part["growth"])
        return
    if "activation_checkpointing" in part:
        show_memory(part)
        return
    print(f"  {'':<22}{'samples/s':>24}{'share':>20}{'GFLOP/sample':>14}{'GFLOP/s of mm':>15}")
    for name, row in part["measures"].items():
        times = (
            f"  {ranged(row['times_as_long'], '.2f')} times as long"
            if "times_as_long" in row
            else ""
        )
        print(
            f"  {name:<22}{ranged(row['samples_per_second'], '.4g'):>24}{ranged(row['share'], '.0%'):>20}"
            f"{row['gflop_per_sample']:>14.1f}{row['peak_gflop_per_second']['median']:>15.0f}{times}"
        )
    for what, parts in part.get("seconds_by_part", {}).items():
        print(
            f"  seconds a {what}: "
            + ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items())
        )
    print(f"  peak memory {part['peak_memory_gib']:.2f} GiB")


def show_memory(part: dict) -> None:
    """Print what each way keeps."""
    for mode, kept in part["activation_checkpointing"].items():
        way = "the plain way" if mode == "plain" else f"activation_checkpointing={mode}"
        print(
            f"  {way + ':':<36}{kept['activation_mib_per_sample']:>7.1f} MiB a sample, at most "
            f"{kept['largest_batch']} samples on one {part['gpu']}"
        )


def show_growth(rows: dict[str, list[dict]]) -> None:
    """Print the time a sample of each point beside its prediction."""
    print(
        f"  {'batch':>7}{'tokens':>8}{'depth':>7}{'ms/sample':>24}{'predicted':>11}{'deviation':>20}{'share':>20}"
    )
    for row in (row for group in rows.values() for row in group):
        milliseconds = {name: 1e3 * value for name, value in row["seconds_per_sample"].items()}
        print(
            f"  {row['batch_size']:>7}{row['num_tokens']:>8}{row['depth']:>7}{ranged(milliseconds, '.4g'):>24}"
            f"{1e3 * row['predicted_seconds_per_sample']:>11.4g}{ranged(row['deviation'], '+.0%'):>20}"
            f"{ranged(row['share'], '.0%'):>20}"
        )


def ranged(values: dict[str, float], form: str) -> str:
    """Median (lowest-highest)."""
    return f"{values['median']:{form}} ({values['low']:{form}}..{values['high']:{form}})"
