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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from scripts.run_experiment.processes import Runner, clean, count_cores, find_job
from scripts.run_experiment.stages import WITHOUT_NETWORK, Stage, read_stages
from training.errors import STOPPED_STATUS, exit_on_error


def main(words: Sequence[str]) -> None:
    """Run all stages, draw samples, list the results.

    Raises:
        ValueError: what can't work.
        SystemExit: with the status of the first program that did not end well.
    """
    if "-h" in words or "--help" in words:
        print(__doc__)
        return
    runner = Runner()  # before torch is imported: it takes seconds, and a request to stop may come
    import torch

    from scripts.run_experiment import checks

    # What runs where
    stages = read_stages(words, os.environ.get("STAGES", ""), Path("configs"))
    stages, skipped = checks.skip_stages(stages)
    job = find_job(
        os.environ, torch.cuda.device_count(), count_cores(), checks.cpu_processes(stages)
    )
    is_dry = os.environ.get("DRY_RUN", "0") != "0"
    checks.check_configs(stages, job.num_processes)
    if not is_dry:
        checks.check_inputs(stages)
    print(job, *skipped, sep="\n", flush=True)

    # What takes one process is for the first machine.
    again = f"To go on, run the same command again: bash train_flowtok.sh {shlex.join(words)}"
    session = Session(runner, again, is_dry)
    is_first = job.machine_rank == 0
    alone = [clean(os.environ)]
    for stage in stages:
        if stage.config.stage not in WITHOUT_NETWORK:
            session.run_stage(stage, job.environments(os.environ))
        elif is_first:
            session.run_stage(stage, alone)
    for stage in stages:
        if is_first and stage.config.stage == "flowtok":
            picture = picture_of(stage)
            if checks.is_newer(picture, stage.config.run_dir):
                print(f"{picture}: complete, nothing to do")
            else:
                command = ["sample.py", "--run", stage.config.run_dir, "--output", str(picture)]
                session.run("sample.py", command, alone)
    if is_first and not is_dry:
        list_results(stages)


@dataclass
class Session:
    """One command of a user's, and how its programs are run."""

    runner: Runner
    again: str  # how to go on
    is_dry: bool  # print the commands, run nothing

    def run_stage(self, stage: Stage, environments: Sequence[Mapping[str, str]]) -> None:
        """Run one stage, a process in each environment."""
        if self.runner.requests:
            print(f"asked to stop before stage {stage}. {self.again}")
            raise SystemExit(STOPPED_STATUS)
        print(f"== {stage}", flush=True)
        start = time.monotonic()
        self.run(f"stage {stage}", stage.command, environments)
        if not self.is_dry:
            print(f"== {stage} took {time.monotonic() - start:.0f} s", flush=True)

    def run(
        self, name: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]
    ) -> None:
        """Run a Python program.

        Raises:
            SystemExit: with its status, after words on how to go on.
        """
        command = [sys.executable, *arguments]
        print(f"+ {shlex.join(command)}", flush=True)
        status = 0 if self.is_dry else self.runner.run(command, environments)
        if status == STOPPED_STATUS:
            print(f"{name} stopped. {self.again}", flush=True)
        elif status not in (0, 2):  # 2: its last line says what is wrong
            print(f"{name} failed with status {status}. {self.again}", file=sys.stderr, flush=True)
        if status:
            raise SystemExit(status)


def picture_of(stage: Stage) -> Path:
    """Where the samples of a flow go: samples_512.png for flowtok_512."""
    suffix = stage.name.removeprefix("flowtok")
    return Path(stage.config.experiment_dir) / f"samples{suffix}.png"


def list_results(stages: Sequence[Stage]) -> None:
    paths = [picture_of(stage) for stage in stages]
    paths += [Path(stage.config.experiment_dir) / "report.json" for stage in stages]
    paths += [Path(stage.config.run_dir) for stage in stages]
    print("Results:")
    for path in dict.fromkeys(paths):
        if path.exists():
            print(f"  {path}")


if __name__ == "__main__":
    exit_on_error(lambda: main(sys.argv[1:]))
