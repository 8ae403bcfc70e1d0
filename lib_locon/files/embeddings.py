"""Textual inversions that travel inside an adapter file, under `bundle_emb.<name>.…`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

PREFIX = "bundle_emb."
_INVERSION = ".string_to_param."
_ENCODERS = ("clip_l", "clip_g")
_IGNORED = ("step", "sd_checkpoint", "sd_checkpoint_name")
"""What a textual inversion's own file says beside its vectors."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors (count, width) for the word `name`, by text encoder; "" where the file does not say which."""

    name: str
    vectors: Mapping[str, Tensor]


def read_embeddings(
    keys: Iterable[str], tensor: Callable[[str], Tensor]
) -> tuple[tuple[Embedding, ...], list[tuple[str, str]]]:
    """The embeddings among `keys`, and (key, reason) of what is none."""
    found: dict[str, dict[str, Tensor]] = {}
    unread: list[tuple[str, str]] = []
    for key in keys:
        name, encoder, reason = _split(key.removeprefix(PREFIX))
        if not reason and encoder in found.get(name, {}):
            reason = "a second token of one embedding"
        if reason:
            unread.append((key, reason))
            continue
        vectors = tensor(key)
        if vectors.ndim not in (1, 2) or 0 in vectors.shape:
            unread.append((key, f"an embedding has one or two axes, not the shape {tuple(vectors.shape)}"))
        else:
            found.setdefault(name, {})[encoder] = vectors.reshape(-1, vectors.shape[-1])
    return tuple(Embedding(name, vectors) for name, vectors in found.items()), unread


def _split(rest: str) -> tuple[str, str, str]:
    """(name, encoder, why it cannot be used) of what follows the prefix. A name may hold dots."""
    if _INVERSION in rest:
        return rest.split(_INVERSION)[0], "", ""
    name, _, part = rest.rpartition(".")
    if not name:
        return "", "", "an embedding without a name"
    if part in _ENCODERS:
        return name, part, ""
    if part in _IGNORED:
        return name, part, "a note of the embedding's trainer, not needed"
    return name, part, f"embeddings for {part!r} have no place in the webui"
