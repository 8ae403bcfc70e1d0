"""Which key of a checkpoint file a parameter of the loaded model came from.

Names only. Whether it really came from there is for the base store to prove, bit for bit: a name that is wrong costs
one comparison and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from lib_locon.models.table import WRAPPERS

_SPELLINGS: tuple[tuple[str, str], ...] = (
    # old SD1 checkpoints; the host renames their keys while loading
    ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    # SD2 turbo's text encoder stands under SDXL's name in the file
    ("cond_stage_model.", "conditioner.embedders.0."),
    # Forge keeps the part of the model that has the UNet, not the whole
    ("diffusion_model.", "model.diffusion_model."),
)
"""How the model's name begins, and how the file's name may begin instead."""


def checkpoint_keys(paths: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """Parameter path → key, for those that have one. `keys` should be quick to search (a dict or a set)."""
    found: dict[str, str] = {}
    for path in paths:
        key = next((name for name in _candidates(path) if name in keys), None)
        if key is not None:
            found[path] = key
    return found


def _candidates(path: str) -> Iterator[str]:
    """The path, the path without the levels that the host's hijack and torch.compile put into it, other spellings."""
    yield path  # a file saved from such a model has them too
    name = ".".join(level for level in path.split(".") if level not in WRAPPERS)
    yield name
    for ours, theirs in _SPELLINGS:
        if name.startswith(ours):
            yield theirs + name[len(ours) :]
