"""Files that are opened by a name that may have got another meaning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib_locon.errors import FileError
from lib_locon.files.regular import open_regular, read_regular


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with open_regular(path) as file:
        assert file.read() == b"12345"


def test_more_bytes_than_asked_for_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    with pytest.raises(FileError, match="larger than 4 bytes"):
        read_regular(path, 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(FileError, match="no file but a pipe or a device"):
        open_regular(tmp_path / "a")


def test_what_is_no_file_is_said_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Is a directory"):
        open_regular(tmp_path)
    with pytest.raises(FileError, match="No such file"):
        open_regular(tmp_path / "none")
    with pytest.raises(FileError, match="cannot be read"):
        open_regular(Path("a\0b"))
