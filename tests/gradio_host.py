"""The host's page, built with the gradio that is installed, as the webui builds its own: settings, cards, editor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gradio as gr

TAB = "txt2img"


class Page:
    """To be handed to `launch` as `make_app`: builds and launches a page at the start and at each "Reload UI"."""

    def __init__(self, auth: tuple[str, str] | None = None) -> None:
        self._auth = auth
        self.demo: Any = None
        self.url = ""

    def __call__(self) -> Any:
        self.close()
        with gr.Blocks(analytics_enabled=False) as self.demo:
            gallery, refresh = gr.Gallery(elem_id=f"{TAB}_gallery"), gr.Button("Refresh")
            with gr.Tabs():
                self._settings()
                self._cards(gallery, refresh)
        self.demo.queue()
        app, self.url, _ = self.demo.launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False, auth=self._auth
        )
        return app

    def close(self) -> None:
        """Stops the page that is up."""
        if self.demo is not None:
            self.demo.close()

    def _settings(self) -> None:
        from modules import shared

        def apply_settings(*values: Any) -> str:
            given = dict(zip(self.settings, values, strict=True))
            changed = {key: value for key, value in given.items() if value != getattr(shared.opts, key)}
            for key, value in changed.items():
                shared.opts.set(key, value)
            return ", ".join(changed)

        with gr.Tab("Settings"):
            self.settings = {key: _component(key, info) for key, info in shared.opts.data_labels.items()}
            result = gr.Textbox()
            gr.Button("Apply settings").click(fn=apply_settings, inputs=list(self.settings.values()), outputs=result)

    def _cards(self, gallery: Any, button: Any) -> None:
        from modules import ui_extra_networks

        pages = list(ui_extra_networks.extra_pages)
        shown, editors = [], []
        for page in pages:
            with gr.Tab(page.title, elem_id=f"{TAB}_{page.extra_networks_tabname}"):
                elem_id = f"{TAB}_{page.extra_networks_tabname}_cards_html"
                shown.append(gr.HTML(page.create_html(TAB, empty=True), elem_id=elem_id))
                editors.append(page.create_user_metadata_editor(None, TAB))
                editors[-1].create_ui()
        for editor in editors:
            editor.setup_ui(gallery)

        def refresh() -> Any:
            html = [page.create_html(TAB) for page in pages]
            return html if len(html) > 1 else html[0]

        button.click(fn=refresh, inputs=[], outputs=shown)
        self.demo.load(fn=refresh, inputs=[], outputs=shown)

    def call(self, name: str, *inputs: Any, session: Any = None) -> Any:
        """Runs the function of that name behind a button, as a browser does: over the web, through gradio's queue."""
        functions = self.demo.fns.items() if isinstance(self.demo.fns, dict) else enumerate(self.demo.fns)
        number = next(n for n, known in functions if getattr(known.fn, "__name__", "") == name)
        found = (session or self.session()).predict(*inputs, fn_index=number)
        return [_plain(part) for part in found] if isinstance(found, (list, tuple)) else _plain(found)

    def session(self) -> Any:
        """A browser's: what one event keeps, the next one finds."""
        from gradio_client import Client

        user = {"auth": self._auth} if self._auth else {}
        return Client(self.url, **user, **_quiet(Client))


def _component(key: str, info: Any) -> Any:
    """A setting's part of the page, made as the host makes it."""
    from modules import shared

    args = info.component_args() if callable(info.component_args) else info.component_args
    kinds = {str: gr.Textbox, int: gr.Number, bool: gr.Checkbox, float: gr.Number}
    make = info.component or kinds[type(info.default)]
    return make(label=info.label, value=getattr(shared.opts, key), elem_id=f"setting_{key}", **(args or {}))


def _plain(value: Any) -> Any:
    """A component's value, also where the event answers with a change of the component."""
    return value.get("value") if isinstance(value, dict) and value.get("__type__") == "update" else value


def _quiet(client: Callable[..., Any]) -> dict[str, Any]:
    import inspect

    return {"verbose": False} if "verbose" in inspect.signature(client).parameters else {}


def until(done: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it came true in that time."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()
