"""One IA3 module of an adapter."""

from __future__ import annotations

from lib_locon.hosts.legacy_modules import NetworkModuleIa3

__all__ = ["NetworkModuleIa3"]
