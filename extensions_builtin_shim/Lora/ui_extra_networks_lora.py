"""The page of cards."""

from __future__ import annotations

from lib_locon.hosts.a1111 import cards, library
from lib_locon.hosts.cards_page import CardsPage


class ExtraNetworksPageLora(CardsPage):
    """Ours, over the webui's own adapters."""

    def __init__(self) -> None:
        super().__init__(library, cards)
