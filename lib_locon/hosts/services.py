"""What stands around the tags: cards, images' texts, addresses of the web application, and the built-in's options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules import extra_networks, paths_internal, script_callbacks, sd_models, shared
from torch import nn

from lib_locon.errors import UnknownName
from lib_locon.hosts.api import Api
from lib_locon.hosts.cards_page import Registration
from lib_locon.hosts.infotext import Hashes, Infotext, Paste
from lib_locon.hosts.options import add_settings, value
from lib_locon.hosts.web import Routes
from lib_locon.hosts.webui import Webui, log
from lib_locon.index import hash_table
from lib_locon.library import Library
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
        self.cards = Registration(library, index_file)
        self.infotext = Infotext(self.hashes)
        self._routes = Routes(Api(webui, library, self.cards.cards, self._loaded).routes(), _logins)
        self._set_aside: list[Any] = []

    def register(self) -> None:
        """Hooks into the host's start-up."""
        script_callbacks.on_ui_settings(lambda: add_settings(self._names, lambda: self._library().refresh()))
        script_callbacks.on_ui_settings(self.cards.take_over)
        script_callbacks.on_app_started(self._started)
        script_callbacks.on_infotext_pasted(self._pasted)
        script_callbacks.on_script_unloaded(self._give_back)

    def hashes(self) -> Hashes:
        """The hashes of files, kept on disk."""
        if self._hashes is None:
            table = hash_table(index_file())
            self._hashes = Hashes(table, table.flush)
        return self._hashes

    def told(self, p: Any, report: Report, *, hires: bool) -> None:
        """To be called after each `activate`: writes into the image's text, and says what is not there."""
        self.infotext.write(
            p, self._webui.used, report, hires=hires, hashes=bool(value(ADD_HASHES)), applied=bool(value(INFOTEXT))
        )
        for problem in report.problems:
            if isinstance(problem, Missing) and value(WARN_IN_PAGE):
                _pop_up("Warning", str(problem))

    def with_chosen(self, p: Any, params_list: Sequence[Any]) -> list[Any]:
        """The tags, and one for the adapter that the user chose for every prompt, where none names it."""
        name, prompts = str(value(SD_LORA)), getattr(p, "all_prompts", None)
        known = [str(params.items[0]) for params in params_list if params.items]
        if name == NO_ADAPTER or name in known or not prompts or not self._is_there(name):
            return list(params_list)
        weight = shared.opts.extra_networks_default_multiplier
        tag = f"<lora:{name}:{weight}>"
        p.all_prompts = [prompt if tag in prompt else prompt + tag for prompt in prompts]
        return [*params_list, extra_networks.ExtraNetworkParams(items=[name, str(weight)])]

    def _is_there(self, name: str) -> bool:
        try:
            return bool(self._library().find(name))
        except UnknownName:
            return False

    def _names(self) -> list[str]:
        return [card.name for card in self.cards.cards().all()]

    def _loaded(self) -> tuple[nn.Module, Path | None] | None:
        self._settings()
        model = sd_models.model_data.sd_model  # `shared.sd_model` would load one
        return None if model is None else (model, self._checkpoint(model))

    def _started(self, _: object, app: Any) -> None:
        self._routes.install(app)
        self._set_aside = _without_builtin_paste()
        self.cards.read_ahead()

    def _pasted(self, _: str, fields: dict[str, Any]) -> None:
        index = self.cards.cards().index
        paste = Paste(self._library(), self.hashes(), lambda file: facts.hash if (facts := index.known(file)) else "")
        paste.into(fields)
        for sentence in paste.said:
            log.info("%s", sentence)
            _pop_up("Info", sentence)

    def _give_back(self) -> None:
        self._routes.give_back()
        self.cards.give_back()
        script_callbacks.callback_map["callbacks_infotext_pasted"].extend(self._set_aside)
        self._set_aside = []
        if self._hashes is not None:
            self._hashes.close()
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


def _logins() -> Mapping[str, str]:
    """Of the host's --api-auth: user name → password."""
    pairs = str(getattr(shared.cmd_opts, "api_auth", None) or "").split(",")
    return dict(pair.split(":", 1) for pair in pairs if ":" in pair)


def _pop_up(kind: str, sentence: str) -> None:
    """On the host's page, where it has one."""
    show = getattr(sys.modules.get("gradio"), kind, None)
    if show is not None:
        show(sentence)
