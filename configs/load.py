"""YAML files and command line -> a checked dataclass. Knows OmegaConf and no stage.

configs/emoji/flowtok.yaml configures the run runs/emoji/flowtok: `experiment_dir` is `runs_dir` and
the file's folder, `run_dir` adds the file's name, unless YAML or command line set them.
`base: FILE` (relative to the YAML) is read first and overridden. The command line has
`key.subkey=value`, the value as YAML, or as it is where the field is text. Paths may begin with ~.
Unknown keys, wrong types and impossible combinations raise ValueError in one line, naming the key,
the value and the nearest valid name.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import os.path
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")
structured = functools.cache(OmegaConf.structured)  # takes longer than to copy one, as merge does
HOME_PATH = re.compile(r"([\w-]+:|)(~[\w.-]*/.*)", re.DOTALL)  # ~/x, ~user/x, local-dir:~/x


class Parser(argparse.ArgumentParser):
    """Command lines whose errors end in one line as well."""

    def error(self, message: str):
        raise ValueError(f"command line: {message}; see --help")


def parse_stage_args(stage: type[T], description: str | None) -> T:
    """The config that a stage program's command line names: --config FILE key=value ...

    --print shows the resolved config and ends.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="a YAML of this stage")
    parser.add_argument("--print", action="store_true", help="show the resolved config and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    config = load_config(stage, args.config, args.overrides)
    if args.print:
        print(yaml.safe_dump(settable(config), sort_keys=False), end="")
        raise SystemExit
    return config


def load_config(stage: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """The checked config of one stage.

    stage: a dataclass with the fields `runs_dir`, `experiment_dir` and `run_dir` and a `check()`.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path)).parent.name
    names = {
        "experiment_dir": "${runs_dir}/" + folder,
        "run_dir": "${experiment_dir}/" + path.stem,
    }
    config = load_dataclass(stage, path, overrides, names)
    config.check()
    return config


def load_dataclass(
    schema: type[T],
    path: str | Path,
    overrides: list[str] | None = None,
    defaults: dict | None = None,
) -> T:
    """A dataclass from its own defaults, then `defaults`, the YAML and the command line.

    Raises:
        ValueError: an unknown key, a wrong type, what a `__post_init__` refuses.
    """
    path = Path(path)
    node = OmegaConf.merge(structured(schema), defaults or {})
    try:
        # Sources by rising rank, so that an error can say which of them it is of.
        changes = {str(path): read_yaml(path), "command line": parse_overrides(overrides, schema)}
        for origin, values in changes.items():
            refuse_derived(values, schema, origin)
            node = merge(node, values, origin)
        return build(schema, expand_home(OmegaConf.to_container(node, resolve=True)))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ValueError(f"{path}: {explain(error, schema)}") from error
    except RecursionError as error:
        raise ValueError(f"{path} or the command line is nested too deeply") from error


def merge(node: Any, values: Any, origin: str) -> Any:
    """A typed node with new values; the old one and they are used up."""
    try:
        return OmegaConf.unsafe_merge(node, values)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        schema = OmegaConf.get_type(node)
        raise ValueError(f"{origin}: {explain(error, schema)}") from error


# Sources


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """A YAML file merged over its `base:`, as an OmegaConf node."""
    path = path.resolve()
    if path in seen:
        circle = " -> ".join(str(p) for p in (*seen, path))
        raise ValueError(f"base: files refer to each other in a circle: {circle}")
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "no YAML"
        raise ValueError(f"config file {path} does not exist; in its folder: {found}")

    # Its own keys, without the interpolations resolved: what they name may come from the base.
    try:
        with path.open("rb") as file:  # YAML knows UTF-16, as PowerShell writes it, by its bytes
            node = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not OmegaConf.is_dict(node):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    base = node.pop("base", None)
    if base is None:
        return node
    if not isinstance(base, str):
        raise ValueError(f"{path}: base names one file, got {base}")
    return OmegaConf.merge(read_yaml(path.parent / base, (*seen, path)), node)


def parse_overrides(overrides: list[str] | None, schema: type) -> Any:
    """`key=value` strings -> an OmegaConf node."""
    texts = {key for key, field in all_fields(schema) if field.type is str}
    typed = []
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ValueError(f"command line: {item!r} is not of the form key=value")
        # Text in quotes, or YAML would cut a folder at " #" and read 20_1 as 201.
        if key in texts and not value.startswith(("'", '"')):
            value = json.dumps(value, ensure_ascii=False)
        typed.append(f"{key}={value}")
    try:
        return OmegaConf.from_dotlist(typed)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        given = " ".join(typed)
        raise ValueError(f"command line: cannot read {given}: {one_line(error)}") from error


def expand_home(value: Any) -> Any:
    """Nested values with the home folder for ~ in front of a path; local-dir:~/x is one, too."""
    if isinstance(value, dict):
        return {name: expand_home(part) for name, part in value.items()}
    if isinstance(value, list):
        return [expand_home(part) for part in value]
    if not isinstance(value, str) or not (match := HOME_PATH.fullmatch(value)):
        return value
    prefix, path = match.groups()
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise ValueError(f"{value}: there is no home folder {path.split('/')[0]}")
    return prefix + expanded


# Dataclasses and their fields


def build(schema: type[T], values: dict, prefix: str = "") -> T:
    """A dataclass and its parts from nested values."""
    # OmegaConf.to_object does the same, but an error of a check would not say of which section.
    arguments = dict(values)
    for field in dataclasses.fields(schema):
        part, value = part_of(field), values[field.name]
        name = f"{prefix}{field.name}."
        if part and is_mapping_of_parts(field):
            arguments[field.name] = {k: build(part, v, f"{name}{k}.") for k, v in value.items()}
        elif part and value is not None:
            arguments[field.name] = build(part, value, name)
    try:
        return schema(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def part_of(field: dataclasses.Field) -> type | None:
    """The dataclass in a field's type, as it is, in `| None` or in `dict[str, ...]`; else None."""
    kinds = [field.type, *get_args(field.type)]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def is_mapping_of_parts(field: dataclasses.Field) -> bool:
    """Whether a field is dict[str, DATACLASS]."""
    return getattr(field.type, "__origin__", None) is dict


def all_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """The fields of a dataclass and of its parts by dotted key; of a mapping's parts, none."""
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}", field
        part = part_of(field)
        if part and not is_mapping_of_parts(field) and not field.metadata.get("derived"):
            yield from all_fields(part, f"{prefix}{field.name}.")


def refuse_derived(given: Any, schema: type, origin: str) -> None:
    """Refuse values for fields that a program fills in from the text tower or an earlier run."""
    for key, field in all_fields(schema):
        source = field.metadata.get("derived")
        if source and is_given(given, key):
            raise ValueError(f"{origin}: {key} can't be set, it follows from {source}")


def is_given(node: Any, key: str) -> bool:
    """Whether an OmegaConf node has a dotted key, whatever its value."""
    # OmegaConf.select would resolve interpolations, and what they name may come from elsewhere.
    for name in key.split("."):
        if not OmegaConf.is_dict(node) or name not in node:
            return False
        node = node._get_node(name)
    return True


def valid_keys(schema: type) -> list[str]:
    """All dotted keys of a dataclass that may be set."""
    return [key for key, field in all_fields(schema) if not field.metadata.get("derived")]


def settable(config: Any) -> Any:
    """A dataclass as nested values, without the fields that follow from other runs."""
    if isinstance(config, dict):
        return {name: settable(value) for name, value in config.items()}
    if not dataclasses.is_dataclass(config):
        return config
    fields = [f for f in dataclasses.fields(config) if not f.metadata.get("derived")]
    return {f.name: settable(getattr(config, f.name)) for f in fields}


# Messages


def explain(error: Exception, schema: type) -> str:
    """OmegaConf's message in one line, with the key in front and the nearest key of all groups."""
    key = getattr(error, "full_key", "") or ""
    reason = str(error).splitlines()[0]
    # OmegaConf knows the neighbours of a key only.
    if isinstance(error, ConfigKeyError) and "Did you mean" not in reason and key:
        nearest = nearest_key(key, valid_keys(schema))
        reason += f". Did you mean: {nearest!r}?" if nearest else ""
    return f"{key}: {reason}" if key else reason


def nearest_key(name: str, valid: list[str]) -> str | None:
    """The key of any group that an unknown one was probably meant to be.

    By its last part: the same one elsewhere, its initials (lr: learning_rate), a similar spelling.
    """
    keys = defaultdict(list)  # by their last parts
    initials = defaultdict(list)
    for key in valid:
        last = key.rsplit(".", 1)[-1]
        keys[last].append(key)
        if "_" in last:
            initials["".join(word[:1] for word in last.split("_"))].append(key)
    wanted = name.rsplit(".", 1)[-1]
    candidates = keys.get(wanted) or initials.get(wanted)
    if not candidates:
        similar = difflib.get_close_matches(wanted, keys, n=1)
        candidates = keys[similar[0]] if similar else []
    likeness = {key: difflib.SequenceMatcher(None, name, key).ratio() for key in candidates}
    return max(candidates, key=likeness.get, default=None)


def one_line(error: Exception) -> str:
    """A message without its line breaks."""
    return " ".join(str(error).split())
