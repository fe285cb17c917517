"""The YAML files that ship, each with the config of its stage."""

from pathlib import Path

from scripts.run_experiment.stages import load_stage

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/*.yaml"))


def load(file, *overrides):
    """A shipped config."""
    return load_stage(ROOT / file, overrides)
