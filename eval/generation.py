"""FID and other numbers of the images that a run makes from captions, by a written protocol.

    python -m eval.generation runs/demo --protocol demo
    accelerate launch --multi_gpu --num_processes 8 --module eval.generation RUN \\
        --protocol coco30k captions=[captions_val2014.json] reference=[coco.npz]
    python -m eval.generation RUN --protocol FILE.yaml --guidance 1,1.5,2,3 --steps 10,20,50

RUN is an experiment or its stage-3 run; EMA weights. A protocol is a YAML (eval/protocol.py);
key=value changes it. An image does not depend on --batch-size or the number of processes. The same
command continues an interrupted evaluation. Writes images, features and evaluation.json; with
several values of guidance or steps, a folder for each, a table and a chart.
"""

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

# Run as a file, Python looks into eval/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.load import load_dataclass
from data.files import check_writable, user_path, write_json, write_text
from eval.evaluation import REPORT, EvaluationSetup, evaluate_images
from eval.feature_nets import WeightsFiles, load_networks
from eval.features import load_reference
from eval.images import Reading
from eval.programs import (
    INSTALL,
    add_reading_options,
    add_sweep_options,
    add_weights_options,
    build_parser,
    print_metrics,
    start_processes,
)
from eval.protocol import Protocol, protocol_file, read_captions
from modeling.flow import check_guidance
from modeling.layers import fingerprint
from modeling.pipeline import ImageGenerator
from modeling.published import file_sha256
from training.checkpoint import EMA_FILE
from training.errors import exit_on_error
from training.loading import load_newest
from training.pipelines import flow_folder, load_pipeline


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = build_parser(__doc__)
    help_text = "experiment folder, or a stage-3 run folder"
    parser.add_argument("run", type=user_path, metavar="RUN", help=help_text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the protocol")
    help_text = "a YAML file, or a name: coco30k, mjhq30k, demo, geneval"
    parser.add_argument("--protocol", required=True, help=help_text)
    parser.add_argument(
        "--output", type=user_path, help="folder; default: evaluation/PROTOCOL in RUN"
    )
    parser.add_argument("--dinov2-weights", metavar="FILE", help="ViT-L/14, for features=dinov2")
    add_sweep_options(parser)
    add_reading_options(parser, 64, "images that a feature network sees at once")
    add_weights_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Check everything, then evaluate each point of the sweep."""
    # What needs no network is checked first
    protocol = load_dataclass(Protocol, protocol_file(args.protocol), args.overrides)
    captions = read_captions(protocol)
    points = [
        replace(protocol, guidance=guidance, steps=steps)
        for steps in args.steps or [protocol.steps]
        for guidance in args.guidance or [protocol.guidance]
    ]
    if len(points) > 1 and find_spec("matplotlib") is None:
        raise ValueError(f"the chart of a sweep needs matplotlib: {INSTALL}")
    output = args.output or args.run / "evaluation" / Path(args.protocol).stem
    state = start_processes(args.device)
    check_writable(output / REPORT)

    # The run: all processes must have the same checkpoint, though training may go on meanwhile
    (generator, default), checkpoint = load_newest(
        flow_folder(args.run), lambda: load_pipeline(args.run, state.device)
    )
    model = describe_model(checkpoint, generator)
    if len({*gather_object([model["flow_fingerprint"]])}) > 1:
        raise ValueError(
            f"{args.run} is being trained, and the processes loaded different checkpoints: start "
            "again"
        )
    for point in points:
        check_guidance(point.sampling(default).guidance, generator.flow.config.null_probability)

    # What the images are measured with
    reading = Reading(args.batch_size, args.num_workers, state)
    files = WeightsFiles(args.inception_weights, args.dinov2_weights, args.download)
    networks = load_networks(protocol, generator, files, state)
    size = protocol.feature_size(generator.tokenizer.config.image_size)
    setup = EvaluationSetup(
        captions=captions,
        generator=generator,
        default=default,
        model=model,
        networks=networks,
        reference=load_reference(protocol, captions, networks.features, size, reading),
        reading=reading,
    )

    # A folder for each point
    reports = []
    for point in points:
        sampling = point.sampling(default)
        name = f"guidance_{sampling.guidance:g}_steps_{sampling.steps}"
        folder = output / name if len(points) > 1 else output
        reports.append(evaluate_images(setup, point, folder))
        if state.is_main_process:
            print_report(reports[-1], folder / REPORT)
    if len(points) > 1 and state.is_main_process:
        write_sweep(output, reports)


def describe_model(checkpoint: Path, generator: ImageGenerator) -> dict[str, Any]:
    """Which weights make the images; read at once, because training may remove the checkpoint."""
    return {
        "checkpoint": checkpoint.name,
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "flow_fingerprint": fingerprint(generator.flow),
        "tokenizer_fingerprint": fingerprint(generator.tokenizer),
        "text_encoder_fingerprint": generator.text_encoder.identity,
    }


def print_report(report: dict[str, Any], path: Path) -> None:
    """How many images, how fast, and the metrics."""
    made = f"{report['num_images']} images, {report['images_made']} made now"
    rate = f", {report['images_per_second']:.1f} images/s" if report["images_made"] else ""
    print_metrics(report, f"{path}: {made}{rate}")


def write_sweep(folder: Path, reports: list[dict[str, Any]]) -> None:
    """sweep.json, sweep.md and sweep.png: a row, a point for each guidance and number of steps."""
    # Metrics that at least one point has
    names = [
        name
        for name in reports[0]["metrics"]
        if any(report["metrics"][name] is not None for report in reports)
    ]
    rows = []
    for report in reports:
        row = {name: report["sampling"][name] for name in ("steps", "guidance")}
        row |= {name: report["metrics"][name] for name in names}
        rows.append(row | {"images_per_second": report["images_per_second"]})
    # The same as json, as a Markdown table and, of the first metric, as a chart
    write_json({"rows": rows}, folder / "sweep.json")
    cells = [["" if value is None else f"{value:.6g}" for value in row.values()] for row in rows]
    lines = [[*rows[0]], ["---"] * len(rows[0]), *cells]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text(table, folder / "sweep.md")
    print(table, end="")
    if names:
        save_chart(rows, names[0], folder / "sweep.png")
    print(f"{folder}: sweep.json, sweep.md{', sweep.png' if names else ''} written")


def save_chart(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """A metric over guidance, a curve for each number of steps."""
    from eval.charts import save_lines  # matplotlib is needed for charts only

    curves: dict[str, list] = {}
    for row in rows:
        if row[metric] is not None:
            points = curves.setdefault(f"{row['steps']} steps", [])
            points.append((row["guidance"], row[metric]))
    save_lines(curves, "guidance", metric, path)


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
