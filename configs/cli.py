"""The command line of the programs: a stage's config, and errors that end in one line."""

import argparse
import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from configs.launchers import report_error
from configs.load import load_config, one_line

ROOT = Path(__file__).resolve().parents[1]
MAX_MESSAGE = 5000  # characters; a hostile name or value may be longer

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Command lines whose errors end in one line as well."""

    def error(self, message: str):
        raise ValueError(f"command line: {message}; see --help")


def parse_stage_args(stage: type[T], description: str | None) -> T:
    """The config that a stage program's command line names: --config FILE key=value ...

    --print shows the resolved config and ends. A bad config ends with one line and status 2.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="a YAML of this stage")
    parser.add_argument("--print", action="store_true", help="show the resolved config and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = exit_on_error(parser.parse_intermixed_args)
    config = exit_on_error(lambda: load_config(stage, args.config, args.overrides))
    if args.print:
        print(yaml.safe_dump(settable(config), sort_keys=False), end="")
        raise SystemExit
    return config


def settable(config: Any) -> Any:
    """A dataclass as nested values, without the fields that follow from other runs."""
    if isinstance(config, dict):
        return {name: settable(value) for name, value in config.items()}
    if not dataclasses.is_dataclass(config):
        return config
    fields = [f for f in dataclasses.fields(config) if not f.metadata.get("derived")]
    return {f.name: settable(getattr(config, f.name)) for f in fields}


def exit_on_error(action: Callable):
    """Run `action`; an error that is the user's, the data's or a machine's ends with one line.

    Those are ValueError, FloatingPointError (numbers gone wild) and OSError (disks, processes).
    The exit status is 2; of several processes with the same error, one prints it.
    """
    try:
        return action()
    except (ValueError, FloatingPointError, OSError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(filter(is_ours, reversed(frames)), frames[-1])
        message = printable(one_line(error)[:MAX_MESSAGE]) or type(error).__name__
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        report_error(f"error: {message} ({place})")
        raise SystemExit(2) from None


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a line of a traceback is in this repository, not in a package."""
    path = Path(frame.filename)
    return ROOT in path.parents and "site-packages" not in path.parts


def printable(text: str) -> str:
    """Data or arguments with escapes for what a terminal would obey or can't print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
