"""Sentences about errors: of an image whose adapters could not be changed, and of code that is another extension's."""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb

from lib_locon.library import without_folder, without_folders

OURS = Path(__file__).resolve().parents[1]


def others_error(error: BaseException, what: str, instead: str) -> str:
    """A sentence about an error that another's code raised when we asked it for `what`.

    The innermost frame that is not ours says whose it is: the folder below `extensions`, else the file.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    theirs = [frame for frame in frames if OURS not in Path(frame.f_code.co_filename).parents]
    place = Path((theirs or frames)[-1].f_code.co_filename) if frames else Path("an unknown file")
    parts = place.parts
    at = next((i for i, part in enumerate(parts[:-1]) if part in ("extensions", "extensions-builtin")), None)
    who = f"the extension {parts[at + 1]}" if at is not None else f"another program's code in {place.name}"
    why = str(error) or "without a word"
    return f"{who} failed when it was asked for {what} ({type(error).__name__}: {why}); {instead}"


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
