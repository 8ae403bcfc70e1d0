"""Where pristine weights are kept while the model holds patched ones.

`checkpoint`: nowhere. The value is read back from the file that the model came from. That it can be is not assumed but
proved, per weight and before its first change, by comparing the file's numbers, cast to the weight's dtype, with the
weight, bit for bit. What differs (a baked VAE, a merge, an edited weight) or is not there is copied to RAM.
`ram`, `device`: copies of the touched weights, in RAM (pinned for a weight on a GPU) or beside the weight.
`auto`: as `checkpoint` where there is a file to read from, else as `ram`.

A copy outlives its use: the next adapter finds it there, for memory given back and taken again costs more time than any
sum. It counts for nothing until it was compared with the weight once more. `free_unused` gives it back at once.

To and from GPUs nothing is waited for until `wait` (`transit`). A copy of a weight there is made anew, not compared.

Several threads may save and release at a time, each another weight; around everything else is the engine's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lib_locon.errors import FileError, one_of
from lib_locon.patching.bits import alike, other_bits, same_bits
from lib_locon.patching.memory import Scratch, in_ram, on_device
from lib_locon.patching.readback import PristineSource, ReadBack
from lib_locon.patching.store_report import StoreReport
from lib_locon.patching.transit import Transit

Policy: TypeAlias = Literal["auto", "checkpoint", "ram", "device"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def policy_named(name: str) -> Policy:
    """A policy by its name. Raises ValueError."""
    return one_of(POLICIES, name, "policy")


NOT_THE_FILES = "the model's weight is not the checkpoint's"


class BaseStore:
    """The pristine values of the touched weights, and of those only. The first save of a weight wins until dropped.

    `policy` and `source` may be set at any time; they hold for weights saved from then on. A host that loads another
    checkpoint into the model sets the new source.
    """

    def __init__(self, policy: Policy = "auto", source: PristineSource | None = None) -> None:
        self.policy: Policy = policy_named(policy)
        self.source = source
        self._copies: dict[str, Tensor] = {}
        self._unused: dict[str, Tensor] = {}
        self._free_unused = False
        self._reads: dict[str, ReadBack] = {}
        self._reasons: dict[str, str] = {}
        self._scratch = Scratch()
        self._transit = Transit()
        self._judged: dict[str, ReadBack | str] = {}
        """Of the change that is being made, the weights that were proved together: or why one was not."""

    def save(self, path: str, weight: Tensor) -> Tensor:
        """The pristine value of the weight at `path`; where the store has none yet, `weight` is it.

        In the dtype that the weight had at the first call; on the CPU, or with `device` where the weight was. The
        caller must not write into it. Raises BaseLost.
        """
        # a second save must never replace the first: by then the model may hold a patched weight
        copy = self._copies.get(path)
        if copy is not None:
            return copy
        read = self._reads.get(path)
        if read is None:
            return self._first(path, weight)
        try:
            return read.read(self._scratch)
        except FileError as error:
            return self._loaded_again(path, weight, error)

    def fetch(self, path: str, weight: Tensor) -> Tensor:
        """As `save`, where the weight is now. What comes to a GPU is not waited for; see `wait`."""
        read = self._reads.get(path)
        if weight.is_cuda and path not in self._copies:
            if read is None and _is_plain(weight):
                return self._first_on_gpu(path, weight)
            if read is not None and read.source.has_parts():
                try:
                    return self._transit.fetch(weight, read)
                except FileError as error:
                    return self._transit.fetch(weight, self._loaded_again(path, weight, error))
        return self._transit.fetch(weight, self.save(path, weight))

    def put_back(self, weight: Tensor, base: Tensor | ReadBack) -> None:
        """weight ← what `save` or `readable` said its base is. Raises BaseLost, with a part of the weight written."""
        self._transit.put_back(weight, base)

    def prove(self, weights: Mapping[str, Tensor]) -> None:
        """Finds out which of some weights on GPUs can be read back, before they are saved: it waits for each GPU once,
        where `save` would for each weight."""
        if self.policy not in ("auto", "checkpoint"):
            return
        differ: dict[torch.device, list[tuple[str, ReadBack, Tensor]]] = {}
        for path, weight in weights.items():
            if path in self._copies or path in self._reads:
                continue
            try:
                read, base = self._as_in_file(path, weight)
            except FileError as reason:
                self._judged[path] = str(reason)
            else:
                (there,) = self._transit.to(weight.device).send([base])
                differ.setdefault(weight.device, []).append((path, read, other_bits(there, weight)))
        for found in differ.values():
            verdicts = torch.stack([differs for _, _, differs in found]).tolist()
            for (path, read, _), differs in zip(found, verdicts, strict=True):
                self._judged[path] = NOT_THE_FILES if differs else read

    def under_way(self, device: torch.device) -> None:
        """Something else goes to this GPU that `wait` is to wait for."""
        self._transit.to(device)

    def wait(self) -> None:
        """For all that is under way between RAM and GPUs: to be called at the end of a change, whatever its end."""
        self._judged = {}
        self._transit.wait()

    def readable(self, path: str, weight: Tensor) -> ReadBack | None:
        """The pristine value of a weight by rows, for who needs no more of it at a time; None where it is no file's, or
        can be had by `save` only. For a weight that `save` was called for."""
        read = self._reads.get(path)
        if (
            read is None
            or read.shape != tuple(weight.shape)
            or read.dtype != weight.dtype
            or not read.source.has_parts()
        ):
            return None
        return read

    def sources(self) -> dict[PristineSource, list[str]]:
        """The files that bases are or will be read from, with the weights that rely on each."""
        found: dict[PristineSource, list[str]] = {} if self.source is None else {self.source: []}
        for path, read in self._reads.items():
            found.setdefault(read.source, []).append(path)
        return found

    @property
    def free_unused(self) -> bool:
        """Whether a copy is given back as soon as nothing uses it; if pinned, at the end of a change."""
        return self._free_unused

    @free_unused.setter
    def free_unused(self, wanted: bool) -> None:
        self._free_unused = wanted
        if wanted:
            self._unused.clear()

    def release(self, path: str) -> None:
        """Lets go of a weight that holds its base again."""
        copy = self._copies.get(path)
        if copy is not None and not self.free_unused:
            self._unused[path] = copy
        self.drop(path)

    def drop(self, path: str) -> None:
        """Forgets a weight that has another base now."""
        self._copies.pop(path, None)
        self._reads.pop(path, None)
        self._reasons.pop(path, None)
        self._free_if_idle()

    def forget(self) -> None:
        """All of it, for good. Whoever is going through what was kept goes on with that."""
        self._copies, self._unused, self._reads, self._reasons = {}, {}, {}, {}
        self._transit = Transit()
        self._free_if_idle()

    def keep(self, paths: Collection[str]) -> None:
        """Forgets all other weights, and gives unused copies back."""
        self._unused.clear()
        self._copies = {path: copy for path, copy in self._copies.items() if path in paths}
        self._reads = {path: read for path, read in self._reads.items() if path in paths}
        self._reasons = {path: reason for path, reason in self._reasons.items() if path in paths}
        self._transit.wait()
        self._free_if_idle()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: the copies, all that is pinned for some, and the buffer for reading back."""
        copies = (*self._copies.values(), *self._unused.values())
        pinned = self._transit.pinned
        return sum(copy.nbytes for copy in copies if not pinned.holds(copy)) + pinned.nbytes + self._scratch.nbytes

    def report(self) -> StoreReport:
        """How the weights are kept now. May be asked for while others are being saved."""
        kept = [("ram" if copy.device.type == "cpu" else "device", copy.nbytes) for copy in list(self._copies.values())]
        kept += [("checkpoint", read.nbytes) for read in list(self._reads.values())]
        nbytes: Counter[str] = Counter()
        for way, size in kept:
            nbytes[way] += size
        sources = {id(read.source): read.source for read in list(self._reads.values())}
        changed = not all(source.unchanged() for source in sources.values())
        return StoreReport(
            self.policy,
            Counter(way for way, _ in kept),
            nbytes,
            Counter(self._reasons.values()),
            changed,
            sum(copy.nbytes for copy in list(self._unused.values())),
        )

    def _first(self, path: str, weight: Tensor) -> Tensor:
        unused = self._unused.pop(path, None)
        if self.policy in ("auto", "checkpoint"):
            try:
                return self._proved(path, weight)
            except FileError as reason:
                self._reasons[path] = str(reason)
            self._free_if_idle()
        copy = self._copy(weight, unused if self._may_hold(unused, weight) else None)
        self._copies[path] = copy
        return copy

    def _copy(self, weight: Tensor, unused: Tensor | None) -> Tensor:
        pristine = weight.detach()
        if weight.is_cuda and _is_plain(weight):
            # an unused copy is written anew: to compare it would take as long, and be waited for
            if self.policy == "device":
                return on_device(pristine) if unused is None else unused.copy_(pristine)
            copy = self._transit.copied(weight, unused)
            return in_ram(pristine) if copy is None else copy
        if unused is not None and same_bits(unused.to(weight.device), weight):
            return unused
        return on_device(pristine) if self.policy == "device" else in_ram(pristine)

    def _first_on_gpu(self, path: str, weight: Tensor) -> Tensor:
        judged = self._judged.get(path)
        if isinstance(judged, ReadBack):
            self._reads[path] = judged
        else:
            base = self._first(path, weight)
            if base.device == weight.device:
                return base
        return on_device(weight.detach())  # as it is, it is the base: nothing need come back from RAM

    def _may_hold(self, copy: Tensor | None, weight: Tensor) -> bool:
        """Whether the copy is one of such a weight, and where the policy wants it."""
        if copy is None or not _is_plain(weight) or not alike(copy, weight):
            return False
        return copy.device == weight.device if self.policy == "device" else copy.is_cpu

    def _proved(self, path: str, weight: Tensor) -> Tensor:
        """`weight` as the file has it, bit for bit. Raises FileError with the reason where it does not."""
        judged = self._judged.get(path)
        if isinstance(judged, str):
            raise FileError(judged)
        read, base = self._as_in_file(path, weight)
        if not same_bits(base.to(weight.device), weight):
            raise FileError(NOT_THE_FILES)
        self._reads[path] = read
        return base

    def _as_in_file(self, path: str, weight: Tensor) -> tuple[ReadBack, Tensor]:
        """What the file has for the weight, read whole, on the CPU. Raises FileError where it can have nothing."""
        source = self.source
        if source is None:
            raise FileError("there is no checkpoint file that the model is known to come from")
        if not _is_plain(weight):
            raise FileError("the model's weight is no plain tensor")
        if not source.unchanged():
            raise FileError("the checkpoint file has changed, or is too new to tell whether it will")
        read = ReadBack(source, path, tuple(weight.shape), weight.dtype)
        return read, read.read(self._scratch)

    def _loaded_again(self, path: str, weight: Tensor, error: FileError) -> Tensor:
        """The way out after a base was lost: the host loaded a checkpoint, and the weight is what that file has."""
        try:
            return self._proved(path, weight)
        except FileError:
            raise self._reads[path].lost(error) from error

    def _free_if_idle(self) -> None:
        if not self._reads:
            self._scratch.free()


def _is_plain(weight: Tensor) -> bool:
    return type(weight.detach()) is Tensor
