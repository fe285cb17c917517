"""FID and other numbers of the images that a run makes from captions, by a written protocol.

    python -m eval.generation runs/emoji --protocol emoji
    accelerate launch --multi_gpu --num_processes 8 --module eval.generation RUN \\
        --protocol coco30k captions=[captions_val2014.json] reference=[coco.npz]
    python -m eval.generation RUN --protocol FILE.yaml --guidance 1,1.5,2,3 --steps 10,20,50

RUN is an experiment or its stage-3 run; EMA weights. A protocol is a YAML (eval/protocol.py);
key=value changes it. An image does not depend on --batch-size or the number of processes. The same
command continues an interrupted evaluation. Writes images, features and evaluation.json; with
several values of guidance or steps, a folder for each, a table and a chart. FlowEvaluation gives
the same numbers while stage 3 trains.
"""

import argparse
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from configs.load import load_dataclass
from data.files import check_writable, user_path, write_json, write_text
from eval import programs
from eval.curves import check_matplotlib, save_lines
from eval.evaluation import REPORT, EvaluationSetup, evaluate_images
from eval.feature_nets import load_networks
from eval.features import load_reference
from eval.images import Reading
from eval.protocol import Protocol, protocol_file, read_captions
from modeling.flow_model import FlowModel
from modeling.layers import check_least, fingerprint
from modeling.pipeline import Generator, ImageGenerator, SamplingConfig
from modeling.published import file_sha256
from modeling.text_encoder import TextEncoderConfig, load_text_encoder
from training.checkpoint import EMA_FILE
from training.errors import exit_on_error
from training.loading import load_newest, load_tokenizer
from training.pipelines import flow_folder, load_pipeline, network_of

NUM_WORKERS = 2  # reading processes of each process, in training


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = programs.build_parser(__doc__)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="experiment folder, or a stage-3 run folder")
    add("overrides", nargs="*", metavar="key=value", help="changes of the protocol")
    add("--protocol", required=True, help="a YAML, or a name: coco30k, mjhq30k, emoji, geneval")
    add("--output", type=user_path, help="folder; default: evaluation/PROTOCOL in RUN")
    add("--dinov2-weights", metavar="FILE", help="ViT-L/14, for features=dinov2")
    programs.add_sweep_options(parser)
    programs.add_reading_options(parser, 64, "images that a feature network sees at once")
    programs.add_weights_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check everything, then evaluate each point of the sweep; the reports, of the main process."""
    # What needs no network is checked first
    protocol = load_dataclass(Protocol, protocol_file(args.protocol), args.overrides)
    captions = read_captions(protocol)
    points = [
        replace(protocol, guidance=guidance, steps=steps)
        for steps in args.steps or [protocol.steps]
        for guidance in args.guidance or [protocol.guidance]
    ]
    if len(points) > 1:
        check_matplotlib()
    output = args.output or args.run / "evaluation" / Path(args.protocol).stem
    state = programs.start_processes(args.device)
    check_writable(output / REPORT)

    # The run: all processes must have the same checkpoint, though training may go on meanwhile
    (generator, default), checkpoint = load_newest(
        flow_folder(args.run), lambda: load_pipeline(args.run, state.device)
    )
    model = describe_model(checkpoint, generator)
    programs.check_same(args.run, model["flow_fingerprint"])
    for point in points:
        sampling = point.sampling(default)
        sampling.check_flow(generator.flow.config)
        sampling.check_images("images_per_caption", protocol.images_per_caption)

    # What the images are measured with
    reading = Reading(args.batch_size, args.num_workers, state)
    paths = {"inception": args.inception_weights, "dinov2": args.dinov2_weights}
    networks = load_networks(protocol, generator, paths, args.download)
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

    # A folder for each point of a sweep
    reports = []
    for point in points:
        sampling = point.sampling(default)
        name = f"guidance_{sampling.guidance:g}_steps_{sampling.steps}"
        folder = output / name if len(points) > 1 else output
        report = evaluate_images(setup, point, folder)
        reports.append(report)
        if state.is_main_process:
            made = f"{report['num_images']} images, {report['images_made']} made now"
            rate = f", {report['images_per_second']:.1f} images/s" if report["images_made"] else ""
            programs.print_metrics(report, f"{folder / REPORT}: {made}{rate}")
    if len(points) > 1 and state.is_main_process:
        write_sweep(output, reports)
    return reports


def describe_model(checkpoint: Path, generator: Generator) -> dict[str, Any]:
    """Which weights make the images; read at once, because training may remove the checkpoint."""
    return {
        "checkpoint": checkpoint.name,
        "ema_sha256": file_sha256(checkpoint / EMA_FILE),
        "flow_fingerprint": fingerprint(network_of(generator)),
        "tokenizer_fingerprint": fingerprint(generator.tokenizer),
        "text_encoder_fingerprint": generator.text_encoder.identity,
    }


def write_sweep(folder: Path, reports: list[dict[str, Any]]) -> None:
    """sweep.json, sweep.md and sweep.png: a row, a point for each guidance and number of steps."""
    # Metrics that at least one point has: a column without a number says nothing
    tables = [report["metrics"] for report in reports]
    names = [name for name in tables[0] if any(table[name] is not None for table in tables)]
    rows = []
    for report in reports:
        row = {name: report["sampling"][name] for name in ("steps", "guidance")}
        row |= {name: report["metrics"][name] for name in names}
        rows.append(row | {"images_per_second": report["images_per_second"]})
    write_json({"rows": rows}, folder / "sweep.json")
    cells = [["" if value is None else f"{value:.6g}" for value in row.values()] for row in rows]
    table = programs.markdown_table([[*rows[0]], *cells])
    write_text(table, folder / "sweep.md")
    print(table, end="")
    # The chart is of the first metric, by guidance, a line for each number of steps
    if names:
        curves: dict[str, list] = {}
        for row in rows:
            if row[names[0]] is not None:
                curve = curves.setdefault(f"{row['steps']} steps", [])
                curve.append((row["guidance"], row[names[0]]))
        save_lines(curves, "guidance", names[0], folder / "sweep.png")
    print(f"{folder}: sweep.json, sweep.md{', sweep.png' if names else ''} written")


# While stage 3 trains


@dataclass
class EvaluationConfig:
    """Generation metrics while stage 3 trains."""

    # as often, and at the end; 0: never. One evaluation must end within training.timeout_minutes
    every_steps: int = 0
    protocol: str = ""  # a name among eval/protocols, or a YAML file
    overrides: list[str] = field(default_factory=list)  # key=value: changes of the protocol
    batch_size: int = 64  # images that a feature network sees at once
    inception_weights: str = ""  # path; empty: torch's cache
    dinov2_weights: str = ""  # path of DINOv2 ViT-L/14, for features=dinov2

    def __post_init__(self):
        check_least(self, 0, "every_steps")
        check_least(self, 1, "batch_size")
        if self.every_steps and not self.protocol:
            raise ValueError("every_steps needs protocol: a name among eval/protocols, or a YAML")


@dataclass
class FlowEvaluation:
    """(EMA weights, step) -> metrics of a protocol; report and pictures: RUN/evaluation/step_*.

    All processes take part. Captions and reference are read once; networks and sums are made anew
    each time, so that nothing passes from one evaluation to the next. ValueError: captions,
    reference or weights that are absent or can't serve.
    """

    config: EvaluationConfig
    protocol: Protocol
    run_dir: Path
    tokenizer_run: str
    text_encoder: TextEncoderConfig
    sampling: SamplingConfig

    def __post_init__(self):
        config, protocol = self.config, self.protocol
        self.reading = Reading(config.batch_size, NUM_WORKERS, PartialState())
        # All that can be wrong is found now, not after hours of training
        protocol.sampling(self.sampling)
        if not protocol.metrics:
            raise ValueError(f"protocol {config.protocol} measures nothing: its metrics are empty")
        self.captions, self.reference = read_captions(protocol), None
        with programs.undisturbed():
            setup = self._prepare(None, "")
            if setup.networks.absent:
                reasons = "; ".join(setup.networks.absent.values())
                raise ValueError(f"protocol {config.protocol}: {reasons}")
            net, size = setup.networks.features, protocol.feature_size(setup.image_size)
            self.reference = load_reference(protocol, self.captions, net, size, self.reading)

    def __call__(self, model: FlowModel, step: int) -> dict[str, float]:
        """{"eval/fid": ...} on the main process, {} on the others; null metrics are left out."""
        state = self.reading.state
        folder = self.run_dir / "evaluation" / f"step_{step:08d}"
        # What is there is of a killed process, or of steps that are done again: of other weights
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        state.wait_for_everyone()
        with programs.undisturbed():
            report = evaluate_images(self._prepare(model, folder.name), self.protocol, folder)
            # Of each step the numbers and a sheet stay: 30,000 images would fill the disk
            if state.is_main_process:
                for name in ("images", "features"):
                    shutil.rmtree(folder / name)
        metrics = report.get("metrics", {}).items()
        return {f"eval/{name}": value for name, value in metrics if value is not None}

    def _prepare(self, model: FlowModel | None, checkpoint: str) -> EvaluationSetup:
        """The networks, made anew, and what stays the same. Without a model it can't generate."""
        # Loaded for this evaluation only: in between, the GPU's memory is training's
        config, device = self.config, self.reading.state.device
        generator = ImageGenerator(
            text_encoder=load_text_encoder(self.text_encoder).to(device),
            tokenizer=load_tokenizer(self.tokenizer_run).to(device),
            flow=model,
        )
        paths = {"inception": config.inception_weights, "dinov2": config.dinov2_weights}
        return EvaluationSetup(
            captions=self.captions,
            generator=generator,
            default=self.sampling,
            model={"checkpoint": checkpoint},
            networks=load_networks(self.protocol, generator, paths, download=False),
            reference=self.reference,
            reading=self.reading,
        )


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
