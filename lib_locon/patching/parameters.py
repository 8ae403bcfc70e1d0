"""The parameters of one model by their paths."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.patching.plan import Patch, Plan


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped: the same weights under their own names. Another one as it is."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


class Parameters:
    """Looked up anew each time: `.to()` and load_state_dict may put another tensor in a parameter's place.

    Holds no module alive, so that whoever keeps something for each model does not keep the models by it.
    """

    def __init__(self, model: nn.Module, gone: Callable[[Sequence[str]], None]) -> None:
        """`gone` is called when a module is no more, with the paths of its parameters."""
        self._owners: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        self._tied: dict[str, str] = {}
        first: dict[int, str] = {}
        for prefix, module in model.named_modules():
            names = {f"{prefix}.{name}" if prefix else name: name for name in module._parameters}
            owner = weakref.ref(module, partial(_tell, gone, tuple(names)))
            for path, name in names.items():
                self._owners[path] = (owner, name)
                # one parameter under several names has one base: it goes by the first
                self._tied[path] = first.setdefault(id(module._parameters[name]), path)

    def weight(self, path: str) -> Tensor:
        """Raises PatchError where its module is gone, and as the module does where it has no such parameter."""
        module, name = self.owner(path)
        weight = module._parameters.get(name)  # as a rule; `getattr` of a module takes five times as long
        if weight is None:
            weight = getattr(module, name)
        return weight

    def owner(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds the parameter, and its name there. Raises PatchError where that is gone."""
        reference, name = self._owners[path]
        module = reference()
        if module is None:
            raise PatchError(f"the module that held {path} is gone; make a new Session for the model")
        return module, name

    def found(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Those of them that are there."""
        found: dict[str, Tensor] = {}
        for path in paths:
            with suppress(Exception):
                found[path] = self.weight(path)
        return found

    def shares(self, other: Parameters) -> bool:
        """Whether both models have a module in common: one of them may be a part of the other."""
        mine = {owner() for owner, _ in self._owners.values()} - {None}
        return any(owner() in mine for owner, _ in other._owners.values())

    def untied(self, plan: Plan) -> Plan:
        """With one name for each parameter: all that is to be done to it in one place."""
        merged: dict[str, tuple[Patch, ...]] = {}
        for path, patches in plan.items():
            first = self._tied.get(path, path)
            merged[first] = (*merged.get(first, ()), *patches)
        return merged


def _tell(gone: Callable[[Sequence[str]], None], paths: Sequence[str], _: object) -> None:
    gone(paths)
