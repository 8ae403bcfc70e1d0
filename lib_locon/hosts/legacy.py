"""What other extensions see of the set in use, and may change: one object per adapter, under the built-in's names.

Reading an object gives what the model holds. Setting `te_multiplier`, `unet_multiplier` or `dyn_dim` of one, or taking
one out of the list, is honoured

- at `activate`, where a class attribute was replaced by a property (it is read, then and at each step);
- before each call of the denoising network, after every other extension's callback for it;
- before a text encoder encodes, unless the host has kept what it would say;
- whenever somebody calls `networks.network_apply_weights` or a `network_…_forward`: for all layers at once.

What was set stays until the next `activate`, which starts from the prompt again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lib_locon.hosts.failures import others_error
from lib_locon.hosts.legacy_modules import LiveModules
from lib_locon.session import Session, Use

log = logging.getLogger("lib_locon")
TE, UNET, DYN = "te_multiplier", "unet_multiplier", "dyn_dim"


class Names(Protocol):
    """Where the objects are shown: who owns the names, and what an object is made of."""

    @property
    def loaded(self) -> list[Any]:
        """The list of those in use."""

    @property
    def in_memory(self) -> dict[str, Any]:
        """Name → object."""

    @property
    def kind(self) -> type[Any]:
        """The objects' class."""

    def on_disk(self, path: Path) -> Any:
        """The object for a file."""


@dataclass(eq=False)
class Shown:
    """An object, the use that it stands for, what we wrote into it, and what has been set by somebody else since."""

    network: Any
    use: Use
    written: dict[str, object] = field(default_factory=dict)
    theirs: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    """Attribute → a sentence about the code that others put behind it, where that failed."""

    def write(self) -> None:
        """Shows what the use asks for, but leaves alone what somebody else has set."""
        strengths = self.use.strengths
        for name, value in ((TE, strengths.te), (UNET, strengths.unet), (DYN, self.use.dyn)):
            if name not in self.theirs:
                self.written[name] = value
                _set(self.network, name, value)

    def look(self) -> None:
        """Notes what does not read as we wrote it."""
        self.theirs |= {name for name, value in self.written.items() if _differ(self._said(name), value)}

    def wanted(self) -> Use:
        """The use with what somebody else has set."""
        strengths, dyn = self.use.strengths, self.use.dyn
        if TE in self.theirs and (te := self._number(TE)) is not None:
            strengths = replace(strengths, te=te, encoders=())
        if UNET in self.theirs and (unet := self._number(UNET)) is not None:
            strengths = replace(strengths, unet=unet, parts=())
        if DYN in self.theirs:
            dim = self._said(DYN)
            dyn = dim if dim is None or (type(dim) is int and dim > 0) else dyn
        return Use(self.use.adapter, strengths, dyn, self.use.name)

    def now(self) -> Use:
        """What the object says at this moment."""
        self.look()
        return self.wanted() if self.theirs else self.use

    def _said(self, name: str) -> object:
        """The attribute's value; what we wrote where there is none, or where the code behind it fails."""
        ours = self.written.get(name)
        try:
            return getattr(self.network, name, ours)
        except Exception as error:
            if name not in self.problems:
                instead = f"the {'number of ranks' if name == DYN else 'strength'} in the tag is used"
                self.problems[name] = others_error(error, f"{name} of {self.use.name!r}", instead)
                log.warning("%s", self.problems[name], exc_info=error)
            self.theirs.discard(name)
            return ours

    def _number(self, name: str) -> float | None:
        value = self._said(name)
        if name not in self.theirs:  # it fails at this moment; at the next step it may not
            return None
        try:
            number = float(value)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001  the value may be of anybody's class
            number = math.nan
        if math.isfinite(number):
            return number
        log.warning("another extension set %s of %r to %r, which is no strength: not used", name, self.use.name, value)
        self.theirs.discard(name)  # said once, and ours again
        self.write()
        return None


class LoadedNetworks:
    """The objects of the set in use. Without `names` nobody looks, and nothing is shown."""

    def __init__(self) -> None:
        self.names: Names | None = None
        self.touched = False
        """Whether anything was changed from outside since the last `show`."""
        self.shown: list[Shown] = []

    def show(self, uses: Sequence[Use], model: nn.Module, session: Session) -> list[Use]:
        """Puts an object for each use in the place of those before. Returns what to apply, as `adjusted`."""
        shown: list[Shown] = []
        if self.names is None:
            self.show_again(shown)
            return list(uses)
        for use in uses:
            each = Shown(_blank(self.names, use), use)
            _set(each.network, "modules", LiveModules(each.network, each.now, model, session))
            shown.append(each)
        self.show_again(shown)
        return self.adjusted(list(uses))

    def show_again(self, shown: list[Shown]) -> None:
        """Puts objects that were shown before in the place of the others, as others left them."""
        self.touched = False
        self.shown = shown
        if self.names is not None:
            networks = [each.network for each in shown]
            self.names.loaded[:] = networks
            self.names.in_memory.clear()
            self.names.in_memory.update({network.name: network for network in networks})

    def adjusted(self, uses: list[Use]) -> list[Use]:
        """`uses`, one for each that is shown, with what others have set; the very same list if nothing was."""
        if self.names is None or len(uses) != len(self.shown):
            return uses
        listed = {id(network) for network in self.names.loaded}
        wanted: list[Use] = []
        for shown, use in zip(self.shown, uses, strict=True):
            shown.look()
            shown.use = use
            shown.write()
            shown.look()  # a property may answer for itself, whatever is written
            if id(shown.network) in listed:
                wanted.append(shown.wanted() if shown.theirs else use)
        if all(one is other for one, other in zip(wanted, uses, strict=False)) and len(wanted) == len(uses):
            return uses
        self.touched = True
        return wanted

    @property
    def current(self) -> tuple[object, ...]:
        """What the objects in the list say now: comparable, and cheap to ask for."""
        loaded = self.names.loaded if self.names is not None else ()
        known = {id(shown.network): shown for shown in self.shown}

        def said(network: Any, name: str) -> object:
            shown = known.get(id(network))
            return _plain(network, name) if shown is None else shown._said(name)

        return tuple((id(n), *(_key(said(n, name)) for name in (TE, UNET, DYN))) for n in loaded)

    def problems(self) -> list[str]:
        """Sentences about faults in the code that others put behind the objects, each once."""
        return list(dict.fromkeys(problem for shown in self.shown for problem in shown.problems.values()))

    def clear(self) -> None:
        """Nothing is in use."""
        self.shown = []
        if self.names is not None:
            self.names.loaded.clear()
            self.names.in_memory.clear()


def _blank(names: Names, use: Use) -> Any:
    # not through __init__: the class is another's, and its attributes may be properties by now
    network: Any = object.__new__(names.kind)
    for name, value in {
        "name": use.name or use.adapter.name,
        "mentioned_name": use.name or use.adapter.name,
        "network_on_disk": names.on_disk(Path(use.adapter.identity.path)),
        "mtime": use.adapter.identity.mtime_ns / 1e9,
        "bundle_embeddings": {},  # those are put into the host's table, and taken out, by us
    }.items():
        _set(network, name, value)
    return network


def _set(network: Any, name: str, value: object) -> None:
    with suppress(Exception):  # somebody made a property of it that cannot be set: then it says what it is
        setattr(network, name, value)


def _differ(one: object, other: object) -> bool:
    """Of anything that others set: an array compares number by number, and gives no truth value."""
    try:
        return bool(one != other)
    except Exception:  # noqa: BLE001
        return True


def _key(value: object) -> object:
    return value if value is None or isinstance(value, (int, float, str)) else id(value)


def _plain(network: Any, name: str) -> object:
    """The attribute of an object that is none of ours."""
    try:
        return getattr(network, name, None)
    except Exception:  # noqa: BLE001  it is not asked for its strength, only whether it changed
        return None
