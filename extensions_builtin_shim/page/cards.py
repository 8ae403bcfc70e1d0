"""The cards of a page that an extension registered, as plain data for the browser."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from modules import shared
from modules.ui_extra_networks import ExtraNetworksPage
from PIL import Image

from lib_locon.untrusted_json import parse

TAB = "txt2img"
_PART = re.compile(r'\s*(?:("(?:\\.|[^"\\])*")|opts\.(\w+)|([\d.]+))\s*(?:\+|$)')


def cards_of(page: ExtraNetworksPage, *, refresh: bool) -> dict[str, Any]:
    """One tab, listed anew as the host lists it when the tab is shown or refreshed."""
    if refresh:
        page.refresh()
    page.create_html(TAB)
    return {
        "title": page.title,
        "name": page.extra_networks_tabname,
        "allow_negative": page.allow_negative_prompt,
        "folders": page.allowed_directories_for_previews(),
        "cards": [_card(item) for item in page.items.values()],
    }


def _card(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": item["name"],
        "prompt": evaluated(item["prompt"]),
        "negative_prompt": evaluated(item.get("negative_prompt", '""')),
        "preview": item.get("preview"),
        "description": item.get("description") or "",
        "search_terms": list(item["search_terms"]),
        "sort_keys": item["sort_keys"],
        "locon": item.get("locon"),
    }


def evaluated(expression: str) -> str:
    """What a browser makes of an item's prompt, an expression such as `"<lora:a:" + opts.x + ">"`.

    The host lets the browser evaluate it as a script. This page allows no such scripts, so it is done here.
    """
    text, position = "", 0
    while position < len(expression):
        part = _PART.match(expression, position)
        if part is None:
            raise ValueError(f"not a sum of texts, numbers and settings: {expression!r}")
        quoted, option, number = part.groups()
        text += json.loads(quoted) if quoted else _number(getattr(shared.opts, option) if option else float(number))
        position = part.end()
    return text


def _number(value: float) -> str:
    return f"{value:g}"


MOST_PIXELS = 16_000_000
"""Of a picture inside a file: a few kilobytes can claim to be gigabytes of it."""


def cover_image(pages: Sequence[ExtraNetworksPage], name: str, item: str) -> tuple[bytes, str] | None:
    """The first picture inside an item's file, with its kind. Read and written anew, as the host does."""
    metadata = next((page.metadata.get(item) for page in pages if page.name == name), None) or {}
    try:
        images = parse(metadata.get("ssmd_cover_images", "[]"))
        image = Image.open(io.BytesIO(base64.b64decode(images[0])), formats=("PNG", "JPEG", "WEBP", "GIF"))
        if image.width * image.height > MOST_PIXELS:
            return None
        file = io.BytesIO()
        image.save(file, "PNG")
    # Pillow's own errors are of many kinds, such as SyntaxError for a broken PNG
    except (ValueError, TypeError, LookupError, OSError, SyntaxError, Image.DecompressionBombError):
        return None
    return file.getvalue(), "image/png"
