"""The engine: makes a model hold exactly base + plan, and nothing else.

Its promises are in the README; each has a test. State belongs to one model object.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.patching.compute import Workspace, exact_sums, overflows, patched, write_sum
from lib_locon.patching.crew import Job, can_share, crew_for, working_at
from lib_locon.patching.held import Held, keys
from lib_locon.patching.plan import Patch, Plan
from lib_locon.patching.rounding import Rounding, write_one_by_one
from lib_locon.patching.storage import Memory, cannot_hold, decode, encode
from lib_locon.patching.store import BaseLost, BaseStore, same_bits


class _Failed(Exception):
    """A weight that could not be written. Its cause says why."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def _not_patched(what: str, cause: BaseException | None) -> PatchError:
    why = str(cause) or type(cause).__name__
    return PatchError(f"{what} could not be patched ({why}); every weight is the base again")


class Engine:
    """Writes the weights of one model, in place: the host's references to them stay valid.

    A weight that is not in `_held` holds its base. Safe to call from several threads: calls wait for each other.
    """

    def __init__(self, model: nn.Module) -> None:
        # weakly: whoever keeps an engine for each model must not keep the models alive by it
        self._owners: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        self._tied: dict[str, str] = {}
        first: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for name, weight in module._parameters.items():
                path = f"{prefix}.{name}" if prefix else name
                self._owners[path] = (weakref.ref(module), name)
                # one parameter under several names has one base: it goes by the first
                self._tied[path] = first.setdefault(id(weight), path)
        self.store = BaseStore()
        self._held: dict[str, Held] = {}
        self._lock = threading.RLock()
        self._memory = Memory()
        self._job: Job | None = None
        """What workers may be doing here; none of them writes any more once it was stopped."""
        self.generation = 0
        """Another one after each change: whoever remembers what the model holds sees by it that this is past."""

    @property
    def active(self) -> bool:
        """Whether any weight differs (or may differ) from its base."""
        return bool(self._held)

    @property
    def base_bytes(self) -> int:
        """Memory taken by copies of pristine weights."""
        return self.store.nbytes

    def unchanged(self) -> bool:
        """Whether every weight still holds what was last written into it, and nothing was left half done."""
        with self._own():
            return all(held.patches is not None and held.untouched(self._weight(p)) for p, held in self._held.items())

    def apply(self, plan: Plan, rounding: Rounding = "exact") -> int:
        """Makes the model hold base + plan and returns how many weights were written.

        `rounding`: once, or after each patch in the plan's order (weights of 8 bits always once). Weights that already
        hold what they should are not touched. All or nothing: on any error every weight gets its base back before the
        error goes on (as PatchError; an interrupt as itself).
        """
        with self._own():
            self._settle()
            self._memory = Memory()
            self._accept_outside_writes()
            plan = self._untied(plan)
            wanted = {path: keys(patches, rounding) for path, patches in plan.items()}
            held = {path: entry.keys for path, entry in self._held.items()}
            changed = [path for path in {**held, **wanted} if path not in held or held[path] != wanted.get(path)]
            if not changed:
                return 0
            try:
                self._write_all(changed, plan, rounding)
            except _Failed as failure:
                self.restore()
                raise _not_patched(failure.path, failure.__cause__) from failure.__cause__
            except Exception as error:
                self.restore()
                raise _not_patched("the model", error) from error
            except BaseException:
                self.restore()
                raise
            return len(changed)

    def restore(self) -> None:
        """Gives every changed weight its base back, by copy, and frees the copies.

        Goes on to the end whatever happens on the way: Ctrl-C is raised after it; weights that cannot be written are
        named in a PatchError.
        """
        interrupt: KeyboardInterrupt | None = None
        failed: dict[str, Exception] = {}
        with self._own():
            self._memory = Memory()
            while self._job is not None or set(self._held) - set(failed):
                try:
                    self._settle()
                    self._accept_outside_writes()
                    for path in [path for path in self._held if path not in failed]:
                        self._restore_one(path, failed)
                except KeyboardInterrupt as error:
                    interrupt = error
            self.store.keep(failed)
        if interrupt is not None:
            raise interrupt
        if failed:
            path, cause = next(iter(failed.items()))
            raise PatchError(f"{len(failed)} weights, {path} first, could not be given their base back ({cause}); "
                             "load the checkpoint again") from cause  # fmt: skip

    def _own(self) -> AbstractContextManager[object]:
        """The engine to oneself. Raises PatchError in a worker: the change that it is a part of has the engine."""
        if self._job is not None and working_at() is self._job:
            raise PatchError("an adapter's own code asked for a change of the model in the middle of another one")
        return self._lock

    def _settle(self) -> None:
        if self._job is not None:
            self._job.stop()
            self._job = None

    def _restore_one(self, path: str, failed: dict[str, Exception]) -> None:
        self.generation += 1
        try:
            self._write(path, ())
        except BaseLost as error:
            failed[path] = error  # nothing was written
        except Exception as error:  # noqa: BLE001  the others must get their base back, whatever is wrong with this one
            weight = self._weight(path)
            base = self.store.save(path, weight).to(weight.device)
            if base.dtype == weight.dtype and same_bits(weight.detach(), base):
                self._forget(path)  # it cannot be written, and never was
            else:
                failed[path] = error

    def _accept_outside_writes(self) -> None:
        """A weight that was loaded anew since we wrote it is a base again: its old base must never come back.

        Where the tensor is another but the numbers are those that we wrote (a conversion that replaces parameters), it
        is still ours.
        """
        for path, entry in list(self._held.items()):
            weight = self._weight(path)
            if entry.untouched(weight) or entry.patches is None:
                continue
            try:
                base = self.store.save(path, weight).to(weight.device)
            except BaseLost:
                if entry.weight == id(weight) and not weight.is_inference():
                    self._forget(path)  # the same tensor, written in place: a checkpoint was loaded into it
                continue
            ours = torch.empty_like(base, dtype=entry.dtype)
            with exact_sums(base.device.type):
                self._write_sum(path, ours, base, entry.patches, entry.rounding)
            if entry.is_still_in(weight, ours, base):
                self._held[path] = Held.by(weight, entry.patches, entry.rounding)
            else:
                self._forget(path)

    def _write_all(self, paths: Sequence[str], plan: Plan, rounding: Rounding) -> None:
        """Writes these weights: those that get their base back, then those that two workers may. Raises _Failed."""
        extremes: dict[str, Tensor | None] = {}
        devices = self._devices(paths)
        self.generation += 1

        @contextmanager
        def begin() -> Iterator[Callable[[str], None]]:
            space = Workspace()

            def write(path: str) -> None:
                try:
                    extremes[path] = self._write(path, plan.get(path, ()), rounding, space)
                except Exception as error:
                    raise _Failed(path) from error

            with exact_sums(*devices):
                yield write

        with begin() as alone:
            for path in paths:
                if not plan.get(path):  # first: their copies are given back before others are made
                    alone(path)
            shared = self._to_share([path for path in paths if plan.get(path)]) if can_share() else {}
            crew = crew_for(sum(shared.values()))
            if crew is not None:
                # the largest first, so that both end at nearly the same time
                self._job = Job(sorted(shared, key=shared.__getitem__, reverse=True), begin)
                crew.do(self._job)
                self._job = None
            for path in paths:
                if path not in extremes:
                    alone(path)
        path = self._overflowing(extremes)
        if path:
            raise _Failed(path) from OverflowError("at these strengths its numbers are beyond those of its dtype")

    def _devices(self, paths: Sequence[str]) -> set[str]:
        """The kinds of device that these weights are on."""
        found: set[str] = set()
        for path in paths:
            with suppress(Exception):  # to be said where it is written
                found.add(self._weight(path).device.type)
        return found

    def _to_share(self, paths: Sequence[str]) -> dict[str, int]:
        """Those that workers may write, and how many numbers each has. Not those that run others' code, or on a GPU."""
        sizes: dict[str, int] = {}
        places: dict[int, str] = {}
        for path in paths:
            try:
                weight, (module, name) = self._weight(path), self._owner(path)
                holds = weight.device.type == "cpu" and cannot_hold(module, name, self._memory) is None
                first = places.setdefault(weight.data_ptr(), path) if holds else ""
            except Exception:  # noqa: BLE001  to be said where it is written
                continue
            if first == path:
                sizes[path] = weight.numel()
            else:  # two parameters over the same numbers: one after the other
                sizes.pop(first, None)
        return sizes

    def _write(
        self, path: str, patches: Sequence[Patch], rounding: Rounding = "exact", space: Workspace | None = None
    ) -> Tensor | None:
        weight = self._weight(path)
        extremes: Tensor | None = None
        with _writing(weight):
            base = self.store.save(path, weight)
            # noted before the first byte changes: whatever happens from here on, `restore` will see to this weight
            self._held[path] = Held.by(weight, None, rounding)
            if patches:
                on_device = base.to(weight.device)
                extremes = self._write_sum(path, weight.detach(), on_device, patches, rounding, space)
            else:
                weight.copy_(base)
        if patches:
            self._held[path] = Held.by(weight, tuple(patches), rounding)
        else:
            self._forget(path, self.store.release)
        return extremes

    def _write_sum(
        self,
        path: str,
        out: Tensor,
        base: Tensor,
        patches: Sequence[Patch],
        rounding: Rounding,
        space: Workspace | None = None,
    ) -> Tensor | None:
        """The sum into `out`, and its extremes. A weight of 8 bits is read and rounded as its module says.

        To be called within `exact_sums`, as `_write` is with patches.
        """
        module, name = self._owner(path)
        if cannot_hold(module, name, self._memory) is None:
            write = write_sum if rounding == "exact" else write_one_by_one
            return write(out, base, patches, space)
        total, extremes = patched(decode(module, name, base), patches, torch.float32)
        if extremes is not None and overflows(extremes, torch.float32):
            raise OverflowError("at these strengths its numbers are beyond fp32")
        out.copy_(encode(module, name, total, out.dtype))  # kept within its range
        return None

    def _overflowing(self, extremes: Mapping[str, Tensor | None]) -> str:
        """The first of these weights whose sum its dtype cannot hold; "" for none. Waits for a GPU once, at the end."""
        found = {path: values for path, values in extremes.items() if values is not None}
        for dtype in {self._weight(path).dtype for path in found}:
            paths = [path for path in found if self._weight(path).dtype == dtype]
            if overflows(torch.cat([found[path] for path in paths]), dtype):
                bad = [path for path in paths if overflows(found[path], dtype)]
                # a checkpoint that has NaN in it was so before: not the adapter's doing, and no reason to refuse it
                bad = [path for path in bad if torch.isfinite(self.store.save(path, self._weight(path)).float()).all()]
                if bad:
                    return bad[0]
        return ""

    def _forget(self, path: str, forget: Callable[[str], None] | None = None) -> None:
        # the copy first: interrupted in between, the weight counts as held and is looked at again; the other way round
        # a stale copy would be taken for its base one day
        self.generation += 1
        (forget or self.store.drop)(path)
        self._held.pop(path, None)

    def _untied(self, plan: Plan) -> Plan:
        merged: dict[str, tuple[Patch, ...]] = {}
        for path, patches in plan.items():
            first = self._tied.get(path, path)
            merged[first] = (*merged.get(first, ()), *patches)
        return merged

    def _weight(self, path: str) -> Tensor:
        # looked up each time: `.to()` and load_state_dict may put another tensor in the parameter's place
        module, name = self._owner(path)
        weight = module._parameters.get(name)  # as a rule; `getattr` of a module takes five times as long
        if weight is None:
            weight = getattr(module, name)
        return weight

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        reference, name = self._owners[path]
        module = reference()
        if module is None:
            raise PatchError(f"the module that held {path} is gone; make a new Session for the model")
        return module, name


def _writing(weight: Tensor) -> AbstractContextManager[object]:
    return torch.inference_mode() if weight.is_inference() else torch.no_grad()
