"""The order of the host's start and of its "Reload UI"."""

from __future__ import annotations

from collections.abc import Callable

from . import extensions, extra_networks, script_callbacks, scripts, sd_models, ui_extra_networks
from ._absent import absent

__getattr__ = absent(__name__)


make_app: Callable[[], object] | None = None
"""For the launcher: where the web application comes from; None: there is none."""
app: object = None
"""The one that is up now: a new one at the start, and at each "Reload UI"."""


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
    ui_extra_networks.initialize()
    ui_extra_networks.register_default_pages()
    extra_networks.initialize()
    extra_networks.register_default_extra_networks()


def build_ui() -> None:
    """The callbacks around the building of the page, which is built between the last two: with the settings first,
    then the tabs of cards, from the pages that are registered by then."""
    script_callbacks.before_ui_callback()
    script_callbacks.ui_settings_callback()
    global app
    app = None if make_app is None else make_app()
    script_callbacks.app_started_callback(None, app)


def reload_ui() -> None:
    """ "Reload UI": scripts run again, packages they imported stay, the model stays and is not announced again."""
    script_callbacks.script_unloaded_callback()
    initialize_rest()
    build_ui()
