"""The order of the host's start and of its "Reload UI"."""

from __future__ import annotations

from . import extensions, extra_networks, script_callbacks, scripts, sd_models
from ._absent import absent

__getattr__ = absent(__name__)


def start() -> None:
    """From nothing to ready.

    The host loads the model in a thread beside; it is ready seconds after the page, so here it comes last.
    """
    initialize_rest()
    build_ui()
    sd_models.model_data.get_sd_model()


def initialize_rest() -> None:
    """The part of the start that "Reload UI" repeats: whatever scripts registered as extra networks is lost here."""
    extensions.list_extensions()
    scripts.load_scripts()
    extra_networks.initialize()
    extra_networks.register_default_extra_networks()


def build_ui() -> None:
    """The callbacks around the building of the page, which does not exist here."""
    script_callbacks.before_ui_callback()
    script_callbacks.ui_settings_callback()
    script_callbacks.app_started_callback(None, None)


def reload_ui() -> None:
    """ "Reload UI": scripts run again, packages they imported stay, the model stays and is not announced again."""
    script_callbacks.script_unloaded_callback()
    initialize_rest()
    build_ui()
