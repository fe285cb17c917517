"""YAML (+ `base:`) + command line -> a checked dataclass. Prints the resolved config as a program:

    python -m configs.load configs/demo/flowtok.yaml training.max_steps=100

`base: FILE` (relative to the YAML) is read first and overridden. Command-line values are `key.subkey=value`, as YAML.
Unknown keys, wrong types and impossible combinations raise ValueError, naming the key and the nearest valid one.
"""

import argparse
import dataclasses
import difflib
import os.path
import sys
import traceback
from pathlib import Path
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed import DistError

from configs.schema import STAGES, StageConfig, check

ROOT = Path(__file__).resolve().parents[1]
LONGEST_MESSAGE = 5000  # characters; a hostile name or value in it may be longer


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """A YAML file merged over its `base:`, as an OmegaConf node."""
    path = path.resolve()
    if path in seen:
        raise ValueError(
            f"base: files refer to each other in a circle: {' -> '.join(str(p) for p in (*seen, path))}"
        )
    if not path.is_file():
        folder = path.parent
        names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
        raise ValueError(
            f"config file {path} does not exist; in its folder: {', '.join(sorted(names)) or 'no YAML'}"
        )
    try:
        node = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not OmegaConf.is_dict(node):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    base = node.pop("base", None)
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: base names one file, got {base}")
    return OmegaConf.merge(read_yaml(path.parent / base, (*seen, path)), node) if base else node


def one_line(error: Exception) -> str:
    """A parser's message without its line breaks."""
    return " ".join(str(error).split())


def valid_keys(schema: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass."""
    keys = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.type):
            keys += valid_keys(f.type, f"{prefix}{f.name}.")
    return keys


def nearest_key(name: str, valid: list[str]) -> str | None:
    """The valid key that an unknown one was probably meant to be, or None.

    By its last part: the same one elsewhere, the initials of one (lr: learning_rate), a similar spelling. Among several
    the one most like the whole name.
    """

    def leaf(key: str) -> str:
        return key.rsplit(".", 1)[-1]

    def initials(key: str) -> str:
        return "".join(word[:1] for word in leaf(key).split("_"))

    similar = difflib.get_close_matches(leaf(name), {leaf(key) for key in valid}, n=1)
    candidates = (
        [key for key in valid if leaf(key) == leaf(name)]
        or [key for key in valid if "_" in leaf(key) and initials(key) == leaf(name)]
        or [key for key in valid if leaf(key) in similar]
    )
    return max(
        candidates, key=lambda key: difflib.SequenceMatcher(None, name, key).ratio(), default=None
    )


def is_list_or_reference(node: Any, key: str) -> bool:
    """Whether the value of a key is a list, or ${...} for one that is only known after merging."""
    return OmegaConf.is_list(node._get_node(key)) or OmegaConf.is_interpolation(node, key)


def check_keys(node: Any, schema: type, origin: str) -> None:
    """Refuse keys that the schema lacks, naming the nearest valid one."""
    valid = valid_keys(schema)

    def check_group(node: Any, schema: type, prefix: str) -> None:
        fields = {f.name: f.type for f in dataclasses.fields(schema)}
        for key in node:
            name = f"{prefix}{key}"
            if key not in fields:
                near = nearest_key(name, valid)
                hint = f"did you mean {near!r}?" if near else f"valid: {', '.join(fields)}"
                raise ValueError(f"{origin}: unknown key {name!r}; {hint}")
            if dataclasses.is_dataclass(fields[key]):
                child = node._get_node(key)
                if not OmegaConf.is_dict(child):
                    raise ValueError(
                        f"{origin}: {name!r} is a group of keys ({', '.join(valid_keys(fields[key]))})"
                    )
                check_group(child, fields[key], f"{name}.")
            elif get_origin(fields[key]) is list and not is_list_or_reference(node, key):
                raise ValueError(
                    f"{origin}: {name!r} is a list, as in {name}=[first,second]; got {node[key]!r}"
                )

    check_group(node, schema, "")


def parse_overrides(overrides: list[str]) -> Any:
    """`key=value` strings -> an OmegaConf node."""
    for item in overrides:
        if "=" not in item.lstrip("=") or item.startswith("="):
            raise ValueError(f"command line: {item!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist(overrides)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            f"command line: cannot read {' '.join(overrides)}: {one_line(error)}"
        ) from error


def load_config(
    path: str | Path, overrides: list[str] | None = None, stage: str | None = None
) -> StageConfig:
    """Read, merge, type and check one stage's config.

    Args:
        path: the YAML file, or a run folder's saved config.yaml.
        overrides: command-line `key=value` strings.
        stage: the stage that the caller runs; another one in the file is an error.

    Raises:
        ValueError: anything wrong, in one line.
    """
    try:
        return _load(Path(path), overrides or [], stage)
    except RecursionError as error:
        raise ValueError(f"{path} or the command line is nested too deeply") from error


def _load(path: Path, overrides: list[str], stage: str | None) -> StageConfig:
    node = read_yaml(path)
    name = node.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        raise ValueError(f"{path}: key 'stage' is {name!r}; valid: {', '.join(STAGES)}")
    if stage is not None and name != stage:
        raise ValueError(f"{path} configures stage {name!r}, this program runs stage {stage!r}")
    schema = STAGES[name]
    changes = parse_overrides(overrides)
    check_keys(node, schema, str(path))
    check_keys(changes, schema, "command line")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), node, changes)
        values = without_detours(
            OmegaConf.to_container(merged, resolve=True), f"{merged.experiment_dir}/../"
        )
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", "") or ""
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: {key + ': ' if key else ''}{reason}") from error
    if config.stage != name:
        raise ValueError(
            f"command line: stage={config.stage}, but {path} configures stage {name!r}"
        )
    check(config)
    return config


def without_detours(value: Any, prefix: str) -> Any:
    """Nested values in which "runs/mine/../other" is "runs/other": there may be no runs/mine yet, or it is a link."""
    if isinstance(value, dict):
        return {key: without_detours(item, prefix) for key, item in value.items()}
    if isinstance(value, list):
        return [without_detours(item, prefix) for item in value]
    return os.path.normpath(value) if isinstance(value, str) and value.startswith(prefix) else value


def resolved(config: StageConfig) -> dict:
    """Plain nested values of a config, as saved in the run folder."""
    return dataclasses.asdict(config)


def default_values(config: StageConfig) -> dict:
    """Plain nested values of a config of the same stage in which nothing was set."""
    return resolved(type(config)())


def parse_stage_args(stage: str, description: str | None) -> StageConfig:
    """Command line of a stage script: --config FILE key=value ...; a bad config ends with one line and status 2."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of this stage")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that override the file's"
    )
    args = parser.parse_args()
    return exit_on_error(lambda: load_config(args.config, args.overrides, stage))


def exit_on_error(action):
    """Run `action`; a user's error, numbers gone wild, a failing disk or group end the program: a line and status 2."""
    try:
        return action()
    except (ValueError, FloatingPointError, OSError, DistError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(filter(is_ours, reversed(frames)), frames[-1])
        message = escape(one_line(error)[:LONGEST_MESSAGE]) or type(error).__name__
        print(
            f"error: {message}\n  (raised at {Path(frame.filename).name}:{frame.lineno})",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a line of a traceback is in this repository, not in a package."""
    path = Path(frame.filename)
    return ROOT in path.parents and "site-packages" not in path.parts


def escape(text: str) -> str:
    """What data or an argument may have in it and a terminal would obey, or can't print, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def main() -> None:
    """Print the resolved config of a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = exit_on_error(lambda: load_config(args.file, args.overrides))
    print(yaml.safe_dump(resolved(config), sort_keys=False), end="")


if __name__ == "__main__":
    main()
