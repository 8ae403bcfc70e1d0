"""Whose names are whose: the built-in Lora's modules and patches, and its names.

Imported only inside the host or its stand-in.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from modules import sd_models
from torch import nn

from lib_locon.hosts.legacy import LoadedNetworks

log = logging.getLogger("lib_locon")
FOLDER = Path(__file__).resolve().parents[2] / "extensions_builtin_shim" / "Lora"
"""Modules that answer to the names of the built-in's where that is switched off."""
_STEMS = frozenset(path.stem for path in FOLDER.glob("*.py")) - {"__init__"}
_LAYERS = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "MultiheadAttention")
_METHODS = {"forward": "forward", "load_state_dict": "_load_from_state_dict"}


class Finder(MetaPathFinder):
    """Finds the built-in's names in our folder. Stands last, so it gives way to whoever else has them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a name of the built-in's, None for all others."""
        del target
        if path is not None or fullname not in _STEMS:
            return None
        return importlib.util.spec_from_file_location(fullname, FOLDER / f"{fullname}.py")


_FINDER = Finder()


def offer_names() -> None:
    """Makes the built-in's names importable where nobody else has them."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def withdraw_names() -> None:
    """Takes them back, those too that were imported: the built-in may be switched on at the next "Reload UI"."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in _STEMS:
        if is_ours(sys.modules.get(name)):
            del sys.modules[name]


def is_ours(module: ModuleType | None) -> bool:
    """Whether a module is from our folder."""
    return module is not None and Path(str(getattr(module, "__file__", ""))).parent == FOLDER


class Owner:
    """The modules that have the names, the built-in's or ours, as places to show the loaded adapters in."""

    def __init__(self, networks: ModuleType, network: ModuleType) -> None:
        self._networks, self._network = networks, network

    @property
    def loaded(self) -> list[Any]:
        """Asked for anew each time: other extensions put another list in its place."""
        found: list[Any] = self._networks.loaded_networks
        return found

    @property
    def in_memory(self) -> dict[str, Any]:
        """As `loaded`."""
        found: dict[str, Any] = self._networks.networks_in_memory
        return found

    @property
    def kind(self) -> type[Any]:
        """As `loaded`."""
        found: type[Any] = self._network.Network
        return found

    def on_disk(self, path: Path) -> Any:
        """The object for a file: the one in `available_networks`, or another for a file that is not there."""
        known = self._networks.available_networks.get(path.stem)
        if known is not None and Path(known.filename) == path:
            return known
        return self._network.NetworkOnDisk(path.stem, str(path))


def find_owner() -> tuple[Owner | None, ModuleType | None]:
    """Who has the names, and the built-in's (or anybody's) `networks` where that is not ours."""
    try:
        networks, network = importlib.import_module("networks"), importlib.import_module("network")
    except Exception:  # noqa: BLE001  somebody else's module, and whatever it does when it is imported
        networks = network = ModuleType("networks")
    needed = (("loaded_networks", networks), ("networks_in_memory", networks), ("available_networks", networks))
    if not all(hasattr(module, name) for name, module in (*needed, ("Network", network), ("NetworkOnDisk", network))):
        log.warning("another extension has a module called networks: others cannot see the loaded adapters there")
        return None, None
    return Owner(networks, network), None if is_ours(networks) else networks


class _StandIn:
    """Stands where the built-in keeps the methods that it patched. They are torch's own again."""

    def __init__(self, originals: Any) -> None:
        vars(self).update(vars(originals))
        self.unloaded = False

    def undo(self) -> None:
        """The built-in is unloaded: there is nothing left to undo, and nothing to put back."""
        self.unloaded = True


def _torchs_own() -> SimpleNamespace:
    """The methods of torch's layers under the built-in's names for them. To be made while none is patched."""
    methods = {
        f"{layer}_{short}": getattr(getattr(nn, layer), field) for layer in _LAYERS for short, field in _METHODS.items()
    }
    return SimpleNamespace(**methods, undo=lambda: None)


class BuiltIn:
    """The built-in, as long as we stand in its place: it stays loaded, and acts no more."""

    def __init__(self, networks: ModuleType, functions: Mapping[str, Callable[..., Any]], handler: type[Any]) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._networks = networks
        _take_out(networks)
        for name, function in functions.items():
            self._replace(networks, name, function)
        lora = sys.modules.get("extra_networks_lora")
        kind = getattr(lora, "ExtraNetworkLora", None)
        # where the built-in is switched off, somebody may have imported half of its modules, and the rest is ours
        for name in ("activate", "deactivate") if isinstance(kind, type) and not issubclass(handler, kind) else ():
            self._replace(kind, name, _handed_on(handler, name))
        if vars(networks).get("originals", self) is None:  # nothing was patched, but others call layers through it
            self._replace(networks, "originals", _torchs_own())
        self._originals: Any = None
        self._stand_in: _StandIn | None = None
        self.undo_patches()

    def _replace(self, place: Any, name: str, new: Any) -> None:
        if name in vars(place):
            self._replaced.append((place, name, vars(place)[name], new))
            setattr(place, name, new)

    def undo_patches(self) -> bool:
        """Gives torch's classes their own methods back. Returns whether all of them have theirs.

        To be tried again later where not: the host puts its own over some while it loads a model, and puts back what
        it found there.
        """
        originals = getattr(self._networks, "originals", None)
        patched = [self._is_patch(layer, short, field) for layer in _LAYERS for short, field in _METHODS.items()]
        if self._originals is None and originals is not None and all(patched):
            # the model may be loading in another thread, within one of these functions: they find what they call
            # through `originals`, which the built-in's own `undo` empties
            self._originals, self._stand_in = originals, _StandIn(originals)
            self._networks.originals = self._stand_in  # type: ignore[attr-defined]
            originals.undo()
            patched = []
        return not any(patched)

    def _is_patch(self, layer: str, short: str, field: str) -> bool:
        patch = getattr(self._networks, f"network_{layer}_{short}", None)
        return patch is not None and getattr(getattr(nn, layer), field) is patch

    def give_back(self) -> None:
        """Everything as it was, where nobody else has changed it since."""
        for place, name, old, new in reversed(self._replaced):
            if vars(place).get(name) is new:
                setattr(place, name, old)
        self._replaced.clear()
        if self._originals is not None and self._stand_in is not None:
            if not self._stand_in.unloaded:  # else the built-in itself is unloaded by now
                self._originals.__init__()
            self._networks.originals = self._originals  # type: ignore[attr-defined]
            self._originals = None


def _take_out(networks: ModuleType) -> None:
    """Gives models their base back, by the built-in's own hand, where it acted before we came (at a "Reload UI")."""
    restore = getattr(networks, "network_restore_weights_from_backup", None)
    forget = getattr(networks, "network_reset_cached_weight", None)
    if restore is None or forget is None:
        return
    modules = (module for model in sd_models.model_data.loaded_sd_models for module in model.modules())
    for module in modules:
        with torch.no_grad():
            if getattr(module, "network_current_names", ()):
                restore(module)
            if hasattr(module, "network_weights_backup"):
                forget(module)  # its copy of the base: it would keep that for good


def _handed_on(handler: type[Any], name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        del self
        return getattr(handler(), name)(*args)

    return method


class LayerNames:
    """`sd_model.network_layer_mapping` and `module.network_layer_name`, for models where the built-in set none."""

    def __init__(self) -> None:
        self._named: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def name(self, model: Any) -> None:
        """Names the layers of a model as the built-in does, unless somebody else has."""
        if not hasattr(model, "network_layer_mapping") or model in self._named:
            name_layers(model)
            self._named.add(model)

    def give_back(self) -> None:
        """Takes our names off."""
        for model in list(self._named):
            for module in vars(model).pop("network_layer_mapping", {}).values():
                vars(module).pop("network_layer_name", None)
        self._named.clear()


def name_layers(model: Any) -> None:
    """Sets them: the text encoder's and the UNet's modules by their paths with underscores, numbered in SDXL."""
    if getattr(model, "is_sdxl", False):
        embedders = enumerate(model.conditioner.embedders)
        roots = [(f"{number}_", embedder.wrapped) for number, embedder in embedders if hasattr(embedder, "wrapped")]
    else:
        encoder = getattr(model, "cond_stage_model", None)
        roots = [("", getattr(encoder, "wrapped", encoder))]
    mapping: dict[str, nn.Module] = {}
    for prefix, root in (*roots, ("", getattr(model, "model", None))):
        for path, module in root.named_modules() if isinstance(root, nn.Module) else ():
            module.network_layer_name = name = prefix + path.replace(".", "_")
            mapping[name] = module
    model.network_layer_mapping = mapping


class Places:
    """What we put elsewhere in the host for other extensions, and take back when the scripts are unloaded."""

    def __init__(self, loaded: LoadedNetworks, functions: Mapping[str, Callable[..., Any]], handler: type[Any]) -> None:
        self._loaded, self._functions, self._handler = loaded, functions, handler
        self._builtin: BuiltIn | None = None
        self._settled = False
        self._layers = LayerNames()

    def take_over(self) -> None:
        """Shows the loaded adapters under the built-in's names, and stops the built-in where it is switched on."""
        self.stop()
        self._settled = False
        self._loaded.names, networks = find_owner()
        if networks is not None:
            self._builtin = BuiltIn(networks, self._functions, self._handler)
        self._loaded.clear()  # of what the built-in had in use
        for model in sd_models.model_data.loaded_sd_models:
            self._layers.name(model)

    def model_loaded(self, model: Any) -> None:
        """The host announces a model."""
        self._layers.name(model)
        self.settle()

    def settle(self) -> None:
        """Finishes what could not be done while a model was loading. To be called before adapters are applied."""
        if self._builtin is not None and not self._settled:
            self._settled = True
            if not self._builtin.undo_patches():
                log.info(
                    "torch's layers keep the built-in Lora's patches, which do nothing: another extension patches too"
                )

    def stop(self) -> None:
        """The built-in is as we found it."""
        if self._builtin is not None:
            self._builtin.give_back()
        self._builtin = None

    def give_back(self) -> None:
        """Everything is as we found it."""
        self._loaded.names = None
        self.stop()
        self._layers.give_back()
        withdraw_names()
