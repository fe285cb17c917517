"""The run folder of a stage and what every stage does at its start.

RUN/  config.yaml (resolved; rebuilds the model alone)  metrics.jsonl  checkpoints/step_*/  samples/step_*.png
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import set_seed

CONFIG_FILE = "config.yaml"
# How long a process waits for the others: pictures, checkpoints and uneven shards take longer than NCCL's ten minutes.
WAIT_LIMIT = timedelta(hours=2)


@dataclass
class Run:
    """One stage's run on this process."""

    folder: Path
    accelerator: Accelerator

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


def start_accelerator(precision: str) -> Accelerator:
    """Join the other processes, if any. precision is "fp32" or "bf16" (autocast)."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32 on a GPU; the CPU ignores it
    handlers = [InitProcessGroupKwargs(timeout=WAIT_LIMIT), DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers)


def start_run(folder: str | Path, precision: str, seed: int) -> Run:
    """Start accelerate and seed everything that is random before the first step. Writes nothing."""
    accelerator = start_accelerator(precision)
    set_seed(seed, device_specific=False)
    return Run(Path(folder), accelerator)


def save_config(run: Run, resolved_config: dict, network_keys: list[str], has_checkpoint: bool) -> None:
    """Write the resolved config into the run folder, checked against the one that its checkpoints were trained with.

    Args:
        resolved_config: plain values; what changed since an earlier start is printed.
        network_keys: top-level keys that define the network; these must not change once there is a checkpoint.

    Raises:
        ValueError: a network key differs from the run that is to be resumed.
    """
    path = run.folder / CONFIG_FILE
    if path.is_file() and has_checkpoint:
        changes = list_changes(yaml.safe_load(path.read_text()) or {}, resolved_config)
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
        partial.rename(path)
    run.accelerator.wait_for_everyone()


def list_changes(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Differences of two nested configs as (dotted key, 'key: old -> new')."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [c for k in keys for c in list_changes(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == new else [(prefix, f"{prefix}: {old} -> {new}")]
