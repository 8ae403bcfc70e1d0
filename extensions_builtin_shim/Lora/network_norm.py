"""One norm module of an adapter."""

from __future__ import annotations

from lib_locon.hosts.legacy_modules import NetworkModuleNorm

__all__ = ["NetworkModuleNorm"]
