"""AUTOMATIC1111's webui: takes over `<lora:…>` and `<lyco:…>`. Imported only inside the host (or its stand-in)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules import extra_networks, script_callbacks, shared

from lib_locon.hosts.webui import Webui, log
from lib_locon.report import Report
from lib_locon.settings import ALLOW_PICKLE, BASE_STORE, SETTINGS, SIDE_PATH, Setting

_webui = Webui()


class LoconNetwork(extra_networks.ExtraNetwork):  # type: ignore[misc]  # the host is untyped
    """Answers the host when a prompt has, or no longer has, adapter tags."""

    def __init__(self) -> None:
        super().__init__("lora")

    def activate(self, p: Any, params_list: Sequence[Any]) -> None:
        """Called for each batch and pass, with an empty list when there are no tags."""
        if not params_list and not _webui.active:
            _webui.last_report = Report()
            return  # `shared.sd_model` loads a model where there is none: not for a prompt that asks for nothing
        tags = [("lora", [str(item) for item in params.items]) for params in params_list]
        _webui.use_folders(_folders(), allow_pickle=bool(_value(ALLOW_PICKLE)))
        _webui.side_path = bool(_value(SIDE_PATH))
        _webui.base_store = str(_value(BASE_STORE))
        _webui.activate(shared.sd_model, tags, getattr(p, "comment", _no_comment), _checkpoint(shared.sd_model))

    def deactivate(self, p: Any) -> None:
        """The weights stay patched: the next run's `activate` changes them, or finds them right and has no work."""


def register() -> None:
    """Hooks into the host's start-up. To be called at each load of the scripts ("Reload UI" runs them again)."""
    # the host empties its registry after the scripts are loaded and lets the built-in register in before_ui; an order
    # among those callbacks can be asked for in metadata.ini only under the folder's name, which the user may choose.
    # app_started comes after all of them, at each start and after each "Reload UI", and before the first image
    script_callbacks.on_app_started(lambda *_: take_over())
    script_callbacks.on_ui_settings(add_settings)
    script_callbacks.on_model_loaded(_webui.model_loaded)
    script_callbacks.on_script_unloaded(_webui.release)


def add_settings() -> None:
    """Puts our settings on the host's page. Through add_option: the host restores an overridden one only then."""
    for setting in SETTINGS:
        section = ("locon", "LoCon adapters")
        shared.opts.add_option(setting.key, shared.OptionInfo(setting.default, setting.label, section=section))


def _value(setting: Setting) -> object:
    value: object = getattr(shared.opts, setting.key, setting.default)
    return value if not setting.choices or value in setting.choices else setting.default


def _checkpoint(model: Any) -> Path | None:
    """The file that a model was loaded from, as the host remembers it."""
    name = getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)
    return Path(name) if isinstance(name, str) else None


def last_report() -> Report:
    """What the latest `activate` did; the host itself gets sentences only."""
    return _webui.last_report


def take_over() -> None:
    """Makes us the handler of both tags. Harmless to repeat."""
    network = LoconNetwork()
    extra_networks.register_extra_network(network)
    extra_networks.register_extra_network_alias(network, "lyco")
    log.info("sd-webui-locon answers for <lora:…> and <lyco:…>")


def _folders() -> list[Path]:
    """The folders that the webui's own options name."""
    names = [getattr(shared.cmd_opts, option, None) for option in ("lora_dir", "lyco_dir_backcompat")]
    return list(dict.fromkeys(Path(name) for name in names if name))


def _no_comment(_: str) -> None:
    """At model load the host activates an empty set without a processing object."""
