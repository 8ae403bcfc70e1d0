"""The text under an image, read back into fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from . import script_callbacks, shared
from ._absent import absent

__getattr__ = absent(__name__)

_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LEAST = 3  # a last line with fewer parameters is a part of the prompt
_NEGATIVE = "Negative prompt:"


def parse_generation_parameters(x: str) -> dict[str, str]:
    """Field → text; "Prompt" and "Negative prompt" are always there."""
    *lines, last = x.strip().split("\n")
    found = _PARAMETER.findall(last)
    if len(found) < _LEAST:
        lines, found = [*lines, last], []
    start = next((index for index, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = [line.strip() for line in lines[start:]]
    if negative:
        negative[0] = negative[0].removeprefix(_NEGATIVE).strip()
    fields = {name: _unquoted(value.strip()) for name, value in found}
    return {**fields, "Prompt": "\n".join(line.strip() for line in lines[:start]), _NEGATIVE[:-1]: "\n".join(negative)}


def get_override_settings(params: Mapping[str, str]) -> list[tuple[str, str, object]]:
    """(name in the text, setting, value) of the settings that a text asks for and that are another one now."""
    asked = [(info.infotext, key) for key, info in shared.opts.data_labels.items() if info.infotext in params]
    found = [(name, key, shared.opts.cast_value(key, params[name])) for name, key in asked]
    return [(name, key, value) for name, key, value in found if value != getattr(shared.opts, key)]


def paste_fields(text: str) -> dict[str, str]:
    """What the host's paste button does: reads the fields and lets the extensions change them."""
    fields = parse_generation_parameters(text)
    script_callbacks.infotext_pasted_callback(text, fields)
    return fields


def _unquoted(value: str) -> str:
    if not (len(value) > 1 and value[0] == value[-1] == '"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
