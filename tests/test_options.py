"""scripts/options.py: docs/options.md is fresh; a row says all that is known of a field."""

from dataclasses import dataclass, field
from typing import Literal

from scripts import options


@dataclass
class Part:
    size: int = 3  # pixels


@dataclass
class Schema:
    # What it is.
    # And why.
    name: str = ""  # of the thing
    kind: Literal["a", "b"] = "a"
    parts: dict[str, Part] = field(default_factory=dict)  # by name
    part: Part = field(default_factory=lambda: Part(size=4))
    width: int = field(default=1, metadata={"derived": "the tokenizer"})
    maybe: Part | None = None


def test_the_page_is_what_the_program_writes():
    assert options.PAGE.read_text() == options.build_page()


def test_comments_above_and_beside_a_field_are_its_meaning():
    assert options.rows_of(Schema) == [
        ("`name`", "str", '`""`', "What it is. And why. of the thing"),
        ("`kind`", "`a` or `b`", '`"a"`', ""),
        ("`parts`", "sections by name", "`{}`", "by name"),
        ("`parts.NAME.size`", "int", "`3`", "pixels"),
        ("`part.size`", "int", "`4`", "pixels"),
        ("`maybe`", "section or null", "`null`", ""),
        ("`maybe.size`", "int", "`3`", "pixels"),
    ]
