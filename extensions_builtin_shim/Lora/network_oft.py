"""One OFT module of an adapter."""

from __future__ import annotations

from lib_locon.hosts.legacy_modules import NetworkModuleOFT

__all__ = ["NetworkModuleOFT"]
