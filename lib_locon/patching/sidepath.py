"""The side path: ΔW run beside a layer instead of written into its weight, y + Σ strength · ΔW(x).

For weights that cannot hold the sum. One forward hook on each touched module and on no other, known to this ledger
alone; nothing is set on the host's modules, and taking the set away takes the hooks away.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.models.targets import View
from lib_locon.patching.hooks import Hook, Sum, Term
from lib_locon.patching.plan import Patch, Plan
from lib_locon.patching.storage import Findings, Route, cannot_hook, which_path

_Key: TypeAlias = dict[str, tuple[object, ...]]
"""Of a plan: equal keys, equal hooks."""


class Branches(Protocol):
    """Whoever makes branches of deltas (`lib_locon.families.combine`)."""

    def has_branch(self, layer: object, /) -> bool:
        """Whether it can run beside a layer."""
        ...

    def combine(self, layers: Sequence[Any], strengths: Sequence[float], /) -> Sum:
        """All of them as one."""
        ...

    def send(self, sums: Sequence[Any], device: torch.device, /) -> None:
        """Brings these to a GPU, where they will run."""
        ...


class SidePath:
    """The hooks on one model. Safe to call from several threads; belongs to one model object, as the engine does."""

    def __init__(self, model: nn.Module, branches: Branches) -> None:
        self._branches = branches
        # weakly, as in the engine; a hook that stands on a module holds it while it stands
        self._modules = weakref.WeakValueDictionary(model.named_modules(remove_duplicate=False))
        self._owners: dict[str, list[tuple[str, str]]] = {}
        """Parameter path → (module path, name) of all modules that hold this same parameter, each module once."""
        self._hooks: dict[int, Hook] = {}
        self._held: _Key = {}
        self._lock = threading.RLock()
        self._find_owners(model)

    @property
    def active(self) -> bool:
        """Whether any module has a hook."""
        return bool(self._hooks)

    def route(self, view: View, delta: object, *, side: bool = False, findings: Findings | None = None) -> Route:
        """By which way this ΔW reaches its weight; `side`: beside it wherever possible."""
        branch, findings = self._branches.has_branch(delta), findings or Findings()
        routes = [
            which_path(
                self._module(path), name, view, branch=branch, parent=self._parent(path), side=side, findings=findings
            )
            for path, name in self._owners[view.path]
        ]
        # a weight that two modules share is written once, or not at all; beside it means beside both
        return next((route for route in routes if route.path != "side"), routes[0])

    def judge(self) -> Judge:
        """For the ΔWs of one adapter."""
        return Judge(self)

    def split(self, plan: Plan, *, side: bool = False, findings: Findings | None = None) -> tuple[Plan, Plan]:
        """(what the engine is to write, what is to run beside). Patches without any way stay with the engine."""
        merged: dict[str, tuple[Patch, ...]] = {}
        beside: dict[str, tuple[Patch, ...]] = {}
        findings = findings or Findings()
        for path, patches in plan.items():
            if not side and self._all_hold(path, findings):  # as nearly always
                merged[path] = patches
                continue
            for patch in patches:
                runs = self.route(patch.view, patch.delta, side=side, findings=findings).path == "side"
                plans = beside if runs else merged
                plans[path] = (*plans.get(path, ()), patch)
        return merged, beside

    def _all_hold(self, path: str, findings: Findings) -> bool:
        """Whether the parameter can hold a sum, for each of the modules that have it."""
        return all(findings.cannot_hold(self._module(owner), name) is None for owner, name in self._owners[path])

    def set(self, plan: Plan) -> int:
        """Makes the hooks exactly those of `plan`; returns how many modules were touched.

        The same set again touches none; other strengths read no factor again. All or nothing: on any error there is no
        hook left before the error goes on (as PatchError; an interrupt as itself).
        """
        key: _Key = {path: tuple(patch.key for patch in patches) for path, patches in plan.items()}
        with self._lock:
            if key == self._held:
                return 0
            try:
                touched = self._change(plan)
            except Exception as error:
                self.clear()
                what = str(error) or type(error).__name__
                raise PatchError(f"an adapter could not run beside its layers ({what}); none does now") from error
            except BaseException:
                self.clear()
                raise
            self._held = key
            return touched

    def _change(self, plan: Plan) -> int:
        wanted = self._wanted(plan)
        # all that can fail of itself comes first
        terms = {key: self._terms(self._hooks.get(key), groups) for key, (_, groups) in wanted.items()}
        self._send(wanted, terms)
        touched = 0
        for key, new in terms.items():
            hook = self._hooks.setdefault(key, Hook(wanted[key][0]))
            if hook.key != tuple(term.key for term in new):
                hook.terms = new
                hook.install()
                touched += 1
        for key in [key for key in self._hooks if key not in wanted]:
            self._hooks[key].remove()
            del self._hooks[key]
            touched += 1
        _forget_compiled(touched > 0)
        return touched

    def _send(self, wanted: Mapping[int, tuple[nn.Module, object]], terms: Mapping[int, Sequence[Term]]) -> None:
        needed: dict[torch.device, list[Sum]] = {}
        for key, some in terms.items():
            weight = getattr(wanted[key][0], "weight", None)
            if isinstance(weight, Tensor) and weight.is_cuda:
                needed.setdefault(weight.device, []).extend(term.sum for term in some)
        for device, sums in needed.items():
            self._branches.send(sums, device)

    def clear(self) -> None:
        """Takes every hook away and lets go of the factors. Goes on to the end; Ctrl-C is raised after it."""
        interrupt: KeyboardInterrupt | None = None
        with self._lock:
            had = bool(self._hooks)
            while self._hooks:
                try:
                    for key, hook in list(self._hooks.items()):
                        hook.remove()
                        self._hooks.pop(key, None)
                except KeyboardInterrupt as error:
                    interrupt = error
            self._held = {}
            _forget_compiled(had)
        if interrupt is not None:
            raise interrupt

    def _wanted(self, plan: Plan) -> dict[int, tuple[nn.Module, dict[tuple[str, View], list[Patch]]]]:
        """id of the module → it, and its patches by parameter and part, each in the plan's order."""
        wanted: dict[int, tuple[nn.Module, dict[tuple[str, View], list[Patch]]]] = {}
        for patch in (patch for path in sorted(plan) for patch in plan[path]):
            for path, name in self._owners[patch.view.path]:
                module = self._module(path)
                reason = cannot_hook(module, name, patch.view, self._parent(path))
                if reason or not self._branches.has_branch(patch.delta):
                    raise PatchError(f"{patch.view.path}: {reason or 'this kind of adapter needs the weight itself'}")
                _, groups = wanted.setdefault(id(module), (module, {}))
                groups.setdefault((name, patch.view), []).append(patch)
        return wanted

    def _terms(self, hook: Hook | None, groups: Mapping[tuple[str, View], Sequence[Patch]]) -> tuple[Term, ...]:
        old = {term.sources: term for term in hook.terms} if hook else {}
        return tuple(self._term(tuple(patches), old) for patches in groups.values())

    def _term(self, patches: tuple[Patch, ...], old: Mapping[tuple[object, ...], Term]) -> Term:
        strengths = [patch.strength for patch in patches]
        known = old.get(tuple((patch.source, patch.view) for patch in patches))
        if known is not None:
            return Term(patches, known.sum.with_strengths(strengths))
        return Term(patches, self._branches.combine([patch.delta for patch in patches], strengths))

    def _module(self, path: str) -> nn.Module:
        module: nn.Module | None = self._modules.get(path)
        if module is None:
            raise PatchError(f"the model's module {path!r} is gone: keep the model as long as its Session")
        return module

    def _parent(self, path: str) -> nn.Module | None:
        return self._modules.get(path.rpartition(".")[0]) if path else None

    def _find_owners(self, model: nn.Module) -> None:
        same: dict[int, list[tuple[str, str]]] = {}
        for path, name, weight in _parameters(model):
            holders = same.setdefault(id(weight), [])
            if not any(self._modules[other] is self._modules[path] for other, _ in holders):
                holders.append((path, name))
            self._owners[f"{path}.{name}" if path else name] = holders


class Judge:
    """Says of each ΔW of an adapter why it has no way to its weight at all; None where it has one."""

    def __init__(self, side: SidePath) -> None:
        self._side = side
        self._findings = Findings()
        self.rounded: set[str] = set()
        """The weights for which the answer was that their sum is rounded to 8 bits again."""

    def __call__(self, view: View, delta: object) -> str | None:
        route = self._side.route(view, delta, findings=self._findings)
        if route.rounds:
            self.rounded.add(view.path)
        return route.reason if route.path is None else None


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, weight in module._parameters.items():
            if weight is not None:
                yield path, name, weight


def _forget_compiled(changed: bool) -> None:
    """What torch.compile made of the model knows nothing of a hook that came, went or changed since."""
    if changed and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
