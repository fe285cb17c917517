"""Which solver reaches the end of a trained flow with the fewest network evaluations?

    python -m research.solvers runs/emoji [--guidance 1 1.5 3] [--evaluations 4 6 8 10 12 16 20]

Error: root mean square distance of the image latents from a 1000-step reference (midpoint, float32,
from the same start), over the root mean square distance that the reference itself travels.
Evaluations: passes of the velocity network per branch and image. The captions are those of the
run's own pictures, EMA weights. Writes RUN/solvers/solvers.json and a chart for each guidance.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

# Run as a file, Python looks into research/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import check_writable, write_json
from eval.curves import save_lines
from eval.programs import build_parser, integer
from modeling.pipeline import ImageGenerator, SamplingConfig
from modeling.samplers import SOLVERS, evaluations_a_step
from training.errors import exit_on_error
from training.loading import read_run_config
from training.pipelines import flow_folder, load_pipeline

REFERENCE = {"sampler": "midpoint", "steps": 1000}
BASELINE_STEPS = 20  # of Euler, the paper's


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("run", type=Path, help="experiment folder, or a stage-3 run folder")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 3.0])
    parser.add_argument(
        "--evaluations", type=integer(1), nargs="+", default=[4, 6, 8, 10, 12, 16, 20]
    )
    parser.add_argument("--output", type=Path, help="folder (default: RUN/solvers)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Load, integrate, write."""
    folder = args.output or args.run / "solvers"
    check_writable(folder / "solvers.json")
    captions = list(read_run_config(flow_folder(args.run)).pictures.captions)
    parts, sampling = load_pipeline(args.run, torch.device(args.device))
    sampling = replace(sampling, precision="fp32")
    text_states = parts.encode_text(captions)
    start = parts.start(text_states, sampling, seed=0, indices=list(range(len(captions))))
    budgets = sorted({*args.evaluations, BASELINE_STEPS})
    report = {}
    for guidance in args.guidance:
        guided = replace(sampling, guidance=guidance)
        curves = measure(parts, text_states, start, guided, budgets)
        limit = dict(curves["euler"])[BASELINE_STEPS]
        reached = {
            name: min((budget for budget, error in curve if error <= limit), default=None)
            for name, curve in curves.items()
        }
        report[f"{guidance:g}"] = {
            "euler_20_error": limit,
            "evaluations_to_reach_it": reached,
            "rows": [
                {"sampler": name, "evaluations": budget, "error": error}
                for name, curve in curves.items()
                for budget, error in curve
            ],
        }
        chart = folder / f"guidance_{guidance:g}.png"
        save_lines(curves, "evaluations", "error", chart, y_scale="log")
        shown = ", ".join(f"{name} {count}" for name, count in reached.items() if count)
        print(f"guidance {guidance:g}: 20 Euler steps are {limit:.4f} off; as near with: {shown}")
    content = {"captions": captions, "reference": REFERENCE, "guidance": report}
    write_json(content, folder / "solvers.json")
    print(f"{folder}: solvers.json and charts written")


def measure(
    parts: ImageGenerator,
    text_states: Tensor,
    start: Tensor,
    sampling: SamplingConfig,
    budgets: list[int],
) -> dict[str, list[tuple[int, float]]]:
    """Of each solver (evaluations, error) for the budgets that its steps fit exactly."""

    def follow(**changes) -> Tensor:
        return parts.transport(start, text_states, replace(sampling, **changes))

    reference = follow(**REFERENCE)
    way = (reference - start / parts.flow.latent_scale).square().mean()
    curves = {}
    for name, solver in SOLVERS.items():
        each = evaluations_a_step(solver)
        curves[name] = []
        for budget in (budget for budget in budgets if budget % each == 0):
            end = follow(sampler=name, steps=budget // each)
            error = ((end - reference).square().mean() / way).sqrt().item()
            curves[name].append((budget, error))
    return curves


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
