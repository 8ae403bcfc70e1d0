"""What is at each address, with the names of the host's own where the host has one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from modules import extensions, infotext_utils, shared, ui_extra_networks

from extensions_builtin_shim.limits import (
    BadRequest,
    checked_count,
    checked_guidance,
    checked_prompt,
    checked_seed,
    checked_steps,
)
from extensions_builtin_shim.page.cards import cards_of, cover_image
from extensions_builtin_shim.webui import Run, Webui
from lib_locon.errors import FileError
from lib_locon.files.regular import read_regular

MAX_PREVIEW = 64_000_000
"""Bytes of a picture beside a file."""
FILES = Path(__file__).with_name("files")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
DEFAULTS: dict[str, Any] = {"negative_prompt": "", "seed": 1, "steps": 8, "guidance": 2.5, "count": 1}
_HEAD = "<!-- what the extensions add -->"


class NotFound(Exception):
    """A file that is not there, or not for this page."""


class Answer(NamedTuple):
    """What is sent back."""

    content: bytes
    kind: str

    @classmethod
    def json(cls, data: object) -> Answer:
        """Plain data."""
        return cls(json.dumps(data).encode(), "application/json")

    @classmethod
    def file(cls, path: Path) -> Answer:
        """A file, of the kind that its ending says."""
        return cls(path.read_bytes(), KINDS[path.suffix.lower()])


Fields = Mapping[str, Any]
Route = Callable[[Webui, Fields], Answer]


def front_page(webui: Webui, fields: Fields) -> Answer:
    """The page, with the scripts and styles of the extensions in it as the host would put them there."""
    del webui, fields
    added = [
        f'<script type="module" src="{escape(address)}"></script>'
        if path.suffix == ".mjs"
        else f'<link rel="stylesheet" href="{escape(address)}">'
        for address, path in _addresses()
    ]
    page = (FILES / "page.html").read_text(encoding="utf-8")
    return Answer(page.replace(_HEAD, "\n  ".join(added)).encode(), KINDS[".html"])


def _addresses() -> Iterator[tuple[str, Path]]:
    """With the time of its last change each, as the host writes them: a browser keeps no older version then."""
    for address, path in _extension_files().items():
        yield f"{quote(address, safe='/=')}?{path.stat().st_mtime}", path


def extension_file(path: str) -> Answer | None:
    """A script or style of an extension, at the address under which the host has it; None for any other address."""
    file = _extension_files().get(path.removeprefix("/")) if path.startswith("/file=") else None
    return None if file is None else Answer.file(file)


def options(webui: Webui, fields: Fields) -> Answer:
    """The settings that the scripts of a page read as `opts`."""
    del webui, fields
    values = shared.opts.values().items()
    return Answer.json({key: value for key, value in values if key.startswith(("extra_networks_", "locon_"))})


def cards(webui: Webui, fields: Fields) -> Answer:
    """The tabs of cards. With `refresh` their extensions look into the folders again."""
    with webui.pages() as pages:
        return Answer.json({"pages": [cards_of(page, refresh="refresh" in fields) for page in pages]})


def thumb(webui: Webui, fields: Fields) -> Answer:
    """A preview in a folder of a page."""
    del webui
    try:
        path = ui_extra_networks.fetch_file(fields.get("filename", ""))
        return Answer(read_regular(path, MAX_PREVIEW), KINDS[path.suffix.lower()])
    except (OSError, ValueError, KeyError, FileError) as error:
        raise NotFound("there is no such preview") from error


def cover(webui: Webui, fields: Fields) -> Answer:
    """A preview inside an adapter's file."""
    with webui.pages() as pages:
        found = cover_image(pages, fields.get("page", ""), fields.get("item", ""))
    if found is None:
        raise NotFound("there is no such picture")
    return Answer(*found)


def generate(webui: Webui, fields: Fields) -> Answer:
    """The images of one job."""
    unknown = sorted(fields.keys() - {"prompt", *DEFAULTS})
    if unknown:
        raise BadRequest(f"unknown: {', '.join(unknown)}; known are prompt, {', '.join(DEFAULTS)}")
    if "prompt" not in fields:
        raise BadRequest("the request has no prompt")
    values = {**DEFAULTS, **fields}
    runs = webui.generate_all(
        checked_prompt(values["prompt"]),
        checked_prompt(values["negative_prompt"]),
        seed=checked_seed(values["seed"]),
        steps=checked_steps(values["steps"]),
        guidance=checked_guidance(values["guidance"]),
        count=checked_count(values["count"]),
    )
    images = [_image(run) for run in runs]
    whole_job = {key: runs[-1].as_json(None)[key] for key in ("adapters", "comments", "seconds")}
    return Answer.json({"images": images, **whole_job, "interrupted": shared.state.interrupted})


def _image(run: Run) -> dict[str, object]:
    address = "data:image/png;base64," + base64.b64encode(run.png).decode()
    return {"prompt": run.prompt, "seed": run.seed, "infotext": run.infotext, "image": address, "sha256": run.sha256}


def progress(webui: Webui, fields: Fields) -> Answer:
    """How far the running job is."""
    del fields
    return Answer.json(webui.progress())


def interrupt(webui: Webui, fields: Fields) -> Answer:
    """Stops the running job at its next step."""
    del fields
    webui.interrupt()
    return Answer.json({})


def read_parameters(webui: Webui, fields: Fields) -> Answer:
    """The fields of an image's text, as the host's paste button reads them."""
    del webui
    return Answer.json(infotext_utils.paste_fields(checked_prompt(fields.get("text"))))


def _part(name: str) -> Route:
    return lambda webui, fields: Answer.file(FILES / name)


def _extension_files() -> dict[str, Path]:
    """Address → file."""
    found = {}
    for extension in extensions.active():
        root = Path(extension.path)
        for path in (*sorted(root.glob("javascript/*.mjs")), root / "style.css"):
            if path.is_file():
                found[f"file=extensions/{extension.name}/{path.relative_to(root).as_posix()}"] = path
    return found


ROUTES: dict[str, tuple[str, Route]] = {
    "/": ("GET", front_page),
    **{f"/{path.name}": ("GET", _part(path.name)) for path in FILES.iterdir() if path.suffix in (".mjs", ".css")},
    "/sd_extra_networks/thumb": ("GET", thumb),
    "/sd_extra_networks/cover-images": ("GET", cover),
    "/api/options": ("GET", options),
    "/api/cards": ("GET", cards),
    "/api/progress": ("GET", progress),
    "/api/generate": ("POST", generate),
    "/api/interrupt": ("POST", interrupt),
    "/api/read-parameters": ("POST", read_parameters),
}
