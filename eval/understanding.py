"""What a dual tokenizer's codes keep of what its teacher sees, beside pixels and latents.

    python -m eval.understanding runs/emoji_dual --train TRAIN_SHARDS --heldout HELDOUT_SHARDS

RUN is a dual tokenizer's run folder, or an experiment with one. The teacher's own image feature is
read out of each representation: the teacher's patch features, of which the codes can keep no more
than there is, semantic codes, the features predicted from them, pixel codes, small pixels, and with
--flowtok RUN the latents of a FlowTok tokenizer. Where the teacher's feature is the mean of its
patches' (ImageTower.pools_by_mean), patch features, its own and predicted ones, are read by that
mean ("read_by": "mean"); all else by a ridge regression that is fitted on the training images. Of
the held-out images: the cosine of what is read to the teacher's feature; zero-shot retrieval, how
often the teacher's text feature of its own caption is the nearest among all different captions
(top1) or one of the five nearest (top5), and this as a share of what the teacher's own feature
reaches, with its standard error. EMA weights. One json.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from data.files import integer, user_path, write_json
from data.images import ImageTextConfig
from eval.feature_nets import ClipScorer
from eval.features import number_groups
from eval.images import ImageSet, choose_images, iterate_images, list_images
from eval.programs import (
    add_reading_options,
    build_parser,
    check_report,
    stage_run,
    start_processes,
)
from eval.report import shrink
from modeling.dual_tokenizer import DualTokenizer
from modeling.image_tokenizer import ImageTokenizer
from modeling.image_tower import Teacher
from training.errors import exit_on_error
from training.loading import load_dual_tokenizer, load_tokenizer, read_section
from training.ridge import fit_ridge

MAX_TRAIN = 1500  # images that the regressions are fitted on: they cost N^3 operations


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="run of a dual tokenizer, or an experiment")
    add("--train", nargs="+", required=True, metavar="DATA", help="folders or tar shards")
    add("--heldout", nargs="+", required=True, metavar="DATA", help="folders or tar shards")
    add("--flowtok", type=user_path, metavar="RUN", help="a FlowTok tokenizer beside it")
    add("--num-train", type=integer(2), default=MAX_TRAIN, help="evenly spaced training images")
    add("--output", type=user_path, help="default: understanding.json in the run folder")
    add_reading_options(parser, 32, "images at a time")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    run = stage_run(args.run, "tokenizer")
    output = args.output or run / "understanding.json"
    data_sets = {"train": args.train, "heldout": args.heldout}
    check_report(output, data_sets)
    device = start_processes(args.device).device
    tokenizer = load_dual_tokenizer(run).to(device)
    config = tokenizer.config
    clip = ClipScorer(config.teacher, device, download=True)
    teacher = Teacher(config.teacher).to(device)
    other = load_tokenizer(args.flowtok).to(device) if args.flowtok else None
    represent = partial(representations, tokenizer, teacher, other)

    # Everything that is asked of an image, once; the entries are chosen before they are read
    data = read_section(run, "data", ImageTextConfig)
    keys, background = tuple(data.captions.keys), tuple(data.background)
    (train, _), (heldout, captions) = (
        read_features(ImageSet(entries, config.image_size, keys, background), represent, clip, args)
        for entries in (choose_images(args.train, args.num_train), list_images(args.heldout))
    )

    # What is to be found, and what the teacher itself finds of it
    target, true = train.pop("teacher"), heldout.pop("teacher")
    different, own = [*dict.fromkeys(captions)], number_groups(captions)
    chunks = [different[i : i + 256] for i in range(0, len(different), 256)]
    texts = torch.cat([clip.read(chunk) for chunk in chunks]).cpu()

    def retrieve(features: Tensor) -> dict[str, Tensor]:
        numbers = {"top1": 1, "top5": 5}
        return {name: among_nearest(features, texts, own, most) for name, most in numbers.items()}

    reached = retrieve(true)

    # What each representation knows of the teacher's feature
    readouts = {}
    for name, values in heldout.items():
        if teacher.tower.pools_by_mean and name in ("teacher_patches", "predicted_features"):
            by, read = "mean", values.mean(1)
        else:
            by, read = "ridge", fit_ridge(train[name], target[:, None])(values)[:, 0]
        read = F.normalize(read, dim=-1)
        readouts[name] = {"read_by": by, "cosine": (read * true).sum(-1).mean().item()}
        for measure, hits in retrieve(read).items():
            share, error = share_of(hits, reached[measure])
            readouts[name] |= {measure: hits.float().mean().item(), f"{measure}_share": share}
            readouts[name][f"{measure}_share_error"] = error
    report = {
        "protocol": {"data": data_sets},
        "num_train": len(target),
        "num_heldout": len(captions),
        "num_captions": len(texts),
        "teacher": {name: hits.float().mean().item() for name, hits in reached.items()},
        "readouts": readouts,
    }
    write_json(report, output)
    print(json.dumps(report, indent=2))
    print(f"{output}: written")


def representations(
    tokenizer: DualTokenizer, teacher: Teacher, other: ImageTokenizer | None, images: Tensor
) -> dict[str, Tensor]:
    """By name what stands for images B x 3 x R x R in [0, 1]: B x N x C each."""
    coded, sizes = tokenizer.encode(images), tokenizer.config.quantizer
    # The codes can keep no more than there is in the teacher's own patches; pixels are the floor
    found = {
        "teacher_patches": teacher(images),
        "predicted_features": tokenizer.read(tokenizer.quantizer.decode(coded.indices)),
        "semantic_codes": coded.mean[..., : sizes.semantic_channels],
        "pixel_codes": coded.mean[..., sizes.semantic_channels :],
        "pixels": shrink(images).flatten(2),
    }
    if other:
        size = other.config.image_size
        fitted = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        found["flowtok_latents"] = other.encode(fitted).mean
    return found


@torch.no_grad()
def read_features(
    images: ImageSet, represent: Callable, clip: ClipScorer, args: argparse.Namespace
) -> tuple[dict[str, Tensor], list[str]]:
    """Representations and the teacher's feature of all readable images, on the CPU; captions."""
    found, captions = defaultdict(list), []
    for batch in iterate_images(images, args.batch_size, args.num_workers):
        for name, reason in batch["skipped"]:
            print(f"left out: {name}: {reason}", file=sys.stderr)
        if not batch["index"]:
            continue
        # Floats for the codes; CLIP takes the bytes by its own preprocessing
        pixels = batch["image"].to(clip.device).float() / 255
        captions += batch["caption"]
        found["teacher"].append(clip.see(batch["image"]).cpu())
        for name, values in represent(pixels).items():
            found[name].append(values.float().cpu())
    if len(captions) < 2:
        raise ValueError(f"only {len(captions)} of {len(images)} images could be read")
    return {name: torch.cat(parts) for name, parts in found.items()}, captions


def among_nearest(images: Tensor, texts: Tensor, own: Tensor, most: int) -> Tensor:
    """B bool: is the feature of its own text one of the `most` nearest of M x E to an image's?"""
    similar = images @ texts.T
    return (similar > similar.gather(1, own[:, None])).sum(-1) < most


def share_of(hits: Tensor, reached: Tensor) -> tuple[float | None, float | None]:
    """How many are hits as a share of those the teacher reaches, B bool each; standard error."""
    hits, reached = hits.double(), reached.double()
    if not reached.any():
        return None, None
    share = hits.sum() / reached.sum()
    error = (hits - share * reached).square().sum().sqrt() / reached.sum()
    return share.item(), error.item()


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
