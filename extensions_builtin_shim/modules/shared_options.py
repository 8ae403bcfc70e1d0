"""The host's own settings that extensions read, with the host's defaults."""

from __future__ import annotations

from ._absent import absent
from .options import OptionInfo

__getattr__ = absent(__name__)

_DEFAULTS: dict[str, object] = {
    "samples_format": "png",
    "extra_networks_default_multiplier": 1.0,
    "extra_networks_add_text_separator": " ",
    "extra_networks_hidden_models": "When searched",
    "extra_networks_card_width": 0,
    "extra_networks_card_height": 0,
    "extra_networks_card_text_scale": 1.0,
    "extra_networks_card_show_desc": True,
    "extra_networks_card_description_is_html": False,
    "extra_networks_card_order_field": "Path",
    "extra_networks_card_order": "Ascending",
}


def known() -> dict[str, OptionInfo]:
    """All of them. An extension's settings come on top of these at each start."""
    return {key: OptionInfo(value, key) for key, value in _DEFAULTS.items()}
