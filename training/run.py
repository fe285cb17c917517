"""The run folder of a stage and what every stage does at its start.

RUN/  config.yaml (resolved; rebuilds the model alone)  metrics.jsonl  checkpoints/step_*/  samples/step_*.png
"""

import errno
import fcntl
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import set_seed

from training.checkpoint import flush

CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"
# Without a step; NCCL's own ten minutes are too short for pictures, checkpoints and uneven shards.
TIMEOUT_MINUTES = 60.0


@dataclass
class Run:
    """One stage's run on this process."""

    folder: Path
    accelerator: Accelerator
    started: float  # time.monotonic()

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """True on the process that writes."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)


def patience(timeout_minutes: float) -> timedelta:
    """How long a process waits for the others: until the watchdog (training/faults.py), which says more, has bitten."""
    return timedelta(minutes=2 * timeout_minutes)


def start_accelerator(precision: str, timeout_minutes: float = TIMEOUT_MINUTES) -> Accelerator:
    """Join the other processes, if any. precision is "fp32" or "bf16" (autocast)."""
    torch.set_float32_matmul_precision(
        "high"
    )  # TF32 for what is left in float32 on a GPU; the CPU ignores it
    waiting = InitProcessGroupKwargs(timeout=patience(timeout_minutes))
    handlers = [waiting, DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers
    )


def start_run(
    folder: str | Path, precision: str, seed: int, timeout_minutes: float = TIMEOUT_MINUTES
) -> Run:
    """Start accelerate and seed everything that is random before the first step. Writes nothing."""
    started = time.monotonic()
    accelerator = start_accelerator(precision, timeout_minutes)
    set_seed(seed, device_specific=False)
    return Run(Path(folder), accelerator, started)


@contextmanager
def lock_run(run: Run):
    """Hold the run folder while training in it: two trainings would overwrite each other's checkpoints.

    Raises:
        ValueError: another process holds it; says which.
    """
    if not run.is_main:
        yield
        return
    with (run.folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                yield  # a file system without locks
                return
            file.seek(0)
            raise ValueError(
                f"{run.folder} is being trained by another process: {file.read().strip()}"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def save_config(
    run: Run, resolved_config: dict, defaults: dict, network_keys: list[str], has_checkpoint: bool
) -> None:
    """Write the resolved config into the run folder, checked against the one that its checkpoints were trained with.

    Args:
        resolved_config: plain values; what changed since an earlier start is printed.
        defaults: what a key means that the earlier config lacks, because the code did not have it yet.
        network_keys: top-level keys that define the network; these must not change once there is a checkpoint.

    Raises:
        ValueError: a network key differs from the run that is to be resumed.
    """
    path = run.folder / CONFIG_FILE
    if path.is_file() and has_checkpoint:
        changes = list_changes(fill_in(read_saved(path), defaults), resolved_config)
        fatal = [line for key, line in changes if key.split(".")[0] in network_keys]
        if fatal:
            raise ValueError(
                f"{run.folder} was trained with another network: {'; '.join(fatal)}. Take another experiment_dir, or "
                "delete the folder"
            )
        for _, line in changes:
            run.say(f"config changed since the last start: {line}")
    run.accelerator.wait_for_everyone()
    if run.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(yaml.safe_dump(resolved_config, sort_keys=False))
        flush(partial)  # without it, nothing says which network the checkpoints are of
        partial.rename(path)
    run.accelerator.wait_for_everyone()


def read_saved(path: Path) -> dict:
    """The config that a run was trained with.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        values = error
    if not isinstance(values, dict):
        reason = values if isinstance(values, Exception) else f"it holds a {type(values).__name__}"
        raise ValueError(
            f"{path} is damaged ({reason}); if your config is still that of the run, delete this file"
        )
    return values


def fill_in(values: dict, defaults: dict) -> dict:
    """Nested values with the keys that they lack taken from `defaults`."""
    missing = {key: value for key, value in defaults.items() if key not in values}
    groups = [
        key
        for key in values
        if isinstance(values[key], dict) and isinstance(defaults.get(key), dict)
    ]
    return values | {key: fill_in(values[key], defaults[key]) for key in groups} | missing


def list_changes(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Differences of two nested configs as (dotted key, 'key: old -> new')."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [
            c
            for k in keys
            for c in list_changes(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)
        ]
    return [] if old == new else [(prefix, f"{prefix}: {old} -> {new}")]
