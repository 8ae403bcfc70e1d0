"""Text for terminals and logs: nothing in the names and texts of somebody's files is obeyed, or stops the output."""

from __future__ import annotations

import io
import sys


def printable(text: str, *, lines: bool = False) -> str:
    """Escape every character that a terminal would obey or could not show.

    That is what Python calls unprintable: control characters, marks that turn the direction of writing, halves of
    characters. With `lines` the ends of lines stay. For whatever is printed or logged of the names, keys and texts in
    somebody's files; JSON and HTML have escapes of their own.
    """
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )


def escape_unencodable() -> None:
    """Let stdout and stderr escape the characters that the terminal's encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
