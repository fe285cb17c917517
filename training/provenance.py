"""What the results in a folder were made of: kept beside them, compared when they are gone on with.

source.json names the shards that were read, with their states, which tell a shard that was made
anew from one that was only copied or touched (data/storage.py). Beside checkpoints it also has a
dual tokenizer's teacher, beside token shards the options of the encoding. Who knows better deletes
it. Stages 2 and 3 know tokens by their identity (training/tokens.py).
"""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data.config import ReaderConfig
from data.files import write_json
from data.storage import is_other, shard_states
from data.tar import expand_shards, shard_name
from training.checkpoint import checkpoint_folders
from training.run import CONFIG_FILE, Run, read_saved

SOURCE_FILE = "source.json"
SHARDS = "source_shards"  # in it: name of each shard that was read -> its state, "" if unknown
NUM_NAMED = 3  # differences that an error names
CHANGE_SHARDS = (
    "; to train on with more or fewer shards, name them in data.shards or data.sources, and set "
    "training.max_steps above the steps that were made"
)


def states_by_name(shards: Sequence[str]) -> dict[str, str]:
    """Name -> state of each shard. Every process must call it; the main one looks."""
    states: dict[str, str] = {}
    if PartialState().is_main_process:
        for shard, state in zip(shards, shard_states(shards), strict=True):
            name = shard_name(shard)
            # shards of several data sets may have one name
            states[f"{name} ({len(states)})" if name in states else name] = state
    return broadcast_object_list([states])[0]


def check_shards(run: Run, data: ReaderConfig, max_steps: int, teacher: str = "") -> dict:
    """What a run reads, for save_source.

    teacher: fingerprint of a dual tokenizer's, which earlier commits did not note.

    Raises:
        ValueError: its checkpoints were trained on other shards, or by another teacher.
    """
    try:
        now = states_by_name(expand_shards(data.all_shards()))
    except ValueError:  # a complete run needs none, and a reader says what is missing
        return {}
    source = {SHARDS: now} | ({"teacher": teacher} if teacher else {})
    steps = checkpoint_folders(run.folder)
    if not steps:
        return source

    # More or fewer shards are no mistake where the config names them and there are steps to make.
    found = read_source(run.folder)
    before = found.get(SHARDS, {})
    if before and max(steps) < max_steps and names_other_shards(run.folder, data):
        if changes := [*new_or_gone(before, now)]:
            run.say(f"{run.folder} goes on with other shards: {first_of(changes)}")
        found |= {SHARDS: {name: before.get(name, state) for name, state in now.items()}}
    check_source(run.folder, found, source, CHANGE_SHARDS)
    return source


def names_other_shards(folder: Path, data: ReaderConfig) -> bool:
    """Whether a run's last config names its shards otherwise; other folders alone don't count."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    saved = read_saved(folder / CONFIG_FILE).get("data", {})
    sources = [*saved.get("sources", {}).values()] or [saved]
    # a weight of 0 leaves a source out
    used = [each.get("shards", []) for each in sources if each.get("weight", 1)]
    before = map(shard_name, chain.from_iterable(used))
    return sorted(before) != sorted(map(shard_name, data.all_shards()))


def new_or_gone(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """A line for each shard that only one of both has."""
    yield from (f"{name} is new" for name in now if name not in before)
    yield from (f"{name} is gone" for name in before if name not in now)


def first_of(changes: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = [f"and {len(changes) - NUM_NAMED} more"] if len(changes) > NUM_NAMED else []
    return "; ".join([*changes[:NUM_NAMED], *more])


def read_source(folder: Path) -> dict:
    """What the results in a folder are made of, {} if that is not known."""
    path = folder / SOURCE_FILE
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged, delete it: {error}") from error


def save_source(folder: Path, source: dict) -> None:
    """Write what the results in a folder are made of, unless that is known; the main process."""
    # An earlier commit may have known less: what is known now is added.
    if not PartialState().is_main_process:
        return
    found = read_source(folder)
    # a store that does not answer today said something before
    before, now = found.get(SHARDS, {}), source.get(SHARDS, {})
    known = {name: state or before.get(name, "") for name, state in now.items()}
    if source and found != source | {SHARDS: known}:
        write_json(source | {SHARDS: known}, folder / SOURCE_FILE)


def check_source(folder: Path, found: dict, source: dict, further_way: str = "") -> None:
    """Refuse results of another source; what `found` does not name is unknown, and passes.

    further_way: out of the error, beside deleting files.
    """
    # Continuing on other data would give a model of both, of which nobody could say what it saw.
    changed = list(differences(found, source))
    if changed:
        way_out = "Delete it and run this again"
        if all(change.startswith(SHARDS) for change in changed):
            way_out += f"; if it is to stay all the same, delete {folder / SOURCE_FILE}"
            way_out += further_way
        named = first_of(changed)
        raise ValueError(f"{folder} was made of another source: {named}. {way_out}")

    # Shards that are too large to be compared as a whole
    before, now = (each.get(SHARDS, {}) for each in (found, source))
    unsure = [name for name in now if before.get(name) and now[name] not in ("", before[name])]
    if unsure and PartialState().is_main_process:
        print(
            f"{folder}: {len(unsure)} shards that it is made of, the first {unsure[0]}, have "
            "another time than before. Size and samples of their bytes are the same, so they are "
            "taken for copies; if they were made anew, delete the folder",
            flush=True,
        )


def differences(found: dict, wanted: dict, prefix: str = "") -> Iterator[str]:
    """A line for each value that is known and differs."""
    for key, value in wanted.items():
        if key not in found or found[key] == value:
            continue
        if key == SHARDS:
            before, now = found[key], value
            for name in before:
                if name in now and is_other(before[name], now[name]):
                    yield f"{SHARDS}.{name} was {before[name]}, is {now[name]}"
            yield from (f"{SHARDS}.{change}" for change in new_or_gone(before, now))
        elif isinstance(value, dict):
            yield from differences(found[key], value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} was {found[key]}, is {value}"
