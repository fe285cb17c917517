"""Checkpoints: one folder per step, written aside, flushed and renamed.

step_00001000/  model.safetensors  ema.safetensors  optimizer.pt  rank_00000.pt ...
                discriminator_model.safetensors  discriminator_optimizer.pt    (stage 1)
                state.json    step, inputs, bytes and CRC-32 of each other file; written last
latest -> step_00001000
Nothing in it executes code when read: safetensors, JSON, and torch.load with weights_only.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.files import flush, load_json
from training.run import Run, config_changes
from training.sharding import gather

PREFIX, PARTIAL_SUFFIX = "step_", ".tmp"
MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.pt"
STATE_FILE, LATEST_LINK = "state.json", "latest"
STATE_TYPES = {"step": int, "ema_updates": int, "num_processes": int, "inputs": dict, "files": dict}


# Finding


def checkpoint_folders(run_dir: Path) -> dict[int, Path]:
    """Checkpoints of a run by step, ascending; whether they are whole is not looked at."""
    folders = {}
    for path in (run_dir / "checkpoints").glob(f"{PREFIX}*"):
        digits = path.name.removeprefix(PREFIX)
        if path.is_dir() and digits.isdigit():
            folders[int(digits)] = path
    return dict(sorted(folders.items()))


def latest_checkpoint(run_dir: Path, verify: bool = False) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole checkpoint, None without any.

    verify: read every byte, too. ValueError: there are checkpoints, but all are damaged.
    """
    # A damaged checkpoint costs the steps since the one before, never the run: with none left the
    # user decides, nothing starts over unasked.
    folders = checkpoint_folders(run_dir)
    for step, folder in reversed(folders.items()):
        damage = find_damage(folder, verify)
        if not damage:
            return step, folder
        message = f"warning: {folder} is damaged ({damage}), looking for the one before"
        print(message, file=sys.stderr, flush=True)
    if folders:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole (see above); to start over, delete "
            f"{run_dir}/checkpoints"
        )
    return None


def find_damage(folder: Path, verify: bool = False) -> str:
    """What is wrong with a checkpoint, "" if nothing: by the sizes of its files, or their bytes."""
    try:
        state = read_state(folder)
        # A folder that somebody renamed is not the step that it claims to be.
        if folder.name != f"{PREFIX}{state['step']:08d}":
            return f"{STATE_FILE} is of step {state['step']}"
        for name, expected in state["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if verify and file_crc32(folder / name) != expected["crc32"]:
                return f"{name} has other contents than were written"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes; about a second per GB."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def is_complete(run: Run, config: Any, inputs: dict) -> bool:
    """True if the run has a checkpoint of its last step; says so, and which changes it ignores.

    config: a TrainedStage (training/stage.py). ValueError: its checkpoints were trained on other
    `inputs` (what earlier stages gave).
    """
    latest = latest_checkpoint(run.folder)
    if latest is None:
        return False
    step, folder = latest
    check_inputs(folder, inputs)
    if step < config.training.max_steps:
        return False
    with suppress(ValueError):  # of a damaged config.yaml: whoever needs it will say so
        changes = config_changes(run, config)
        # Folders that moved change nothing.
        keys = [key for key, _ in changes if not key.endswith("_dir")]
        if keys:
            run.say(f"warning: {run.folder} is complete, it ignores changes of {', '.join(keys)}")
    run.say(f"{run.folder}: complete at step {step}, nothing to do")
    return True


# Reading


def read_state(folder: Path) -> dict:
    """The plain values of a checkpoint, see STATE_TYPES; ValueError: it is broken."""
    path = folder / STATE_FILE
    state = load_json(path.read_bytes()) if path.is_file() else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is missing or damaged")
    for name, kind in STATE_TYPES.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: {name} is {state.get(name)!r}, expected {kind.__name__}")
    return state


def load_plain(path: Path, mmap: bool = False) -> Any:
    """Tensors and plain values of a file that torch.save wrote, on the CPU; ValueError: others."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # pickle, zip and torch have a dozen types for what is no such file
        raise ValueError(
            f"{path} is broken, or holds more than tensors and plain values: refused"
        ) from error


def check_inputs(folder: Path, inputs: dict) -> None:
    """Refuse a checkpoint that was trained on other than what earlier stages give now."""
    # By fingerprints, not by paths: a stage that was trained anew lies where the old one did.
    run_dir = folder.parents[1]
    trained = read_state(folder)["inputs"]
    if inputs and not trained:
        raise ValueError(
            f"{run_dir} holds converted weights, no training to continue: start from them with "
            "init_from, in another run_dir"
        )
    changed = [
        f"{key} was {trained.get(key)}, is {inputs.get(key)}"
        for key in {**trained, **inputs}
        if trained.get(key) != inputs.get(key)
    ]
    if changed:
        raise ValueError(
            f"an earlier stage has changed since {run_dir} was trained: {'; '.join(changed)}. "
            "Delete the folder to train it again"
        )


# Writing


def rank_file(rank: int) -> str:
    """The file of what one process has for itself: data position, unreported metrics."""
    return f"rank_{rank:05d}.pt"


def partial_folder(run_dir: Path, step: int) -> Path:
    """Where the files of a step are written."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:08d}{PARTIAL_SUFFIX}"


def snapshot(state: Any, is_kept: bool = True) -> Any:
    """A copy on the CPU of nested dicts and lists with tensors, which later steps don't change.

    is_kept: False on the processes that only help to gather sharded tensors, which get none.
    """
    if isinstance(state, Tensor):
        # All processes gather, though one keeps the result. safetensors takes no strided views.
        whole = gather(state.detach())
        return whole.to("cpu", copy=True).contiguous() if is_kept else None
    if isinstance(state, dict):
        return {key: snapshot(value, is_kept) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [snapshot(value, is_kept) for value in state]
    return state


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make the empty folder for the files of a step; leftovers of a killed run are removed."""
    folder = partial_folder(run_dir, step)
    for leftover in folder.parent.glob(f"{PREFIX}*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    return folder


def write_checkpoint(partial: Path, parts: dict[str, dict], state: dict, keep: int) -> None:
    """Write state dicts by file name into a folder that was begun, and commit it."""
    with explained_write_errors(partial):
        for name, values in parts.items():
            save = save_file if name.endswith(".safetensors") else torch.save
            save(values, partial / name)
        commit_checkpoint(partial, state, keep)


def commit_checkpoint(partial: Path, state: dict, keep: int) -> None:
    """Write state.json, rename the folder, move `latest`, delete all but the newest `keep`."""
    # The state vouches for the other files, so it is written last.
    files = sorted(path for path in partial.iterdir() if path.name != STATE_FILE)
    sums = {path.name: {"bytes": path.stat().st_size, "crc32": file_crc32(path)} for path in files}
    state_path = partial / STATE_FILE
    state_path.write_text(json.dumps(state | {"files": sums}))

    # safetensors makes files that only their owner can read.
    for path in files:
        path.chmod(state_path.stat().st_mode)

    # All bytes are on disk before the name says so: a crash leaves the old checkpoint or the new.
    for path in (*files, state_path, partial):
        flush(path)
    final = partial.with_suffix("")
    if final.exists():
        delete(final)  # damaged, or the run would have resumed from it
    partial.rename(final)

    # The link is replaced, so that there is one at any moment.
    link = final.parent / (LATEST_LINK + PARTIAL_SUFFIX)
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(final.parent / LATEST_LINK)
    flush(final.parent)

    # Later steps were found damaged, or this would not be the newest: they stay, uncounted.
    folders = checkpoint_folders(final.parents[1])
    newest = int(final.name.removeprefix(PREFIX))
    for step in [step for step in folders if step <= newest][:-keep]:
        delete(folders[step])


@contextmanager
def explained_write_errors(partial: Path) -> Iterator[None]:
    """Remove what was written if the rest can't be; OSError says which checkpoint, and why."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors have own types for a full disk, and do not say that it is full.
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(partial).free / 1e6:.1f} MB are free there"
        shutil.rmtree(partial, ignore_errors=True)
        final = partial.with_suffix("")
        raise OSError(f"cannot write checkpoint {final}: {error}{free}; older ones stay") from error


def delete(folder: Path) -> None:
    """Remove a checkpoint."""
    # Renamed first, so that a kill halfway leaves nothing that looks like a checkpoint.
    doomed = folder.with_name(f"{folder.name}.deleted{PARTIAL_SUFFIX}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


class BackgroundWriter:
    """Runs one write at a time in a thread; a write's error comes up at the next call."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *error) -> None:
        self.wait()

    def start(self, write: Callable[[], None]) -> None:
        """Begin a write, once the one before is done."""
        # Two at once would need memory for two copies of all weights.
        self.wait()
        self._write = self._pool.submit(write)

    def wait(self) -> None:
        """Return when everything is written; raises what the write raised."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def check(self) -> None:
        """Raise what a finished write raised; does not wait."""
        if self._write is not None and self._write.done():
            self.wait()
