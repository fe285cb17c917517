"""FID and other numbers of the images that a trained run makes from captions, by a written protocol.

    python -m eval.generation runs/demo --protocol demo
    accelerate launch --multi_gpu --num_processes 8 --module eval.generation RUN --protocol coco30k \
        captions=[captions_val2014.json] reference=[coco.npz]
    python -m eval.generation RUN --protocol FILE.yaml --guidance 1,1.5,2,3 --steps 10,20,50

RUN is an experiment or its stage-3 run; EMA weights. A protocol is a YAML (eval/protocol.py); key=value changes it.
Image i is a function of (seed, i), whatever --batch-size and the number of processes (eval/making.py). It costs up to
group_size - 1 images that are made and dropped in the last group, and batches of group_size. An interrupted evaluation
continues where it was. Writes images, features and evaluation.json; with several values of guidance or steps a folder
each and a table.
"""

import argparse
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from configs.cli import exit_on_error
from configs.load import load_dataclass
from eval.evaluation import REPORT, Evaluation, evaluate, load_reference, read_captions, read_inputs
from eval.networks import MeasuringConfig, load_networks
from eval.options import add_options, check_options, numbers
from eval.protocol import Protocol, protocol_file
from eval.sweep import write_sweep
from modeling.fingerprint import fingerprint
from modeling.flow import check_guidance
from modeling.pipeline import ImageGenerator
from modeling.published import file_sha256
from training.checkpoint import EMA_FILE
from training.files import check_writable
from training.loading import flow_folder, load_newest, load_pipeline
from training.run import TIMEOUT_MINUTES


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="experiment folder, or a stage-3 run folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the protocol")
    parser.add_argument(
        "--protocol", required=True, help="a YAML file, or a name: coco30k, mjhq30k, demo, geneval"
    )
    parser.add_argument("--output", type=Path, help="folder; default: evaluation/PROTOCOL in RUN")
    parser.add_argument(
        "--guidance", type=numbers(float), metavar="LIST", help="as in 1,1.5,2: one evaluation each"
    )
    parser.add_argument(
        "--steps", type=numbers(int), metavar="LIST", help="solver steps, as in 10,20,50"
    )
    parser.add_argument("--no-images", action="store_true", help="keep features only")
    parser.add_argument("--dinov2-weights", metavar="FILE", help="ViT-L/14, for features=dinov2")
    add_options(parser, 64, "images that a feature network sees at once")
    return parser.parse_intermixed_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible values before anything is loaded."""
    check_options(args)
    for name in ("guidance", "steps"):
        values = getattr(args, name) or []
        if len({*values}) != len(values):
            raise ValueError(f"--{name} names a value twice: {values}")
    if args.output and args.output.is_file():
        raise ValueError(f"--output {args.output} is a file, expected a folder")


def load_protocol(name: str, overrides: list[str]) -> Protocol:
    """A protocol's YAML with what the command line changes.

    Raises:
        ValueError: no such file, an unknown key, a wrong type, or values that do not go together.
    """
    return load_dataclass(Protocol, protocol_file(name), overrides)


def prepare(args: argparse.Namespace) -> Evaluation:
    """Read and check all inputs; what is wrong with them is said before an image is made.

    Raises:
        ValueError: anything wrong with them.
    """
    check_args(args)
    protocol = load_protocol(args.protocol, args.overrides)
    captions = read_captions(protocol)
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(minutes=TIMEOUT_MINUTES))
    torch.backends.cudnn.allow_tf32 = (
        False  # convolutions of float32 would be rounded to 10 bits on a GPU
    )
    check_writable(output_folder(args) / REPORT)
    (parts, default), checkpoint = load_newest(
        flow_folder(args.run), lambda: load_pipeline(args.run, state.device)
    )
    model = describe_model(checkpoint, parts)  # now: training may remove it
    if len({*gather_object([model["flow_fingerprint"]])}) > 1:
        raise ValueError(
            f"{args.run}: the processes loaded different checkpoints: it is being trained, start again"
        )
    for point in points(args, protocol):
        check_guidance(point.sampling(default).guidance, parts.flow.null_probability)
    inputs = read_inputs(protocol, captions, parts.tokenizer.config)
    config = MeasuringConfig(
        args.batch_size, args.num_workers, args.inception_weights or "", args.dinov2_weights or ""
    )
    networks = load_networks(
        protocol, parts.tokenizer, parts.tokenize.config, config, args.download, state
    )
    reference = load_reference(inputs, networks.extractor, config, state)
    return Evaluation(
        inputs, parts, default, networks, reference, model, config, not args.no_images, state
    )


def output_folder(args: argparse.Namespace) -> Path:
    """Where images and report go."""
    return args.output or args.run / "evaluation" / Path(args.protocol).stem


def describe_model(checkpoint: Path, parts: ImageGenerator) -> dict[str, Any]:
    """Which weights make the images."""
    return {
        "checkpoint": checkpoint.name,
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "flow_fingerprint": fingerprint(parts.flow),
        "tokenizer_fingerprint": fingerprint(parts.tokenizer),
        "text_encoder_fingerprint": fingerprint(parts.text_encoder),
    }


def points(args: argparse.Namespace, protocol: Protocol) -> list[Protocol]:
    """The protocol at each guidance and number of steps of the command line."""
    guidances, steps = args.guidance or [protocol.guidance], args.steps or [protocol.steps]
    return [
        replace(protocol, guidance=guidance, steps=number)
        for number in steps
        for guidance in guidances
    ]


def print_summary(report: dict[str, Any], path: Path) -> None:
    """What was found, in a few lines."""
    found = ", ".join(
        f"{name} {value:.4f}" for name, value in report["metrics"].items() if value is not None
    )
    rate = f", {report['images_per_second']:.1f} images/s" if report["images_made"] else ""
    print(
        f"{path}: {report['num_images']} images, {report['images_made']} made now{rate}{': ' if found else ''}{found}"
    )
    for name, reason in report["missing"].items():
        print(f"  no {name}: {reason}")


def main(args: argparse.Namespace) -> None:
    """Evaluate each point."""
    evaluation = prepare(args)
    output = output_folder(args)
    sweep = points(args, evaluation.inputs.protocol)
    reports = []
    for point in sweep:
        sampling = point.sampling(evaluation.default)
        name = f"guidance_{sampling.guidance:g}_steps_{sampling.steps}"
        folder = output / name if len(sweep) > 1 else output
        reports.append(evaluate(evaluation, point, folder))
        if evaluation.state.is_main_process:
            print_summary(reports[-1], folder / REPORT)
    if len(sweep) > 1 and evaluation.state.is_main_process:
        write_sweep(output, reports)


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
