"""Checkpoints: one folder a step, written aside and renamed, so that a folder with a final name is whole.

step_00001000/  model.safetensors  ema.safetensors  optimizer.pt  state.json  loader_rank_00000.pt ...
Nothing in it executes code when read: safetensors, JSON, and torch.load with weights_only.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX, PARTIAL_SUFFIX = "step_", ".tmp"
MODEL_FILE, EMA_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"


def checkpoint_folders(run_dir: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, in ascending order."""
    folders = {}
    for path in (run_dir / "checkpoints").glob(f"{PREFIX}*"):
        digits = path.name.removeprefix(PREFIX)
        if path.is_dir() and digits.isdigit():
            folders[int(digits)] = path
    return dict(sorted(folders.items()))


def latest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest complete checkpoint, or None."""
    folders = checkpoint_folders(run_dir)
    return max(folders.items()) if folders else None


def loader_file(rank: int) -> str:
    """Name of the file with one process's data position."""
    return f"loader_rank_{rank:05d}.pt"


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, on the CPU and contiguous."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, path)


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
    except Exception as error:  # safetensors raises its own types, torch a RuntimeError: both say what is wrong
        raise ValueError(f"{path} does not fit the configured model: {error}") from error


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make the empty folder in which the files of `step` are written; a left-over of a killed run is removed."""
    folder = run_dir / "checkpoints" / f"{PREFIX}{step:08d}{PARTIAL_SUFFIX}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def commit_checkpoint(partial: Path, keep: int) -> Path:
    """Flush the files to disk, give the folder its final name, then delete all but the newest `keep`."""
    for path in [*partial.iterdir(), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    final = partial.with_suffix("")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for folder in list(checkpoint_folders(final.parent.parent).values())[:-keep]:
        shutil.rmtree(folder)
    return final


def write_shared_state(folder: Path, model: nn.Module, ema: nn.Module, optimizer, state: dict) -> None:
    """Write what all processes have in common; called by the main process."""
    save_weights(model, folder / MODEL_FILE)
    save_weights(ema, folder / EMA_FILE)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER_FILE)
    (folder / STATE_FILE).write_text(json.dumps(state))


def read_state(folder: Path) -> dict:
    """The plain values of a checkpoint: step, EMA updates, number of processes."""
    return json.loads((folder / STATE_FILE).read_text())


def check_inputs(folder: Path, inputs: dict) -> None:
    """Compare what a checkpoint was trained on with what earlier stages give now.

    Raises:
        ValueError: naming each difference.
    """
    trained = read_state(folder)["inputs"]
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
