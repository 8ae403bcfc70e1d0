"""Our settings among the host's options. Imported only inside the host or its stand-in."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

from modules import shared

from lib_locon.hosts.infotext import APPLIED
from lib_locon.settings import BUILTIN_SETTINGS, NO_ADAPTER, SD_LORA, SETTINGS, Setting, Value


def value(setting: Setting) -> Value:
    """What a setting is now; its default in a host that does not know it."""
    return setting.read(getattr(shared.opts, setting.key, setting.default))


def number(setting: Setting) -> int:
    """That of a setting which is one."""
    found = value(setting)
    assert isinstance(found, int)
    return found


def note(p: Any, *, used: bool, hires: bool) -> None:
    """Writes the settings that make another image of the same adapters into the image's text, if they are set so."""
    texts = getattr(p, "extra_generation_params", None)
    if not isinstance(texts, dict):
        return  # no job: the host has nothing to write it into
    for setting in (each for each in SETTINGS if each.infotext):
        found = value(setting)
        if used and found != setting.default:
            texts[setting.infotext] = found
        elif not hires:  # a hires pass without adapters takes nothing back of what was said of the first pass
            texts.pop(setting.infotext, None)


def complete(fields: MutableMapping[str, Any]) -> None:
    """A pasted text of ours that does not have such a setting was made with its default."""
    if APPLIED in fields:
        for setting in (each for each in SETTINGS if each.infotext):
            fields.setdefault(setting.infotext, setting.default)


def add_settings(names: Callable[[], list[str]], refresh: Callable[[], object]) -> None:
    """Puts our settings on the host's page, and the built-in's where it does not. `names` are those of the adapters.

    Through add_option: the host puts an overridden option back only if it was in `opts.data`, and the built-in's own
    are not. So an override of one image would stay for good; they are put there too.
    """
    for setting in SETTINGS:
        shared.opts.add_option(setting.key, _info(setting))
    for setting in BUILTIN_SETTINGS:
        known = shared.opts.data_labels.get(setting.key)
        if known is None:
            shared.opts.add_option(setting.key, _info(setting, names, refresh))
        else:
            shared.opts.data.setdefault(setting.key, known.default)


def _info(setting: Setting, names: Callable[[], list[str]] = list, refresh: Callable[[], object] | None = None) -> Any:
    gradio = sys.modules.get("gradio")  # the host's own, which it has where it has a page
    default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    args: Any = {"lines": setting.lines} if setting.lines else None
    more: dict[str, Any] = {"infotext": setting.infotext} if setting.infotext else {}
    if setting is SD_LORA:
        more = {"component": getattr(gradio, "Dropdown", None), "refresh": refresh}
        args = lambda: {"choices": [NO_ADAPTER, *names()]}  # noqa: E731  the host calls it each time it shows the list
    elif setting.choices:
        more["component"] = getattr(gradio, "CheckboxGroup" if isinstance(default, list) else "Radio", None)
        args = {"choices": list(setting.choices)}
    elif isinstance(default, int) and not isinstance(default, bool):
        args = {"precision": 0}
    return shared.OptionInfo(default, setting.label, component_args=args, section=setting.section, **more)
