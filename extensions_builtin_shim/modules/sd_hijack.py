"""What the host puts around a model. Here: its table of embeddings."""

from __future__ import annotations

from ._absent import absent
from .textual_inversion.textual_inversion import EmbeddingDatabase

__getattr__ = absent(__name__)


class StableDiffusionModelHijack:
    """One for the process."""

    def __init__(self) -> None:
        self.embedding_db = EmbeddingDatabase()


model_hijack = StableDiffusionModelHijack()
