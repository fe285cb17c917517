"""README.md and docs/: their commands parse and name what exists, their links lead somewhere."""

import argparse
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from configs.load import load_dataclass, valid_keys
from eval.protocol import Protocol, protocol_file
from scripts.run_experiment.stages import PROGRAMS, load_stage, program_of, read_stages

ROOT = Path(__file__).parents[1]
PAGES = sorted(["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))])
SHELL = {"source", "pip", "python3", "mkdir", "mv"}  # what pages use besides our programs


def read_commands(text):
    """Words of each command of the bash blocks; comments removed, lines joined, && split."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def split_variables(words):
    """Leading NAME=VALUE words as a dict, and the others."""
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words[0].partition("=")
        words = words[1:]
    return variables, words


class Parsed(Exception):
    """Carries what a program's argparse made of its arguments, in place of running it."""


def parse_arguments(path, arguments, monkeypatch):
    """Start a program up to its parse_args()."""

    def stop_after(original):
        def parse(*args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr("os.path.isdir", lambda path: True)  # folders of the reader's
                raise Parsed(original(*args, **kwargs))

        return parse

    parser = argparse.ArgumentParser
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(parser, name, stop_after(getattr(parser, name)))
        patch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(Parsed) as caught:
            runpy.run_path(str(path), run_name="__main__")
    return caught.value.args[0]


def check_python(words, monkeypatch):
    """`[-m] PROGRAM ARGUMENTS`: the program exists, its argparse takes them, its config loads.

    Returns the config's file, if there is one, in a list.
    """
    if words[0] in ("-m", "--module"):
        path, arguments = ROOT / (words[1].replace(".", "/") + ".py"), words[2:]
    else:
        path, arguments = ROOT / words[0], words[1:]
    assert path.is_file(), f"{path} does not exist"
    parsed = parse_arguments(path, arguments, monkeypatch)
    overrides = getattr(parsed, "overrides", [])
    if getattr(parsed, "protocol", None):
        load_dataclass(Protocol, protocol_file(parsed.protocol), overrides)
    elif file := getattr(parsed, "config", None) or (
        "overrides" in parsed and getattr(parsed, "file", None)
    ):
        assert (ROOT / file).is_file(), f"{file} does not exist"
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        programs = {name for name, _ in PROGRAMS.values()}
        assert module not in programs or module == program_of(Path(file).stem)[0]
        load_stage(ROOT / file, overrides)
        return [ROOT / file]
    return []


def check_command(words, monkeypatch):
    """The configs that a command runs; AssertionError, ValueError, SystemExit: it cannot run."""
    variables, words = split_variables(words)
    if words[:2] == ["bash", "train_flowtok.sh"]:
        manual = (ROOT / "train_flowtok.sh").read_text()
        assert all(name in manual for name in variables)
        stages = read_stages(words[2:], variables.get("STAGES", ""), ROOT / "configs")
        return [stage.file for stage in stages]
    elif words[0] in ("bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    elif words[0] == "python":
        return check_python(words[1:], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        program = ["-m"] * bool(launch.module) + [launch.training_script]
        return check_python([*program, *launch.training_script_args], monkeypatch)
    else:
        assert words[0] in SHELL, f"{words[0]}: unknown program"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_would_run(page, monkeypatch):
    commands = read_commands((ROOT / page).read_text())
    assert commands
    for words in commands:
        check_command(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [name for name in targets if "://" not in name and not (path.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/recipe.md"])
def test_named_files_exist(page):
    """Those of our folders in backticks; the recipe also names some of a commit."""
    folders = "configs|data|eval|modeling|research|scripts|tests|training"
    pattern = rf"`((?:{folders})/[a-z\d_/.]+\.\w+|(?:train_|sample)\w*\.(?:py|sh))`"
    names = re.findall(pattern, (ROOT / page).read_text())
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/recipe.md"])
def test_named_config_keys_exist(page):
    """`section.key` and `section.key=value` in backticks, with or without a stage in front."""
    stages = [getattr(import_module(module), name) for module, name in PROGRAMS.values()]
    valid = {key for stage in [*stages, Protocol] for key in valid_keys(stage)}
    sections = {key.split(".")[0] for key in valid if "." in key}
    pattern = r"`([a-z_]+(?:\.[a-z\d_]+)+)(?:[=:][^`]*)?`"
    names = [name for name in re.findall(pattern, (ROOT / page).read_text()) if ".json" not in name]
    unknown = {name for name in names if name.split(".")[0] in sections} - valid
    assert not {name for name in unknown if name.split(".", 1)[1] not in valid}
