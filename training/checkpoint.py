"""Checkpoints: one folder a step, written aside, flushed, renamed; a manifest tells a whole one from a damaged one.

step_00001000/  model.safetensors  ema.safetensors  optimizer.pt  state.json  rank_00000.pt ...
                discriminator_model.safetensors  discriminator_optimizer.pt    (stage 1 with an adversarial loss)
                manifest.json    bytes and sha256 of each file; written last
latest -> step_00001000    moves after the folder has its name
Nothing in it executes code when read: safetensors, JSON, and torch.load with weights_only.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX, PARTIAL_SUFFIX = "step_", ".tmp"
MODEL_FILE, EMA_FILE, OPTIMIZER_FILE, STATE_FILE = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "state.json",
)
MANIFEST_FILE, LATEST_LINK = "manifest.json", "latest"
STATE_TYPES = {
    "step": int,
    "ema_updates": int,
    "bad_steps": list,
    "num_processes": int,
    "inputs": dict,
}


def checkpoint_folders(run_dir: Path) -> dict[int, Path]:
    """Checkpoints of a run by step, in ascending order; whether they are whole is not looked at."""
    folders = {}
    for path in (run_dir / "checkpoints").glob(f"{PREFIX}*"):
        digits = path.name.removeprefix(PREFIX)
        if path.is_dir() and digits.isdigit():
            folders[int(digits)] = path
    return dict(sorted(folders.items()))


def latest_checkpoint(run_dir: Path, verify_contents: bool = False) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole checkpoint, or None without any. Damaged newer ones are passed over, aloud.

    Args:
        verify_contents: compare the files' hashes, too, not only their sizes: reads every byte.

    Raises:
        ValueError: there are checkpoints, but all are damaged: nothing starts over unasked.
    """
    folders = checkpoint_folders(run_dir)
    for step, folder in reversed(folders.items()):
        damage = find_damage(folder, verify_contents)
        if not damage:
            return step, folder
        print(
            f"warning: {folder} is damaged ({damage}), looking for the one before",
            file=sys.stderr,
            flush=True,
        )
    if folders:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole (above); to start over, delete {run_dir}/checkpoints"
        )
    return None


def find_damage(folder: Path, verify_contents: bool) -> str:
    """What is wrong with a checkpoint, by its manifest; "" if nothing."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if STATE_FILE not in manifest:
            return f"{MANIFEST_FILE} does not list {STATE_FILE}"
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if verify_contents and file_hash(path) != expected["sha256"]:
                return f"{name} has other contents than were written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE}: {type(error).__name__}: {error}"
    return ""


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rank_file(rank: int) -> str:
    """Name of the file with what one process has for itself: its data position and its unreported metrics."""
    return f"rank_{rank:05d}.pt"


def snapshot(state: Any) -> Any:
    """A copy of nested dicts and lists with tensors on the CPU, contiguous, that later steps don't change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, list | tuple) else state


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, on the CPU and contiguous."""
    save_file(snapshot(dict(module.state_dict())), path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Strictly load safetensors into a module.

    Raises:
        ValueError: the file is missing or broken, or its tensors are not the module's; names file and tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        tensors = load_file(path)
        module.load_state_dict(tensors, strict=True)
    except (
        Exception
    ) as error:  # safetensors raises its own types, torch a RuntimeError: both say what is wrong
        raise ValueError(f"{path} does not fit the configured model: {error}") from error


def load_plain(path: Path, mmap: bool = False) -> Any:
    """Tensors and plain values of a file that torch.save wrote, on the CPU.

    Raises:
        ValueError: the file is missing or broken, or holds anything that would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # pickle, zip and torch have a dozen types for what is no such file
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is broken: refused"
        ) from error


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make the empty folder in which the files of `step` are written; left-overs of a killed run are removed."""
    folder = run_dir / "checkpoints" / f"{PREFIX}{step:08d}{PARTIAL_SUFFIX}"
    for leftover in folder.parent.glob(f"{PREFIX}*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    return folder


def commit_checkpoint(partial: Path, keep: int, keep_every_steps: int = 0) -> Path:
    """Write the manifest, flush all files to disk, give the folder its final name, move `latest`, then rotate.

    Kept are the newest `keep`, and those whose step is a multiple of `keep_every_steps` (0: none of them).
    """
    files = sorted(path for path in partial.iterdir() if path.name != MANIFEST_FILE)
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files
    }
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    for path in files:  # safetensors makes files that only their owner can read
        path.chmod((partial / MANIFEST_FILE).stat().st_mode)
    for path in [*files, partial / MANIFEST_FILE, partial]:
        flush(path)
    final = partial.with_suffix("")
    if final.exists():
        delete(final)  # damaged, or it would have been resumed from
    partial.rename(final)
    point_latest_to(final)
    flush(final.parent)
    rotate(final, keep, keep_every_steps)
    return final


def rotate(newest: Path, keep: int, keep_every_steps: int) -> None:
    """Delete what is not kept, once `newest` is whole.

    Those of later steps were found damaged, or it would not be the newest: they count for nothing and stay.
    """
    newest_step = int(newest.name.removeprefix(PREFIX))
    folders = {
        step: path
        for step, path in checkpoint_folders(newest.parent.parent).items()
        if step <= newest_step
    }
    for step in list(folders)[:-keep]:
        if not (keep_every_steps and step % keep_every_steps == 0):
            delete(folders[step])


def delete(folder: Path) -> None:
    """Remove a checkpoint such that a kill half-way leaves none that looks like one."""
    doomed = folder.with_name(f"{folder.name}.deleted{PARTIAL_SUFFIX}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


class BackgroundWriter:
    """Runs one write at a time in a thread; an error of the write comes up at the next call. Leaving it waits."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *error) -> None:
        self.wait()

    def start(self, write: Callable[[], None]) -> None:
        """Begin a write, once the one before is done."""
        self.wait()
        self._write = self._pool.submit(write)

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            Exception: what the write raised.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def check(self) -> None:
        """Raise what a finished write raised; does not wait."""
        if self._write is not None and self._write.done():
            self.wait()


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_latest_to(folder: Path) -> None:
    """Move the link `latest` in one step."""
    partial = folder.parent / (LATEST_LINK + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.name)
    partial.replace(folder.parent / LATEST_LINK)


def write_checkpoint(
    partial: Path, weights: dict, optimizers: dict, state: dict, keep: int, keep_every_steps: int
) -> None:
    """Write file name -> snapshot of a state dict, and the plain values, into a folder that was begun; commit it."""
    with writing(partial):
        for name, tensors in weights.items():
            save_file(tensors, partial / name)
        for name, values in optimizers.items():
            torch.save(values, partial / name)
        write_state(partial, state)
        commit_checkpoint(partial, keep, keep_every_steps)


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Remove what was written if the rest can't be: a full disk has room again.

    Raises:
        OSError: naming the checkpoint; torch and safetensors have other types for a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free = ""
        with suppress(OSError):  # torch's error does not say that the disk is full
            free = f"; {shutil.disk_usage(partial).free / 1e6:.1f} MB are free there"
        shutil.rmtree(partial, ignore_errors=True)
        message = f"cannot write checkpoint {partial.with_suffix('')}: {error}{free}; those before are kept"
        raise OSError(message) from error


def write_state(folder: Path, state: dict) -> None:
    """Write the plain values of a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps(state))


def read_state(folder: Path, needed: tuple[str, ...] = ()) -> dict:
    """The plain values of a checkpoint: step, EMA updates, number of processes, inputs.

    Raises:
        ValueError: the file is missing or broken, lacks a needed value or has one of another type.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected an object")
    for name in needed:
        if name not in state:
            raise ValueError(f"{path} has no {name!r}: another version of this code wrote it")
    for name, kind in STATE_TYPES.items():
        if name in state and not isinstance(state[name], kind):
            raise ValueError(f"{path}: {name} is {state[name]!r}, expected {kind.__name__}")
    return state


def check_inputs(folder: Path, inputs: dict) -> None:
    """Compare what a checkpoint was trained on with what earlier stages give now.

    Raises:
        ValueError: naming each difference.
    """
    trained = read_state(folder, ("inputs",))["inputs"]
    if inputs and not trained:
        raise ValueError(
            f"{folder.parents[1]} holds converted weights, no training to go on with: start from them with init_from, "
            "in another run_dir"
        )
    changed = [
        f"{k} was {trained.get(k)}, is {inputs.get(k)}"
        for k in {**trained, **inputs}
        if trained.get(k) != inputs.get(k)
    ]
    if changed:
        raise ValueError(
            f"{folder.parents[1]} was trained on what an earlier stage gave before it changed: {'; '.join(changed)}. "
            "Delete the folder to train it again"
        )
