"""What the webui's calls mean, without the webui: tags → session → comments. Shared by the hosts."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.files.pristine import CheckpointSource
from lib_locon.files.reader import SafetensorsFile
from lib_locon.hosts.embeddings import BundledEmbeddings
from lib_locon.library import Library
from lib_locon.models.checkpoint_keys import checkpoint_keys
from lib_locon.patching.store import PristineSource, policy_named
from lib_locon.prompt.grammar import Parsed, parse_tag
from lib_locon.prompt.request import Problem
from lib_locon.report import Report
from lib_locon.resolve import AdapterCache, resolve
from lib_locon.session import Session

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
        self.embeddings = BundledEmbeddings()
        self.last_report = Report()
        self._sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()

    @property
    def active(self) -> bool:
        """Whether any model holds, or may hold, anything of an adapter."""
        return self.embeddings.active or any(session.active for session in self._sessions.values())

    def use_folders(self, folders: Iterable[Path], *, allow_pickle: bool) -> None:
        """Where the host keeps adapters, and whether pickled files count."""
        folders = [folder for folder in folders if folder.is_dir()]
        if (folders, allow_pickle) != (self.library.folders, self.library.allow_pickle):
            self.library = Library(folders, allow_pickle=allow_pickle)
            self.cache = AdapterCache(allow_pickle=allow_pickle)

    def activate(
        self, model: nn.Module, tags: Sequence[Tag], comment: Callable[[str], object], checkpoint: Path | None = None
    ) -> Report:
        """Makes `model` hold the adapters of these tags and no others; each call replaces the one before.

        `checkpoint` is the file that the model came from, for weights that can be read back from it.

        Says under the image (`comment`) and in the log what it did. Never raises for bad input, and the host would
        swallow what it raised: where the set as a whole fails, the model holds its base and the comment says so.
        """
        parsed = Parsed("")
        for kind, items in tags:
            parse_tag(kind, items, parsed)
        uses, missing = resolve(parsed.requests, self.library, self.cache)
        problems = [*parsed.bad, *missing]
        try:
            session = self.session(model, checkpoint)
            session.side_path = self.side_path
            session.engine.store.policy = policy_named(self.base_store)
            report = session.apply(uses)
            if report.written:
                log.info("%s", session.engine.store.report())
        except Exception as error:
            if not isinstance(error, LoconError):
                log.exception("an error in sd-webui-locon itself")
            report = Report()
            what = str(error) or type(error).__name__
            uses, problems = [], [*problems, Problem(f"no adapter is in this image: {what}")]
        problems += map(Problem, self.embeddings.use([use.adapter for use in uses], model))
        self.last_report = report = Report(report.adapters, tuple(problems), report.written, tuple(parsed.warnings))
        for line in report.lines():
            comment(line)
        for adapter in report.adapters:
            log.info("%s", adapter)
        for problem in (*report.problems, *report.warnings):
            log.warning("%s", problem)
        return report

    def session(self, model: nn.Module, checkpoint: Path | None = None) -> Session:
        """The model's session, made at its first use, and again after the host loaded weights into the model."""
        session = self._sessions.get(model)
        if session is None:
            session = self._sessions[model] = Session(model)
            session.engine.store.source = _source(session, checkpoint)
        return session

    def model_loaded(self, model: nn.Module) -> None:
        """The host loaded weights into `model`, new or known. Its modules may be others now, so look at it anew."""
        session = self._sessions.pop(model, None)
        if session is not None:
            session.restore()  # what was loaded anew is left alone; after a change of the VAE alone, patches come off

    def release(self) -> None:
        """Gives every model its base back and forgets it."""
        for session in list(self._sessions.values()):
            session.restore()
        self._sessions.clear()


def _source(session: Session, checkpoint: Path | None) -> PristineSource | None:
    """The checkpoint file as a place to read weights back from; None for a pickled one, or where there is none."""
    try:
        file = SafetensorsFile(checkpoint) if checkpoint is not None else None
        return CheckpointSource(file, checkpoint_keys(session.table.shapes, file.entries)) if file else None
    except LoconError as error:
        log.info("weights will be copied to RAM: %s", error)
        return None
