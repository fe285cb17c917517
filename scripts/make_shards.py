"""Images with captions -> tar shards (webdataset layout), which the stages read.

    python scripts/make_shards.py folder photos --output shards/photos
    python scripts/make_shards.py table pairs.csv --caption-column text --output shards/pairs
    python scripts/make_shards.py coco captions_val2017.json --images val2017 --output shards/coco
    python scripts/make_shards.py karpathy dataset_coco.json --split test --output shards/coco_test
    python scripts/make_shards.py mjhq meta_data.json --images mjhq30k --output shards/mjhq
    python scripts/make_shards.py shards 'laion/*.tar' --min-aesthetic-score 5 --output shards/laion
    python scripts/make_shards.py hub lambdalabs/naruto-blip-captions --output shards/naruto

A sample is {key}.jpg (or its own extension; the file's bytes as they are, unless --resize),
{key}.txt (the first caption), {key}.json (the source's metadata and all "captions"), and whatever
else a source tar has under its key. Keys are the source's names without dots. Rows that name the
same image are one sample, with all their captions and the other columns of the first row.

Shard i is made of the i-th --samples-per-shard samples of the shuffled source; dropped samples
leave it smaller. So the result depends neither on --workers nor on how often the run was stopped:
the same command continues it, and refuses if a file of the source has changed. In a Slurm array,
give every part the same command with `--shard-index $SLURM_ARRAY_TASK_ID --num-shards N`; the part
that finishes last writes summary.json.

    OUTPUT/000000.tar ...   the shards; one with no sample left is not written
    OUTPUT/holdout/         with --holdout N: shards with N samples that no other shard has
    OUTPUT/source.json      the settings; other settings need another folder
    OUTPUT/summary.json     samples read, kept and dropped by reason, with the first of each reason;
                            samples of each shard. What belongs to no sample (a file of a folder, a
                            member of a tar) counts as a dropped one. "unused": what kept samples
                            had but do not use (captions that a filter drops, broken JSON).
    OUTPUT/progress/        index of the source, its files' sizes and times, counts per shard;
                            of `hub` until all shards are there, a copy of the data set
"""

import argparse
import json
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from data.captions import check_caption_keys
from data.entries import Entry, build_index, file_stamp, first_equals
from data.files import integer, written_whole
from data.filters import FilterConfig
from data.hub import HUB
from data.packing import (
    COPIES,
    INDEX,
    PROGRESS_FOLDER,
    ROWS,
    SampleConfig,
    Task,
    digest_task,
    write_task,
)
from data.sources import LOCAL_SOURCES, file_path
from data.tar import refuse_foreign_shards
from data.workers import map_in_processes
from scripts.run_experiment.processes import count_cores
from training.errors import exit_on_error, printable

SOURCES = {**LOCAL_SOURCES, "hub": HUB}  # by the name of the sub-command
SOURCE_FILE = "source.json"
SUMMARY_FILE = "summary.json"
# one line for each file of the source: [path, [bytes, time of change]], null if missing
FILES = f"{PROGRESS_FOLDER}/files.jsonl"
HOLDOUT_FOLDER = "holdout"  # in the output folder
NUM_CHANGES = 5  # changed source files that an error names
# what may differ between runs into one folder
NOT_SETTINGS = ("output", "workers", "shard_index", "num_shards")


# ------------------------------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Plan:
    """Which samples make which shard, and which shards this part of the array writes."""

    output: Path
    part: int
    num_parts: int
    config: SampleConfig
    shards: dict[str, np.ndarray]  # by name: the numbers of its samples' first entries
    images: np.ndarray  # by number of entry: the first entry of the sample that gets its captions

    @cached_property
    def by_image(self) -> np.ndarray:
        """All entries, those of a sample side by side."""
        return np.argsort(self.images, kind="stable")

    def shards_of(self, part: int) -> list[str]:
        return list(self.shards)[part :: self.num_parts]

    def task(self, shard: str) -> Task:
        """A shard's job without its samples: where its files are."""
        return Task(shard, self.output, self.part, self.config)

    def whole_task(self, shard: str) -> Task:
        firsts = self.shards[shard]
        # where the entries of each sample lie in by_image
        begins = np.searchsorted(self.images, firsts, sorter=self.by_image)
        ends = np.searchsorted(self.images, firsts, side="right", sorter=self.by_image)
        # a copy of another image has none: all are of that one's sample
        numbers = [
            self.by_image[begin:end].tolist() or [first]
            for first, begin, end in zip(firsts.tolist(), begins, ends, strict=True)
        ]
        return replace(self.task(shard), numbers=numbers, is_duplicate=begins == ends)

    def run(
        self, work: Callable[[Task], int], shards: Sequence[str], workers: int, title: str
    ) -> None:
        """work(task) of some shards, in several processes, with a progress bar."""
        num_samples = sum(len(self.shards[shard]) for shard in shards)
        counts = map_in_processes(work, map(self.whole_task, shards), min(workers, len(shards)))
        with progress_bar(title, total=num_samples) as progress:
            for count in counts:
                progress.update(count)


def progress_bar(title: str, **options: Any) -> tqdm:
    """Rate and time left, on stderr."""
    # no thread of its own: processes are forked
    tqdm.monitor_interval = 0
    # seldom where that is a file, in which every line stays
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(desc=title, unit=" samples", mininterval=interval, **options)


def make_shards(args: argparse.Namespace) -> None:
    """The whole run, or one part of it; continues where an earlier one was stopped."""
    if args.shard_index >= args.num_shards:
        last = args.num_shards - 1
        raise ValueError(
            f"shard_index: given {args.shard_index}, expected 0..{last} (num_shards - 1)"
        )
    plan = make_plan(args)
    todo = [shard for shard in plan.shards_of(plan.part) if not plan.task(shard).is_finished()]
    if todo:
        if (plan.output / SUMMARY_FILE).is_file():
            # a shard is gone; so are the copies of a source's files since the earlier run was
            # complete
            deque(SOURCES[args.source].entries(args), maxlen=0)
        if args.drop_duplicates:
            plan = find_duplicates(plan, args.workers)
        plan.run(write_task, todo, args.workers, "writing")
    report(plan, num_written=len(todo))


def make_plan(args: argparse.Namespace) -> Plan:
    """Find the samples, unless an earlier run has, and fix their order."""
    # checks the options before anything is written
    config = sample_config(args)
    output = Path(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    check_output(output, settings)
    if (output / INDEX).is_file():
        check_source(args, output)
    else:
        make_index(args, output, settings)
    rows = np.load(output / ROWS, mmap_mode="r")
    order = first_entries(rows)
    if args.shuffle:
        order = order[np.random.default_rng(args.seed).permutation(len(order))]
    shards = divide(order, rows["faulty"], args.samples_per_shard, args.holdout)
    images = np.ascontiguousarray(rows["image"])
    return Plan(output, args.shard_index, args.num_shards, config, shards, images)


def first_entries(rows: np.ndarray) -> np.ndarray:
    """The number of each sample's first entry."""
    return np.flatnonzero(rows["image"] == np.arange(len(rows)))


def divide(
    order: np.ndarray, faulty: np.ndarray, samples_per_shard: int, holdout: int
) -> dict[str, np.ndarray]:
    """Name of each shard -> its samples; the first `holdout` that may be usable have their own."""
    # not what is known to be no sample: fewer than were asked for would be held out
    held_out = np.zeros(len(faulty), bool)
    held_out[order[~faulty[order]][:holdout]] = True
    shards = {}
    for folder, is_here in (("", ~held_out), (f"{HOLDOUT_FOLDER}/", held_out)):
        numbers = order[is_here[order]]
        for i, begin in enumerate(range(0, len(numbers), samples_per_shard)):
            shards[f"{folder}{i:06d}"] = numbers[begin : begin + samples_per_shard]
    return shards


def sample_config(args: argparse.Namespace) -> SampleConfig:
    """What the command line says of each sample; ValueError names the option."""
    caption_keys = getattr(args, "caption_keys", ())
    if "caption_keys" in args:
        check_caption_keys(caption_keys, "caption_keys")
    filters = {field.name: getattr(args, field.name) for field in fields(FilterConfig)}
    return SampleConfig(
        caption_keys=tuple(caption_keys),
        filters=FilterConfig(**filters),
        resize=args.resize,
        quality=args.quality,
        background=tuple(args.background),
    )


def check_output(output: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds something else; ValueError names what differs."""
    source_file = output / SOURCE_FILE
    if source_file.is_file():
        found = json.loads(source_file.read_text())
        changed = [
            f"{name} was {found.get(name)!r}, is {settings.get(name)!r}"
            for name in {**settings, **found}
            if settings.get(name) != found.get(name)
        ]
        if changed:
            raise ValueError(
                f"output: {output} holds shards of another run: {'; '.join(changed)}. Delete it or "
                "name another"
            )
    refuse_foreign_shards(output, SOURCE_FILE)


def check_source(args: argparse.Namespace, output: Path) -> None:
    """Refuse to go on from an index of files that have changed, are new or are gone."""
    # by size and time: to read them would take as long as the shards do
    new = dict.fromkeys(SOURCES[args.source].files(args))
    changes = []
    with open(output / FILES) as file:
        for path, before in map(json.loads, file):
            new.pop(path, None)
            now = file_stamp(path)
            if now != before:
                change = "is gone" if now is None else "is new" if before is None else "has changed"
                changes.append(f"{path} {change}")
    changes += [f"{path} is new" for path in new]
    if changes:
        raise ValueError(
            f"output: {output} holds shards of an older state of the source: {len(changes)} files "
            f"differ: {', '.join(changes[:NUM_CHANGES])}. To make all shards anew, delete it or "
            "name another"
        )


def make_index(args: argparse.Namespace, output: Path, settings: dict[str, Any]) -> None:
    """Find the samples and write the index; nothing stays behind if that fails."""
    path = output / INDEX
    part = str(args.shard_index)
    source = SOURCES[args.source]
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # the index last, as a sign that the others are there; of parts side by side all write the
        # same
        with written_whole(path, part) as index, written_whole(output / FILES, part) as files:
            with progress_bar("finding", iterable=source.entries(args)) as entries:
                rows = build_index(with_files(source.files(args), entries, files), index)
            usable = len(first_entries(rows)) - np.count_nonzero(rows["faulty"])
            if args.holdout >= max(usable, 1):
                raise ValueError(
                    f"holdout: given {args.holdout}, expected fewer than the {usable} samples of "
                    "the source"
                )
            with written_whole(output / SOURCE_FILE, part) as file:
                file.write(json.dumps(settings, indent=2).encode())
            with written_whole(output / ROWS, part) as file:
                np.save(file, rows)
    except BaseException:
        with suppress(OSError):  # another part has put something there
            for folder in new_folders:
                folder.rmdir()
        raise


def with_files(paths: Iterable[str], entries: Iterable[Entry], file: BinaryIO) -> Iterator[Entry]:
    """The entries; what they come from is written down on the way."""

    # before any of it is read: what changes meanwhile is found by the next run
    def write(path: str) -> None:
        file.write(json.dumps([path, file_stamp(path)]).encode() + b"\n")

    for path in paths:
        write(path)
    for entry in entries:
        # an image that a file names; those of a folder are among the paths
        if entry.captions is not None and entry.fault is None:
            write(entry.path)
        yield entry


def find_duplicates(plan: Plan, workers: int) -> Plan:
    """Of kept samples with equal image files, the first in the source stays, with all captions.

    The parts of an array share the digests, each with those of its own shards first.
    """
    # the work of another part that has not begun is done as well, rather than waited for
    parts = [(plan.part + shift) % plan.num_parts for shift in range(plan.num_parts)]
    shards = [shard for part in parts for shard in plan.shards_of(part)]
    missing = [shard for shard in shards if not plan.task(shard).digests.is_file()]
    if missing:
        plan.run(digest_task, missing, workers, "comparing")
    digests = np.zeros((len(plan.images), 2), np.uint64)
    for shard, firsts in plan.shards.items():
        digests[firsts] = np.load(plan.task(shard).digests)
    # zeros are of dropped samples: one without a caption must not take the place of its copy
    kept = np.flatnonzero(digests.any(axis=1))
    first_of = np.arange(len(plan.images))
    first_of[kept] = kept[first_equals(digests[kept])]
    return replace(plan, images=first_of[plan.images])


def report(plan: Plan, num_written: int) -> None:
    """Print what there is; of all shards, write the summary. ValueError: no sample was kept."""
    # what is there of all parts of the array: the records of all shards make the summary
    records = {}
    missing = []
    for task in map(plan.task, plan.shards):
        if task.is_finished():
            records[f"{task.name}.tar"] = json.loads(task.record.read_text())
        else:
            missing.append(task.name)
    there = f"{len(records)} of {len(plan.shards)} there"
    print(f"{plan.output}: {num_written} shards written, {there}")
    if missing:
        names = ", ".join(missing[:5])
        print(f"the last part of the array writes {SUMMARY_FILE}; missing: {names} ...")
        return
    read, kept = (sum(each[name] for each in records.values()) for name in ("read", "kept"))
    summary: dict[str, Any] = {"read": read, "kept": kept}
    for counts, firsts in (("dropped", "first"), ("unused", "first_unused")):
        counter = Counter()
        first = {}
        for record in records.values():
            counter.update(record[counts])
            first = record[firsts] | first  # the case of the earliest shard stays
        summary |= {counts: dict(sorted(counter.items())), firsts: dict(sorted(first.items()))}
    summary["shards"] = {name: each["kept"] for name, each in records.items() if each["kept"]}
    with written_whole(plan.output / SUMMARY_FILE, str(plan.part)) as file:
        file.write(json.dumps(summary, indent=2).encode())
    # every shard is there, so nobody reads the copies again
    shutil.rmtree(plan.output / COPIES, ignore_errors=True)
    reasons = describe_reasons(summary["dropped"], summary["first"])
    if not kept:
        raise ValueError(f"none of the {read} samples was kept; dropped: {'; '.join(reasons)}")
    print(f"{read} samples read, {kept} kept in {len(summary['shards'])} shards; dropped:", end=" ")
    print("\n  ".join(["", *reasons]) or "none")
    if unused := describe_reasons(summary["unused"], summary["first_unused"]):
        print("\n  ".join(["not used of kept samples:", *unused]))


def describe_reasons(counts: dict[str, int], first: dict[str, str]) -> list[str]:
    return [
        f"{reason}: {count}, first {printable(first[reason])}"
        for reason, count in Counter(counts).most_common()
    ]


# ------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    # Ctrl-C ends the workers, too: it may come up while their end is handled.
    try:
        try:
            exit_on_error(lambda: make_shards(args))
        except BrokenProcessPool:
            reason = "a worker was killed (out of memory?)"
            parser.exit(1, f"error: {reason}; the same command, with fewer --workers, continues\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command continues from here\n")


def build_parser() -> argparse.ArgumentParser:
    """One sub-command for each source, with its own arguments and those that all have."""
    parser = argparse.ArgumentParser(
        prog="make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    add_output_options(shared.add_argument_group("output"))
    add_filter_options(shared.add_argument_group("filters"))
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, kind in SOURCES.items():
        command = commands.add_parser(
            name,
            help=kind.text,
            description=kind.text,
            parents=[shared],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        for flag, options in kind.arguments.items():
            command.add_argument(flag, **options)
    return parser


def add_output_options(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, default: Any, text: str, **options: Any) -> None:
        group.add_argument(flag, default=default, help=text, **options)

    at_least_0 = integer(0)
    at_least_1 = integer(1)
    byte = integer(0, 255)
    group.add_argument("--output", required=True, type=file_path, metavar="FOLDER")
    add("--samples-per-shard", 1000, "before filters", type=at_least_1)
    add("--holdout", 0, "samples that go to OUTPUT/holdout, before filters", type=at_least_0)
    add("--shuffle", True, "over the whole source", action=argparse.BooleanOptionalAction)
    add("--seed", 0, "of the shuffle", type=at_least_0)
    add("--resize", 0, "shorter side to which larger images shrink; 0: off", type=at_least_0)
    add("--quality", 95, "of JPEG with --resize", type=integer(1, 100))
    add("--background", [255, 255, 255], "RGB, with --resize", type=byte, nargs=3, metavar="0..255")
    add("--workers", count_cores(), "processes", type=at_least_1)
    add("--shard-index", 0, "which part of a Slurm array this is, from 0", type=at_least_0)
    add("--num-shards", 1, "how many parts the array has", type=at_least_1)


def add_filter_options(group: argparse._ArgumentGroup) -> None:
    """One flag per field of FilterConfig, with its default."""

    def add(name: str, text: str, **options: Any) -> None:
        flag = f"--{name.replace('_', '-')}"
        default = getattr(FilterConfig(), name)
        group.add_argument(flag, default=default, help=text, **options)

    duplicates = "of equal image files keep the first; reads all of them twice"
    group.add_argument("--drop-duplicates", action="store_true", help=duplicates)
    choices = ["keep", "drop", "fail"]
    add("min_longer_side", "pixels; 0: off", type=int)
    add("max_aspect_ratio", "longer / shorter side; 0: off", type=float)
    add("min_aesthetic_score", "as the source's JSON or table has it", type=float)
    add("max_watermark_probability", "0..1, as the source's JSON or table has it", type=float)
    add("missing_score", "of a sample without the score that a filter needs", choices=choices)
    add("min_caption_characters", "shorter captions are dropped; 0: off", type=int)
    add("max_caption_characters", "longer captions are dropped; 0: off", type=int)


if __name__ == "__main__":
    main()
