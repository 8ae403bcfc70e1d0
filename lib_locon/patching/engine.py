"""The engine: makes a model hold exactly base + plan, and nothing else.

Its promises are in the README; each has a test. State belongs to one model object.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial

from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.patching.again import look_at_files, made_again
from lib_locon.patching.bits import alike, same_bits
from lib_locon.patching.compute import exact_sums
from lib_locon.patching.crew import Job, crew_for, working_at
from lib_locon.patching.held import Held
from lib_locon.patching.parameters import ModuleGone, Parameters
from lib_locon.patching.places import refuse_overlaps
from lib_locon.patching.plan import Patch, Plan
from lib_locon.patching.readback import BaseLost
from lib_locon.patching.rounding import Rounding
from lib_locon.patching.storage import Findings
from lib_locon.patching.store import BaseStore
from lib_locon.patching.workspace import Workspace
from lib_locon.patching.writer import Send, Writer, writing

COMPARED = 3
"""Weights that two models are compared by, to tell a copy: patched ones are equal by no chance."""


class NoData(PatchError):
    """A weight that the host sent to the meta device: there is nothing in it, and nothing can be put back."""


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

    def __init__(self, model: nn.Module, send: Send = lambda deltas, device: False) -> None:
        self._weights = Parameters(model, partial(_forget_gone, weakref.ref(self)))
        self.store = BaseStore()
        self._send = send
        self._held: dict[str, Held] = {}
        self._lock = threading.RLock()
        self._writer = self._new_writer()
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
            there = self._weights.found(self._held)
            return all(
                held.patches is not None and path in there and held.untouched(there[path])
                for path, held in self._held.items()
            )

    def is_copied_in(self, other: Engine) -> bool:
        """Tell whether another model's weights hold what this one wrote into its own: it is a copy, patches and all."""
        with self._own():
            mine = self._weights.found(list(self._held)[:COMPARED])
            theirs = other._weights.found(mine)
            pairs = [(weight, theirs[path]) for path, weight in mine.items() if path in theirs]
            try:
                return bool(pairs) and all(
                    one is not copy and alike(one, copy) and same_bits(one, copy.to(one.device)) for one, copy in pairs
                )
            except Exception:  # noqa: BLE001  weights without numbers, or of a form of their own: nothing can be told
                return False

    def shares(self, other: Engine) -> bool:
        """Whether the two may write the same weights: of a model, and of a part of it."""
        return self._weights.shares(other._weights)

    def forms(self) -> object:
        """How the weights are stored: equal ones, no ΔW has another way to its weight."""
        return self._weights.forms()

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model has the modules that it had when this was made."""
        return self._weights.are_of(model)

    def refuse_changed_by(self, other: Engine, plan: Plan) -> None:
        """Raises PatchError where a weight of the plan holds what another engine wrote: it is not the base."""
        with other._own():
            other._writer = other._new_writer()
            other._accept_outside_writes()
            theirs = {id(weight) for weight in other._weights.found(other._held).values()}
        for path, weight in self._weights.found(plan).items():
            if id(weight) in theirs:
                raise PatchError(f"{path} holds an adapter of a Session for another model, which shares this weight; "
                                 "take it off there first, or use one Session for both")  # fmt: skip

    def apply(self, plan: Plan, rounding: Rounding = "exact", findings: Findings | None = None) -> int:
        """Makes the model hold base + plan and returns how many weights were written.

        `rounding`: once, or after each patch in the plan's order (weights of 8 bits always once). Weights that already
        hold what they should are not touched. All or nothing: on any error every weight gets its base back before the
        error goes on (as PatchError; an interrupt as itself). `findings`: what was found of the weights just now.
        """
        with self._own():
            self._settle()
            self._writer = self._new_writer(findings)
            self._accept_outside_writes()
            plan = self._weights.untied(plan)
            held = self._held
            there = self._weights.found({**held, **plan})
            # one whose module is gone is to be said in any case
            same = {path for path in there if path in held and held[path].is_of(plan.get(path, ()), rounding)}
            changed = [path for path in {**held, **plan} if path not in same]
            if not changed:
                return 0
            try:
                self._write_all(changed, there, plan, rounding)
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
            self._writer = self._new_writer()
            while self._job is not None or set(self._held) - set(failed):
                try:
                    self._settle()
                    self._accept_outside_writes(failed)
                    for path in [path for path in self._held if path not in failed]:
                        self._restore_one(path, failed)
                except KeyboardInterrupt as error:
                    interrupt = error
            try:
                self.store.wait()
            finally:
                self.store.keep(failed)
        if interrupt is not None:
            raise interrupt
        if failed:
            path, cause = next(iter(failed.items()))
            what = f"{len(failed)} weights, {path} first, could not be given their base back ({cause})"
            known = isinstance(cause, (BaseLost, NoData, ModuleGone))
            raise PatchError(what if known else f"{what}; load the checkpoint again") from cause

    def _own(self) -> AbstractContextManager[object]:
        """The engine to oneself. Raises PatchError in a worker: the change that it is a part of has the engine."""
        if self._job is not None and working_at() is self._job:
            raise PatchError("an adapter's own code asked for a change of the model in the middle of another one")
        return self._lock

    def _new_writer(self, findings: Findings | None = None) -> Writer:
        return Writer(self._weights, self.store, findings or Findings(), self._send)

    def _settle(self) -> None:
        if self._job is not None:
            self._job.stop()
            self._job = None

    def _restore_one(self, path: str, failed: dict[str, Exception]) -> None:
        self.generation += 1
        try:
            self._write(path, ())
        except BaseLost as error:
            failed[path] = error
        except (ModuleGone, NoData) as error:
            failed[path] = error
            self._forget(path)  # said once: nothing can be done about it
        except Exception as error:  # noqa: BLE001  the others must get their base back, whatever is wrong with this one
            failed[path] = error
            with suppress(Exception):
                weight = self._weights.weight(path)
                base = self.store.save(path, weight)
                if same_bits(weight.detach().cpu(), base.cpu()):  # a GPU may have no memory left to compare them
                    self._forget(path)  # it cannot be written, and never was
                    del failed[path]

    def _accept_outside_writes(self, failed: dict[str, Exception] | None = None) -> None:
        """A weight that was loaded anew since we wrote it is a base again: its old base must never come back.

        Where the tensor is another but the numbers are those that we wrote (a conversion that replaces parameters), it
        is still ours. `failed` takes the weights of which that cannot be told, and why; else that is raised.
        """
        look_at_files(self.store, self._weights, self._held, self._writer)
        there = self._weights.found(self._held)
        for path, weight in there.items():
            try:
                self._accept_outside_write(path, weight)
            except Exception as error:
                if failed is None:
                    raise
                failed[path] = error  # one of a form that nothing can be compared with: the others get their base

    def _accept_outside_write(self, path: str, weight: Tensor) -> None:
        entry = self._held[path]
        if entry.untouched(weight) or weight.is_meta:
            return
        try:
            base = self.store.fetch(path, weight)
        except BaseLost:
            if entry.is_the_same(weight) and not weight.is_inference():
                self._forget(path)  # the same tensor, written in place: a checkpoint was loaded into it
            return
        if entry.patches is None:  # what it was left with is nothing that could be known again
            if entry.is_the_same(weight):
                self._forget(path)
            return
        if entry.is_still_in(weight, made_again(path, entry, base, self._writer), base):
            self._held[path] = Held.by(weight, entry.patches, entry.rounding)
        else:
            self._forget(path)

    def _write_all(self, paths: Sequence[str], weights: Mapping[str, Tensor], plan: Plan, rounding: Rounding) -> None:
        """Writes the weights of these paths: those that get their base back, then those that two workers may. `weights`
        are all that are held or planned, as far as they are there. Raises _Failed."""
        extremes: dict[str, Tensor | None] = {}
        refuse_overlaps({path: weight for path, weight in weights.items() if path in plan})
        devices = {weight.device.type for weight in weights.values()}
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
            # first those that get their base back: their copies are given back before others are made
            for some in ([p for p in paths if not plan.get(p)], [p for p in paths if plan.get(p)]):
                there = {path: weights[path] for path in some if path in weights}
                self._writer.prepare(there, plan)
                shared = {path: it.numel() for path, it in there.items() if self._writer.can_share(path, it)}
                crew = crew_for(sum(shared.values()))
                if crew is not None:
                    # the largest first, so that both end at nearly the same time
                    self._job = Job(sorted(shared, key=shared.__getitem__, reverse=True), begin)
                    crew.do(self._job)
                    self._job = None
                for path in some:
                    if crew is None or path not in shared:
                        alone(path)
        self.store.wait()
        if path := self._writer.overflowing(extremes):
            raise _Failed(path) from OverflowError("at these strengths its numbers are beyond those of its dtype")

    def _write(
        self, path: str, patches: Sequence[Patch], rounding: Rounding = "exact", space: Workspace | None = None
    ) -> Tensor | None:
        weight = self._weights.weight(path)
        if weight.is_meta:
            raise NoData(f"{path} was moved to the meta device, which holds no numbers; load the model again")
        with writing(weight):
            write = self._writer.ready(path, weight, patches, rounding, space)
            # noted before the first byte changes: whatever happens from here on, `restore` will see to this weight
            self._held[path] = Held.by(weight, None, rounding)
            try:
                extremes = write()
            except BaseLost:
                self._held[path] = Held.by(weight, None, rounding, abandoned=True)
                raise
        if patches:
            self._held[path] = Held.by(weight, tuple(patches), rounding)
        else:
            self._forget(path, self.store.release)
        return extremes

    def _forget(self, path: str, forget: Callable[[str], None] | None = None) -> None:
        # the copy first: interrupted in between, the weight counts as held and is looked at again; the other way round
        # a stale copy would be taken for its base one day
        self.generation += 1
        (forget or self.store.drop)(path)
        self._held.pop(path, None)


def _forget_gone(engine: weakref.ref[Engine]) -> None:
    """Nobody will ask for the base of any weight any more."""
    # at any moment: others may be going through what is replaced here
    alive = engine()
    if alive is not None:
        alive.store.forget()
        alive._held = {}
        alive.generation += 1
