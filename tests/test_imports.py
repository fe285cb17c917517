"""Imports point one way: programs -> eval -> training -> modeling | data; read with ast."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "data", "eval", "modeling", "research", "scripts", "tests", "training")
PROGRAMS = (
    *("train_flowtok", "train_next_scale", "train_reader", "train_text_decoder"),
    *("train_text_projector", "train_tokenizer"),
)
ENTRY_POINTS = ("sample", *PROGRAMS)
OURS = {*FOLDERS, *ENTRY_POINTS}
# What a file of each folder may import of ours. Entry points, scripts, research, tests: everything.
ALLOWED = {
    "modeling": {"modeling"},
    "data": {"data"},
    "training": {"training", "modeling", "data"},
    "eval": {"eval", "modeling", "data", "training"},
    "configs": {"configs"},
}
OPEN_CLIP_USERS = ("modeling/clip_weights.py", "modeling/text_encoder.py", "tests/conftest.py")


@cache
def sources():
    """Path from the root -> text, of all our Python files."""
    paths = [
        *ROOT.glob("*.py"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def imported_modules(nodes):
    """(dotted name, is it `import x`, not `from x import y`) of the imports among syntax nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), False


def full_name(node):
    """The module of `from x import y`; only modeling/ imports relatively, and has no folders."""
    return f"modeling.{node.module}" if node.level else node.module


def run_on_import(tree):
    """All nodes outside functions: what importing the file executes."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            waiting += ast.iter_child_nodes(node)


def faults(path, text):
    """What is wrong with the imports of one file, as short strings."""
    tree, folder = ast.parse(text), path.split("/")[0]
    allowed = ALLOWED.get(folder, OURS)
    if folder == "eval" and "\nif __name__ ==" in text:
        allowed = {*allowed, "configs"}  # the entry points among the evaluations read configs
    found = []
    for name, is_plain in imported_modules(ast.walk(tree)):
        top = name.split(".")[0]
        # The wheel calls modeling/ another name (pyproject.toml).
        if name.startswith(".") and folder != "modeling":
            found.append("relative import")
        if top == folder == "modeling":
            found.append("absolute import")
        if top in OURS - allowed:
            found.append(f"{folder} imports {top}")
        if top == "eval" and is_plain:
            found.append("import eval")  # would hide the builtin
        if top == "open_clip" and path not in OPEN_CLIP_USERS:
            found.append("open_clip")
    if any(name.split(".")[0] == "wandb" for name, _ in imported_modules(run_on_import(tree))):
        found.append("wandb on import")
    return found


def test_imports_point_one_way():
    found = {path: faults(path, text) for path, text in sources().items()}
    assert {path: names for path, names in found.items() if names} == {}


# Re-exports: a name is imported from the file that defines it, or the arrows say nothing


@cache
def defined_names(text):
    """What a file defines at its top level, also under `if` and `try`."""
    names, waiting = set(), list(ast.parse(text).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            waiting += ast.iter_child_nodes(node)
    return names


def re_exports(text, files):
    """(module, name) of what a file imports from a file of ours that does not define it."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        path = full_name(node).replace(".", "/")
        source = files.get(f"{path}.py") or files.get(f"{path}/__init__.py")
        if source is not None:
            for alias in node.names:
                is_file = f"{path}/{alias.name}.py" in files
                if not is_file and alias.name not in defined_names(source):
                    yield full_name(node), alias.name


def test_names_are_imported_from_where_they_are_defined():
    found = {path: list(re_exports(text, sources())) for path, text in sources().items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_file_is_read():
    found = set(sources())
    assert {*OPEN_CLIP_USERS, "eval/report.py", "tests/test_imports.py"} <= found
    assert {f"{name}.py" for name in ENTRY_POINTS} == {name for name in found if "/" not in name}
