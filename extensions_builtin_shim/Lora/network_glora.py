"""One GLoRA module of an adapter."""

from __future__ import annotations

from lib_locon.hosts.legacy_modules import NetworkModuleGLora

__all__ = ["NetworkModuleGLora"]
