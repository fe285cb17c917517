"""Metrics: summed on the device, read only when reported; one log for console, metrics.jsonl and wandb."""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor


@dataclass
class LoggingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "flowtok"


class MetricSums:
    """Running sums of scalar tensors, kept on the device. Remembers the first step with a non-finite value."""

    def __init__(self, device: torch.device):
        self.device = device
        self.first_bad_step = torch.full((), -1.0, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget the sums, not the first bad step."""
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Add one step's scalars; no device sync."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        bad = ~torch.isfinite(stacked).all() & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, float(step), self.first_bad_step)
        for name, value in zip(values, stacked, strict=True):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def means(self, reduce) -> dict[str, float]:
        """Means over the steps since the last reset and over the processes (`reduce` averages a tensor over them)."""
        names = list(self._sums)
        values = reduce(torch.stack([self._sums[n] for n in names]) / self._count)
        return dict(zip(names, values.tolist(), strict=True))

    def check_finite(self) -> None:
        """Stop on the first non-finite value so far.

        Raises:
            FloatingPointError: naming the step.
        """
        step = int(self.first_bad_step.item())
        if step >= 0:
            raise FloatingPointError(
                f"a loss or gradient became non-finite at step {step}; the last checkpoint is from before. Lower "
                "optimizer.learning_rate, or training.max_gradient_norm, and run the same command again"
            )


class MetricLog:
    """Writes values of a step to the console, metrics.jsonl and wandb. Only the main process writes."""

    def __init__(self, run_dir: Path, config: LoggingConfig, enabled: bool, run_name: str, start_step: int):
        self.enabled = enabled
        self.path = run_dir / "metrics.jsonl"
        self._wandb = None
        if not enabled:
            return
        self._drop_after(start_step)
        if config.wandb != "off":
            import wandb  # costs seconds: only where it is wanted

            run_id = run_name.replace("/", "-")
            self._wandb = wandb.init(
                project=config.wandb_project, name=run_name, id=run_id, resume="allow", dir=run_dir, mode=config.wandb
            )

    def _drop_after(self, start_step: int) -> None:
        """Remove lines of steps that the resumed run will do again (those after its checkpoint)."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= start_step]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.rename(self.path)

    def log(self, step: int, max_steps: int, values: dict[str, float], seconds_left: float) -> None:
        """Report one line."""
        if not self.enabled:
            return
        left = timedelta(seconds=max(0, round(seconds_left)))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {step}/{max_steps}  {shown}  left {left}", flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Finish the wandb run, if any."""
        if self._wandb is not None:
            self._wandb.finish()
