"""The run folder of a stage and what every stage does at its start.

RUN/
  config.yaml                 the stage and its resolved config; rebuilds the networks by itself
  metrics.jsonl               one line per report
  checkpoints/step_*/         see training/checkpoint.py
  samples/step_*.png          pictures with captions
"""

import dataclasses
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, set_seed

from data.files import write_text

CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"
# NCCL's own ten minutes are too short for pictures, checkpoints and uneven shards.
TIMEOUT_MINUTES = 60.0
# What accelerate's variables, or the config file of its launcher, may ask for beside DDP
ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


@dataclass
class Run:
    """One stage's run on this process."""

    folder: Path
    accelerator: Accelerator
    started: float  # time.monotonic()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """True on the process that writes."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


def process_group_timeout(timeout_minutes: float) -> timedelta:
    """Twice the watchdog's (training/supervise.py), so that its clearer message comes first."""
    return timedelta(minutes=2 * timeout_minutes)


def refuse_engines() -> None:
    """Refuse what the environment asks for and no program here is written for."""
    # accelerate would obey in silence, also a config file that its user has forgotten.
    for name in (f"ACCELERATE_USE_{engine}" for engine in ENGINES):
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "false"):
            raise ValueError(
                f"{name}={value}: only DDP and training.shard are supported; unset it, or start "
                "without accelerate's config file (accelerate config)"
            )


def start_run(
    folder: str | Path, precision: str, seed: int, timeout_minutes: float = TIMEOUT_MINUTES
) -> Run:
    """Join the other processes, if any, and seed what is random before the first step.

    Writes nothing. precision: "fp32", or "bf16" by autocast.

    Raises:
        ConnectionError: the other processes can't be reached.
        ValueError: the environment asks for another engine than DDP.
    """
    started = time.monotonic()
    refuse_engines()
    # TF32 for what is left in float32 on a GPU; the CPU ignores it.
    torch.set_float32_matmul_precision("high")
    # Buffers are the same everywhere by construction: no exchange of them in each step. accelerate
    # knows only the name that newer torch warns of.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    handlers = [
        InitProcessGroupKwargs(timeout=process_group_timeout(timeout_minutes)),
        DistributedDataParallelKwargs(broadcast_buffers=False),
    ]
    mixed_precision = "no" if precision == "fp32" else precision
    # Without a GPU accelerate joins the processes only where it is told so.
    cpu = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers
        )
    except dist.DistError as error:
        raise ConnectionError(f"the other processes can't be reached: {error}") from error
    set_seed(seed, device_specific=False)
    return Run(folder=Path(folder), accelerator=accelerator, started=started)


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the run folder, or ValueError: two programs would overwrite each other's files.

    Every process must call it; the main one takes the lock, and where it can't, all of them end.
    """
    refusal = ""
    with ExitStack() as stack:
        if run.is_main:
            run.folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run.folder / LOCK_FILE).open("a+"))
            # A data worker would keep the lock of a killed program until it notices.
            os.register_at_fork(after_in_child=file.close)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Another error is of a file system without locks.
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.seek(0)
                    owner = file.read().strip()
                    refusal = f"{run.folder} is being written by another process: {owner}"
            else:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        [refusal] = broadcast_object_list([refusal])
        if refusal:
            raise ValueError(refusal)
        yield


def save_config(run: Run, config: Any, has_checkpoint: bool) -> None:
    """Write a stage's config into the run folder, checked against that of its checkpoints.

    config: a StageConfig (training/stage.py); changes since an earlier start are printed.

    Raises:
        ValueError: one of `config.networks` differs from the run that is to be resumed, or another
            process trains in this folder.
    """
    # Where there is no checkpoint, an earlier start has left nothing to be faithful to.
    if has_checkpoint:
        # Weights do not fit another network; everything else may change on the way.
        changes = config_changes(run, config)
        networks = tuple(f"{name}." for name in config.networks)
        fatal = [line for key, line in changes if f"{key}.".startswith(networks)]
        if fatal:
            raise ValueError(
                f"{run.folder} was trained with another network: {'; '.join(fatal)}. Choose "
                "another experiment_dir, or delete the folder"
            )
        for _, line in changes:
            run.say(f"config changed since the last start: {line}")
    run.accelerator.wait_for_everyone()
    with locked(run):  # a training that goes on here keeps its config
        if run.is_main:
            values = {"stage": config.stage, **dataclasses.asdict(config)}
            write_text(yaml.safe_dump(values, sort_keys=False), run.folder / CONFIG_FILE)


def config_changes(run: Run, config: Any) -> list[tuple[str, str]]:
    """(dotted key, "key: old -> new") of what a stage's config changes in that of a started run."""
    path = run.folder / CONFIG_FILE
    if not path.is_file():
        return []
    # A key that the earlier config lacks did not exist yet: it had its default's effect.
    defaults = dataclasses.asdict(type(config)())
    saved = fill_in(read_saved(path), defaults)
    return list_changes(saved, {"stage": config.stage, **dataclasses.asdict(config)})


def read_saved(path: Path) -> dict:
    """The config that a run was trained with; ValueError: the file is damaged."""
    return parse_saved(path, path.read_bytes())


def parse_saved(path: Path, content: bytes) -> dict:
    """read_saved of a file that holds this."""
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        values = error
    if not isinstance(values, dict):
        reason = values if isinstance(values, Exception) else f"it holds a {type(values).__name__}"
        raise ValueError(
            f"{path} is damaged ({reason}); if your config is still that of the run, delete it"
        )
    return values


def fill_in(values: dict, defaults: dict) -> dict:
    """Nested values with the keys that they lack taken from `defaults`."""
    # Not by OmegaConf, which would read ${...} and ??? in a text.
    filled = defaults | values
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = fill_in(value, defaults[key])
    return filled


def list_changes(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Differences of two nested configs as (dotted key, 'key: old -> new')."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix, f"{prefix}: {old} -> {new}")]
    changes = []
    for key in old | new:
        name = f"{prefix}.{key}" if prefix else key
        changes += list_changes(old.get(key), new.get(key), name)
    return changes


def seed_step(seed: int, rank: int, step: int) -> None:
    """Make the randomness of a step a function of (seed, rank, step)."""
    mixed = np.random.SeedSequence(seed, spawn_key=(rank, step)).generate_state(1, np.uint32)
    torch.manual_seed(int(mixed[0]))
