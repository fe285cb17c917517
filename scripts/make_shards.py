"""Images with captions -> tar shards (webdataset layout), which every stage and `scripts.encode_tokens` read.

    python scripts/make_shards.py folder   photos                            --output shards/photos
    python scripts/make_shards.py table    pairs.csv --caption-column text   --output shards/pairs
    python scripts/make_shards.py coco     annotations/captions_train2017.json --images train2017 --output shards/coco
    python scripts/make_shards.py karpathy dataset_coco.json --split test --images . --output shards/coco_test
    python scripts/make_shards.py mjhq     meta_data.json --images mjhq30k   --output shards/mjhq
    python scripts/make_shards.py shards   'laion/*.tar' --min-aesthetic-score 5 --output shards/laion

A sample is {key}.jpg (or its own extension; the file's bytes as they are, unless --resize), {key}.txt (the first
caption), {key}.json (the source's metadata and all "captions"), and what else a source tar has under its key. Keys are
the source's names without dots. Shard i is made of the i-th --samples-per-shard samples of the shuffled source; those
that are dropped leave it smaller. So the result depends neither on --workers nor on how often the run was stopped:
the same command goes on where it was. A Slurm array gives every part the same command, with
`--shard-index $SLURM_ARRAY_TASK_ID --num-shards N`; the part that finishes last writes summary.json.

    OUTPUT/000000.tar ...   the shards; one without any sample left is not written
    OUTPUT/source.json      the settings; other settings need another folder
    OUTPUT/summary.json     samples read, kept and dropped by reason; samples of each shard
    OUTPUT/progress/        index of the source, counts per shard; not needed once summary.json is there
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

from data.captions import check_caption_keys
from data.entries import Entry, build_index
from data.filters import FilterConfig, SampleFilter
from data.packing import (
    DUPLICATE,
    UNCHECKED,
    USABLE,
    SampleConfig,
    Task,
    digest_task,
    index_path,
    map_in_processes,
    progress_bar,
    run_tasks,
    write_array,
    write_file,
    write_task,
)
from data.sources import (
    coco_entries,
    folder_entries,
    karpathy_entries,
    mjhq_entries,
    table_entries,
    tar_entries,
)

SOURCE_FILE, SUMMARY_FILE = "source.json", "summary.json"
NOT_SETTINGS = (
    "output",
    "workers",
    "shard_index",
    "num_shards",
)  # what may differ between runs into one folder


# ---------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Plan:
    """Which samples make which shard, and which shards this part of the array writes."""

    output: Path
    part: int
    num_parts: int
    config: SampleConfig
    samples_per_shard: int
    order: np.ndarray  # numbers of all entries
    rows: np.ndarray  # of the index, by number
    states: np.ndarray  # by number

    @property
    def num_shards(self) -> int:
        return -(-len(self.order) // self.samples_per_shard)

    def task(self, shard: int) -> Task:
        numbers = self.order[shard * self.samples_per_shard : (shard + 1) * self.samples_per_shard]
        return Task(
            shard,
            self.output,
            self.part,
            self.config,
            numbers,
            self.rows[numbers],
            self.states[numbers],
        )

    def run(self, work: Callable, shards: Sequence[int], workers: int, title: str) -> None:
        if shards:
            num_samples = sum(len(self.task(shard).numbers) for shard in shards)
            run_tasks(work, map(self.task, shards), num_samples, min(workers, len(shards)), title)


def make_shards(args: argparse.Namespace) -> None:
    """The whole run, or one part of it; goes on where an earlier one was stopped."""
    check_arguments(args)
    plan = make_plan(args)
    todo = [
        shard
        for shard in range(plan.part, plan.num_shards, plan.num_parts)
        if not plan.task(shard).is_finished()
    ]
    if todo and args.drop_duplicates:
        find_duplicates(plan, args.workers)
    plan.run(write_task, todo, args.workers, "writing")
    report(plan, num_written=len(todo))


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError naming the option, what was given and what is expected."""
    expected = {
        "samples_per_shard": (args.samples_per_shard >= 1, "a number >= 1"),
        "seed": (args.seed >= 0, "a number >= 0"),
        "resize": (args.resize >= 0, "pixels, or 0 to keep the files as they are"),
        "quality": (1 <= args.quality <= 100, "1..100"),
        "background": (all(0 <= value <= 255 for value in args.background), "three values 0..255"),
        "workers": (args.workers >= 1, "processes >= 1"),
        "num_shards": (args.num_shards >= 1, "parts >= 1"),
        "shard_index": (
            0 <= args.shard_index < args.num_shards,
            f"0..{args.num_shards - 1} (num_shards - 1)",
        ),
    }
    for name, (holds, meaning) in expected.items():
        if not holds:
            raise ValueError(f"{name}: given {getattr(args, name)!r}, expected {meaning}")
    filter_config(args).validate()
    if "caption_keys" in args:
        check_caption_keys(args.caption_keys)
    if getattr(args, "images", None) is not None and not os.path.isdir(args.images):
        raise ValueError(f"images: {args.images} is not a folder")


def filter_config(args: argparse.Namespace) -> FilterConfig:
    return FilterConfig(**{field.name: getattr(args, field.name) for field in fields(FilterConfig)})


def make_plan(args: argparse.Namespace) -> Plan:
    """Finds the samples, unless an earlier run has; fixes their order."""
    output = Path(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    check_output(output, settings)
    if not index_path(output).is_file():
        make_index(args, output, settings)
    rows = np.load(rows_path(output), mmap_mode="r")
    order = np.arange(len(rows))
    if args.shuffle:
        order = np.random.default_rng(args.seed).permutation(len(rows))
    config = SampleConfig(
        caption_keys=tuple(getattr(args, "caption_keys", ())),
        sample_filter=SampleFilter(filter_config(args)),
        resize=args.resize,
        quality=args.quality,
        background=tuple(args.background),
    )
    states = np.full(len(rows), UNCHECKED, np.uint8)
    return Plan(
        output,
        args.shard_index,
        args.num_shards,
        config,
        args.samples_per_shard,
        order,
        rows,
        states,
    )


def rows_path(output: Path) -> Path:
    return index_path(output).with_name("index.npy")


def check_output(output: Path, settings: dict[str, Any]) -> None:
    """ValueError: the folder holds something else."""
    source = output / SOURCE_FILE
    if source.is_file():
        found = json.loads(source.read_text())
        names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        changed = [f"{name} was {found.get(name)!r}, is {settings.get(name)!r}" for name in names]
        if changed:
            raise ValueError(
                f"{output} holds shards of another run: {'; '.join(changed)}. Delete it or name another"
            )
    elif output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, expected a folder")
    elif any(output.glob("*.tar")):
        raise ValueError(
            f"output: {output} holds tars, but not of this script ({SOURCE_FILE} is missing); name another"
        )


def make_index(args: argparse.Namespace, output: Path, settings: dict[str, Any]) -> None:
    """Find the samples and write the index; nothing stays behind if that fails."""
    path, part = index_path(output), args.shard_index
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{part}.tmp")
    try:
        rows = build_index(progress_bar("finding", iterable=find_entries(args)), unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        with suppress(OSError):  # another part has put something there
            for folder in new_folders:
                folder.rmdir()
        raise
    if path.is_file():  # another part was faster
        unfinished.unlink()
        return
    write_file(output / SOURCE_FILE, json.dumps(settings, indent=2).encode(), part)
    write_array(rows_path(output), rows, part)
    os.replace(unfinished, path)


def find_entries(args: argparse.Namespace) -> Iterator[Entry]:
    """The entries of the source that the command line names."""
    if args.source == "folder":
        yield from folder_entries(args.folder)
    elif args.source == "table":
        yield from table_entries(args.tables, args.images, args.path_column, args.caption_column)
    elif args.source == "coco":
        yield from coco_entries(args.file, images_folder(args))
    elif args.source == "karpathy":
        yield from karpathy_entries(args.file, images_folder(args), args.split, args.restval)
    elif args.source == "mjhq":
        yield from mjhq_entries(args.file, images_folder(args))
    elif args.workers == 1:
        yield from tar_entries(args.patterns)
    else:
        yield from tar_entries(
            args.patterns, lambda work, paths: map_in_processes([work] * args.workers, paths)
        )


def images_folder(args: argparse.Namespace) -> str:
    return os.path.dirname(args.file) if args.images is None else args.images


def find_duplicates(plan: Plan, workers: int) -> None:
    """Fill plan.states: of several kept samples with the same image file, the first one of the source stays.

    The parts of an array share the work, each with its own shards first: what is there already is not done again, and
    nobody waits for a part that has not started.
    """
    parts = [(plan.part + shift) % plan.num_parts for shift in range(plan.num_parts)]
    shards = [shard for part in parts for shard in range(part, plan.num_shards, plan.num_parts)]
    missing = [shard for shard in shards if not plan.task(shard).digests.is_file()]
    plan.run(digest_task, missing, workers, "comparing")
    digests = np.empty((len(plan.order), 2), np.uint64)
    for shard in range(plan.num_shards):
        task = plan.task(shard)
        digests[task.numbers] = np.load(task.digests)
    is_kept = digests.any(axis=1)
    by_digest = np.lexsort(digests.T)  # stable: equal ones stay in the order of the source
    later, earlier = by_digest[1:], by_digest[:-1]
    repeats = later[(digests[later] == digests[earlier]).all(axis=1)]
    plan.states[is_kept] = USABLE
    plan.states[repeats[is_kept[repeats]]] = DUPLICATE


def report(plan: Plan, num_written: int) -> None:
    """Print what there is; with all records there, write the summary. ValueError: no sample was kept at all."""
    tasks = [plan.task(shard) for shard in range(plan.num_shards)]
    missing = [task.tar.name for task in tasks if not task.is_finished()]
    print(
        f"{plan.output}: {num_written} shards written, {plan.num_shards - len(missing)} of {plan.num_shards} there"
    )
    if missing:
        print(
            f"{SUMMARY_FILE} comes with the last part of the array; missing: {', '.join(missing[:5])} ..."
        )
        return
    records = {task.tar.name: json.loads(task.record.read_text()) for task in tasks}
    dropped = sum((Counter(record["dropped"]) for record in records.values()), Counter())
    summary = {
        "read": sum(record["read"] for record in records.values()),
        "kept": sum(record["kept"] for record in records.values()),
        "dropped": dict(sorted(dropped.items())),
        "shards": {name: record["kept"] for name, record in records.items() if record["kept"]},
    }
    write_file(plan.output / SUMMARY_FILE, json.dumps(summary, indent=2).encode(), plan.part)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common()) or "none"
    print(
        f"{summary['read']} samples read, {summary['kept']} kept in {len(summary['shards'])} shards; dropped: {reasons}"
    )
    if not summary["kept"]:
        raise ValueError(f"none of the {summary['read']} samples was kept; dropped: {reasons}")


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        make_shards(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except ChildProcessError:
        parser.exit(
            1,
            "error: a worker was killed (out of memory?); the same command, with fewer --workers, goes on\n",
        )
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from here\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[shared],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    shared = argparse.ArgumentParser(add_help=False)
    add_output_options(shared)
    add_filter_options(shared)
    path = os.path.normpath

    folder = command("folder", "images with same-named .txt or .json captions, also in sub-folders")
    folder.add_argument("folder", type=path)
    add_caption_keys(folder)

    table = command(
        "table", "csv, tsv, parquet or jsonl files with a path and a caption in each row"
    )
    table.add_argument("tables", type=path, nargs="+", metavar="FILE")
    table.add_argument(
        "--images", type=path, help="where relative paths start; default: the table's folder"
    )
    table.add_argument("--path-column", default="path", help="of the image file")
    table.add_argument(
        "--caption-column",
        default="caption",
        help="a string, in jsonl and parquet also a list of them",
    )

    coco = command("coco", "captions_*.json of COCO, with all captions of an image")
    karpathy = command(
        "karpathy",
        "dataset_coco.json, Karpathy's split of COCO 2014 (or of Flickr), with all captions",
    )
    mjhq = command("mjhq", "meta_data.json of MJHQ-30K; images are CATEGORY/ID.jpg")
    for parser_of_file in (coco, karpathy, mjhq):
        parser_of_file.add_argument("file", type=path, metavar="FILE")
        parser_of_file.add_argument(
            "--images", type=path, help="folder of the images; default: that of FILE"
        )
    karpathy.add_argument("--split", required=True, help="train, val or test")
    karpathy.add_argument(
        "--restval",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train includes restval, as in captioning papers: 113,287 images; without it 82,783",
    )

    shards = command(
        "shards", "tars in webdataset's layout, as img2dataset writes them, to filter and shuffle"
    )
    shards.add_argument(
        "patterns", nargs="+", metavar="TAR", help="path, glob or x-{000..127}.tar; .gz is slow"
    )
    add_caption_keys(shards)
    return parser


def add_caption_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-keys",
        nargs="+",
        default=["json:captions", "txt", "json:caption"],
        metavar="KEY",
        help="where captions lie, the first that has any: an extension, or json:FIELD (a string or a list)",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, metavar="FOLDER")
    group.add_argument("--samples-per-shard", type=int, default=1000, help="before filters")
    group.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="over the whole source",
    )
    group.add_argument("--seed", type=int, default=0, help="of the shuffle")
    group.add_argument(
        "--resize", type=int, default=0, help="shorter side to which larger images shrink; 0: off"
    )
    group.add_argument("--quality", type=int, default=95, help="of JPEG with --resize")
    group.add_argument(
        "--background",
        type=int,
        nargs=3,
        default=[255, 255, 255],
        metavar="0..255",
        help="RGB, with --resize",
    )
    group.add_argument("--workers", type=int, default=cpus, help="processes")
    group.add_argument(
        "--shard-index", type=int, default=0, help="which part of a Slurm array this is, from 0"
    )
    group.add_argument("--num-shards", type=int, default=1, help="how many parts the array has")


def add_filter_options(parser: argparse.ArgumentParser) -> None:
    """One flag per field of FilterConfig, with its default."""
    group, default = parser.add_argument_group("filters"), FilterConfig()

    def add(name: str, text: str, **options: Any) -> None:
        group.add_argument(
            f"--{name.replace('_', '-')}", default=getattr(default, name), help=text, **options
        )

    group.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="same image file, byte by byte; reads all twice",
    )
    add("min_longer_side", "pixels; 0: off", type=int)
    add("max_aspect_ratio", "longer / shorter side; 0: off", type=float)
    add("min_aesthetic_score", "as the source's JSON or table has it", type=float)
    add("max_watermark_probability", "0..1, as the source's JSON or table has it", type=float)
    add("aesthetic_keys", "names of the score, the first that is there", nargs="+", metavar="NAME")
    add("watermark_keys", "names of the probability", nargs="+", metavar="NAME")
    add(
        "missing_score",
        "what happens to a sample without a score that is asked for",
        choices=["keep", "drop", "fail"],
    )
    add("min_caption_characters", "of the first caption; 0: off", type=int)
    add("max_caption_characters", "of the first caption; 0: off", type=int)


if __name__ == "__main__":
    main()
