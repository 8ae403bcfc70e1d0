"""One whole-difference module of an adapter."""

from __future__ import annotations

from lib_locon.hosts.legacy_modules import NetworkModuleFull

__all__ = ["NetworkModuleFull"]
