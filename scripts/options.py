"""Write docs/options.md: every key of every stage, with type, default and meaning.

    python -m scripts.options

The keys are the fields of the stages' dataclasses, the meanings are the comments above and beside
them. tests/test_options.py fails where the page is not what this writes.
"""

import ast
import dataclasses
import inspect
import io
import json
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from configs.load import is_mapping_of_parts, part_of
from data.files import write_text
from eval.programs import build_parser, markdown_table
from scripts.run_experiment.stages import PROGRAMS, stage_class
from training.stage import StageConfig, TrainedStage

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
INTRODUCTION = """# Options

What a stage's YAML and command line can set; `key.subkey=value` on the command line. Written by

```bash
python -m scripts.options
```

from the dataclasses and the comments beside their fields. Sizes that follow from the text tower or
an earlier run can't be set and are left out. NAME stands for a name of your choice.
"""


def build_page() -> str:
    tables = {
        "All stages": rows_of(StageConfig),
        "Stages with training": rows_of(TrainedStage),
    }
    tables |= {f"Stage {stage}": rows_of(stage_class(stage)) for stage in PROGRAMS}
    page, seen = INTRODUCTION, set()
    for title, rows in tables.items():
        table = [("key", "type", "default", "meaning"), *(row for row in rows if row not in seen)]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in table]
        page += f"\n## {title}\n\n{markdown_table(cells)}"
        # What stages share is said once.
        if not title.startswith("Stage "):
            seen |= {*rows}
    return page


def rows_of(schema: type, prefix: str = "", part: Any = None) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each field of a dataclass and its parts.

    part: the dataclass's values in another one, where they are not its defaults.
    """
    # A derived field follows from another stage: it can't be set.
    rows, meanings = [], dict(read_comments(schema))
    for field in dataclasses.fields(schema):
        if field.metadata.get("derived"):
            continue
        key, inner = f"{prefix}{field.name}", part_of(field)
        default = field.default  # MISSING: it must be given
        if part:
            default = getattr(part, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        is_part = dataclasses.is_dataclass(default)
        if not is_part:
            shown = "" if default is dataclasses.MISSING else f"`{json.dumps(default)}`"
            rows.append((f"`{key}`", type_name(field), shown, meanings[field.name]))
        if inner and is_mapping_of_parts(field):
            rows += rows_of(inner, f"{key}.NAME.")
        elif inner:
            rows += rows_of(inner, f"{key}.", default if is_part else None)
    return rows


def type_name(field: dataclasses.Field) -> str:
    """What may be given, in words."""
    if part_of(field):
        return "sections by name" if is_mapping_of_parts(field) else "section or null"
    if get_origin(field.type) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(field.type))
    return str(field.type) if get_args(field.type) else field.type.__name__


def read_comments(schema: type) -> Iterator[tuple[str, str]]:
    """(name, comments above it and beside it) of each field, inherited ones first."""
    for base in reversed([base for base in schema.__mro__ if dataclasses.is_dataclass(base)]):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                # Lines of comments alone, upwards to the statement before.
                first = node.lineno
                while first - 1 in comments and comments[first - 1].line.lstrip().startswith("#"):
                    first -= 1
                own = [comments[n] for n in range(first, node.end_lineno + 1) if n in comments]
                yield node.target.id, " ".join(t.string.removeprefix("# ") for t in own)


if __name__ == "__main__":
    build_parser(__doc__).parse_args()
    write_text(build_page(), PAGE)
    print(PAGE)
