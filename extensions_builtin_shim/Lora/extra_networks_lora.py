"""Who answers for the tags. Others derive from the class and hand on to it what they have changed in the tags."""

from __future__ import annotations

from lib_locon.hosts.a1111 import LoconNetwork as ExtraNetworkLora

__all__ = ["ExtraNetworkLora"]
