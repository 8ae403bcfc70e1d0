"""Routes in the host's web application, as plain ASGI: they run under every FastAPI that a host brings."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

log = logging.getLogger("lib_locon")
MAX_BODY = 1_000_000
"""Bytes of a request."""
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class WebError(Exception):
    """An answer that is an error: a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Ask:
    """A request: the parts of its path, its query, and what its JSON body holds (None where it has none)."""

    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any = None

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number out of the query."""
        text = self.query.get(name, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 9 or not least <= int(text) <= most:
            raise WebError(400, f"{name} must be a whole number from {least} to {most}, not {text[:40]!r}")
        return int(text)


@dataclass(frozen=True)
class Route:
    """One address. `protected`: asks for the name and password that the host's own API asks for."""

    method: str
    path: str
    answer: Callable[[Ask], Any]
    protected: bool = True


class Endpoint:
    """Answers the requests for one route, in a thread: the host's loop serves other requests meanwhile."""

    def __init__(self, route: Route, logins: Callable[[], Mapping[str, str]]) -> None:
        self._route = route
        self._logins = logins
        self.__name__ = route.path.strip("/").replace("/", "_")

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        try:
            self._check_login(scope)
            body = await _body(receive) if self._route.method == "POST" else b""
            status, content = 200, await asyncio.to_thread(self._answer, scope, body)
        except WebError as error:
            status, content = error.status, encoded({"error": str(error)})
        except Exception as error:
            log.exception("an error in sd-webui-locon itself")
            status, content = 500, encoded({"error": f"an error in sd-webui-locon itself: {type(error).__name__}"})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Basic"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _answer(self, scope: Mapping[str, Any], body: bytes) -> bytes:
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        return encoded(self._route.answer(Ask(scope.get("path_params", {}), query, _parsed(body))))

    def _check_login(self, scope: Mapping[str, Any]) -> None:
        logins = self._logins() if self._route.protected else {}
        if not logins:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        try:
            user, _, password = base64.b64decode(token, validate=True).partition(b":")
        except ValueError:
            user = password = b""
        # every login is compared, so that the time taken says nothing
        good = [
            hmac.compare_digest(user, name.encode()) & hmac.compare_digest(password, word.encode())
            for name, word in logins.items()
        ]
        if kind.lower() != b"basic" or not any(good):
            raise WebError(401, "this address asks for the user name and password of --api-auth")


class Routes:
    """What of ours stands in a web application: in the place of routes that were there, or behind all others."""

    def __init__(self, routes: list[Route], logins: Callable[[], Mapping[str, str]]) -> None:
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
    """As JSON. What no JSON can say (NaN, infinity) becomes null."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MAX_BODY:
            raise WebError(413, f"a request may have {MAX_BODY} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body) if body.strip() else None
    except (ValueError, RecursionError) as error:
        raise WebError(400, "the request's body is no JSON") from error


def _same(known: Any, route: Route) -> bool:
    return getattr(known, "path", None) == route.path and route.method in (getattr(known, "methods", None) or ())


def _place(app: Any, wanted: Any) -> int:
    return next(place for place, known in enumerate(app.router.routes) if known is wanted)
