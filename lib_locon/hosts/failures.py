"""Sentences about errors: of an image whose adapters could not be changed, and of code that is another extension's."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from traceback import walk_tb

from lib_locon.library import without_folder, without_folders

OURS = Path(__file__).resolve().parents[1]
AT_MOST = 300
"""Characters of what another's error says."""


def others_error(error: BaseException, what: str, instead: str) -> str:
    """A sentence about an error that another's code raised when we asked it for `what`.

    The innermost frame in an extension says whose it is (by the folder below `extensions`), also where a library that
    it called raised the error; else the innermost that is not ours, by its file.
    """
    places = [(Path(frame.f_code.co_filename), line) for frame, line in walk_tb(error.__traceback__)]
    theirs = [(path, line, _extension(path)) for path, line in places if OURS not in path.parents]
    path, line, name = next(
        filter(itemgetter(2), reversed(theirs)), theirs[-1] if theirs else (Path("an unknown file"), 0, "")
    )
    who = f"the extension {name}" if name else f"another program's code in {path.name}"
    where = f", in {path.name} line {line}" if name else ""
    why = without_folders(" ".join(str(error).split()))[:AT_MOST] or "without a word"
    return f"{who} failed when it was asked for {what} ({type(error).__name__}: {why}{where}); {instead}"


def _extension(path: Path) -> str:
    """The name of the extension that a file belongs to; "" for none."""
    folders = path.parent.parts
    at = next((i for i, part in enumerate(folders[:-1]) if part in ("extensions", "extensions-builtin")), None)
    return "" if at is None or "site-packages" in folders else folders[at + 1]


def failed(error: Exception, checkpoint: Path | None, *, held: bool, since: str = "") -> str:
    """For everybody's eyes: without the folders that files lie in. `held`: the model could not be given its base back,
    and so what it held before is in the image; `since` says from which step on, where that is not the first."""
    what = " ".join(str(error).splitlines()) or type(error).__name__  # torch says some things in several lines
    what = without_folders(what if checkpoint is None else without_folder(what, checkpoint))
    if not held:
        return f"no adapter is in this image{since}: {what}"
    # the host's buttons that unload and reload it only move the model between the processor's memory and the GPU's
    return (
        f"what the model held before is in this image{since}: {what}. To load it, choose another checkpoint and then "
        "this one again, or start the webui anew"
    )
