"""Checks of config fields."""


def check_fields(config: object, **expected: tuple[bool, str]) -> None:
    """Refuse the first field that does not hold; expected: field=(whether it holds, what is expected).

    Raises:
        ValueError: naming the field, what was given and what is expected.
    """
    for name, (holds, meaning) in expected.items():
        if not holds:
            raise ValueError(f"{name}: given {getattr(config, name)!r}, expected {meaning}")
