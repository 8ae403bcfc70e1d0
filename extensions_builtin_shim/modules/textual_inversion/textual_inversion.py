"""The host's table of embeddings. Kept as the host keeps it; the stand-in's small text encoder does not read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._absent import absent

__getattr__ = absent(__name__)


class Embedding:
    """Vectors for a word."""

    def __init__(self, vec: Tensor | dict[str, Tensor], name: str) -> None:
        self.vec = vec
        self.name = name
        self.shape = -1
        self.vectors = 0


class EmbeddingDatabase:
    """By word. `expected_shape` is the width that the model reads, -1 while no model has told it."""

    def __init__(self) -> None:
        self.word_embeddings: dict[str, Embedding] = {}
        self.expected_shape = -1

    def register_embedding(self, embedding: Embedding, model: object) -> Embedding | None:
        """Adds it under its own name."""
        return self.register_embedding_by_name(embedding, model, embedding.name)

    def register_embedding_by_name(self, embedding: Embedding | None, model: object, name: str) -> Embedding | None:
        """Adds it under `name`, in the place of what stood there; None takes the name away."""
        del model  # the host tokenizes the name with it
        if embedding is None:
            self.word_embeddings.pop(name, None)
        else:
            self.word_embeddings[name] = embedding
        return embedding


def create_embedding_from_data(data: Mapping[str, Any], name: str, filename: str = "unknown") -> Embedding:
    """From a textual inversion's table, the two encoders' vectors of SDXL, or one tensor; else an exception."""
    if "string_to_param" in data:
        vectors = dict(data["string_to_param"])
        embedding = Embedding(next(iter(vectors.values())), name)
        embedding.shape = embedding.vec.shape[-1]
    elif "clip_g" in data and "clip_l" in data:
        embedding = Embedding(dict(data), name)
        embedding.shape = data["clip_g"].shape[-1] + data["clip_l"].shape[-1]
    elif len(data) == 1:
        embedding = Embedding(next(iter(data.values())), name)
        embedding.shape = embedding.vec.shape[-1]
    else:
        raise Exception(f"{filename} is no embedding")  # the host raises this very class
    return embedding
