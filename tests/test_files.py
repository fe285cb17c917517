"""data/files.py: text in any Unicode encoding, and errors that name the file."""

import errno
import os
from unittest.mock import Mock

import pytest

from data.files import read_text_file, written_whole

TEXT = "ein Hündchen 犬\u2028🐕\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_text_is_the_same_in_every_unicode_encoding(tmp_path, encoding, line_end):
    path = tmp_path / "x.txt"
    path.write_bytes(TEXT.replace("\n", line_end).encode(encoding))
    assert read_text_file(path) == TEXT


@pytest.mark.parametrize(
    "content", ["Hündchen".encode("cp1252"), b"\xff\xfea", b"\x89PNG\r\n", b"PK\3\4\0", None]
)
def test_what_is_no_text_or_no_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="x.txt"):
        read_text_file(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt()])
def test_writing_that_ends_before_the_last_byte_leaves_the_old_file_and_names_it(
    tmp_path, monkeypatch, error
):
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
    for name in ("x", "new"):
        with pytest.raises(type(error)) as caught, written_whole(tmp_path / name) as file:
            file.write(b"new")
        assert getattr(caught.value, "filename", str(tmp_path / name)) == str(tmp_path / name)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
