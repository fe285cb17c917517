"""Captions of images against references: BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE and the share of exact matches.

    python -m eval.captions RUN DATA [DATA ...] [--guidance 1,1.5,2] [--steps 5,20]

RUN is an experiment or its stage-3 run, from image to text or joint; EMA weights. DATA: folders or image shards whose
samples have one or several references (--caption-keys), or one .jsonl with a line {"image": FILE, "captions": [...]}
each, FILE relative to it. Every image counts: one that is unreadable or has no reference stops it.
Writes one json: protocol, model, versions, and the metrics at each steps and guidance. Also those of what the text
decoder reads in z_I itself, without any flow. What can't run is null with the reason (eval/caption_metrics.py).
"""

import argparse
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import exit_on_error
from data.bad_samples import BadSample
from data.captions import captions_of, check_caption_keys, clean_caption, strings
from data.entries import Entry, clean_key, load_json, read_parts
from eval.caption_metrics import PACKAGE, CaptionScorer
from eval.captioning import BACKGROUND
from eval.images import RESIZE_RULE, ImageSet, image_name, iterate_images, list_images
from eval.json_report import device_name, package_version, package_versions
from eval.options import numbers
from modeling.flow import check_guidance
from modeling.pipeline import Captioner, SamplingConfig, join_punctuation
from training.files import check_writable, write_json
from training.loading import captioning_run, fingerprint, load_captioner, load_newest

REPORT = "captions.json"
NUM_EXAMPLES = 20
COLUMNS = ("steps", "guidance", "exact_match", "bleu_4", "meteor", "rouge_l", "cider", "spice")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="experiment folder, or a stage-3 run folder"
    )
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="folders, image shards, or one .jsonl"
    )
    parser.add_argument(
        "--caption-keys",
        nargs="+",
        metavar="KEY",
        default=["json:captions", "txt", "json:caption"],
        help="where a sample's references lie, tried in order: an extension, or json:field",
    )
    parser.add_argument(
        "--guidance", type=numbers(float), metavar="LIST", help="as in 1,1.5,2; default: the run's"
    )
    parser.add_argument(
        "--steps", type=numbers(int), metavar="LIST", help="as in 5,20; default: the run's"
    )
    parser.add_argument(
        "--output", type=Path, help=f"default: {REPORT} in the stage-3 run's folder"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_intermixed_args(arguments)


def list_references(
    data: Sequence[str], keys: Sequence[str]
) -> tuple[list[Entry], list[list[str]]]:
    """Images and the references of each.

    Raises:
        ValueError: no such file, no image, or one without a reference; names it.
    """
    check_caption_keys(keys, "--caption-keys")
    if any(name.endswith(".jsonl") for name in data):
        if len(data) > 1:
            raise ValueError(
                f"DATA is one .jsonl or several folders and shards, got {' '.join(data)}"
            )
        return read_jsonl(Path(data[0]))
    entries = list_images(data)
    return entries, [references_of(entry, keys) for entry in entries]


def references_of(entry: Entry, keys: Sequence[str]) -> list[str]:
    """All references of a sample.

    Raises:
        ValueError: none.
    """
    try:
        references = captions_of(read_parts(entry), keys)
    except BadSample as error:
        raise ValueError(f"{image_name(entry)}: {error.reason}") from error
    if not references:
        raise ValueError(
            f"{image_name(entry)} has no reference under {', '.join(keys)} (--caption-keys)"
        )
    return references


def read_jsonl(path: Path) -> tuple[list[Entry], list[list[str]]]:
    """Images and references of lines {"image": FILE, "captions": [...]}; a single one may be under "caption".

    Raises:
        ValueError: no file, or a line of another form; names it.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    entries, references = [], []
    for number, line in enumerate(
        path.read_text(encoding="utf-8-sig").split("\n"), start=1
    ):  # not at U+2028
        if not line.strip():
            continue
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


def encode(parts: Captioner, entries: Sequence[Entry], args: argparse.Namespace) -> Tensor:
    """Starts of the flow of all images, N x K x C on the CPU.

    Raises:
        ValueError: an image that cannot be read.
    """
    images = ImageSet(entries, parts.tokenizer.config.image_size, (), BACKGROUND)
    starts = []
    for batch in iterate_images(images, args.batch_size, args.num_workers):
        for name, reason in batch["skipped"]:
            raise ValueError(f"{name} cannot be measured: {reason}")
        starts.append(parts.source(batch["image"].float() / 255).cpu())
    return torch.cat(starts)


def exact_match(
    parts: Captioner, captions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """Share in percent of captions that are one of their references, as the tokenizer spells (and cuts) it."""

    def spelled(texts: Sequence[str]) -> list[str]:
        return [join_punctuation(parts.tokenize.decode(ids)) for ids in parts.tokenize(list(texts))]

    hits = [caption in spelled(texts) for caption, texts in zip(captions, references, strict=True)]
    return 100 * sum(hits) / len(hits)


def java_version() -> str | None:
    """First line of `java -version`, or None."""
    if shutil.which("java") is None:
        return None
    lines = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()
    return next((line for line in lines if "version" in line), None)


def describe(
    args: argparse.Namespace,
    parts: Captioner,
    checkpoint: Path,
    scorer: CaptionScorer,
    sampling: SamplingConfig,
) -> dict:
    """Protocol, model and versions: what the numbers depend on."""
    counts = [len(texts) for texts in scorer.references.values()]
    return {
        "protocol": {
            "data": args.data,
            "num_images": len(counts),
            "references_per_image": {
                "min": min(counts),
                "max": max(counts),
                "mean": sum(counts) / len(counts),
            },
            "caption_keys": args.caption_keys,
            "resize": RESIZE_RULE,
            "sampling": asdict(sampling),
            "tokenizer": scorer.tokenizer,
            "tokenizer_reason": scorer.tokenizer_reason,
        },
        "model": {
            "run": str(args.run),
            "checkpoint": f"{captioning_run(args.run).name}/{checkpoint.name}",
            "flow_fingerprint": fingerprint(parts.flow),
            "text_decoder_fingerprint": fingerprint(parts.decoder),
            "tokenizer_fingerprint": fingerprint(parts.tokenizer),
        },
        "versions": package_versions()
        | {PACKAGE: package_version(PACKAGE), "java": java_version()},
        "device": device_name(parts.device),
    }


def main(args: argparse.Namespace) -> None:
    """Read, caption, measure, write, print."""
    if args.batch_size < 1 or args.num_workers < 0:
        raise ValueError(
            f"--batch-size {args.batch_size} must be at least 1, --num-workers {args.num_workers} at least 0"
        )
    entries, references = list_references(args.data, args.caption_keys)
    run = captioning_run(args.run)
    path = args.output or run / REPORT
    check_writable(path)
    (parts, default), checkpoint = load_newest(
        run, lambda: load_captioner(args.run, torch.device(args.device))
    )
    pairs = product(args.steps or [default.steps], args.guidance or [default.guidance])
    points = [replace(default, steps=steps, guidance=guidance) for steps, guidance in pairs]
    for point in points:
        check_guidance(point.guidance, parts.flow.null_probability)
    scorer = CaptionScorer(references)
    starts = encode(parts, entries, args).split(args.batch_size)

    def measure(latents_of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        captions = [
            text for start in starts for text in parts.read(latents_of(start.to(parts.device)))
        ]
        shown = zip(entries, captions, references, strict=True)
        return {
            "exact_match": exact_match(parts, captions, references),
            **scorer.score(captions),
            "examples": [
                {"image": image_name(entry), "caption": text, "references": texts}
                for entry, text, texts in shown
            ][:NUM_EXAMPLES],
        }

    report = describe(args, parts, checkpoint, scorer, default)
    report["results"] = [
        {"steps": point.steps, "guidance": point.guidance}
        | measure(lambda start, point=point: parts.transport(start, point))
        for point in points
    ]
    report["without_flow"] = measure(lambda start: start)
    write_json(report, path)
    print_report(report, path)


def print_report(report: dict, path: Path) -> None:
    """A table, why what is null is null, and where the json lies."""
    print("  ".join(name.rjust(11) for name in COLUMNS))
    for row in [*report["results"], {"steps": 0, "guidance": "no flow"} | report["without_flow"]]:
        cells = (
            f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name])
            for name in COLUMNS
        )
        print("  ".join(cell.rjust(11) for cell in cells))
    if report["protocol"]["tokenizer_reason"]:
        print(
            f"tokenizer: {report['protocol']['tokenizer']}: {report['protocol']['tokenizer_reason']}"
        )
    for name, reason in report["without_flow"]["reasons"].items():
        print(f"{name}: null: {reason}")
    print(f"{path}: {report['protocol']['num_images']} images")


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
