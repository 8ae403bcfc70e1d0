"""The webui's "Lora" page of cards, in the place of the built-in's. Imported only inside the host or its stand-in."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modules import sd_models, shared, ui_extra_networks
from torch import nn

from lib_locon.cards import Card, Cards, fits
from lib_locon.errors import FileError
from lib_locon.facts import Facts, FactsIndex, FileMetadata
from lib_locon.files.reader import FileIdentity
from lib_locon.files.regular import read_regular
from lib_locon.hosts.cards_shown import badges, with_notes
from lib_locon.hosts.options import value
from lib_locon.index import DiskTable, facts_table
from lib_locon.library import Library
from lib_locon.models.base_family import model_family
from lib_locon.session import Session
from lib_locon.settings import FILENAME, HIDE_UNKNOWN, PREFERRED_NAME, SHOW_ALL
from lib_locon.user_metadata import KNOWN_BASES, read_user_metadata

NAME = "lora"
MAX_DESCRIPTION = 1_000_000
"""Bytes of a text beside a file; a larger one is no description."""
_FAMILIES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class CardsPage(ui_extra_networks.ExtraNetworksPage):  # type: ignore[misc]  # the host is untyped
    """Lists the adapters. `library` gives the one that the tags are looked up in, as the settings have it now."""

    def __init__(self, library: Callable[[], Library], cards: Callable[[], Cards]) -> None:
        super().__init__("Lora")
        self._library = library
        self._cards = cards

    def refresh(self) -> None:
        """Looks into the folders again."""
        self._library().refresh()

    def list_items(self) -> Iterator[dict[str, Any]]:
        """One item per adapter, those that do not fit the loaded model too: they are hidden by a style, not left out"""
        model = loaded_family()
        for index, card in enumerate(self._cards().all(prefer_alias=prefers_alias())):
            yield self._item(card, index, model)

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        """One item anew, for instance after its metadata was edited; it keeps its place among the others."""
        del enable_filter  # what does not fit is there too, and hidden by a style
        card, known = self.card(name), self.items.get(name)
        place = index if index is not None or known is None else known["sort_keys"]["default"]
        return None if card is None else self._item(card, place or 0, loaded_family())

    def allowed_directories_for_previews(self) -> list[str]:
        """Whose files the host may send to a browser, pictures only."""
        return [os.path.abspath(folder) for folder in self._library().folders]  # noqa: PTH100  links stay as they are

    def read_user_metadata(self, item: dict[str, Any], use_cache: bool = True) -> None:
        """As the host, but whatever stands in that file, the page comes up."""
        del use_cache
        user = read_user_metadata(Path(item["filename"]))
        item["user_metadata"] = dict(user.raw)
        if user.description:
            item["description"] = user.description

    def find_description(self, path: str) -> str | None:
        """The text beside a file; `path` is without the ending. As the host, but whatever stands there."""
        for name in (f"{path}.txt", f"{path}.description.txt"):
            if self.lister.exists(name):
                with suppress(FileError):
                    return read_regular(Path(name), MAX_DESCRIPTION).decode("utf8", "replace")
        return None

    def create_item_html(self, tabname: str, item: dict[str, Any], template: str | None = None) -> Any:
        """The card's HTML, or without a template its parts. The host escapes some of what it puts in; here, all is."""
        values = super().create_item_html(tabname, {**item, "search_terms": list(map(escape, item["search_terms"]))})
        if not values:
            return values  # hidden by the host's own setting
        about = item["locon"]
        values["copy_path_button"] = self.btn_copy_path_tpl.format(filename=escape(item["filename"]))
        values["background_image"] += badges(about)
        values["sort_keys"] += f' data-locon-names="{escape(json.dumps(about["names"]))}"'
        values["sort_keys"] += " data-locon-hidden" if about["hidden"] else ""
        return values if template is None else _whole_letters(template.format(**values))

    def create_tree_file_item_html(self, tabname: str, file_path: str, item: dict[str, Any]) -> str:
        """A file in the tree. The host escapes nothing there."""
        shown = {**item, "name": _Escaped(item["name"]), "shorthash": escape(item["shorthash"])}
        html: str = super().create_tree_file_item_html(tabname, escape(file_path), shown)
        return html

    def create_tree_dir_item_html(self, tabname: str, dir_path: str, content: str | None = None) -> str | None:
        """A folder in the tree. The host escapes nothing there."""
        html: str | None = super().create_tree_dir_item_html(tabname, escape(dir_path), content)
        return html

    def create_html(self, tabname: str, *, empty: bool = False) -> str:
        """The whole page, with a line about what is not shown."""
        html = _whole_letters(super().create_html(tabname, empty=empty))
        abouts = [item["locon"] for item in self.items.values()]
        return with_notes(html, abouts, loaded_family()) if abouts else html

    def create_user_metadata_editor(self, ui: Any, tabname: str) -> Any:
        """Ours, whether the built-in and its editor are there or not. Called where the host builds its page."""
        from lib_locon.hosts.metadata_editor import MetadataEditor  # it needs gradio, which a host without a page lacks

        del ui
        return MetadataEditor(tabname, self)

    def card(self, name: str) -> Card | None:
        """The card of that name, with what is in the file and beside it now."""
        return self._cards().find(name, prefer_alias=prefers_alias())

    def metadata_of(self, card: Card) -> Mapping[str, Any]:
        """What stands in the file itself."""
        return FileMetadata(card.identity, allow_pickle=self._library().allow_pickle)

    def preview(self, card: Card) -> str | None:
        """The address of the card's picture, beside the file or in it."""
        with suppress(UnicodeEncodeError):  # a name that is no Unicode text has no address
            if card.preview is not None:
                link: str = self.link_preview(os.path.abspath(card.preview))  # noqa: PTH100
                return link
            if card.facts is not None and card.facts.has_cover:
                return f"./sd_extra_networks/cover-images?page={self.extra_networks_tabname}&item={quote(card.name)}"
        return None

    def preview_file(self, card: Card) -> str:
        """Where a new picture for the card goes."""
        return f"{Path(os.path.abspath(card.path)).with_suffix('')}.{shared.opts.samples_format}"  # noqa: PTH100

    def read_ahead(self) -> None:
        """Begins to read the headers: the host lists the cards once, for the first browser, and then when asked to."""
        self._cards().read_ahead()

    def _item(self, card: Card, index: int, model: str) -> dict[str, Any]:
        filename = os.path.abspath(card.path)  # noqa: PTH100  as the host spells paths: links stay as they are
        plain, facts = str(Path(filename).with_suffix("")), card.facts or Facts()
        item = {
            "name": card.name,
            "filename": filename,
            "shorthash": card.hash[:12],
            "preview": self.preview(card),
            "description": card.user.description or self.find_description(plain),
            "search_terms": [self.search_terms_from_path(filename), *card.search_terms],
            "local_preview": self.preview_file(card),
            "metadata": self.metadata_of(card) if facts.has_metadata else {},
            "sort_keys": {"default": index, **card.sort_keys},
            "sd_version": card.base if card.base in KNOWN_BASES else "Unknown",
            "user_metadata": dict(card.user.raw),
            "prompt": _prompt(card),
            "negative_prompt": json.dumps(f"({card.user.negative_text}:1)" if card.user.negative_text else ""),
        }
        return {**item, "locon": _about(card, model)}


class _Escaped(str):
    """A text that is escaped when a template takes it in as it is; what escapes it by itself gets the text."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return escape(str(self))


def _whole_letters(html: str) -> str:
    """HTML that can be sent: one file whose name is no Unicode text would keep the whole page back."""
    return html.encode("utf8", "replace").decode("utf8")


class Registration:
    """Our page among the host's. `library` is handed to it; `index` gives the file that facts are kept in.

    `hash_of` gives the hashes that were computed so far.
    """

    def __init__(
        self, library: Callable[[], Library], index: Callable[[], Path], hash_of: Callable[[FileIdentity], str]
    ) -> None:
        self._library = library
        self._hash_of = hash_of
        self._index_file = index
        self._index: FactsIndex | None = None
        self._table: DiskTable[Facts] | None = None
        self._page: CardsPage | None = None
        self._displaced: Any = None
        self._lock = threading.Lock()

    def take_over(self) -> None:
        """Puts our page where the built-in's stands, or behind the others. To be called in `ui_settings`.

        The host empties the list of pages after the scripts are loaded; the built-in adds its page in before_ui, after
        our own before_ui callbacks would run; then the host builds the settings, and after them the tabs.
        """
        pages = ui_extra_networks.extra_pages
        page = CardsPage(self._library, self.cards)
        places = [place for place, known in enumerate(pages) if known.name == NAME]
        if not places:
            self._displaced = None
            ui_extra_networks.register_page(page)
        else:
            known = pages[places[0]]
            self._displaced = self._displaced if known is self._page else known
            pages[places[0]] = page
            ui_extra_networks.allowed_dirs.update(page.allowed_directories_for_previews())
        self._page = page

    def cards(self) -> Cards:
        """The cards, with what is known of their files."""
        library = self._library()
        with self._lock:  # the page and programs ask from threads of their own: two tables would write one file
            if self._index is None or self._index.allow_pickle != library.allow_pickle:
                self._close()
                self._table = facts_table(self._index_file(), allow_pickle=library.allow_pickle)
                self._index = FactsIndex(self._table, allow_pickle=library.allow_pickle, rested=self._table.flush)
            return Cards(library, self._index, hash_of=self._hash_of)

    def _close(self) -> None:
        if self._index is not None and self._table is not None:
            self._index.close()
            self._table.close()
        self._index = self._table = None

    def read_ahead(self) -> None:
        """To be called when the host is up."""
        if self._page is not None:
            self._page.read_ahead()

    def give_back(self) -> None:
        """Takes our page out, and puts back the one that stood there."""
        pages = ui_extra_networks.extra_pages
        for place, known in reversed(list(enumerate(pages))):
            if known is self._page:
                pages[place : place + 1] = [] if self._displaced is None else [self._displaced]
        self._page = self._displaced = None
        with self._lock:
            self._close()


def _prompt(card: Card) -> str:
    """An expression of JavaScript, as the host wants it: the default weight is looked up when the card is clicked."""
    if not card.tag:
        return json.dumps("")
    weight = (
        f"{card.user.preferred_weight:g}" if card.user.preferred_weight else "opts.extra_networks_default_multiplier"
    )
    text = f"{json.dumps(f'<lora:{card.tag}:')} + {weight} + {json.dumps('>')}"
    return f"{text} + {json.dumps(f' {card.user.activation_text}')}" if card.user.activation_text else text


def _about(card: Card, model: str) -> dict[str, Any]:
    """What our card shows beyond the host's."""
    fit, base = fits(card.base, model), card.base
    unknown = fit is None and card.facts is not None
    shunned = unknown and model in value(HIDE_UNKNOWN)  # type: ignore[operator]  # a tuple
    if base.startswith("unknown"):
        base = "this model" if base == model else ""
    return {
        "names": list(card.names),
        "family": card.family,
        "rank": card.rank,
        "base": base,
        "base_reason": card.base,
        "size": card.identity.size,
        "triggers": list(card.facts.triggers if card.facts else ()),
        "waiting": card.facts is None,
        "fits": fit,
        "hidden": (fit is False or shunned) and not value(SHOW_ALL),
        "problem": card.problem or (f"It was made for another model: {card.base}." if fit is False else ""),
        "unread": card.facts.unread if card.facts else 0,
    }


def prefers_alias() -> bool:
    """Whether a click on a card writes the name that the trainer gave it."""
    return value(PREFERRED_NAME) != FILENAME


def loaded_family() -> str:
    """What the loaded model is; "" where none is loaded: `shared.sd_model` would load one, for a list of cards."""
    model = sd_models.model_data.sd_model
    if model is None:
        return ""
    if model not in _FAMILIES:
        _FAMILIES[model] = model_family(Session(model).table)
    return _FAMILIES[model]
