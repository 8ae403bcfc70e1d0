"""The parameters of one model by their paths."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.patching.plan import Patch, Plan


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped: the same weights under their own names. Another one as it is."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


class ModuleGone(PatchError):
    """A module of the model, or its weight, is no more, and nobody knows what became of it."""


class Parameters:
    """Looked up anew each time: `.to()` and load_state_dict may put another tensor in a parameter's place.

    Holds no module alive, so that whoever keeps something for each model does not keep the models by it.
    """

    def __init__(self, model: nn.Module, gone: Callable[[], None]) -> None:
        """`gone` is called when nothing is left: neither the model nor any of its modules that have parameters."""
        self._owners: dict[str, list[tuple[weakref.ref[nn.Module], str]]] = {}
        """By path, of all modules that had the same parameter when the model was seen: the one of that path first."""
        self._tied: dict[str, str] = {}
        living: list[None] = [None]
        gone_too = partial(_count_down, living, gone)
        self._model = weakref.ref(model, gone_too)
        first: dict[int, str] = {}
        for prefix, module in model.named_modules():
            if module._parameters:
                living.append(None)
            owner = weakref.ref(module, gone_too)
            for name, weight in module._parameters.items():
                path = f"{prefix}.{name}" if prefix else name
                self._owners[path] = [(owner, name)]
                # one parameter under several names has one base: it goes by the first, as long as any of them lives
                self._tied[path] = path if weight is None else first.setdefault(id(weight), path)
                if self._tied[path] != path:
                    self._owners[self._tied[path]].append((owner, name))

    def weight(self, path: str) -> Tensor:
        """Raises ModuleGone, also where the module has no such parameter any more."""
        weight: object = self._at_hand(path)
        if weight is None:
            module, name = self.owner(path)
            weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            raise ModuleGone(f"there is no weight at {path} any more; load the model again")
        return weight

    def owner(self, path: str) -> tuple[nn.Module, str]:
        """A module that holds the parameter, and its name there. Raises ModuleGone."""
        for reference, name in self._owners[path]:
            module = reference()
            if module is not None:
                return module, name
        raise ModuleGone(f"the module that held {path} is gone; make a new Session for the model")

    def found(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Those of them that are there."""
        found: dict[str, Tensor] = {}
        for path in paths:
            weight: object = self._at_hand(path)
            if isinstance(weight, Tensor):
                found[path] = weight
            else:
                with suppress(Exception):
                    found[path] = self.weight(path)
        return found

    def _at_hand(self, path: str) -> Tensor | None:
        """As nearly always; `getattr` of a module takes five times as long."""
        for reference, name in self._owners.get(path, ()):
            module = reference()
            if module is not None:
                return module._parameters.get(name)
        return None

    def forms(self) -> tuple[object, ...]:
        """Path, type and dtype of each that is there, and whether it holds numbers; there may be none for a bias."""
        found = self.found(self._owners)
        return tuple(
            (path, type(weight), getattr(weight, "dtype", None), getattr(weight, "is_meta", False))
            for path, weight in found.items()
        )

    def are_of(self, model: nn.Module) -> bool:
        """Whether the model still has the modules that it had, at their places."""
        now = {
            f"{prefix}.{name}" if prefix else name: module
            for prefix, module in model.named_modules()
            for name in module._parameters
        }
        return now == {path: owners[0][0]() for path, owners in self._owners.items()}

    def shares(self, other: Parameters) -> bool:
        """Whether both models have a module or a parameter in common: one of them may be a part of the other."""
        return not self._objects().isdisjoint(other._objects())

    def _objects(self) -> set[int]:
        modules = {id(module) for owners in self._owners.values() if (module := owners[0][0]()) is not None}
        return modules | {id(weight) for weight in self.found(self._owners).values()}

    def untied(self, plan: Plan) -> Plan:
        """With one name for each parameter: all that is to be done to it in one place."""
        merged: dict[str, tuple[Patch, ...]] = {}
        weights = self.found(plan)
        first: dict[int, str] = {}
        for path, patches in plan.items():
            name = self._tied.get(path, path)
            weight = weights.get(path)
            if weight is not None:  # what was one parameter may be two by now, and two may be one
                if name != path and self.weight(name) is not weight:
                    name = path
                name = first.setdefault(id(weight), name)
            merged[name] = (*merged.get(name, ()), *patches)
        return merged


def _count_down(living: list[None], gone: Callable[[], None], _: object) -> None:
    # called by whoever frees a module, the garbage collector too, in any thread and at any line
    living.pop()
    if not living:
        gone()
