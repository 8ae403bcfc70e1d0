"""The callbacks of extensions: who is called when, and in which order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from . import errors, extensions
from ._absent import absent
from .util import topological_sort

__getattr__ = absent(__name__)

Callback = Callable[..., object]


@dataclass
class ScriptCallback:
    """`script` is the file that registered it. `name` is what a metadata.ini calls it."""

    script: str
    callback: Callback
    name: str


@dataclass
class CFGDenoiserParams:
    """What a callback of `on_cfg_denoiser` gets; the host goes on with what it leaves in `x` and the conditions.

    `text_cond` is the encoded prompt, `text_uncond` the negative one; `denoiser` is the host's object, with the job as
    its `p`.
    """

    x: Tensor
    image_cond: Tensor | None
    sigma: Tensor
    sampling_step: int
    total_sampling_steps: int
    text_cond: Tensor
    text_uncond: Tensor
    denoiser: object = None


_CATEGORIES = (
    "app_started", "model_loaded", "ui_settings", "script_unloaded", "before_ui", "cfg_denoiser", "infotext_pasted"
)  # fmt: skip
callback_map: dict[str, list[ScriptCallback]] = {f"callbacks_{category}": [] for category in _CATEGORIES}


def on_app_started(callback: Callback, *, name: str | None = None) -> None:
    """Called with the page and its web application when both are up; here there is no page, so with None first."""
    _add("app_started", callback, name)


def on_model_loaded(callback: Callback, *, name: str | None = None) -> None:
    """Called with a model whose weights were loaded, into a new object or into one that was there."""
    _add("model_loaded", callback, name)


def on_ui_settings(callback: Callback, *, name: str | None = None) -> None:
    """Called while the page is built: the place for `shared.opts.add_option`."""
    _add("ui_settings", callback, name)


def on_before_ui(callback: Callback, *, name: str | None = None) -> None:
    """Called before the page is built. The last in the list is called first."""
    _add("before_ui", callback, name)


def on_script_unloaded(callback: Callback, *, name: str | None = None) -> None:
    """Called before the scripts are loaded again. The last in the list is called first."""
    _add("script_unloaded", callback, name)


def on_cfg_denoiser(callback: Callback, *, name: str | None = None) -> None:
    """Called with a CFGDenoiserParams before each call of the denoising network."""
    _add("cfg_denoiser", callback, name)


def on_infotext_pasted(callback: Callback, *, name: str | None = None) -> None:
    """Called with an image's text and the fields read from it, which it may change, when the user pastes one."""
    _add("infotext_pasted", callback, name)


def clear_callbacks() -> None:
    """Forgets all; the scripts are about to be loaded."""
    for callbacks in callback_map.values():
        callbacks.clear()


def remove_current_script_callbacks() -> None:
    """Forgets those that the calling file registered."""
    script = _caller()
    _keep(lambda known: known.script != script)


def remove_callbacks_for_function(callback_func: Callback) -> None:
    """Forgets one function."""
    _keep(lambda known: known.callback != callback_func)


def app_started_callback(demo: object, app: object) -> None:
    """The host calls this when its page is up, and again after each "Reload UI"."""
    _call("app_started", demo, app)


def model_loaded_callback(sd_model: object) -> None:
    """The host calls this when weights were loaded; "Reload UI" loads none."""
    _call("model_loaded", sd_model)


def ui_settings_callback() -> None:
    """The host calls this while it builds the page."""
    _call("ui_settings")


def before_ui_callback() -> None:
    """The host calls this right before it builds the page."""
    _call("before_ui", backwards=True)


def script_unloaded_callback() -> None:
    """The host calls this at "Reload UI", before it loads the scripts again."""
    _call("script_unloaded", backwards=True)


def cfg_denoiser_callback(params: CFGDenoiserParams) -> None:
    """The host calls this at each step."""
    _call("cfg_denoiser", params)


def infotext_pasted_callback(infotext: str, params: dict[str, str]) -> None:
    """The host calls this when an image's text is pasted."""
    _call("infotext_pasted", infotext, params)


def ordered_callbacks(category: str) -> list[ScriptCallback]:
    """In the order of registration, changed as the metadata.ini files of all extensions ask for it."""
    callbacks = {known.name: known for known in callback_map[f"callbacks_{category}"]}
    needs: dict[str, list[str]] = {name: [] for name in callbacks}
    for extension in extensions.extensions:
        for wish in extension.metadata.list_callback_order_instructions():
            if wish.name in callbacks:
                needs[wish.name] += wish.after
                for name in wish.before:
                    needs.get(name, []).append(wish.name)
    return [callbacks[name] for name in topological_sort(needs)]


def _call(category: str, *arguments: object, backwards: bool = False) -> None:
    callbacks = ordered_callbacks(category)
    for known in reversed(callbacks) if backwards else callbacks:
        with errors.reported(f"Error executing callback {category}_callback for {known.script}"):
            known.callback(*arguments)


def _add(category: str, callback: Callback, name: str | None) -> None:
    script = _caller()
    extension = extensions.find_extension(script)
    owner = extension.canonical_name if extension else "base"
    wanted = "/".join([owner, Path(script).name, category, *([name] if name else [])])
    known = callback_map[f"callbacks_{category}"]
    taken = {other.name for other in known}
    names = (wanted, *(f"{wanted}-{number}" for number in range(1, len(known) + 1)))
    known.append(ScriptCallback(script, callback, next(name for name in names if name not in taken)))


def _caller() -> str:
    """The file that called into this one: its name becomes a part of the callback's, wherever that file lies."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename


def _keep(wanted: Callable[[ScriptCallback], bool]) -> None:
    for callbacks in callback_map.values():
        callbacks[:] = [known for known in callbacks if wanted(known)]
