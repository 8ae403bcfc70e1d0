"""The pages of cards: who is registered, and what a page makes of the items that its extension lists."""

from __future__ import annotations

import html
import json
import os
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import extra_networks, shared, util
from ._absent import absent

__getattr__ = absent(__name__)

Item = dict[str, Any]
extra_pages: list[ExtraNetworksPage] = []
allowed_dirs: set[str] = set()
"""Previews are served from these folders and from no others."""


class ExtraNetworksPage:
    """One tab of cards. An extension derives from it and says what there is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.name = title.lower()
        self.extra_networks_tabname = self.name.replace(" ", "_")
        self.allow_prompt = True
        self.allow_negative_prompt = False
        self.metadata: dict[str, Mapping[str, Any]] = {}
        self.items: dict[str, Item] = {}
        self.lister = util.MassFileLister()
        self.card_tpl = shared.html("extra-networks-card.html")
        self.pane_tpl = shared.html("extra-networks-pane.html")
        self.btn_tree_tpl = shared.html("extra-networks-tree-button.html")
        self.btn_copy_path_tpl = shared.html("extra-networks-copy-path-button.html")
        self.btn_metadata_tpl = shared.html("extra-networks-metadata-button.html")
        self.btn_edit_item_tpl = shared.html("extra-networks-edit-item-button.html")

    def refresh(self) -> None:
        """The user pressed the page's refresh button."""

    def create_item(self, name: str, index: int | None = None) -> Item | None:
        """One card's data."""
        raise NotImplementedError

    def list_items(self) -> Iterable[Item]:
        """All cards' data."""
        raise NotImplementedError

    def allowed_directories_for_previews(self) -> list[str]:
        """The folders whose files belong to this page."""
        return []

    def read_user_metadata(self, item: Item, use_cache: bool = True) -> None:
        """Puts what the user wrote about an item beside it."""
        metadata = extra_networks.get_user_metadata(item.get("filename"), self.lister if use_cache else None)
        if metadata.get("description") is not None:
            item["description"] = metadata["description"]
        item["user_metadata"] = metadata

    def link_preview(self, filename: str) -> str:
        """The address of a preview."""
        quoted = urllib.parse.quote(filename.replace("\\", "/"))
        return f"./sd_extra_networks/thumb?filename={quoted}&mtime={self.lister.mctime(filename)[0]}"

    def create_item_html(self, tabname: str, item: Item, template: str | None = None) -> str | dict[str, Any]:
        """A card. Without a template: what would be put into it. Names and descriptions are escaped; nothing else is
        that the item brings, as in the host.
        """
        search_only = self._search_only(item)
        if search_only and shared.opts.extra_networks_hidden_models == "Never":
            return ""
        click = item.get("onclick") or html.escape(
            f"cardClicked('{tabname}', {item['prompt']}, {item.get('negative_prompt', quote_js(''))}, "
            f"{str(self.allow_negative_prompt).lower()});"
        )
        preview, kind = item.get("preview"), f"search_terms{' search_only' if search_only else ''}"
        description = item.get("description") or ""
        names = {"tabname": tabname, "extra_networks_tabname": self.extra_networks_tabname}
        values = {
            "background_image": f'<img src="{html.escape(preview)}" class="preview" loading="lazy">' if preview else "",
            "card_clicked": click,
            "copy_path_button": self.btn_copy_path_tpl.format(filename=item["filename"]),
            "description": html.escape(description) if shared.opts.extra_networks_card_show_desc else "",
            "edit_button": self.btn_edit_item_tpl.format(**names),
            "local_preview": quote_js(item["local_preview"]),
            "metadata_button": self.btn_metadata_tpl.format(**names) if item.get("metadata") else "",
            "name": html.escape(item["name"]),
            "prompt": item.get("prompt"),
            "search_only": " search_only" if search_only else "",
            "search_terms": "".join(f"<span class='hidden {kind}'>{term}</span>" for term in item["search_terms"]),
            "sort_keys": " ".join(f'data-sort-{k}="{html.escape(str(v))}"' for k, v in item["sort_keys"].items()),
            "style": "",
            **names,
        }
        return values if template is None else template.format(**values)

    def create_tree_file_item_html(self, tabname: str, file_path: str, item: Item) -> str:
        """A file in the tree beside the cards. Nothing is escaped here, as in the host."""
        values = self.create_item_html(tabname, item)
        assert isinstance(values, dict)
        return self.btn_tree_tpl.format(
            subclass="tree-list-content-file", data_path=file_path, data_hash=item["shorthash"],
            onclick_extra=values["card_clicked"], action_list_item_label=item["name"],
            action_list_item_action_trailing=values["copy_path_button"],
        )  # fmt: skip

    def create_card_view_html(self, tabname: str, *, none_message: str | None) -> str:
        """All cards."""
        cards = (self.create_item_html(tabname, item, self.card_tpl) for item in self.items.values())
        return "".join(map(str, cards)) or none_message or "<div class='nocards'></div>"

    def create_html(self, tabname: str, *, empty: bool = False) -> str:
        """The whole page, after listing its items anew; `empty` is what stands there until somebody looks at it."""
        self.lister.reset()
        self.items = {} if empty else {item["name"]: item for item in self.list_items()}
        self.metadata = {}
        for item in self.items.values():
            if item.get("metadata"):
                self.metadata[item["name"]] = item["metadata"]
            if "user_metadata" not in item:
                self.read_user_metadata(item)
        cards = self.create_card_view_html(tabname, none_message="Loading..." if empty else None)
        names = {"tabname": tabname, "extra_networks_tabname": self.extra_networks_tabname}
        return self.pane_tpl.format(items_html=cards, **names)

    def search_terms_from_path(self, filename: str) -> str:
        """The path from the folder that the page is about, that folder's name included."""
        path = str(Path(filename).absolute())
        parents = (str(Path(folder).absolute().parent) for folder in self.allowed_directories_for_previews())
        return next((os.path.relpath(path, parent) for parent in parents if path.startswith(parent)), "")

    def get_sort_keys(self, path: str) -> dict[str, object]:
        """By what the user can sort. The host has the two dates the wrong way round."""
        mtime, ctime = self.lister.mctime(path)
        name = Path(path).name.lower()
        return {"date_created": int(mtime), "date_modified": int(ctime), "name": name, "path": path.lower()}

    def find_preview(self, path: str) -> str | None:
        """The address of the picture beside a file; `path` is without the ending."""
        names = (f"{path}{middle}.{ending}" for ending in preview_extensions() for middle in ("", ".preview"))
        return next((self.link_preview(name) for name in names if self.lister.exists(name)), None)

    def find_embedded_preview(self, path: str, name: str, metadata: Mapping[str, Any]) -> str | None:
        """The address of the picture inside a file. Raises for a table of pictures that is no JSON, as the host."""
        images = json.loads(metadata.get("ssmd_cover_images", "[]"))
        if self.lister.exists(f"{path}.safetensors") and any(images):
            return f"./sd_extra_networks/cover-images?page={self.extra_networks_tabname}&item={name}"
        return None

    def find_description(self, path: str) -> str | None:
        """The text beside a file; `path` is without the ending."""
        found = (name for name in (f"{path}.txt", f"{path}.description.txt") if self.lister.exists(name))
        return next((Path(name).read_text(encoding="utf-8", errors="replace") for name in found), None)

    def _search_only(self, item: Item) -> bool:
        folders = map(os.path.abspath, self.allowed_directories_for_previews())
        local = next((item["filename"][len(folder) :] for folder in folders if item["filename"].startswith(folder)), "")
        return shared.opts.extra_networks_hidden_models != "Always" and ("/." in local or "\\." in local)


def initialize() -> None:
    """Forgets all pages: at the start, and at each "Reload UI"."""
    extra_pages.clear()


def register_default_pages() -> None:
    """The host's own pages, for what the small model does not have: here there are none."""


def register_page(page: ExtraNetworksPage) -> None:
    """Adds a page behind the others, whatever it is called. To be called in `before_ui`."""
    extra_pages.append(page)
    allowed_dirs.clear()
    allowed_dirs.update(folder for known in extra_pages for folder in known.allowed_directories_for_previews())


def preview_extensions() -> list[str]:
    """The endings of pictures."""
    return list(dict.fromkeys(("png", "jpg", "jpeg", "webp", "gif", str(shared.opts.samples_format))))


def fetch_file(filename: str = "") -> Path:
    """A preview's file. Raises FileNotFoundError, and ValueError for anything but a picture in a page's folder."""
    path = Path(filename)
    # by the name alone: to ask a disk about any name would, on Windows, log in to whatever server the name has in it
    if not any(Path(folder).absolute() in path.absolute().parents for folder in allowed_dirs) or ".." in path.parts:
        raise ValueError(f"{filename} is in no folder of a page")
    if path.suffix.lower()[1:] not in preview_extensions():
        raise ValueError(f"{filename} is no picture")
    if not path.is_file():
        raise FileNotFoundError(filename)
    return path


def quote_js(s: str) -> str:
    """A text for a script: in quotes, with quotes and backslashes escaped, and no other character."""
    escaped = s.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
