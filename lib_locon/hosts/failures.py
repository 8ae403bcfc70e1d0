"""What is said of an image whose adapters could not be changed."""

from __future__ import annotations

from pathlib import Path

from lib_locon.library import without_folder, without_folders


def failed(error: Exception, checkpoint: Path | None, *, held: bool, since: str = "") -> str:
    """For everybody's eyes: without the folders that files lie in. `held`: the model could not be given its base back,
    and so what it held before is in the image; `since` says from which step on, where that is not the first."""
    what = str(error) or type(error).__name__
    what = without_folders(what if checkpoint is None else without_folder(what, checkpoint))
    if not held:
        return f"no adapter is in this image{since}: {what}"
    # the host's buttons that unload and reload it only move the model between the processor's memory and the GPU's
    return (
        f"what the model held before is in this image{since}: {what}. To load it, choose another checkpoint and then "
        "this one again, or start the webui anew"
    )
