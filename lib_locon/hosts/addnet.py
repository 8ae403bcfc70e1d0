"""Texts of images that were made with the old additional-networks extension: what its fields are as tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MODEL = "AddNet Model "
_HASH = re.compile(r"\([0-9a-fA-F]+\)$")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def tags(fields: Mapping[str, Any]) -> str:
    """A tag for each network that the fields name, in their order. A is for the UNet there, B for the text encoder."""
    found = []
    for key in fields:
        number = key.removeprefix(_MODEL)
        name = _HASH.sub("", str(fields[key]).strip()).strip()
        if number == key or fields.get(f"AddNet Module {number}") != "LoRA" or not _is_plain(name):
            continue
        unet = _weight(fields.get(f"AddNet Weight A {number}"), "1.0")
        te = _weight(fields.get(f"AddNet Weight B {number}"), unet)
        found.append(f"<lora:{name}:{unet}>" if te == unet else f"<lora:{name}:{te}:{unet}>")
    return "".join(found)


def _weight(text: object, default: str) -> str:
    return text if isinstance(text, str) and _NUMBER.fullmatch(text) else default


def _is_plain(name: str) -> bool:
    """Whether a tag can hold the name: an image's text is anybody's, and this becomes a part of the prompt."""
    return bool(name.strip()) and not any(mark in name for mark in "<>:\n")
