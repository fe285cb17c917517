"""What a text-to-image flow makes of a tokenizer's latents: equal rFID is not equal generation.

    python -m eval.tokenizer_probe runs/scenes
    python -m eval.tokenizer_probe RUN RUN --experiment probe_256 --data DIR \\
        --heldout 'DIR/val-*.tar' --protocol coco30k

RUN is an experiment with a tokenizer, or the tokenizer's run. Each tokenizer gets (a) a ridge
regression from text states to latents: of held-out images the share of the latents' variance that
it explains (R2), and how often an image's own latents are the nearest to what it says of the
caption, or among the five nearest; (b) a small flow of fixed size and work, of the stages tokens
and flowtok of the experiment, which resume where they were stopped; its images are judged by
eval.scenes where the data are scenes, or by a protocol of eval.generation. Writes RUN/probe, with
probe.json. For rFID and PSNR: eval.reconstruction.
"""

import argparse
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import integer, user_path, write_json
from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, token_reader
from data.tar import expand_shards
from eval import generation, programs, scenes
from eval.report import BATCH_SIZE, encode, encode_texts, join_batches
from eval.scores import retrieval
from modeling.pipeline import Generator
from training.errors import ROOT, exit_on_error
from training.loading import read_section
from training.pipelines import load_generator
from training.ridge import STRENGTHS, fit_ridges

REPORT = "probe.json"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = programs.build_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="experiment, or tokenizer's run")
    add("--experiment", default="probe_scenes", help="of configs/; default: %(default)s")
    add("--data", type=user_path, metavar="DIR", help="what it reads; default: scenes in RUN")
    add("--heldout", nargs="+", metavar="SHARDS", help="images; default: new-*.tar in DIR")
    add("--protocol", help="of eval.generation; default: the data are scenes")
    help_text = "that the regression is fitted on, and at most as many held-out ones"
    add("--num-images", type=integer(2), default=3000, help=help_text)
    add("--captions", type=integer(1), default=128, help="of each split of scenes")
    programs.add_device_option(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Probe one tokenizer after the other, then print them side by side."""
    # What is absent, or would be replaced, is named before any work
    todo = []
    for run in args.runs:
        data = args.data or run / "scenes"
        heldout = args.heldout or [f"{data}/new-*.tar"]
        expand_shards(heldout)
        programs.check_report(run / "probe" / REPORT, [str(data), *heldout])
        todo.append((run, data, heldout))
    reports = {str(run): probe(args, run, data, heldout) for run, data, heldout in todo}
    print(side_by_side(reports), end="")


def side_by_side(reports: dict[str, dict[str, float]]) -> str:
    """A row for each tokenizer; nothing where a protocol had no number for one of them."""
    names = dict.fromkeys(name for report in reports.values() for name in report)
    rows = []
    for run, report in reports.items():
        cells = [f"{report[name]:.3f}" if name in report else "" for name in names]
        rows.append([run, *cells])
    return programs.markdown_table([["tokenizer", *names], *rows])


def probe(args: argparse.Namespace, run: Path, data: Path, heldout: list[str]) -> dict[str, float]:
    """All figures of one tokenizer, written to its probe.json too."""
    folder = (run / "probe").absolute()
    tokenizer = programs.stage_run(run, "tokenizer")
    train_flow(args.experiment, folder, tokenizer.absolute(), data.absolute())
    generator, _ = load_generator(folder, programs.start_processes(args.device).device)
    latents = read_latents(args, generator, folder, tokenizer, heldout)
    figures = probe_by_ridge(*latents) | judge_flow(args, folder, data)
    write_json(figures | {"protocol": {"data": [str(data), *heldout]}}, folder / REPORT)
    print(f"{folder / REPORT}: written", flush=True)
    return figures


def train_flow(experiment: str, folder: Path, tokenizer: Path, data: Path) -> None:
    """Run the stages of the experiment, or what is left of them.

    SystemExit: with the status of a stage that did not end well.
    """
    # What is done already says so and ends; the rest resumes
    command = [sys.executable, "-m", "scripts.run_experiment", experiment]
    command += [f"experiment_dir={folder}", f"tokenizer_run={tokenizer}", f"data_dir={data}"]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


Captioned = tuple[Tensor, Tensor]  # text states N x L x T, latent means N x K x C


def read_latents(
    args: argparse.Namespace,
    generator: Generator,
    folder: Path,
    tokenizer: Path,
    heldout: list[str],
) -> tuple[Captioned, Captioned]:
    """Of the first training images, as stored, and of held-out ones, in the flow's scale."""
    # The scale of the flow, so that the latents of all tokenizers have deviation 1
    config, scale = generator.tokenizer.config, generator.flow.latent_scale.cpu()
    stored = TokenTextConfig(shards=[f"{folder}/tokens/*.tar"])
    reader = token_reader(stored, config.num_tokens, config.token_channels, None)
    captions, latents = join_batches(reader.once(BATCH_SIZE, limit=args.num_images), "latent_mean")
    train = encode_texts(generator, captions), latents * scale

    images = image_reader(read_section(tokenizer, "data", ImageTextConfig), config.image_size, None)
    captions, pixels = join_batches(images.once(BATCH_SIZE, heldout, args.num_images), "image")
    latents = encode(generator, pixels.float() / 255) * scale
    return train, (encode_texts(generator, captions), latents)


def probe_by_ridge(train: Captioned, heldout: Captioned) -> dict[str, float]:
    """R2 and retrieval of held-out latents by regressions on text states."""
    # Least error asks for more strength than retrieval does; both are chosen on training images.
    fits = fit_ridges(*train, [*STRENGTHS, 10.0, 100.0])
    exact = min(fits, key=attrgetter("error"))
    telling = max(fits, key=attrgetter("top5"))
    states, true = heldout
    numbers = torch.arange(len(true))
    found = retrieval(telling(states), true, numbers, numbers)
    r2 = explained(exact(states), true, exact.latent_mean)
    return {"ridge_r2": r2, "ridge_top1": found["top1"], "ridge_top5": found["top5"]}


def explained(predicted: Tensor, true: Tensor, mean: Tensor) -> float:
    """R2: share of the squared distance from the training mean, N x K x C and K x C."""
    return 1 - ((predicted - true).square().sum() / (true - mean).square().sum()).item()


def judge_flow(args: argparse.Namespace, folder: Path, data: Path) -> dict[str, float]:
    """Of the flow's images: shares with all right for each split, or a protocol's metrics."""
    # As their command lines would, so that the figures are theirs
    common = ["--device", args.device]
    if args.protocol:
        words = [str(folder), "--protocol", args.protocol, *common]
        [report] = generation.main(generation.parse_args(words))
        return {name: value for name, value in report["metrics"].items() if value is not None}
    common += ["--data", str(data), "--captions", str(args.captions)]
    rows: list[dict[str, Any]] = scenes.main(scenes.parse_args(["--run", str(folder), *common]))
    judged = [row for row in rows if row["images"] in ("reconstructed", "generated")]
    return {f"{row['images']}_{row['split']}": row["all"] for row in judged}


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
