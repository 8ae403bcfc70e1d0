"""Textual inversions bundled in adapters: in the host's table of embeddings while their adapter is in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib_locon.files.adapter import Adapter
from lib_locon.files.embeddings import Embedding


class BundledEmbeddings:
    """What of the host's table is ours. An embedding of the user's own folder is never replaced."""

    def __init__(self) -> None:
        self.in_infotext = True
        """Whether the host is to write their adapters' names where it writes the hashes of textual inversions."""
        self._ours: dict[str, Embedding] = {}

    @property
    def active(self) -> bool:
        """Whether the host's table holds any of ours."""
        return bool(self._ours)

    def use(self, adapters: Sequence[Adapter], model: Any) -> list[str]:
        """Makes the table hold the embeddings of these adapters and no others of ours. Returns what failed."""
        wanted = {embedding.name: embedding for adapter in adapters for embedding in adapter.embeddings}
        if not wanted and not self._ours:
            return []
        table = _table()
        for name in [name for name, embedding in self._ours.items() if wanted.get(name) is not embedding]:
            del self._ours[name]
            table.register_embedding_by_name(None, model, name)
        added = (self._add(table, embedding, model) for name, embedding in wanted.items() if name not in self._ours)
        problems = [problem for problem in added if problem]
        for name, embedding in self._ours.items():
            of = [adapter.name for adapter in adapters if any(each is embedding for each in adapter.embeddings)]
            if name in table.word_embeddings:  # the user may have pressed the host's refresh button, which empties it
                table.word_embeddings[name].shorthash = of[0] if self.in_infotext and of else None
        return problems

    def _add(self, table: Any, embedding: Embedding, model: Any) -> str:
        name = embedding.name
        if name in table.word_embeddings:
            return f"the embedding {name!r} of the adapter is not used: the embeddings folder has one of that name"
        loaded = _host_embedding(embedding)
        if table.expected_shape not in (-1, loaded.shape):
            return f"the embedding {name!r} is not used: it is {loaded.shape} wide, the model {table.expected_shape}"
        table.register_embedding(loaded, model)
        self._ours[name] = embedding
        return ""


def _table() -> Any:
    from modules import sd_hijack

    return sd_hijack.model_hijack.embedding_db


def _host_embedding(embedding: Embedding) -> Any:
    from modules.textual_inversion import textual_inversion

    data: dict[str, Any] = dict(embedding.vectors)
    if list(data) == [""]:
        data = {"string_to_param": {"*": data[""]}}
    return textual_inversion.create_embedding_from_data(data, embedding.name, filename=embedding.name)
