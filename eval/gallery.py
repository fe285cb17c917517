"""A page of images with captions and settings: one HTML file that needs nothing beside it."""

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.files import write_text

STYLE = """
body { font: 14px sans-serif; margin: 16px; color: #222; background: #fff; }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 12px; }
dt { color: #666; } dd { margin: 0; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; unicode-bidi: isolate; }
img { display: block; width: 100%; margin-bottom: 4px; outline: 1px solid #ddd; }
"""
# The browser itself refuses scripts and anything from elsewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def gallery(title: str, pictures: Iterable[tuple[bytes, str]], settings: Mapping[str, Any]) -> str:
    """The page's text.

    Args:
        pictures: (PNG file's bytes, caption) of each image.
        settings: shown above them.
    """
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(show(value))}</dd>\n"
        for name, value in settings.items()
    )
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(data).decode()}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>\n'
        for data, caption in pictures
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n"
        f"<dl>\n{rows}</dl>\n<main>\n{figures}</main>\n</body>\n</html>\n"
    )


def show(value: Any) -> Any:
    """A setting as people read it: six digits of a number."""
    return f"{value:.6g}" if isinstance(value, float) else value


def escape(value: Any) -> str:
    """Text in which nothing is markup; what no page can hold (lone surrogates) is replaced."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def write_gallery(
    path: Path, title: str, pictures: Iterable[tuple[bytes, str]], settings: Mapping[str, Any]
) -> None:
    """Write the page aside and rename it."""
    write_text(gallery(title, pictures, settings), path)
