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
from collections.abc import Sequence
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
    # A request to stop may come while torch is imported, which takes seconds.
    runner = Runner()
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

    def run(name: str, arguments: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        command = [sys.executable, *arguments]
        print(f"+ {shlex.join(command)}", flush=True)
        end_unless_done(name, 0 if is_dry else runner.run(command, environments), words)

    # What takes one process is for the first machine.
    is_first = job.machine_rank == 0
    alone = [clean(os.environ)]
    for stage in stages:
        takes_one = stage.config.stage in WITHOUT_NETWORK
        if takes_one and not is_first:
            continue
        if runner.requests:
            end_unless_done("train_flowtok.sh", STOPPED_STATUS, words)
        print(f"== {stage}", flush=True)
        start = time.monotonic()
        run(f"stage {stage}", stage.command, alone if takes_one else job.environments(os.environ))
        if not is_dry:
            print(f"== {stage} took {time.monotonic() - start:.0f} s", flush=True)
    if not is_first:
        return

    # The pictures of a flow that has been trained further since are drawn again.
    for stage in stages:
        if stage.config.stage == "flowtok":
            picture = picture_of(stage)
            run_dir = stage.config.run_dir
            if checks.is_newer(picture, run_dir):
                print(f"{picture}: complete, nothing to do")
            else:
                run("sample.py", ["sample.py", "--run", run_dir, "--output", str(picture)], alone)
    if not is_dry:
        list_results(stages)


def end_unless_done(name: str, status: int, words: Sequence[str]) -> None:
    """End this program with the status of one that has not done its work, and say how to go on."""
    again = f"To go on, run the same command again: bash train_flowtok.sh {shlex.join(words)}"
    if status == STOPPED_STATUS:
        print(f"{name} stopped. {again}", flush=True)
    elif status not in (0, 2):  # 2: its last line says what is wrong
        print(f"{name} failed with status {status}. {again}", file=sys.stderr, flush=True)
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
