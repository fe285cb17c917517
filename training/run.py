"""The run folder of a stage and what every stage does at its start.

RUN/  config.yaml (resolved; rebuilds the model alone)  metrics.jsonl  checkpoints/step_*/  samples/step_*.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

CONFIG_FILE = "config.yaml"


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


def start_run(folder: str | Path, resolved_config: dict, precision: str, network_keys: list[str], seed: int) -> Run:
    """Start accelerate, make the folder, and save the resolved config, checked against the one of an earlier start.

    Args:
        resolved_config: plain values; what changed since an earlier start is printed.
        network_keys: top-level keys that define the network; these must not change.

    Raises:
        ValueError: a network key differs from the run that is to be resumed.
    """
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    run = Run(Path(folder), accelerator)
    set_seed(seed, device_specific=False)
    saved_path = run.folder / CONFIG_FILE
    if saved_path.is_file():
        changes = list_changes(yaml.safe_load(saved_path.read_text()) or {}, resolved_config)
        fatal = [line for key, line in changes if key.split(".")[0] in network_keys]
        if fatal:
            raise ValueError(
                f"{run.folder} was started with another network: {'; '.join(fatal)}. Take another experiment_dir, or "
                "delete the folder"
            )
        for _, line in changes:
            run.say(f"config changed since the last start: {line}")
    accelerator.wait_for_everyone()
    if run.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        partial = saved_path.with_suffix(".tmp")
        partial.write_text(yaml.safe_dump(resolved_config, sort_keys=False))
        partial.rename(saved_path)
    accelerator.wait_for_everyone()
    return run


def list_changes(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Differences of two nested configs as (dotted key, 'key: old -> new')."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [c for k in keys for c in list_changes(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == new else [(prefix, f"{prefix}: {old} -> {new}")]
