"""Captions of images against references: BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE, exact matches.

    python -m eval.captions RUN DATA [DATA ...] [--guidance 1,1.5,2] [--steps 5,20]

RUN is an experiment or its stage-3 run from image to text; EMA weights. DATA: folders or image
shards whose samples have one or several references (--caption-keys). Every image counts: one that
is unreadable or has no reference is an error. Writes one json: protocol, model, versions, and the
metrics at each number of steps and guidance, also those without the flow, of what the text decoder
reads in z_I itself.

Scores are pycocoevalcap's, times 100, as papers print them. Published numbers need Java: for the
PTB tokenizer, METEOR and SPICE. Without it, captions are tokenized by a regular expression, which
gives other numbers (the json says which tokenizer it was), and METEOR and SPICE are null with the
reason. SPICE also needs Stanford's CoreNLP 3.6.0 models, which its package does not have and
nothing here downloads. CIDEr weighs words by how rare they are in the given references: only
numbers on the same set can be compared.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from shutil import which
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor

from data.captions import check_caption_keys
from data.entries import Entry
from data.files import user_path, write_json
from eval import programs
from eval.images import RULES, ImageSet, entry_captions, image_name, iterate_images, list_images
from modeling.layers import fingerprint
from modeling.pipeline import Captioner, SamplingConfig, join_punctuation
from training.errors import exit_on_error
from training.loading import load_newest
from training.pipelines import captioning_run, load_captioner

REPORT = "captions.json"
NUM_EXAMPLES = 20
PTB, SIMPLE = "PTB (Stanford CoreNLP 3.4.1)", "regular expression (not that of published numbers)"
WORD = re.compile(r"\w+(?:['-]\w+)*")
SCORERS = {  # of pycocoevalcap: module and class; each scores the whole set
    "bleu_4": ("bleu.bleu", "Bleu"),
    "meteor": ("meteor.meteor", "Meteor"),
    "rouge_l": ("rouge.rouge", "Rouge"),
    "cider": ("cider.cider", "Cider"),
    "spice": ("spice.spice", "Spice"),
}
COLUMNS = ("steps", "guidance", "exact_match", *SCORERS)
PACKAGE = "pycocoevalcap"
NO_JAVA = "there is no Java on this machine"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
FETCH_MODELS = (
    "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()"
)

Texts = dict[int, list[str]]  # of each image, tokens with spaces between


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = programs.build_parser(__doc__)
    add = parser.add_argument
    keys = ["json:captions", "txt", "json:caption"]
    add("run", type=user_path, metavar="RUN", help="experiment folder, or a stage-3 run folder")
    add("data", nargs="+", metavar="DATA", help="folders or image shards")
    help_text = "where a sample's references lie, tried in order: an extension, or json:field"
    add("--caption-keys", nargs="+", metavar="KEY", default=keys, help=help_text)
    add("--output", type=user_path, help=f"default: {REPORT} in the stage-3 run's folder")
    programs.add_sweep_options(parser)
    programs.add_reading_options(parser, 64, "images at a time")
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> None:
    # What needs no network is checked first
    keys = args.caption_keys
    check_caption_keys(keys, "--caption-keys")
    entries = list_images(args.data)
    references = [entry_captions(entry, keys, "--caption-keys") for entry in entries]
    run = captioning_run(args.run)
    path = args.output or run / REPORT
    programs.check_report(path, args.data)
    state = programs.start_processes(args.device)
    (captioner, default), checkpoint = load_newest(
        run, lambda: load_captioner(args.run, state.device)
    )
    pairs = product(args.steps or [None], args.guidance or [None])
    points = [default.but(steps=steps, guidance=guidance) for steps, guidance in pairs]
    for point in points:
        point.check_flow(captioner.flow.config)

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
        **programs.describe_environment(state, [PACKAGE]),
        "results": results[:-1],
        "without_flow": results[-1],
    }
    write_json(report, path)
    print_report(report, path)


def encode(captioner: Captioner, entries: Sequence[Entry], args: argparse.Namespace) -> Tensor:
    """Starts of the flow of all images, N x K x C on the CPU; ValueError if one is unreadable."""
    # Encoded once for all points of the sweep: the tokenizer is most of the work
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
    # References go through the tokenizer, as what the decoder writes has: lower case, cut
    tokenize, hits = captioner.tokenize, 0
    for caption, texts in zip(captions, references, strict=True):
        hits += caption in [join_punctuation(tokenize.decode(ids)) for ids in tokenize([*texts])]
    return 100 * hits / len(captions)


def describe_protocol(
    args: argparse.Namespace, scorer: "CaptionScorer", sampling: SamplingConfig
) -> dict[str, Any]:
    """What the numbers depend on, beside the model."""
    # More references give higher scores
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


def print_report(report: dict, path: Path) -> None:
    """A row a point, why what is null is null, and where the json lies."""
    print("  ".join(name.rjust(11) for name in COLUMNS))
    without_flow = {"steps": 0, "guidance": "no flow", **report["without_flow"]}
    # In a console's width: captions themselves are in the json
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


# The scores


class CaptionScorer:
    """Scores captions of some images against the same references again and again.

    `tokenizer` says how texts are split, `tokenizer_reason` why not by PTB.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        try:
            self.references = ptb_tokens(references)
            self.tokenizer, self.tokenizer_reason = PTB, None
        except (OSError, ValueError) as error:
            self.references = simple_tokens(references)
            self.tokenizer, self.tokenizer_reason = SIMPLE, str(error)

    def score(self, captions: Sequence[str]) -> dict[str, Any]:
        """{"bleu_4" ... "spice": number or None, "reasons": {name: why}} of a caption an image."""
        tokens = ptb_tokens if self.tokenizer == PTB else simple_tokens
        texts = tokens([[caption] for caption in captions])
        scores: dict[str, Any] = dict.fromkeys(SCORERS) | {"reasons": {}}
        for name in SCORERS:
            try:
                scores[name] = 100 * score_texts(name, self.references, texts)
            except (OSError, ValueError, CalledProcessError) as error:
                scores["reasons"][name] = str(error) or type(error).__name__
        return scores


def score_texts(name: str, references: Texts, texts: Texts) -> float:
    """One metric of the captions; ValueError: it can't run here, and why."""
    folder = package_folder(needs_java=name in ("meteor", "spice"))
    absent = [file for file in SPICE_MODELS if not (folder / "spice" / "lib" / file).is_file()]
    if name == "spice" and absent:
        files = " and ".join(absent)
        raise ValueError(f'{files} not in {PACKAGE}; to fetch: python -c "{FETCH_MODELS}"')
    module, kind = SCORERS[name]
    scorer = getattr(import_module(f"{PACKAGE}.{module}"), kind)()
    # BLEU gives a list, of 1- to 4-grams
    if name == "bleu_4":
        return float(scorer.compute_score(references, texts, verbose=0)[0][3])
    return float(scorer.compute_score(references, texts)[0])


def package_folder(needs_java: bool) -> Path:
    """Where pycocoevalcap is; ValueError without it, or without Java where it is needed."""
    # Without Java the package's own error would be a FileNotFoundError of "java"
    spec = find_spec(PACKAGE)
    if spec is None:
        raise ValueError(f"{PACKAGE} is not installed: {programs.INSTALL}")
    if needs_java and which("java") is None:
        raise ValueError(NO_JAVA)
    return Path(next(iter(spec.submodule_search_locations)))


def ptb_tokens(texts: Sequence[Sequence[str]]) -> Texts:
    """Texts of each image, split as the COCO caption evaluation does, without punctuation.

    ValueError, OSError: it can't run, and why.
    """
    package_folder(needs_java=True)
    tokenizer = import_module(f"{PACKAGE}.tokenizer.ptbtokenizer").PTBTokenizer()
    # One text a line
    lines = {
        index: [{"caption": " ".join(text.split())} for text in group]
        for index, group in enumerate(texts)
    }
    found = tokenizer.tokenize(lines)
    if [len(found.get(index, [])) for index in lines] != [*map(len, texts)]:
        raise ValueError("the PTB tokenizer did not give a line for each text")
    return found


def simple_tokens(texts: Sequence[Sequence[str]]) -> Texts:
    return {
        index: [" ".join(WORD.findall(text.lower())) for text in group]
        for index, group in enumerate(texts)
    }


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
