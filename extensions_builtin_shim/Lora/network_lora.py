"""One LoRA/LoCon module of an adapter."""

from __future__ import annotations

from lib_locon.hosts.legacy_modules import NetworkModuleLora

__all__ = ["NetworkModuleLora"]
