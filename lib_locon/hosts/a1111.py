"""AUTOMATIC1111's webui: takes over `<lora:…>` and `<lyco:…>`. Imported only inside the host (or its stand-in)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules import extra_networks, script_callbacks, sd_models, shared
from torch import nn

from lib_locon.hosts import takeover
from lib_locon.hosts.arrivals import Arrivals
from lib_locon.hosts.legacy_api import Legacy
from lib_locon.hosts.options import number, value
from lib_locon.hosts.rivals import Rivals
from lib_locon.hosts.runs import Runs
from lib_locon.hosts.scheduled import Place
from lib_locon.hosts.services import Services
from lib_locon.hosts.webui import Webui, log
from lib_locon.library import Library
from lib_locon.patching.rounding import rounding_named
from lib_locon.report import Report
from lib_locon.settings import (
    ALLOW_PICKLE,
    BASE_STORE,
    BUNDLED_TI,
    COMMENTS,
    FREE_UNUSED,
    FUNCTIONAL,
    IN_MEMORY,
    PRESETS,
    ROUNDING,
    SIDE_PATH,
    WARN_IN_CONSOLE,
)

_webui = Webui()


class LoconNetwork(extra_networks.ExtraNetwork):  # type: ignore[misc]  # the host is untyped
    """Answers the host when a prompt has, or no longer has, adapter tags."""

    def __init__(self) -> None:
        super().__init__("lora")

    def activate(self, p: Any, params_list: Sequence[Any]) -> None:
        """Called for each batch and pass, with an empty list when there are no tags."""
        _rivals.asked = True
        _places.settle()
        hires = _in_hires(p, params_list)
        params_list = _services.with_chosen(p, params_list)
        if not params_list and not _webui.active:
            _webui.nothing()
            _services.told(p, Report(), hires=hires)
            return  # `shared.sd_model` loads a model where there is none: not for a prompt that asks for nothing
        tags = [("lora", [str(item) for item in params.items]) for params in params_list]
        model, checkpoint = _model()
        if not params_list and not getattr(p, "prompts", None) and _webui.session_of(model) is None:
            return  # the host loads a model, perhaps in the middle of a run; nothing of ours is in it yet
        _step_last()
        comment = getattr(p, "comment", _no_comment)
        report = _webui.activate(model, tags, comment, checkpoint, seed=_seed(p), hires=hires)
        _services.told(p, report, hires=hires)
        if _webui.text_changed:
            _forget_encoded(p)

    def deactivate(self, p: Any) -> None:
        """The weights stay patched: the next run's `activate` changes them, or finds them right and has no work."""
        _webui.finished()


def register() -> None:
    """Hooks into the host's start-up. To be called at each load of the scripts ("Reload UI" runs them again)."""
    # the host empties its registry after the scripts are loaded and lets the built-in register in before_ui; an order
    # among those callbacks can be asked for in metadata.ini only under the folder's name, which the user may choose.
    # app_started comes after all of them, at each start and after each "Reload UI", and before the first image
    _show_log()
    takeover.offer_names()  # now, for scripts that import them while they load
    script_callbacks.on_app_started(lambda *_: take_over())
    _services.register()
    script_callbacks.on_model_loaded(_webui.model_loaded)
    script_callbacks.on_model_loaded(_places.model_loaded)
    script_callbacks.on_script_unloaded(_places.give_back)  # the last one here is called first
    script_callbacks.on_script_unloaded(_webui.release)
    script_callbacks.on_model_loaded(_arrivals.watch)
    script_callbacks.on_script_unloaded(_arrivals.remove)
    script_callbacks.on_cfg_denoiser(_before_step)
    _runs.watch()
    script_callbacks.on_script_unloaded(_runs.remove)


def _checkpoint(model: Any) -> Path | None:
    """The file that a model was loaded from, as the host remembers it."""
    name = getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)
    return Path(name) if isinstance(name, str) else None


def last_report() -> Report:
    """What the latest `activate` did; the host itself gets sentences only."""
    return _webui.last_report


def take_over() -> None:
    """Makes us the handler of both tags, and the built-in's names lead to us. Harmless to repeat."""
    _rivals.take_over()
    _places.take_over()
    for model in getattr(sd_models.model_data, "loaded_sd_models", ()):
        _arrivals.watch(model)


def _settings() -> None:
    """Folders and settings as the host has them now."""
    library()
    _webui.side_path = bool(value(SIDE_PATH) or value(FUNCTIONAL))
    _webui.base_store = str(value(BASE_STORE))
    _webui.rounding = rounding_named(str(value(ROUNDING)))
    _webui.free_unused = bool(value(FREE_UNUSED))
    _webui.embeddings.in_infotext = bool(value(BUNDLED_TI))
    _webui.comments = str(value(COMMENTS))
    _webui.warn_of_missing = bool(value(WARN_IN_CONSOLE))
    _webui.cache.keep(number(IN_MEMORY))
    _webui.use_presets(str(value(PRESETS)))


def _model() -> tuple[nn.Module, Path | None]:
    """The model in use and its file, with the settings as they are now."""
    _settings()
    return shared.sd_model, _checkpoint(shared.sd_model)


def _come_back(place: Place, p: Any) -> None:
    """The host goes on with a job, after `p` inside it."""
    try:
        _webui.come_back(place, *_model())
    except Exception:  # noqa: BLE001  the host's code runs in it too, and no image may be lost over it
        log.exception("the image goes on with the adapters of another one that was made in the middle of it")
    if _webui.text_changed:
        _forget_encoded(p)


def _show_log() -> None:
    """Makes our lines visible: the host shows nothing below a warning unless it was started with --loglevel."""
    host_has_levels = importlib.util.find_spec("modules.logging_config") is not None
    if host_has_levels and not logging.root.handlers and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(lambda _: not logging.root.handlers)  # the first `logging.info` of anybody makes one there
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _step_last() -> None:
    """Puts our callback behind all others': what they set in theirs is honoured in the same step."""
    known = script_callbacks.callback_map["callbacks_cfg_denoiser"]
    if not known or known[-1].callback is not _before_step:
        script_callbacks.remove_callbacks_for_function(_before_step)
        script_callbacks.on_cfg_denoiser(_before_step)


def library() -> Library:
    """The adapters as the host's options and our settings have them now."""
    _webui.use_folders(_folders(), allow_pickle=bool(value(ALLOW_PICKLE)))
    return _webui.library


_services = Services(_webui, library, _settings, _checkpoint)
cards = _services.cards.cards
"""The adapters' cards, with what is known of their files."""
legacy = Legacy(_webui, library, _model, _services.known_hash)
"""What stands behind the names of the built-in's that other extensions use."""
_arrivals = Arrivals(lambda model: _webui.encodes(model, _checkpoint(model)))
_runs = Runs(_webui.place, _come_back)
_rivals = Rivals(LoconNetwork, _webui.release)
_places = takeover.Places(_webui.loaded, legacy.functions(), LoconNetwork)


def _folders() -> list[Path]:
    """The folders that the webui's own options name."""
    names = [getattr(shared.cmd_opts, option, None) for option in ("lora_dir", "lyco_dir_backcompat")]
    return list(dict.fromkeys(Path(name) for name in names if name))


def _before_step(params: Any) -> None:
    """Called before each call of the denoising network; samplers of a higher order call it more than once a step."""
    _services.infotext.fill()
    model = shared.sd_model
    _webui.arrived(model, _checkpoint(model))
    _webui.step(model, params.sampling_step, params.total_sampling_steps)


def _in_hires(p: Any, params_list: Sequence[Any]) -> bool:
    # with little memory the host encodes the hires pass's prompt, with its tags, before the first pass: the flag of the
    # pass is not set yet, but these are the tags of that prompt
    theirs = (getattr(p, "hr_extra_network_data", None) or {}).values()
    of_hires = {id(params) for tags in theirs for params in tags}
    return bool(getattr(p, "is_hr_pass", False)) or any(id(params) in of_hires for params in params_list)


def _forget_encoded(p: Any) -> None:
    """Empties the host's cache of encoded prompts.

    It is keyed by prompts and tags: presets, random block weights and a file trained anew change what a tag means.
    """
    for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
        cache = getattr(p, name, None)
        if isinstance(cache, list):  # shared with the host's class, so emptied in place
            cache[:] = [None] * len(cache)


def _seed(p: Any) -> int:
    """Of the batch's first image."""
    seeds = getattr(p, "seeds", None) or [getattr(p, "seed", 0)]
    return int(seeds[0]) if isinstance(seeds[0], int) else 0


def _no_comment(_: str) -> None:
    """At model load the host activates an empty set without a processing object."""
