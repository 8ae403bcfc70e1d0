"""Stands in for the webui's `modules` package where there is no webui: `python -m extensions_builtin_shim`, and tests.

Only the parts that our extension calls, in the host's order and timing. Whatever is not here raises: an extension gets
nothing from this package that the real host would not give it. Written from the facts about AUTOMATIC1111's webui
v1.10.1, not from its code.
"""

from __future__ import annotations

from ._absent import absent

__getattr__ = absent(__name__)
