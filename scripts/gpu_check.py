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
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import torch
import yaml

from data.files import user_path, write_json
from eval.programs import build_parser, markdown_table
from scripts.benchmark import describe_machine
from scripts.plan import make_plan
from scripts.workload import rounded
from training.errors import ROOT, exit_on_error

LAST_LINES = 15  # of a part that failed
TESTS = "tests/test_gpu.py tests/test_no_sync.py tests/test_resume.py tests/test_compile.py"
BENCH = "scripts/benchmark.py {} --config configs/{}.yaml --batch-size {} --seconds 9 --rounds 3"
SAMPLING = f"{BENCH} sampling.precision=bf16"
# In order of worth: seconds at most, and the words after python; FOLDER is an empty one
PARTS = {
    "tests": (180, f"-m pytest -q -p no:cacheprovider -m gpu {TESTS}"),
    "train_b": (60, BENCH.format("train", "flowtok_b/flowtok", 512)),
    "train_xl": (60, BENCH.format("train", "flowtok_xl/flowtok", 128)),
    "train_tokenizer": (90, BENCH.format("train", "tokenizer_bl77_256/tokenizer", 64)),
    "sample_xl": (90, SAMPLING.format("sample", "flowtok_xl/flowtok", 64)),
    "sample_h": (90, SAMPLING.format("sample", "flowtok_h/flowtok", 64)),
    "encode": (60, f"{BENCH.format('encode', 'tokenizer_bl77_256/tokens', 256)} precision=bf16"),
    "readers": (60, "scripts/benchmark.py readers --seconds 6 --rounds 2"),
    "demo": (400, "-m scripts.run_experiment emoji runs_dir=FOLDER"),
}
PAPER_IMAGES_PER_SECOND = {"sample_xl": 22.7, "sample_h": 18.2}  # on an A100


def main(args: argparse.Namespace) -> int:
    """Run the chosen parts and write what is known after each; the exit status."""
    results = {"machine": describe_machine(), "parts": {}}
    for name, (limit, command) in PARTS.items():
        if name not in args.parts:
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            found = find_figures(name, command, run_part(command, limit))
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            found = {"failed": str(error)}
        found["took_seconds"] = time.monotonic() - start
        results["parts"][name] = rounded(found)
        write_json(results, args.output)
    print(f"\n{table(results['parts'])}\n{args.output}", flush=True)
    return int(any("failed" in found for found in results["parts"].values()))


def run_part(command: str, limit: float) -> str:
    """What a part prints.

    Raises:
        ValueError: it failed; its last lines.
        subprocess.TimeoutExpired: it took too long.
    """
    with TemporaryDirectory() as folder:
        words = [word.replace("FOLDER", folder) for word in command.split()]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
    # Whoever watches sees errors as well; figures are read of stdout alone.
    whole = done.stdout + done.stderr
    print(whole, flush=True)
    if done.returncode:
        last = "\n".join(whole.splitlines()[-LAST_LINES:])
        raise ValueError(f"status {done.returncode}: {last}")
    return done.stdout


def find_figures(name: str, command: str, output: str) -> dict:
    """The figures in what a part printed, beside those that were expected."""
    if name == "tests":
        return {"summary": output.strip().splitlines()[-1]}
    if name == "demo":
        took = re.findall(r"^== (\S+) took (\d+) s$", output, re.MULTILINE)
        return {"seconds": {stage: int(seconds) for stage, seconds in took}}
    figures = yaml.safe_load(output)["measures"]
    if name in PAPER_IMAGES_PER_SECOND:
        # A whole image, from token ids to pixels, which is what the paper counts
        steps = [figures[step] for step in ("text", "projector", "flow", "decode")]
        seconds = sum(1 / step["samples_per_second"]["median"] for step in steps)
        figures["images_per_second"] = 1 / seconds
        figures["paper_images_per_second"] = PAPER_IMAGES_PER_SECOND[name]
    # The planner has never seen a GPU: here is what it foretold.
    if name.startswith("train_"):
        config, batch = re.search(r"--config (\S+) --batch-size (\d+)", command).groups()
        overrides = [f"training.batch_size={batch}", "training.gradient_accumulation=1"]
        plan = make_plan(ROOT / config, overrides, num_gpus=1)
        figures["planned_peak_gib"] = plan["memory_gib"]["peak"]
    return figures


def table(parts: dict[str, dict]) -> str:
    lines = [["part", "samples/s", "share of mm", "GiB"]]
    for name, found in parts.items():
        for key, value in found.items():
            if isinstance(value, dict) and "share_of_mm" in value:
                rate = value["samples_per_second"]["median"]
                share = f"{value['share_of_mm']['median']:.0%}"
                lines.append([f"{name}: {key}", str(rate), share, str(value.get("peak_gib", ""))])
            elif key in ("summary", "images_per_second", "seconds"):
                lines.append([f"{name}: {key}", str(value), "", ""])
            elif key == "failed":
                lines.append([name, key, "", ""])
    return markdown_table(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    names = ",".join(PARTS)
    parser.add_argument("--parts", default=names, help="default: %(default)s")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    output = ROOT / "docs" / "gpu" / f"{device}.json"
    parser.add_argument("--output", type=user_path, default=output)
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"--parts {' '.join(sorted(unknown))}: the parts are {names}")
    return args


if __name__ == "__main__":
    sys.exit(exit_on_error(lambda: main(parse_args())))
