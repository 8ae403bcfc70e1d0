"""Routes in the host's web application, as plain ASGI: they run under every FastAPI that a host brings."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

from lib_locon.hosts.guard import Logins, is_local, may_ask
from lib_locon.untrusted_json import parse

log = logging.getLogger("lib_locon")
MAX_BODY = 1_000_000
"""Bytes of a request."""
MAX_PROMPT = 100_000
"""Characters."""
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
_HEADERS = (
    (b"content-type", b"application/json"),
    (b"x-content-type-options", b"nosniff"),  # names may hold HTML
    (b"cache-control", b"no-store"),
)


class WebError(Exception):
    """An answer that is an error: a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Ask:
    """A request: the parts of its path, its query, and what its JSON body holds (None where it has none).

    `local`: it comes from this very computer, as far as that can be seen.
    """

    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any = None
    local: bool = False

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number out of the query."""
        text = self.query.get(name, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 9 or not least <= int(text) <= most:
            raise WebError(400, f"{name} must be a whole number from {least} to {most}, not {text[:40]!r}")
        return int(text)

    def prompt(self) -> str:
        """The prompt in its body, which is an object then."""
        prompt = self.body.get("prompt") if isinstance(self.body, dict) else None
        if not isinstance(prompt, str):
            raise WebError(400, 'the request must be a JSON object such as {"prompt": "a cat <lora:name:0.8>"}')
        if len(prompt) > MAX_PROMPT:
            raise WebError(413, f"a prompt may have {MAX_PROMPT} characters, this one has {len(prompt)}")
        return prompt


@dataclass(frozen=True)
class Route:
    """One address. `protected`: asks for the host's --api-auth, where it has one.

    Otherwise it asks, as `protected` ones do too, for the login of the host's page, where that has one; `open` ones ask
    for nothing at all.
    """

    method: str
    path: str
    answer: Callable[[Ask], Any]
    protected: bool = True
    open: bool = False


class Endpoint:
    """Answers the requests for one route, in a thread: the host's loop serves other requests meanwhile."""

    def __init__(self, route: Route, logins: Callable[[], Logins]) -> None:
        self._route = route
        self._logins = logins
        self.__name__ = route.path.strip("/").replace("/", "_")

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        try:
            logins = self._logins() if self._route.protected else None
            if not (self._route.open or may_ask(scope, logins)):
                raise WebError(401, "this address asks for the user name and password that the webui was started with")
            body = await _body(receive) if self._route.method == "POST" else b""
            status, content = 200, await asyncio.to_thread(self._answer, scope, body)
        except WebError as error:
            status, content = error.status, encoded({"error": str(error)})
        except Exception as error:
            log.exception("an error in sd-webui-locon itself")
            status, content = 500, encoded({"error": f"an error in sd-webui-locon itself: {type(error).__name__}"})
        headers = [*_HEADERS, (b"content-length", str(len(content)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Basic"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _answer(self, scope: Mapping[str, Any], body: bytes) -> bytes:
        # many programs send letters beyond ASCII as they are, without the % that they should have
        query = dict(parse_qsl(scope.get("query_string", b"").decode("utf8", "replace"), keep_blank_values=True))
        ask = Ask(scope.get("path_params", {}), query, _parsed(body), is_local(scope))
        return encoded(self._route.answer(ask))


class Routes:
    """What of ours stands in a web application: in the place of routes that were there, or behind all others."""

    def __init__(self, routes: list[Route], logins: Callable[[], Logins]) -> None:
        self._routes = routes
        self._logins = logins
        self._app: Any = None
        self._displaced: list[tuple[Any, Any]] = []
        """(ours, theirs or None), in the order in which they were put there."""

    def install(self, app: Any) -> None:
        """The first route that fits answers, so one that is there already is replaced where it stands."""
        self.give_back()
        if app is None:
            return
        self._app = app
        for route in self._routes:
            theirs = next((known for known in app.router.routes if _same(known, route)), None)
            app.add_route(route.path, Endpoint(route, self._logins), methods=[route.method])
            ours = app.router.routes[-1]
            if theirs is not None:
                app.router.routes.pop()
                app.router.routes[_place(app, theirs)] = ours
            self._displaced.append((ours, theirs))

    def give_back(self) -> None:
        """Takes ours out, and puts back what stood there."""
        for ours, theirs in reversed(self._displaced):
            if any(known is ours for known in self._app.router.routes):
                place = _place(self._app, ours)
                self._app.router.routes[place : place + 1] = [] if theirs is None else [theirs]
        self._displaced.clear()
        self._app = None


def encoded(value: object) -> bytes:
    """As JSON. What no JSON can say (NaN, infinity) becomes null, and half letters, as in a file name, become `?`."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)
    return text.encode("utf8", "replace")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise WebError(400, "the request was broken off")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise WebError(413, f"a request may have {MAX_BODY} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _parsed(body: bytes) -> Any:
    try:
        return parse(body.decode("utf-8-sig")) if body.strip() else None
    except ValueError as error:
        raise WebError(400, "the request's body is no JSON") from error


def _same(known: Any, route: Route) -> bool:
    return getattr(known, "path", None) == route.path and route.method in (getattr(known, "methods", None) or ())


def _place(app: Any, wanted: Any) -> int:
    return next(place for place, known in enumerate(app.router.routes) if known is wanted)
