"""The webui's "Lora" page of cards, in the place of the built-in's. Imported only inside the host or its stand-in."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modules import sd_models, shared, ui_extra_networks
from torch import nn

from lib_locon.cards import KNOWN_BASES, Card, Cards, fits, read_user_metadata
from lib_locon.facts import Facts, FactsIndex, FileMetadata
from lib_locon.hosts.options import value
from lib_locon.index import DiskTable, facts_table
from lib_locon.library import Library
from lib_locon.models.base_family import model_family
from lib_locon.session import Session
from lib_locon.settings import FILENAME, HIDE_UNKNOWN, PREFERRED_NAME, SHOW_ALL

NAME = "lora"
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
        model = _model_family()
        for index, card in enumerate(self._cards().all(prefer_alias=_prefers_alias())):
            yield self._item(card, index, model)

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        """One item anew, for instance after its metadata was edited."""
        card = self._cards().find(name, prefer_alias=_prefers_alias())
        return None if card is None else self._item(card, index or 0, _model_family() if enable_filter else "")

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

    def create_item_html(self, tabname: str, item: dict[str, Any], template: str | None = None) -> Any:
        """The card's HTML, or without a template its parts. The host escapes some of what it puts in; here, all is."""
        values = super().create_item_html(tabname, {**item, "search_terms": list(map(escape, item["search_terms"]))})
        if not values:
            return values  # hidden by the host's own setting
        about = item["locon"]
        values["copy_path_button"] = self.btn_copy_path_tpl.format(filename=escape(item["filename"]))
        values["background_image"] += _badges(about)
        values["sort_keys"] += f' data-locon-names="{escape(json.dumps(about["names"]))}"'
        values["sort_keys"] += " data-locon-hidden" if about["hidden"] else ""
        return values if template is None else template.format(**values)

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
        html: str = super().create_html(tabname, empty=empty)
        abouts = [item["locon"] for item in self.items.values()]
        return f'<div class="locon-page">{_notes(abouts)}{html}</div>' if abouts else html

    def create_user_metadata_editor(self, ui: Any, tabname: str) -> Any:
        """The built-in's editor where the built-in is there, else the host's plain one."""
        builtin = sys.modules.get("ui_edit_user_metadata")
        if builtin is not None:
            return builtin.LoraUserMetadataEditor(ui, tabname, self)
        return super().create_user_metadata_editor(ui, tabname)

    def read_ahead(self) -> None:
        """Begins to read the headers: the host lists the cards once, for the first browser, and then when asked to."""
        self._cards().read_ahead()

    def _item(self, card: Card, index: int, model: str) -> dict[str, Any]:
        filename = os.path.abspath(card.path)  # noqa: PTH100  as the host spells paths: links stay as they are
        plain, facts = str(Path(filename).with_suffix("")), card.facts or Facts()
        item = {
            "name": card.name,
            "filename": filename,
            "shorthash": facts.hash[:12],
            "preview": self._preview(card, facts),
            "description": card.user.description or self.find_description(plain),
            "search_terms": [self.search_terms_from_path(filename), *card.search_terms],
            "local_preview": f"{plain}.{shared.opts.samples_format}",
            "metadata": _metadata(card, self._library()) if facts.has_metadata else {},
            "sort_keys": {"default": index, **card.sort_keys},
            "sd_version": card.base if card.base in KNOWN_BASES else "Unknown",
            "user_metadata": dict(card.user.raw),
            "prompt": _prompt(card),
            "negative_prompt": json.dumps(f"({card.user.negative_text}:1)" if card.user.negative_text else ""),
        }
        return {**item, "locon": _about(card, model)}

    def _preview(self, card: Card, facts: Facts) -> str | None:
        if card.preview is not None:
            link: str = self.link_preview(os.path.abspath(card.preview))  # noqa: PTH100
            return link
        if facts.has_cover:
            return f"./sd_extra_networks/cover-images?page={self.extra_networks_tabname}&item={quote(card.name)}"
        return None


class _Escaped(str):
    """A text that is escaped when a template takes it in as it is; what escapes it by itself gets the text."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return escape(str(self))


class Registration:
    """Our page among the host's. `library` is handed to it; `index` gives the file that facts are kept in."""

    def __init__(self, library: Callable[[], Library], index: Callable[[], Path]) -> None:
        self._library = library
        self._index_file = index
        self._index: FactsIndex | None = None
        self._table: DiskTable[Facts] | None = None
        self._page: CardsPage | None = None
        self._displaced: Any = None

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
        if self._index is None or self._index.allow_pickle != library.allow_pickle:
            self._close()
            self._table = facts_table(self._index_file(), allow_pickle=library.allow_pickle)
            self._index = FactsIndex(self._table, allow_pickle=library.allow_pickle, rested=self._table.flush)
        return Cards(library, self._index)

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


def _badges(about: dict[str, Any]) -> str:
    badges = [about["family"], f"rank {about['rank']}" if about["rank"] else "", about["base"]]
    html = "".join(f'<span class="locon-badge">{escape(badge)}</span>' for badge in badges if badge)
    if about["problem"]:
        what = "does not fit" if about["fits"] is False else "cannot be used"
        html += f'<span class="locon-badge locon-problem" title="{escape(about["problem"])}">{what}</span>'
    elif about["unread"]:
        why = f"{about['unread']} keys of the file are not understood; all others are used"
        html += f'<span class="locon-badge locon-warning" title="{escape(why)}">{about["unread"]} keys unknown</span>'
    elif about["waiting"]:
        html += '<span class="locon-badge">being read…</span>'
    return f'<div class="locon-badges">{html}</div>'


def _notes(abouts: list[dict[str, Any]]) -> str:
    hidden, waiting = (sum(about[key] for about in abouts) for key in ("hidden", "waiting"))
    parts = []
    if hidden:
        what = "1 adapter for another model is" if hidden == 1 else f"{hidden} adapters for other models are"
        parts.append(f'{what} hidden. <button type="button" class="locon-show-hidden">Show</button>')
    if waiting:
        what = "1 file is" if waiting == 1 else f"{waiting} files are"
        parts.append(f"{what} being read in the background; refresh to see more about them.")
    return f'<p class="locon-notes">{" ".join(parts)}</p>' if parts else ""


def _metadata(card: Card, library: Library) -> FileMetadata:
    return FileMetadata(card.identity, allow_pickle=library.allow_pickle)


def _prefers_alias() -> bool:
    return value(PREFERRED_NAME) != FILENAME


def _model_family() -> str:
    """What the loaded model is; "" where none is loaded: `shared.sd_model` would load one, for a list of cards."""
    model = sd_models.model_data.sd_model
    if model is None:
        return ""
    if model not in _FAMILIES:
        _FAMILIES[model] = model_family(Session(model).table)
    return _FAMILIES[model]
