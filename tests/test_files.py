"""data/files.py: text in any Unicode encoding, and errors that name the file."""

import errno
import os

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


def test_a_disk_that_is_full_before_the_last_byte_leaves_the_old_file_and_names_it(
    tmp_path, monkeypatch
):
    (tmp_path / "x").write_text("old")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(OSError, match=r"No space left.*x") as caught,
        written_whole(tmp_path / "x") as file,
    ):
        file.write(b"new")
    assert caught.value.filename == str(tmp_path / "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
