"""Our settings among the host's options. Imported only inside the host or its stand-in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from modules import shared

from lib_locon.settings import BUILTIN_SETTINGS, NO_ADAPTER, SD_LORA, SETTINGS, Setting, Value


def value(setting: Setting) -> Value:
    """What a setting is now; its default in a host that does not know it."""
    return setting.read(getattr(shared.opts, setting.key, setting.default))


def number(setting: Setting) -> int:
    """That of a setting which is one."""
    found = value(setting)
    assert isinstance(found, int)
    return found


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
    more: dict[str, Any] = {}
    if setting is SD_LORA:
        more = {"component": getattr(gradio, "Dropdown", None), "refresh": refresh}
        args = lambda: {"choices": [NO_ADAPTER, *names()]}  # noqa: E731  the host calls it each time it shows the list
    elif setting.choices:
        more = {"component": getattr(gradio, "CheckboxGroup" if isinstance(default, list) else "Radio", None)}
        args = {"choices": list(setting.choices)}
    elif isinstance(default, int) and not isinstance(default, bool):
        args = {"precision": 0}
    return shared.OptionInfo(default, setting.label, component_args=args, section=setting.section, **more)
