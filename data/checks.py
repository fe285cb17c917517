"""Checks of config fields: a message names the field, what was given and what is expected."""

from collections.abc import Iterator
from contextlib import contextmanager


def check_fields(config: object, **expected: tuple[bool, str]) -> None:
    """Refuse the first field that does not hold; expected: field=(whether it holds, what is expected).

    Raises:
        ValueError: naming the field and its value.
    """
    for name, (holds, meaning) in expected.items():
        if not holds:
            raise ValueError(f"{name}: given {getattr(config, name)!r}, expected {meaning}")


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Put the name of a part of a config in front of what its own check says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None
