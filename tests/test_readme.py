"""README.md: its commands refer to what exists and parse, and its file map is the repository."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.run_experiment.stages import PROGRAMS, load_stage, program_of, read_stages

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGES = ("configs", "data", "eval", "modeling", "scripts", "training")


# Commands


def fenced_blocks(text, language):
    """Contents of the fenced blocks of a language; "" for those without."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """Words of each command of the bash blocks, comments removed, continued lines joined."""
    lines = "\n".join(fenced_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def split_variables(words):
    """Leading NAME=VALUE words as a dict, and the others."""
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], flags=re.DOTALL):
        name, _, variables[name] = words[0].partition("=")
        words = words[1:]
    return variables, words


class Parsed(Exception):
    """Carries what a program's argparse made of its arguments, in place of running it."""


def parse_arguments(path, arguments, monkeypatch):
    """Start a program up to its parse_args()."""
    original = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, parse)
        patch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(Parsed) as caught:
            runpy.run_path(str(path), run_name="__main__")
    return caught.value.args[0]


def check_python(words, monkeypatch):
    """Check `[-m] PROGRAM ARGUMENTS`: the program exists, its argparse takes the arguments, its config loads."""
    if words[0] in ("-m", "--module"):
        path, arguments = ROOT / (words[1].replace(".", "/") + ".py"), words[2:]
    else:
        path, arguments = ROOT / words[0], words[1:]
    assert path.is_file(), f"{path} does not exist"
    parsed = parse_arguments(path, arguments, monkeypatch)
    if not (
        hasattr(parsed, "overrides") and (hasattr(parsed, "config") or hasattr(parsed, "file"))
    ):
        return
    file = ROOT / (parsed.config if hasattr(parsed, "config") else parsed.file)
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert module == program_of(file.stem)[0] or module not in dict(PROGRAMS.values())
    load_stage(file, parsed.overrides)


def check_accelerate(words, monkeypatch):
    """Check `[OPTIONS] [--module] PROGRAM ARGUMENTS` of accelerate's launcher."""
    from accelerate.commands.launch import launch_command_parser

    launch = launch_command_parser().parse_args(words)
    program = ["-m", launch.training_script] if launch.module else [launch.training_script]
    check_python([*program, *launch.training_script_args], monkeypatch)


def check_train_flowtok(words, variables):
    """Check that train_flowtok.sh has stages to run, and that it has these variables."""
    manual = (ROOT / "train_flowtok.sh").read_text()
    assert all(name in manual for name in variables)
    assert read_stages(words, variables.get("STAGES", ""), ROOT / "configs")


def check_command(words, monkeypatch):
    """AssertionError, ValueError or SystemExit: the command cannot run."""
    variables, words = split_variables(words)
    if words[:2] == ["bash", "train_flowtok.sh"]:
        check_train_flowtok(words[2:], variables)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    elif words[0] == "python":
        check_python(words[1:], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        check_accelerate(words[2:], monkeypatch)


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/recipe.md"])
def test_every_command_of_the_documentation_would_run(page, monkeypatch):
    found = commands((ROOT / page).read_text())
    assert found
    for words in found:
        check_command(words, monkeypatch)


def test_the_readme_shows_how_to_train_sample_test_and_print_a_config():
    text = "\n".join(fenced_blocks(README.read_text(), "bash"))
    for program in (
        "bash train_flowtok.sh",
        "python sample.py",
        "bash scripts/test.sh",
        "--print",
    ):
        assert program in text


@pytest.mark.parametrize(
    "command",
    [
        "bash train_flowtok.sh demos",
        "bash train_flowtok.sh demo training.max_step=3",
        "STAGES=tokens bash train_flowtok.sh demo flowtok.training.max_steps=3",
        "python sampel.py --run runs/demo",
        "python sample.py --run runs/demo --promts x",
        "python train_flowtok.py --config configs/demo/flowtok.yaml training.lr=1",
        "python train_flowtok.py --config configs/demo/tokenizer.yaml",
        "accelerate launch train_tokenizer.py --config configs/demo/tokenizers.yaml",
        "accelerate launch --num_proceses 2 train_tokenizer.py --config configs/demo/tokenizer.yaml",
        "accelerate launch --module scripts.encode_token --config configs/demo/tokens.yaml",
        "bash scripts/tests.sh",
    ],
)
def test_a_command_that_cannot_run_is_found(command, monkeypatch):
    ((words),) = commands(f"```bash\n{command}\n```\n")
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check_command(words, monkeypatch)


def test_commands_are_read_from_bash_blocks_without_comments():
    text = "```bash\n# why\nA=1 python x.py \\\n  --b 'c d'  # more\n```\n```\npython y.py\n```\n"
    assert commands(text) == [["A=1", "python", "x.py", "--b", "c d"]]


# File map


def file_map(text):
    """Paths at the line starts of the block under '## File map'."""
    section = text.split("\n## File map\n")[1].split("\n## ")[0]
    (block,) = fenced_blocks(section, "")
    return [line.split()[0] for line in block.splitlines() if line.strip()]


def repository_files():
    """Files of the repository, tracked or to be: not those that .gitignore names."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")  # an unpacked archive
    return [name for name in result.stdout.splitlines() if (ROOT / name).exists()]


def expand(paths):
    """The paths, those with a * as the folders that they stand for; at least one each."""
    expanded = []
    for path in paths:
        matches = (
            [f"{match.relative_to(ROOT)}/" for match in ROOT.glob(path.rstrip("/"))]
            if "*" in path
            else [path]
        )
        assert matches, path
        expanded += matches
    return expanded


def test_every_path_of_the_file_map_exists_and_stands_there_once():
    paths = file_map(README.read_text())
    assert len(set(paths)) == len(paths)
    for path in expand(paths):
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_every_top_level_entry_module_and_script_is_in_the_file_map():
    paths, files = file_map(README.read_text()), repository_files()
    top = {name.split("/")[0] for name in files} - {"README.md", ".gitignore"}
    assert not top - {path.split("/")[0] for path in paths}
    modules = {
        name
        for name in files
        if name.split("/")[0] in PACKAGES and Path(name).suffix in (".py", ".sh")
    }
    missing = {name for name in modules if name not in paths and Path(name).name != "__init__.py"}
    assert not missing
    experiments = {
        f"{Path(name).parent}/"
        for name in files
        if name.startswith("configs/") and name.endswith(".yaml")
    }
    assert not experiments - set(expand(paths))


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing
