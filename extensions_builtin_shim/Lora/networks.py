"""The adapters there are and those in use: live views of our session."""

from __future__ import annotations

from typing import Any

import lora_patches
from torch import nn

from lib_locon.hosts.a1111 import LoconNetwork, legacy
from lib_locon.hosts.takeover import name_layers

available_networks = legacy.available_networks
available_network_aliases = legacy.available_network_aliases
available_network_hash_lookup = legacy.available_network_hash_lookup
forbidden_network_aliases = legacy.forbidden_network_aliases
loaded_networks: list[Any] = []
loaded_bundle_embeddings: dict[str, Any] = {}
networks_in_memory: dict[str, Any] = {}
originals = lora_patches.LoraPatches()
extra_network_lora = LoconNetwork()

list_available_networks = legacy.files.refresh
update_available_networks_by_names = legacy.look_for
load_networks = legacy.load_networks
network_apply_weights = legacy.apply_weights
network_forward = legacy.forward
network_restore_weights_from_backup = legacy.restore_weights
network_reset_cached_weight = legacy.reset_cached_weight
assign_network_names_to_compvis_modules = name_layers


def purge_networks_from_memory() -> None:
    """Nothing to do: how many adapters stay in memory is looked after with each image."""


def _forward(kind: str) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = getattr(originals, f"{kind}_forward")
        if len(args) == 1 and not kwargs:
            return network_forward(self, args[0], own)
        network_apply_weights(self)
        return own(self, *args, **kwargs)

    return forward


network_Linear_forward = _forward("Linear")  # noqa: N816  the built-in's names
network_Conv2d_forward = _forward("Conv2d")  # noqa: N816
network_GroupNorm_forward = _forward("GroupNorm")  # noqa: N816
network_LayerNorm_forward = _forward("LayerNorm")  # noqa: N816
network_MultiheadAttention_forward = _forward("MultiheadAttention")  # noqa: N816


def _load_state_dict(kind: str) -> Any:
    def load(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(originals, f"{kind}_load_state_dict")(self, *args, **kwargs)

    return load


network_Linear_load_state_dict = _load_state_dict("Linear")  # noqa: N816
network_Conv2d_load_state_dict = _load_state_dict("Conv2d")  # noqa: N816
network_GroupNorm_load_state_dict = _load_state_dict("GroupNorm")  # noqa: N816
network_LayerNorm_load_state_dict = _load_state_dict("LayerNorm")  # noqa: N816
network_MultiheadAttention_load_state_dict = _load_state_dict("MultiheadAttention")  # noqa: N816
