"""Metrics: kept on the device, read only when reported; one log for console, file and wandb."""

import json
import math
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from data.files import load_json, write_text
from training.errors import printable
from training.run import Run

METRICS_FILE, WANDB_FILE = "metrics.jsonl", "wandb_id"  # in the run folder


@dataclass
class LoggingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "flowtok"
    tensorboard: bool = False  # event files in the run folder; needs pip install tensorboard


class MetricWindow:
    """The scalars of the steps since the last report, on the device; nothing waits for them.

    What is in the window is part of a checkpoint, so that a resumed run reports what an
    undisturbed one does.
    """

    def __init__(self):
        # step, names, values, sample keys
        self._steps: list[tuple[int, tuple[str, ...], Tensor, list[str]]] = []

    def reset(self) -> None:
        self._steps = []

    def add(self, step: int, values: dict[str, Tensor], keys: list[str]) -> None:
        """Add one step's scalars; `keys` are those of its samples on this process."""
        # One tensor a step: a report reads them all at once. Sums in bfloat16 would stop growing.
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._steps.append((step, tuple(values), stacked, keys))

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the steps that had the value, and over the processes (`reduce` averages)."""
        # Terms come and go, as the adversarial one does at its start.
        rows: dict[str, list[Tensor]] = {}
        for _, names, values, _ in self._steps:
            for name, value in zip(names, values, strict=True):
                rows.setdefault(name, []).append(value)

        # One exchange between the processes, and one read, for all names together.
        means = reduce(torch.stack([torch.stack(values).mean() for values in rows.values()]))
        return dict(zip(rows, means.tolist(), strict=True))

    def check_finite(self, run_dir: Path, rank: int) -> None:
        """FloatingPointError at a step with a non-finite value, which changed no weights."""
        if not self._steps:
            return
        # One read for all steps. Later ones may be bad because of the first.
        checks = torch.stack([torch.isfinite(values).all() for _, _, values, _ in self._steps])
        is_finite = checks.tolist()
        if all(is_finite):
            return
        step, names, values, keys = self._steps[is_finite.index(False)]
        terms = dict(zip(names, values.tolist(), strict=True))

        # Samples are named if they are to blame. Keys come from data of unknown origin: short, and
        # nothing that a terminal obeys.
        losses = [value for name, value in terms.items() if not name.endswith("gradient_norm")]
        samples = "the loss of this process is finite"
        if not all(map(math.isfinite, losses)):
            samples = f"samples: {', '.join(printable(key[:100]) for key in keys)}"
        found = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        raise FloatingPointError(
            f"non-finite loss or gradient at step {step}, rank {rank}: {found}; {samples}. The "
            f"last checkpoint of {run_dir} is from before it. Lower the learning rate or "
            "training.max_gradient_norm"
        )

    def state_dict(self) -> dict:
        # Without the keys: a checkpoint is saved after check_finite, the only one to read them.
        steps = [[step, list(names), values.cpu()] for step, names, values, _ in self._steps]
        return {"steps": steps}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self._steps = [
            (step, tuple(names), values.to(device), []) for step, names, values in state["steps"]
        ]


def cut_captions(batches: Sequence[dict], device: torch.device) -> dict[str, Tensor]:
    """Share 0..1 of captions that the text tower cuts, where its tokenizer reads any."""
    if "captions_cut" not in batches[0]:
        return {}
    # One of the step's values: it is averaged over batches, steps and processes as losses are.
    shares = [batch["captions_cut"].to(device, non_blocking=True) for batch in batches]
    return {"captions_cut": torch.stack(shares).mean()}


class MetricLog:
    """Writes a step's values to all that LoggingConfig names, on the main process (enabled)."""

    def __init__(self, run_dir: Path, config: LoggingConfig, enabled: bool, start_step: int):
        self.enabled = enabled
        self.path = run_dir / METRICS_FILE
        self._wandb = self._tensorboard = None
        if not enabled:
            return
        # Without what broke off, and without the steps that the resumed run will do again.
        if self.path.exists():
            kept = [line for step, line in whole_lines(self.path) if step <= start_step]
            write_text("".join(line + "\n" for line in kept), self.path)
        if config.wandb != "off":
            self._wandb = start_wandb(run_dir, config, is_new=start_step == 0)
        if config.tensorboard:
            self._tensorboard = start_tensorboard(run_dir, start_step)

    def log(self, step: int, max_steps: int, values: dict[str, float], seconds_left: float) -> None:
        """Report one line; values that are one of many ("name/3") are not shown on the console."""
        if not self.enabled:
            return
        # Terms of one channel or time bin are for curves: dozens of them.
        left = timedelta(seconds=max(0, round(seconds_left)))
        names = [name for name in values if not name.split("/")[-1].isdigit()]
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in names)
        print(f"step {step}/{max_steps}  {shown}  left {left}", flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if self._tensorboard else ():
            self._tensorboard.add_scalar(name, value, step)
        # Its service may die or refuse: no reason to stop a training.
        if self._wandb is not None:
            try:
                self._wandb.log(values, step=step)
            except Exception as error:
                warning = f"warning: wandb fails and is left out from here on: {error!r}"
                print(warning, file=sys.stderr, flush=True)
                self._wandb = None

    def flush(self) -> None:
        """Have what is logged on disk, before a checkpoint that claims these steps."""
        if self.enabled and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Names of metrics.jsonl -> (step, value) of each report that has it, without broken lines."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, line in whole_lines(path):
        for name, value in json.loads(line).items():
            curves.setdefault(name, []).append((step, value))
    return curves


def whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of each line of metrics.jsonl, without broken ones."""
    for line in path.read_text(errors="replace").splitlines():
        if (step := step_of(line)) is not None:
            yield step, line


def step_of(line: str) -> int | None:
    """Step of a line of metrics.jsonl; None for one that a dying machine left broken."""
    values = load_json(line)
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None


def start_wandb(run_dir: Path, config: LoggingConfig, is_new: bool):
    """Start a wandb run, or continue the one whose id is in the run folder."""
    try:
        import wandb  # costs seconds: only where it is wanted
    except ImportError as error:
        raise ValueError(f"logging.wandb={config.wandb}: pip install wandb") from error

    # A resumed run continues its curve; a run made anew in the same folder has one of its own.
    path = run_dir / WANDB_FILE
    if is_new or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    try:
        return wandb.init(
            project=config.wandb_project,
            name=str(run_dir),
            id=path.read_text().strip(),
            resume="allow",
            dir=run_dir,
            mode=config.wandb,
        )
    except wandb.Error as error:
        raise ValueError(f"logging.wandb={config.wandb}: {error}") from error


def start_tensorboard(run_dir: Path, start_step: int):
    """Start event files; ValueError: tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # only where it is wanted, as wandb
    except ImportError as error:
        raise ValueError("logging.tensorboard=true: pip install tensorboard") from error
    return SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)


class TimedIterator:
    """Counts the seconds of waiting for batches, and the samples that the readers skipped."""

    def __init__(self, batches: Iterator[dict]):
        self._batches = batches
        self.seconds = 0.0
        self.skipped: Counter[str] = Counter()  # of this process; a report empties it
        self._told: set[str] = set()

    def __iter__(self) -> "TimedIterator":
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - start
        self.skipped.update(batch.pop("skipped", {}))
        for reason, sample in batch.pop("first_skipped", {}).items():
            if reason not in self._told:  # once, though each data worker has a first one
                self._told.add(reason)
                print(printable(f"skipped, {reason}: the first is {sample}"), flush=True)
        return batch


class Progress:
    """Means, rates and the time left, for a report."""

    def __init__(self, run: Run, config: Any, batches: TimedIterator, step: int):
        """config: a TrainingConfig (training/stage.py); step: from which this start goes on."""
        self.run = run
        self.config = config
        self.batches = batches
        self.start = self.last_time = time.perf_counter()
        self.first_step = self.last_step = step
        self.last_wait = 0.0

    def report(
        self, step: int, window: MetricWindow, optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        """Values to log; the rates are those since the last call."""
        now = time.perf_counter()
        values = window.means(lambda x: self.run.accelerator.reduce(x, reduction="mean"))
        values["learning_rate"] = optimizer.param_groups[0]["lr"]

        # Rates: samples of all processes; a large share of waiting means too few data workers.
        seconds = now - self.last_time
        num_samples = (step - self.last_step) * self.config.batch_size
        values["samples_per_second"] = num_samples / seconds
        values["data_wait_share"] = (self.batches.seconds - self.last_wait) / seconds
        self.last_time = now
        self.last_step = step
        self.last_wait = self.batches.seconds

        # What readers skipped, on any process.
        skipped = sum(gather_object([self.batches.skipped]), Counter())
        self.batches.skipped = Counter()
        return values | {f"skipped/{reason}": count for reason, count in skipped.items()}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count for the rates."""
        start = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - start

    def seconds_left(self, step: int) -> float:
        """Until the last step, at the speed so far."""
        # Since the start, not since the last report: pictures and evaluations come rarely.
        seconds_per_step = (time.perf_counter() - self.start) / (step - self.first_step)
        return seconds_per_step * (self.config.max_steps - step)

    def summary(self, step: int) -> str:
        return f"{step - self.first_step} steps in {time.perf_counter() - self.start:.0f} s"
