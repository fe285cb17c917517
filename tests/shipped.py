"""The YAML files that ship, and the stage that each configures."""

from pathlib import Path

from tiny_experiment import PROGRAMS

from configs.load import load_config

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/*.yaml"))


def stage_of(file):
    """The stage's name, by the file's: flowtok_512 configures stage flowtok."""
    stem = Path(file).stem
    return max((stage for stage in PROGRAMS if stem.startswith(stage)), key=len)


def load(file, *overrides):
    """A shipped config."""
    return load_config(PROGRAMS[stage_of(file)][0], ROOT / file, list(overrides))
