"""Runs the stages of experiments in order: train_flowtok.sh without the set-up of its environment.

    python -m scripts.run_experiment [EXPERIMENT ...] [key=value ...]

The header of train_flowtok.sh is the manual. What can be known is checked before the first stage
starts. Exit status: 2 after one line on what is wrong, 75 if a stage was asked to stop and did,
otherwise that of the program that failed.
"""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.run_experiment.processes import STOPPED_STATUS, Job, Runner, clean, find_job
from training.errors import exit_on_error


def main(words: Sequence[str]) -> int:
    """Run all stages, draw samples, list the results; returns the exit status."""
    runner = Runner()  # before torch is imported: it takes seconds, and a request to stop may come
    import torch

    from scripts.run_experiment import checks
    from scripts.run_experiment.stages import read_stages

    stages = read_stages(words, os.environ.get("STAGES", ""), Path("configs"))
    stages, skipped = checks.skip_unused_towers(stages)
    job = find_job(os.environ, torch.cuda.device_count(), count_cores())
    session = Session(words, job, runner, is_dry=os.environ.get("DRY_RUN", "0") != "0")
    checks.check_configs(stages, job.num_processes)
    if not session.is_dry:
        checks.check_inputs(stages)
    print(job, *skipped, sep="\n", flush=True)
    for stage in stages:
        if status := session.run_stage(stage):
            return status
    flows = [stage for stage in stages if stage.config.stage == "flowtok"]
    for stage in flows if job.machine_rank == 0 else []:
        if status := session.draw_samples(stage):
            return status
    if job.machine_rank == 0 and not session.is_dry:
        list_results(stages)
    return 0


@dataclass
class Session:
    """One command: what was typed, where it runs."""

    words: Sequence[str]
    job: Job
    runner: Runner
    is_dry: bool  # print the commands, run nothing

    def run_stage(self, stage) -> int:
        """Run one stage in all processes; the report in one. Returns the exit status."""
        environments = self.job.environments(os.environ)
        if stage.config.stage == "report":
            environments = [clean(os.environ)] * (self.job.machine_rank == 0)
        if self.runner.requests:
            print(f"asked to stop before stage {stage}. {self.go_on}")
            return STOPPED_STATUS
        print(f"== {stage}", flush=True)
        start = time.monotonic()
        status = self.run(f"stage {stage}", stage.command, environments)
        if not status and not self.is_dry:
            print(f"== {stage} took {time.monotonic() - start:.0f} s", flush=True)
        return status

    def draw_samples(self, stage) -> int:
        """Images or captions of a flow, unless they are newer than its checkpoints."""
        picture = picture_of(stage)
        checkpoints = Path(stage.config.run_dir) / "checkpoints"
        if picture.is_file() and not any(
            is_newer(path, picture) for path in checkpoints.rglob("*")
        ):
            print(f"{picture}: complete, nothing to do")
            return 0
        command = ["sample.py", "--run", stage.config.run_dir, "--output", str(picture)]
        return self.run("sample.py", command, [clean(os.environ)])

    def run(
        self, name: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]
    ) -> int:
        """Run a Python program, and say how to go on if it did not end well."""
        command = [sys.executable, *arguments]
        print(f"+ {shlex.join(command)}", flush=True)
        status = 0 if self.is_dry else self.runner.run(command, environments)
        if status == STOPPED_STATUS:
            print(f"{name} stopped. {self.go_on}", flush=True)
        elif status not in (0, 2):  # 2: its last line says what is wrong
            print(f"{name} failed with status {status}. {self.go_on}", file=sys.stderr, flush=True)
        return status

    @property
    def go_on(self) -> str:
        """What to type next."""
        return (
            f"To go on, run the same command again: bash train_flowtok.sh {shlex.join(self.words)}"
        )


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def picture_of(stage) -> Path:
    """Where the samples of a flow go: samples_512.png for flowtok_512."""
    suffix = stage.name.removeprefix("flowtok")
    return Path(stage.config.experiment_dir) / f"samples{suffix}.png"


def is_newer(path: Path, other: Path) -> bool:
    """Whether a file was written after another one."""
    return path.stat().st_mtime > other.stat().st_mtime


def list_results(stages) -> None:
    """Print what the stages left."""
    paths = [picture_of(stage) for stage in stages]
    paths += [Path(stage.config.experiment_dir) / "report.json" for stage in stages]
    paths += [Path(stage.config.run_dir) for stage in stages]
    print("Results:")
    for path in dict.fromkeys(paths):
        if path.exists():
            print(f"  {path}")


if __name__ == "__main__":
    sys.exit(exit_on_error(lambda: main(sys.argv[1:])))
