"""What the webui's calls mean, without the webui: tags → session → comments. Shared by the hosts."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.hosts.embeddings import BundledEmbeddings
from lib_locon.hosts.failures import failed
from lib_locon.hosts.legacy import LoadedNetworks
from lib_locon.hosts.scheduled import Place, Scheduled, on_text
from lib_locon.hosts.sessions import Sessions
from lib_locon.library import Library
from lib_locon.patching.rounding import Rounding
from lib_locon.patching.store import policy_named
from lib_locon.prompt.grammar import Parsed, parse_tag
from lib_locon.prompt.presets import BUILT_IN
from lib_locon.prompt.request import Problem, Request
from lib_locon.report import Report
from lib_locon.resolve import AdapterCache, Missing, find
from lib_locon.session import Session, Use

log = logging.getLogger("lib_locon")
Tag = tuple[str, Sequence[str]]
"""A tag's kind and its arguments, split at the colons."""


class Webui:
    """Sessions by model object (several checkpoints can be loaded at once), one library, one cache of adapters."""

    def __init__(self) -> None:
        self.library = Library([])
        self.cache = AdapterCache()
        self.side_path = False
        self.base_store = "auto"
        self.free_unused = False
        self.rounding: Rounding = "exact"
        self.embeddings = BundledEmbeddings()
        self.last_report = Report()
        self.used: tuple[Use, ...] = ()
        """What the last `activate` put into its model, as it is at the first step."""
        self.warn_of_missing = False
        """Whether a name that leads to no file is a warning in the log, and not only a line in it."""
        self.comments = "all"
        """What is said under the image: `all`, `problems` or `nothing`."""
        self.presets = BUILT_IN
        self.text_changed = False
        """Whether the last `activate` changed what acts on the text encoders of its model."""
        self.loaded = LoadedNetworks()
        """What other extensions see of the set in use, and may change."""
        self._presets_text = ""
        self._suspended = False
        self._said_of_others: set[str] = set()
        self._step = (0, 1)
        self._scheduled: Scheduled | None = None
        self._in_use: weakref.ref[nn.Module] | None = None
        """The model that the run is at, while there is one."""
        self._sessions = Sessions()
        self._on_text: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()

    @property
    def active(self) -> bool:
        """Whether any model holds, or may hold, anything of an adapter."""
        return self.embeddings.active or self._sessions.active

    def use_folders(self, folders: Iterable[Path], *, allow_pickle: bool) -> None:
        """Where the host keeps adapters, and whether pickled files count."""
        folders = [folder for folder in folders if folder.is_dir()]
        if (folders, allow_pickle) != (self.library.folders, self.library.allow_pickle):
            self.library = Library(folders, allow_pickle=allow_pickle)
            self.cache = AdapterCache(self.cache.most, allow_pickle=allow_pickle)

    def use_presets(self, text: str) -> None:
        """The user's own block weights and rules for `lbw` and `lbwe`, beside the built-in ones."""
        if text != self._presets_text:
            self._presets_text = text
            self.presets = BUILT_IN.with_text(text)
            for problem in self.presets.problems:
                log.warning("%s", problem)

    def activate(
        self,
        model: nn.Module,
        tags: Sequence[Tag],
        comment: Callable[[str], object],
        checkpoint: Path | None = None,
        *,
        seed: int = 0,
        hires: bool = False,
    ) -> Report:
        """Makes `model` hold the adapters of these tags and no others; each call replaces the one before.

        `checkpoint` is the file that the model came from, for weights that can be read back from it. Random block
        weights are drawn from `seed`, so that an image can be made again. Strengths are those of the first step of a
        pass, the hires pass or the one before; `step` goes on from there.

        Says under the image (`comment`) and in the log what it did. Never raises for bad input, and the host would
        swallow what it raised: where the set as a whole fails, the model holds its base and the comment says so.
        """
        parsed = Parsed("")
        for kind, items in tags:
            parse_tag(kind, items, parsed, self.presets)
        requests = [request.drawn(f"{seed}/{number}") for number, request in enumerate(parsed.requests)]
        return self.use(model, requests, comment, checkpoint, hires=hires, bad=parsed.bad, warnings=parsed.warnings)

    def use(
        self,
        model: nn.Module,
        requests: Iterable[Request],
        comment: Callable[[str], object],
        checkpoint: Path | None = None,
        *,
        hires: bool = False,
        bad: Iterable[Problem] = (),
        warnings: Iterable[Problem] = (),
    ) -> Report:
        """As `activate`, for requests that were read already; `bad` and `warnings` came of the reading."""
        found, missing = find(requests, self.library, self.cache)
        uses = found.at(hires=hires)
        now = Scheduled(weakref.ref(model), found, uses, hires, comment, checkpoint, found.scheduled)
        report, problems = self._begin(now, model)
        problems = [*bad, *missing, *problems]
        self.last_report = report = Report(report.adapters, tuple(problems), report.written, tuple(warnings))
        for line in report.lines(self.comments):
            comment(line)
        for adapter in report.adapters:
            log.info("%s", adapter)
        for problem in (*report.problems, *report.warnings):
            quiet = isinstance(problem, Missing) and not self.warn_of_missing
            log.log(logging.INFO if quiet else logging.WARNING, "%s", problem)
        return report

    def place(self) -> Place:
        """Where the run is, for `come_back`."""
        shown, running = self.loaded.shown, self._in_use is not None
        return Place(self._scheduled, self._step, self._suspended, running, self.used, self.last_report, shown)

    def come_back(self, place: Place, model: nn.Module, checkpoint: Path | None) -> None:
        """Makes `model` hold again what a run used that another one came into. Says nothing but what fails now."""
        self.last_report, self.used, self._step, self._suspended = place.report, place.used, place.step, place.suspended
        now, here = place.scheduled, weakref.ref(model)
        self._scheduled = now = None if now is None else replace(now, model=here, checkpoint=checkpoint)
        self._in_use = here if place.running else None
        self.loaded.show_again(place.shown)
        uses = place.used if now is not None else ()
        self._note_text(model, uses)
        self.embeddings.use([use.adapter for use in uses], model)
        if now is not None and not self._suspended:
            self._ready(model, checkpoint)
            self._follow(now, model, anew=True)
        elif (session := self.session_of(model)) is not None:
            session.restore()

    def _begin(self, now: Scheduled, model: nn.Module) -> tuple[Report, list[Problem]]:
        """Applies the set of the first step. Where that fails, the model holds its base."""
        self._scheduled = now if now.uses else None
        self._suspended, self._step, self._in_use = False, (0, 1), now.model
        uses, report = now.uses, Report()
        problems: list[Problem] = []
        try:
            session = self._ready(model, now.checkpoint)
            uses = self.loaded.show(uses, model, session)
            report = session.apply(uses)
            self._said_of_others = set(self.loaded.problems())
            problems = list(map(Problem, self.loaded.problems()))
            if report.written:
                log.info("%s", session.engine.store.report())
        except Exception as error:
            if not isinstance(error, LoconError):
                log.exception("an error in sd-webui-locon itself")
            self._scheduled = None
            self.loaded.clear()
            uses, problems = [], [Problem(failed(error, now.checkpoint, held=self._holds(model)))]
        self.used = tuple(uses)
        self._note_text(model, uses)
        return report, [*problems, *map(Problem, self.embeddings.use([use.adapter for use in uses], model))]

    def _note_text(self, model: nn.Module, uses: Sequence[Use]) -> None:
        text: object = (self.rounding, *map(on_text, uses)) if uses else ()
        if not uses and self._holds(model):
            text = object()  # like nothing before or after it: what is encoded now is no base's
        self.text_changed = self._on_text.get(model, ()) != text
        self._on_text[model] = text

    def nothing(self) -> None:
        """An image without tags is made, with a model that holds nothing of ours."""
        self.last_report, self.used = Report(), ()
        self.finished()
        self.loaded.clear()

    def step(self, model: nn.Module, step: int, steps: int) -> None:
        """Makes `model` hold what the tags ask for at `step`, counted from 0, of a pass of `steps`.

        Called before each call of the denoising network; costs nothing where nothing depends on the step. Never raises:
        where it fails, the model has its base values for the rest of the pass, and the comment says so.
        """
        self._step = (step, steps)
        now = self._scheduled
        if now is not None and not self._suspended and now.model() is model:
            self._follow(now, model)

    def encodes(self, model: nn.Module, checkpoint: Path | None) -> None:
        """To be called before `model` encodes a prompt: what others have set by then acts there too."""
        self.arrived(model, checkpoint)
        now = self._scheduled
        if now is not None and not self._suspended and now.model() is model:
            uses = now.found.at(*self._step, hires=now.hires) if now.by_step else now.uses
            adjusted = self.loaded.adjusted(uses)
            if adjusted is not uses:
                self._follow(now, model)
                self._note_text(model, adjusted)  # the host keeps what it encodes: the next `activate` must know

    def arrived(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Makes `model` hold what the run asks for, where the host went on with it, or with other weights in it.

        To be called before it encodes a prompt or denoises: the host's refiner takes over between two steps.
        """
        session = self.session_of(model)
        if self._in_use is None or (session is not None and self._in_use() is model):
            return
        self._in_use = weakref.ref(model)
        if self._scheduled is not None:
            self._ready(model, checkpoint)
            self._scheduled = replace(self._scheduled, model=self._in_use, checkpoint=checkpoint)
            if not self._suspended:
                self._follow(self._scheduled, model, anew=True)
        elif session is not None:
            session.restore()  # it may hold what an earlier run left in it

    def follow(self) -> None:
        """Makes the model of the pass hold what other extensions ask for by now, wherever in a step that is."""
        now = self._scheduled
        model = now.model() if now is not None else None
        self._suspended = False
        if now is not None and model is not None:
            self._follow(now, model)

    def suspend(self) -> None:
        """Gives the model of the pass its base back until `follow`, or until the next `activate`."""
        model = self._scheduled.model() if self._scheduled is not None else None
        session = self._sessions.known(model) if model is not None else None
        if session is not None and session.active:
            session.restore()
            self._suspended = True

    def _follow(self, now: Scheduled, model: nn.Module, *, anew: bool = False) -> None:
        session = self._sessions.known(model)
        if session is None:
            return
        step, steps = self._step
        try:
            asked = now.found.at(step, steps, hires=now.hires) if now.by_step else now.uses
            uses = self.loaded.adjusted(asked)
            self._say_of_others(now)
            if anew or now.by_step or self.loaded.touched or not session.active:
                session.apply(uses)
        except Exception as error:
            if not isinstance(error, LoconError):
                log.exception("an error in sd-webui-locon itself")
            self._scheduled = None
            self.loaded.clear()
            problem = failed(error, now.checkpoint, held=self._holds(model), since=f" from step {step + 1} on")
            log.warning("%s", problem)
            if self.comments != "nothing":
                now.comment(problem)

    def _say_of_others(self, now: Scheduled) -> None:
        """Once for each fault of another extension that shows in the middle of a run."""
        for problem in self.loaded.problems():
            if problem not in self._said_of_others:
                self._said_of_others.add(problem)
                if self.comments != "nothing":
                    now.comment(problem)

    def finished(self) -> None:
        """The run is over. What its last step left is changed, or found right, by the next `activate`."""
        self._scheduled = self._in_use = None

    def _ready(self, model: nn.Module, checkpoint: Path | None) -> Session:
        session = self.session(model, checkpoint)
        session.side_path, session.rounding = self.side_path, self.rounding
        session.engine.store.policy = policy_named(self.base_store)
        session.engine.store.free_unused = self.free_unused
        return session

    def session(self, model: nn.Module, checkpoint: Path | None = None) -> Session:
        """The model's session, made at its first use, and again after the host loaded weights into the model."""
        return self._sessions.of(model, checkpoint)

    def session_of(self, model: nn.Module) -> Session | None:
        """The model's session, where it was used already."""
        return self._sessions.known(model)

    def _holds(self, model: nn.Module) -> bool:
        session = self.session_of(model)
        return session is not None and session.active

    def model_loaded(self, model: nn.Module) -> None:
        """The host loaded weights into `model`, new or known. Its modules may be others now, so look at it anew."""
        self._sessions.forget(model)  # after a change of the VAE alone, patches come off

    def release(self) -> None:
        """Gives every model its base back and forgets it."""
        self._scheduled = self._in_use = None
        self.loaded.clear()
        self._sessions.clear()
