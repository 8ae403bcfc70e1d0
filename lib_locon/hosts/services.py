"""What stands around the tags: cards, images' texts, addresses of the web application, and the built-in's options."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from modules import extra_networks, paths_internal, script_callbacks, scripts, sd_models, shared
from torch import nn

from lib_locon.errors import UnknownName
from lib_locon.files.background import Background
from lib_locon.files.reader import FileIdentity
from lib_locon.hosts import addnet
from lib_locon.hosts.api import Api
from lib_locon.hosts.cards_api import CardsApi
from lib_locon.hosts.cards_page import Registration, loaded_family, prefers_alias
from lib_locon.hosts.guard import Logins, logins_of
from lib_locon.hosts.infotext import Infotext, Paste
from lib_locon.hosts.options import add_settings, complete, note, value
from lib_locon.hosts.prompt_api import PromptApi
from lib_locon.hosts.search import Hashes, Search, read_body
from lib_locon.hosts.web import Route, Routes
from lib_locon.hosts.webui import Webui, log
from lib_locon.hosts.xyz import Axes
from lib_locon.index import hash_table
from lib_locon.library import Library
from lib_locon.naming import in_a_tag, tidy
from lib_locon.prompt.presets import Presets
from lib_locon.report import Report
from lib_locon.resolve import Missing
from lib_locon.settings import ADD_HASHES, INFOTEXT, NO_ADAPTER, SD_LORA, WARN_IN_PAGE

INDEX = "locon-index-1.sqlite3"


class Services:
    """Made once for the process; `register` is called at each load of the scripts."""

    def __init__(
        self,
        webui: Webui,
        library: Callable[[], Library],
        settings: Callable[[], None],
        checkpoint: Callable[[nn.Module], Path | None],
    ) -> None:
        self._webui = webui
        self._library = library
        self._settings = settings
        self._checkpoint = checkpoint
        self._hashes: Hashes | None = None
        self._lock = threading.Lock()
        self.cards = Registration(library, index_file, self.known_hash)
        self.infotext = Infotext(lambda: self.hashes().bodies)
        api = Api(webui, library, self.cards.cards, self._loaded, self.search, self._chosen_tag)
        self._routes = Routes([*api.routes(), *self._page()], _logins)
        self._set_aside: list[Any] = []
        self._axes = Axes(self._tags, library, self._presets)

    def register(self) -> None:
        """Hooks into the host's start-up."""
        script_callbacks.on_before_ui(self._axes.add)
        script_callbacks.on_ui_settings(lambda: add_settings(self._names, lambda: self._library().refresh()))
        script_callbacks.on_ui_settings(self.cards.take_over)
        script_callbacks.on_app_started(self._started)
        script_callbacks.on_infotext_pasted(self._pasted)
        script_callbacks.on_script_unloaded(self._give_back)

    def hashes(self) -> Hashes:
        """The hashes of files; those of their tensors are kept on disk."""
        with self._lock:  # images, pages and programs ask from threads of their own
            if self._hashes is None:
                table = hash_table(index_file())
                bodies = Background(read_body, table, table.flush, "locon-hashes")
                self._hashes = Hashes(bodies, claims=self._claimed)
            return self._hashes

    def search(self) -> Search:
        """To look for one thing among the files."""
        return Search(self._library(), self.hashes())

    def known_hash(self, file: FileIdentity) -> str:
        """That by which images name the file, if it was computed already; else empty."""
        return self.hashes().bodies.known(file) or ""

    def _claimed(self, file: FileIdentity) -> str:
        facts = self.cards.cards().index.known(file)
        return facts.claimed_hash if facts else ""

    def told(self, p: Any, report: Report, *, hires: bool) -> None:
        """To be called after each `activate`: writes into the image's text, and says what is not there."""
        self.infotext.write(
            p, self._webui.used, report, hires=hires, hashes=bool(value(ADD_HASHES)), applied=bool(value(INFOTEXT))
        )
        note(p, used=bool(self._webui.used), hires=hires)
        for problem in report.problems:
            if isinstance(problem, Missing) and value(WARN_IN_PAGE):
                _pop_up("Warning", str(problem))

    def with_chosen(self, p: Any, params_list: Sequence[Any]) -> list[Any]:
        """The tags, and one for the adapter that the user chose for every prompt, where none names it."""
        prompts = getattr(p, "all_prompts", None)
        name = self._chosen([str(params.items[0]) for params in params_list if params.items])
        if not name or not prompts:
            return list(params_list)
        tag = _tag(name)
        p.all_prompts = [prompt if tag in prompt else prompt + tag for prompt in prompts]
        return [*params_list, extra_networks.ExtraNetworkParams(items=[name, _weight()])]

    def _chosen(self, named: Sequence[str]) -> str:
        """The adapter for every prompt that does not name it; "" where there is none, or it is among `named`."""
        name = in_a_tag(str(value(SD_LORA)))
        among = tidy(name) in map(tidy, named)
        return "" if name == NO_ADAPTER or among or not self._is_there(name) else name

    def _chosen_tag(self, named: Sequence[str]) -> str:
        name = self._chosen(named)
        return _tag(name) if name else ""

    def _is_there(self, name: str) -> bool:
        try:
            return bool(self._library().find(name))
        except UnknownName:
            return False

    def _names(self) -> list[str]:
        return [card.name for card in self.cards.cards().all()]

    def _tags(self) -> list[str]:
        return [card.tag for card in self.cards.cards().all(prefer_alias=False) if card.tag]

    def _presets(self) -> Presets:
        self._settings()
        return self._webui.presets

    def _page(self) -> list[Route]:
        """What our scripts in the page ask."""
        prompts = PromptApi(self.cards.cards, self._presets, loaded_family, prefers_alias)
        return [*prompts.routes(), *CardsApi(self._webui, self._library, self._loaded, loaded_family).routes()]

    def _loaded(self) -> tuple[nn.Module, Path | None] | None:
        self._settings()
        model = sd_models.model_data.sd_model  # `shared.sd_model` would load one
        return None if model is None else (model, self._checkpoint(model))

    def _started(self, _: object, app: Any) -> None:
        self._routes.install(app)
        self._set_aside = _without_builtin_paste()
        self.cards.read_ahead()

    def _pasted(self, _: str, fields: dict[str, Any]) -> None:
        if not _addnet_is_seen_to():
            tags = addnet.tags(fields)
            fields["Prompt"] = "\n".join(filter(None, (str(fields.get("Prompt", "")), tags)))
        complete(fields)
        paste = Paste(self.search())
        paste.into(fields)
        for sentence in paste.said:
            log.info("%s", sentence)
            _pop_up("Info", sentence)

    def _give_back(self) -> None:
        self._axes.remove()
        self._routes.give_back()
        self.cards.give_back()
        script_callbacks.callback_map["callbacks_infotext_pasted"].extend(self._set_aside)
        self._set_aside = []
        if self._hashes is not None:
            self._hashes.bodies.close()
            self._hashes.both.close()
            self._hashes = None


def index_file() -> Path:
    """In the host's cache folder: our own folder is replaced when we are updated."""
    folder = os.environ.get("SD_WEBUI_CACHE_DIR") or Path(paths_internal.data_path, "cache")
    return Path(folder, INDEX)


def _without_builtin_paste() -> list[Any]:
    """Takes the built-in's callback out that puts other files' names into a pasted prompt; returns it.

    It believes what a file says of its own hash, and takes the last of those that say the same.
    """
    known = script_callbacks.callback_map["callbacks_infotext_pasted"]
    theirs = [each for each in known if getattr(each.callback, "__module__", "") == "lora_script.py"]
    for each in theirs:
        script_callbacks.remove_callbacks_for_function(each.callback)
    return theirs


def _addnet_is_seen_to() -> bool:
    """Whether somebody else makes prompts of the fields of the additional-networks extension: it, or the built-in."""
    known = script_callbacks.callback_map["callbacks_infotext_pasted"]
    fields = getattr(getattr(scripts, "scripts_txt2img", None), "infotext_fields", None) or ()
    return any(getattr(each.callback, "__module__", "") == "networks" for each in known) or any(
        field[1] == "AddNet Module 1" for field in fields
    )


def _logins() -> Logins:
    return logins_of(getattr(shared.cmd_opts, "api_auth", None))


def _weight() -> str:
    return str(shared.opts.extra_networks_default_multiplier)


def _tag(name: str) -> str:
    return f"<lora:{name}:{_weight()}>"


def _pop_up(kind: str, sentence: str) -> None:
    """On the host's page, where it has one."""
    gradio = sys.modules.get("gradio")
    show = getattr(gradio, kind, None)
    if show is not None:
        # since version 4 gradio takes it for HTML; names of files, and a pasted text's, can hold any
        as_text = str(getattr(gradio, "__version__", "")).startswith("3.")
        show(sentence if as_text else escape(sentence, quote=False))
