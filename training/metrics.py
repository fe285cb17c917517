"""Metrics: summed on the device, read only when reported; one log for console, metrics.jsonl and wandb."""

import json
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

WANDB_FILE = "wandb_id"  # in the run folder


@dataclass
class LoggingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "flowtok"


class MetricWindow:
    """The scalars of the steps since the last report, kept on the device; nothing waits for it until they are read.

    Steps with a non-finite value are left out of the means. What is in the window is part of a checkpoint, so that a
    resumed run reports what an undisturbed one does.
    """

    def __init__(self):
        self._steps: list[
            tuple[int, tuple[str, ...], Tensor, list[str]]
        ] = []  # step, names, values, sample keys

    def reset(self) -> None:
        """Start a new window."""
        self._steps = []

    def add(self, step: int, values: dict[str, Tensor], keys: list[str]) -> None:
        """Add one step's scalars; `keys` are those of its samples on this process."""
        self._steps.append(
            (step, tuple(values), torch.stack([v.detach().float() for v in values.values()]), keys)
        )

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the window's good steps that had the value, and over the processes (`reduce` averages)."""
        rows: dict[str, list[Tensor]] = {}
        for _, names, values, _ in self._steps:
            values = torch.where(torch.isfinite(values).all(), values, torch.nan)
            for name, value in zip(names, values, strict=True):
                rows.setdefault(name, []).append(value)
        means = reduce(torch.stack([torch.stack(values).nanmean() for values in rows.values()]))
        return dict(zip(rows, means.tolist(), strict=True))

    def bad_steps(self) -> list[tuple[int, dict[str, float], list[str]]]:
        """(step, terms, keys) of the window's steps with a non-finite value."""
        if not self._steps:
            return []
        good = torch.stack(
            [torch.isfinite(values).all() for _, _, values, _ in self._steps]
        ).tolist()
        bad = [step for step, is_good in zip(self._steps, good, strict=True) if not is_good]
        return [
            (step, dict(zip(names, values.tolist(), strict=True)), keys)
            for step, names, values, keys in bad
        ]

    def state_dict(self) -> dict:
        """The window as plain values and tensors, without the keys."""
        return {
            "steps": [[step, list(names), values.cpu()] for step, names, values, _ in self._steps]
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Continue a window."""
        self._steps = [
            (step, tuple(names), values.to(device), []) for step, names, values in state["steps"]
        ]


class MetricLog:
    """Writes values of a step to the console, metrics.jsonl and wandb. Only the main process writes."""

    def __init__(
        self, run_dir: Path, config: LoggingConfig, enabled: bool, run_name: str, start_step: int
    ):
        self.enabled = enabled
        self.path = run_dir / "metrics.jsonl"
        self._wandb = None
        if not enabled:
            return
        self._drop_after(start_step)
        if config.wandb != "off":
            self._wandb = start_wandb(run_dir, config, run_name, is_new=start_step == 0)

    def _drop_after(self, start_step: int) -> None:
        """Remove lines of steps that the resumed run will do again (those after its checkpoint), and broken ones."""
        if not self.path.exists():
            return
        lines = self.path.read_text(errors="replace").splitlines()
        kept = [
            line for line in lines if (step := step_of(line)) is not None and step <= start_step
        ]
        partial = self.path.with_suffix(".tmp")
        with partial.open("w") as file:
            file.writelines(line + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.path)

    def log(self, step: int, max_steps: int, values: dict[str, float], seconds_left: float) -> None:
        """Report one line; values that are one of many ("name/3") are not shown on the console."""
        if not self.enabled:
            return
        left = timedelta(seconds=max(0, round(seconds_left)))
        shown = "  ".join(
            f"{name} {value:.4g}"
            for name, value in values.items()
            if not name.split("/")[-1].isdigit()
        )
        print(f"step {step}/{max_steps}  {shown}  left {left}", flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            try:
                self._wandb.log(values, step=step)
            except Exception as error:  # its service has died, say: no reason to stop training
                print(
                    f"warning: wandb fails and is left out from here on: {error!r}",
                    file=sys.stderr,
                    flush=True,
                )
                self._wandb = None

    def flush(self) -> None:
        """Have what is logged on disk, before a checkpoint that claims these steps."""
        if self.enabled and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the wandb run, if any."""
        if self._wandb is not None:
            self._wandb.finish()


def step_of(line: str) -> int | None:
    """Step of a line of metrics.jsonl; None for one that a dying machine left broken."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None


def start_wandb(run_dir: Path, config: LoggingConfig, run_name: str, is_new: bool):
    """Start a wandb run, or continue the one whose id is in the run folder.

    Raises:
        ValueError: wandb is not installed or refuses.
    """
    try:
        import wandb  # costs seconds: only where it is wanted
    except ImportError as error:
        raise ValueError(
            f"logging.wandb={config.wandb} needs the package: pip install wandb"
        ) from error
    path = run_dir / WANDB_FILE
    if is_new or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    run_id = path.read_text().strip()
    try:
        return wandb.init(
            project=config.wandb_project,
            name=run_name,
            id=run_id,
            resume="allow",
            dir=run_dir,
            mode=config.wandb,
        )
    except wandb.Error as error:
        raise ValueError(f"logging.wandb={config.wandb}: {error}") from error
