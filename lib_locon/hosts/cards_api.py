"""What the cards of the page ask when they come into sight: how much of their file fits the loaded model.

Only those in sight: ten thousand files need not be looked into because somebody opened a page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from torch import nn

from lib_locon.fitting import Fits
from lib_locon.hosts.web import Ask, Route, WebError
from lib_locon.hosts.webui import Webui
from lib_locon.library import Library

MOST_NAMES = 100
"""Of one request."""


class Fitting(TypedDict):
    """`used` of `total` layers fit; `why` is about the others."""

    used: int
    total: int
    why: str


class Answer(TypedDict):
    """`fits` by name of card. `model`: the loaded model's family, "" where nothing tells it, null without a model."""

    fits: dict[str, Fitting]
    model: str | None


class CardsApi:
    """`model` gives the loaded model and its file, and never loads one; `family` is what family it is of."""

    def __init__(
        self,
        webui: Webui,
        library: Callable[[], Library],
        model: Callable[[], tuple[nn.Module, Path | None] | None],
        family: Callable[[], str],
    ) -> None:
        self._webui = webui
        self._library = library
        self._model = model
        self._family = family
        self._fits = Fits()

    def routes(self) -> list[Route]:
        """The one. It asks for no password, as a browser would then ask for it whenever a card comes into sight."""
        return [Route("POST", "/locon/v1/fit", self.fit, protected=False)]

    def fit(self, ask: Ask) -> Answer:
        """Files that cannot be read are left out; all are while no model is loaded."""
        names = ask.body.get("names") if isinstance(ask.body, dict) else None
        if not isinstance(names, list) or len(names) > MOST_NAMES or not all(isinstance(name, str) for name in names):
            raise WebError(
                400, f'the request must be a JSON object such as {{"names": ["a"]}}, with {MOST_NAMES} at most'
            )
        held, library, found = self._model(), self._library(), dict[str, Fitting]()
        if held is None:
            return {"fits": found, "model": None}
        session = self._webui.session(*held)
        # not `find`: that may read files for an alias or a hash, and a card's name is neither
        stems, paths = ({getattr(entry, kind): entry.path for entry in library.entries} for kind in ("stem", "name"))
        for name in names:
            path = paths.get(name) or stems.get(name)
            fit = self._fits.of(path, held[0], session, allow_pickle=library.allow_pickle) if path else None
            if fit is not None:
                found[name] = {"used": fit.used, "total": fit.total, "why": fit.why}
        return {"fits": found, "model": self._family()}
