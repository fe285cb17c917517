"""Captions of images against references: BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE, exact matches.

    python -m eval.captions RUN DATA [DATA ...] [--guidance 1,1.5,2] [--steps 5,20]

RUN is an experiment or its stage-3 run from image to text; EMA weights. DATA: folders or image
shards whose samples have one or several references (--caption-keys), or one .jsonl with a line
{"image": FILE, "captions": [...]} each, FILE relative to it. Every image counts: one that is
unreadable or has no reference is an error. Writes one json: protocol, model, versions, and the
metrics at each number of steps and guidance, also those without the flow, of what the text decoder
reads in z_I itself. What can't run is null, with the reason (eval/caption_scores.py).
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

# Run as a file, Python looks into eval/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.captions import check_caption_keys, clean_caption, strings
from data.entries import Entry, clean_key, load_json
from data.files import check_writable, read_text_file, user_path, write_json
from eval.caption_scores import PACKAGE, CaptionScorer
from eval.images import RULES, ImageSet, entry_captions, image_name, iterate_images, list_images
from eval.programs import (
    add_reading_options,
    add_sweep_options,
    build_parser,
    describe_environment,
    package_version,
    start_processes,
)
from modeling.flow import check_guidance
from modeling.layers import fingerprint
from modeling.pipeline import Captioner, SamplingConfig, join_punctuation
from training.errors import exit_on_error
from training.loading import load_newest
from training.pipelines import captioning_run, load_captioner

REPORT = "captions.json"
NUM_EXAMPLES = 20
COLUMNS = ("steps", "guidance", "exact_match", "bleu_4", "meteor", "rouge_l", "cider", "spice")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = build_parser(__doc__)
    help_text = "experiment folder, or a stage-3 run folder"
    parser.add_argument("run", type=user_path, metavar="RUN", help=help_text)
    help_text = "folders, image shards, or one .jsonl"
    parser.add_argument("data", nargs="+", metavar="DATA", help=help_text)
    help_text = "where a sample's references lie, tried in order: an extension, or json:field"
    keys = ["json:captions", "txt", "json:caption"]
    parser.add_argument("--caption-keys", nargs="+", metavar="KEY", default=keys, help=help_text)
    help_text = f"default: {REPORT} in the stage-3 run's folder"
    parser.add_argument("--output", type=user_path, help=help_text)
    add_sweep_options(parser)
    add_reading_options(parser, 64, "images at a time")
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Read, caption, score, write, print."""
    # What needs no network is checked first
    entries, references = list_references(args.data, args.caption_keys)
    run = captioning_run(args.run)
    path = args.output or run / REPORT
    check_writable(path)
    state = start_processes(args.device)
    (captioner, default), checkpoint = load_newest(
        run, lambda: load_captioner(args.run, state.device)
    )
    pairs = product(args.steps or [default.steps], args.guidance or [default.guidance])
    points = [replace(default, steps=steps, guidance=guidance) for steps, guidance in pairs]
    for point in points:
        check_guidance(point.guidance, captioner.flow.config.null_probability)

    # Where the flow starts is the same at each point; None: the text decoder reads z_I itself
    scorer = CaptionScorer(references)
    starts = encode(captioner, entries, args).split(args.batch_size)
    results = []
    for point in [*points, None]:
        captions = []
        for start in starts:
            latents = start.to(captioner.device)
            captions += captioner.read(captioner.transport(latents, point) if point else latents)
        result = {"steps": point.steps, "guidance": point.guidance} if point else {}
        result["exact_match"] = exact_match(captioner, captions, references)
        result |= scorer.score(captions)
        shown = list(zip(entries, captions, references, strict=True))[:NUM_EXAMPLES]
        result["examples"] = [
            {"image": image_name(entry), "caption": caption, "references": texts}
            for entry, caption, texts in shown
        ]
        results.append(result)

    report = {
        "protocol": describe_protocol(args, scorer, default),
        "model": {
            "run": str(args.run),
            "checkpoint": f"{run.name}/{checkpoint.name}",
            "flow_fingerprint": fingerprint(captioner.flow),
            "text_decoder_fingerprint": fingerprint(captioner.decoder),
            "tokenizer_fingerprint": fingerprint(captioner.tokenizer),
        },
        **describe_versions(state),
        "results": results[:-1],
        "without_flow": results[-1],
    }
    write_json(report, path)
    print_report(report, path)


def list_references(
    data: Sequence[str], keys: Sequence[str]
) -> tuple[list[Entry], list[list[str]]]:
    """Images and the references of each; ValueError naming one without, or what is not there."""
    check_caption_keys(keys, "--caption-keys")
    if any(name.endswith(".jsonl") for name in data):
        if len(data) > 1:
            raise ValueError(f"DATA is one .jsonl, or folders and shards, got {' '.join(data)}")
        return read_jsonl(Path(data[0]))
    entries = list_images(data)
    return entries, [entry_captions(entry, keys, "--caption-keys") for entry in entries]


def read_jsonl(path: Path) -> tuple[list[Entry], list[list[str]]]:
    """Images and references of lines {"image": FILE, "captions": [...]}, or one at "caption".

    Raises:
        ValueError: no file, or a line of another form; names it.
    """
    entries, references = [], []
    # splitlines would also cut at U+2028
    lines = read_text_file(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        # Form, references, file
        row = load_json(line)
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise ValueError(f'{path} line {number}: expected {{"image": FILE, "captions": [...]}}')
        texts = map(clean_caption, strings(row.get("captions")) or strings(row.get("caption")))
        references.append([text for text in texts if text])
        if not references[-1]:
            raise ValueError(f"{path} line {number}: no reference under captions or caption")
        file = path.parent / row["image"]
        if not file.is_file():
            raise ValueError(f"{path} line {number}: {file} does not exist")
        entries.append(Entry(clean_key(row["image"]), str(file), captions=[]))
    if not entries:
        raise ValueError(f"{path} has no line with an image")
    return entries, references


def encode(captioner: Captioner, entries: Sequence[Entry], args: argparse.Namespace) -> Tensor:
    """Starts of the flow of all images, N x K x C on the CPU; ValueError if one is unreadable."""
    images = ImageSet(entries, captioner.tokenizer.config.image_size)
    starts = []
    for batch in iterate_images(images, args.batch_size, args.num_workers):
        for name, reason in batch["skipped"]:
            raise ValueError(f"{name} cannot be measured: {reason}")
        starts.append(captioner.start(batch["image"].float() / 255).cpu())
    return torch.cat(starts)


def exact_match(
    captioner: Captioner, captions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """Percent of captions that are one of their references, as the tokenizer spells and cuts it."""
    tokenize, hits = captioner.tokenize, 0
    for caption, texts in zip(captions, references, strict=True):
        hits += caption in [join_punctuation(tokenize.decode(ids)) for ids in tokenize([*texts])]
    return 100 * hits / len(captions)


def describe_protocol(
    args: argparse.Namespace, scorer: CaptionScorer, sampling: SamplingConfig
) -> dict[str, Any]:
    """What the numbers depend on, beside the model."""
    counts = [len(texts) for texts in scorer.references.values()]
    mean = sum(counts) / len(counts)
    return {
        "data": args.data,
        "num_images": len(counts),
        "references_per_image": {"min": min(counts), "max": max(counts), "mean": mean},
        "caption_keys": args.caption_keys,
        "resize": RULES["crop"],
        "sampling": asdict(sampling),
        "tokenizer": scorer.tokenizer,
        "tokenizer_reason": scorer.tokenizer_reason,
    }


def describe_versions(state: PartialState) -> dict[str, Any]:
    """Versions and device, with the metrics' package and Java."""
    found, java = describe_environment(state), None
    if shutil.which("java"):
        said = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
        java = next((line for line in said.splitlines() if "version" in line), None)
    found["versions"] |= {PACKAGE: package_version(PACKAGE), "java": java}
    return found


def print_report(report: dict, path: Path) -> None:
    """A table, why what is null is null, and where the json lies."""
    # A row a point
    print("  ".join(name.rjust(11) for name in COLUMNS))
    without_flow = {"steps": 0, "guidance": "no flow", **report["without_flow"]}
    for row in [*report["results"], without_flow]:
        values = [row[name] for name in COLUMNS]
        cells = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
        print("  ".join(cell.rjust(11) for cell in cells))
    protocol = report["protocol"]
    if protocol["tokenizer_reason"]:
        print(f"tokenizer: {protocol['tokenizer']}: {protocol['tokenizer_reason']}")
    for name, reason in without_flow["reasons"].items():
        print(f"{name}: null: {reason}")
    print(f"{path}: {protocol['num_images']} images")


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
