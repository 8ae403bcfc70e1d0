"""The built-in's functions that other extensions call, in terms of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_locon.files.reader import FileIdentity
from lib_locon.hosts.legacy_library import Files, Live
from lib_locon.hosts.webui import Webui
from lib_locon.library import Library
from lib_locon.patching.hooks import Hook
from lib_locon.prompt.numbers import Curve
from lib_locon.prompt.request import Request, in_order


class Legacy:
    """What is behind the built-in's names.

    `model` gives the one in use, with our settings in place, and its file; `hash_of` the hashes computed so far.
    """

    def __init__(
        self,
        webui: Webui,
        library: Callable[[], Library],
        model: Callable[[], tuple[nn.Module, Path | None]],
        hash_of: Callable[[FileIdentity], str],
    ) -> None:
        self.webui, self.files, self._model = webui, Files(library, hash_of), model
        self.available_networks = Live(self.files.by_name)
        self.available_network_aliases = Live(self.files.by_alias)
        self.available_network_hash_lookup = Live(self.files.by_hash)
        self.forbidden_network_aliases = Live(self.files.shared_aliases)
        self._seen: object = None
        self._reset = False
        self._restored: int | None = None
        """The layer (by id) that was given its base back last."""
        self._pointless: tuple[int, ...] | None = None
        """The set for which layers are given their base back and patched again before they are used."""

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Those that change what acts on the model, by the built-in's names."""
        return {
            "load_networks": self.load_networks,
            "network_apply_weights": self.apply_weights,
            "network_forward": self.forward,
            "network_restore_weights_from_backup": self.restore_weights,
            "network_reset_cached_weight": self.reset_cached_weight,
        }

    def load_networks(
        self,
        names: Sequence[str],
        te_multipliers: Sequence[float] | None = None,
        unet_multipliers: Sequence[float] | None = None,
        dyn_dims: Sequence[int | None] | None = None,
    ) -> None:
        """Uses these adapters and no others, at once."""
        model, checkpoint = self._model()
        requests = []
        for index, name in enumerate(names):
            te = te_multipliers[index] if te_multipliers else 1.0
            unet = unet_multipliers[index] if unet_multipliers else 1.0
            curves = {"te": Curve.constant(float(te)), "unet": Curve.constant(float(unet))}
            requests.append(Request(name, in_order(curves), dyn_dims[index] if dyn_dims else None))
        self.webui.use(model, requests, lambda _: None, checkpoint)

    def apply_weights(self, module: nn.Module) -> None:
        """To be called before a layer's forward: honours what was set since the last time, for all layers."""
        if self._reset and self._restored == id(module):
            # layer by layer, the whole model would be restored and patched: some do so before they add an adapter to
            # the output themselves, and with the built-in too the layer is patched by then
            self._pointless = self._set
        self._restored = None
        now = self.webui.loaded.current
        if now != self._seen or self._reset:
            self._seen, self._reset = now, False
            self.webui.follow()

    @property
    def _set(self) -> tuple[int, ...]:
        """Which set is in use: another after each `activate`."""
        names = self.webui.loaded.names
        return tuple(map(id, names.loaded)) if names is not None else ()

    @property
    def _is_pointless(self) -> bool:
        return self._pointless is not None and self._pointless == self._set

    def forward(self, module: nn.Module, value: Any, original_forward: Callable[..., Any]) -> Any:
        """The layer's own forward: what adapters add is in its weights, or in a hook."""
        hooked = _is_hooked(module)
        self.apply_weights(module)
        output = original_forward(module, value)
        if not hooked:
            # torch looked for hooks before it called us, and will not run one that came since
            for hook in list(module._forward_hooks.values()):
                output = hook(module, (value,), {}, output) if isinstance(hook, Hook) else output
        return output

    def look_for(self, names: Sequence[str]) -> None:
        """Lists the folders again, where one of these is not known."""
        if not all(name in self.available_network_aliases for name in names):
            self.files.refresh()

    def restore_weights(self, module: nn.Module) -> None:
        """Whoever calls this for one layer does so for all and adds the adapters itself: all get their base back."""
        if not self._is_pointless:
            self._restored = id(module)
            self.webui.suspend()

    def reset_cached_weight(self, module: nn.Module) -> None:
        """The next `apply_weights` applies again, also after `restore_weights`."""
        del module
        self._reset = self._reset or not self._is_pointless


def _is_hooked(module: nn.Module) -> bool:
    """Whether torch runs the hooks of this call at all: it asks once, before the layer's forward."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    everywhere = torch.nn.modules.module
    return any(getattr(module, f"_{kind}", ()) or getattr(everywhere, f"_global_{kind}", ()) for kind in kinds)
