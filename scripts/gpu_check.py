"""What has to be known of a GPU, for scripts/gpu_check.sh: tests, speed and memory, the demo.

    python scripts/gpu_check.py [--parts tests,train_b,...] [--output FILE]

Each part is a command with a limit of time. Its output goes to the screen, its figures to
docs/gpu/NAME.json, NAME the device's, as soon as it ends. A part that fails is noted with its last
lines, and the next one runs. Exit status: 0, or 1 if a part failed.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import torch
import yaml

from data.files import user_path, write_json
from eval.programs import build_parser
from scripts.benchmark import describe_machine
from scripts.plan import make_plan
from scripts.workload import rounded
from training.errors import ROOT, exit_on_error

LAST_LINES = 15  # of a part that failed
PAPER_IMAGES_PER_SECOND = {"sample_xl": 22.7, "sample_h": 18.2}  # on an A100


@dataclass(frozen=True)
class Part:
    """A command and what is kept of its output."""

    command: tuple[str, ...]  # after python; {folder}: an empty one, removed afterwards
    limit: float  # seconds
    read: Callable[[str], Any]
    config: str = ""  # whose planned memory stands beside the measured one


def pytest_summary(output: str) -> dict:
    return {"summary": output.strip().splitlines()[-1]}


def benchmark_figures(output: str) -> dict:
    """The measures that scripts/benchmark.py printed."""
    return yaml.safe_load(output)["measures"]


def sampling_figures(output: str) -> dict:
    """The same, and whole images a second, from token ids to pixels."""
    figures = benchmark_figures(output)
    whole = ("text", "projector", "flow", "decode")
    seconds = sum(1 / figures[part]["samples_per_second"]["median"] for part in whole)
    return figures | {"images_per_second": 1 / seconds}


def demo_figures(output: str) -> dict:
    """How long each stage of train_flowtok.sh took."""
    took = re.findall(r"^== (\S+) took (\d+) s$", output, re.MULTILINE)
    return {"seconds": {stage: int(seconds) for stage, seconds in took}}


def bench(part: str, config: str, batch: int, *overrides: str) -> tuple[str, ...]:
    length = ("--seconds", "9", "--rounds", "3")
    words = ("--config", f"configs/{config}.yaml", "--batch-size", str(batch), *length)
    return ("scripts/benchmark.py", part, *words, *overrides)


def all_parts() -> dict[str, Part]:
    """In order of worth."""
    files = [f"tests/test_{name}.py" for name in ("gpu", "no_sync", "resume", "compile")]
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files)
    demo = ("-m", "scripts.run_experiment", "emoji", "runs_dir={folder}")
    b, xl, h = (f"flowtok_{size}/flowtok" for size in ("b", "xl", "h"))
    tokenizer, tokens = (f"tokenizer_bl77_256/{stage}" for stage in ("tokenizer", "tokens"))
    return {
        "tests": Part(tests, 180, pytest_summary),
        "train_b": Part(bench("train", b, 512), 60, benchmark_figures, b),
        "train_xl": Part(bench("train", xl, 128), 60, benchmark_figures, xl),
        "train_tokenizer": Part(bench("train", tokenizer, 64), 90, benchmark_figures, tokenizer),
        "sample_xl": Part(bench("sample", xl, 64, "sampling.precision=bf16"), 90, sampling_figures),
        "sample_h": Part(bench("sample", h, 64, "sampling.precision=bf16"), 90, sampling_figures),
        "encode": Part(bench("encode", tokens, 256, "precision=bf16"), 60, benchmark_figures),
        "readers": Part(
            ("scripts/benchmark.py", "readers", "--seconds", "6", "--rounds", "2"),
            60,
            benchmark_figures,
        ),
        "demo": Part(demo, 400, demo_figures),
    }


def run_parts(parts: dict[str, Part], output: Path) -> bool:
    """Run them, write what is known after each; whether none failed."""
    results: dict[str, Any] = {"machine": describe_machine(), "parts": {}}
    for name, part in parts.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            found = run_part(part)
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            found = {"failed": str(error)}
        if name in PAPER_IMAGES_PER_SECOND and "failed" not in found:
            found["paper_images_per_second"] = PAPER_IMAGES_PER_SECOND[name]
        seconds = time.monotonic() - start
        results["parts"][name] = rounded(found | {"took_seconds": seconds})
        write_json(results, output)
    print(f"\n{table(results['parts'])}\n\n{output}", flush=True)
    return not any("failed" in found for found in results["parts"].values())


def run_part(part: Part) -> dict:
    """Its figures.

    Raises:
        ValueError: it failed; its last lines.
        subprocess.TimeoutExpired: it took too long.
    """
    with TemporaryDirectory() as folder:
        words = [word.replace("{folder}", folder) for word in part.command]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=part.limit,
        )
    whole = done.stdout + done.stderr
    print(whole, flush=True)
    if done.returncode:
        last = "\n".join(whole.splitlines()[-LAST_LINES:])
        raise ValueError(f"status {done.returncode}: {last}")
    # Beside what was measured stands what scripts/plan.py expected
    figures = part.read(done.stdout)
    if part.config:
        batch = part.command[part.command.index("--batch-size") + 1]
        overrides = [f"training.batch_size={batch}", "training.gradient_accumulation=1"]
        plan = make_plan(ROOT / f"configs/{part.config}.yaml", overrides, num_gpus=1)
        figures["planned_peak_gib"] = plan["memory_gib"]["peak"]
    return figures


def table(parts: dict[str, dict]) -> str:
    """Rates, shares and memory by part, as Markdown."""
    lines = ["| part | samples/s | share of mm | GiB |", "|---|---|---|---|"]
    for name, found in parts.items():
        if "failed" in found:
            lines.append(f"| {name} | failed | | |")
        for way, row in found.items():
            if isinstance(row, dict) and "share_of_mm" in row:
                rate, share = (row[key]["median"] for key in ("samples_per_second", "share_of_mm"))
                memory = row.get("peak_gib", "")
                lines.append(f"| {name}: {way} | {rate} | {share:.0%} | {memory} |")
        shown = {k: v for k, v in found.items() if k in ("summary", "images_per_second", "seconds")}
        lines += [f"| {name}: {key} | {value} | | |" for key, value in shown.items()]
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    names = ",".join(all_parts())
    parser.add_argument("--parts", default=names, help="default: %(default)s")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    output = ROOT / "docs" / "gpu" / f"{device}.json"
    parser.add_argument("--output", type=user_path, default=output)
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - all_parts().keys():
        parser.error(f"--parts {' '.join(sorted(unknown))}: the parts are {names}")
    return args


def main(args: argparse.Namespace) -> int:
    """Run the chosen parts; the exit status."""
    parts = {name: part for name, part in all_parts().items() if name in args.parts}
    return 0 if run_parts(parts, args.output) else 1


if __name__ == "__main__":
    sys.exit(exit_on_error(lambda: main(parse_args())))
