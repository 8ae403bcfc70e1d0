"""An adapter file, a loaded adapter, and one module of one."""

from __future__ import annotations

from typing import Any

from lib_locon.hosts.legacy_library import NetworkOnDisk, SdVersion
from lib_locon.hosts.legacy_modules import NetworkModule

__all__ = ["Network", "NetworkModule", "NetworkOnDisk", "SdVersion"]


class Network:
    """A loaded adapter. Those in `networks.loaded_networks` are live: `lib_locon/hosts/legacy.py` says how."""

    def __init__(self, name: str, network_on_disk: NetworkOnDisk) -> None:
        self.name = name
        self.network_on_disk = network_on_disk
        self.te_multiplier = 1.0
        self.unet_multiplier = 1.0
        self.dyn_dim: int | None = None
        self.modules: Any = {}
        self.bundle_embeddings: dict[str, Any] = {}
        self.mtime: float | None = None
        self.mentioned_name: str | None = None
