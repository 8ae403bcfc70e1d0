"""The web application that extensions add their addresses to: as much of the host's as they need, over this server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Endpoint = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]


class Added(NamedTuple):
    """An address, such as `/a/{name}` or `/a/{name:path}`."""

    path: str
    endpoint: Endpoint
    methods: frozenset[str]

    def parts(self, path: str) -> dict[str, str] | None:
        """What stands in the place of the names; None where the address is another."""
        pattern = re.sub(
            r"\\\{(\w+)(:path)?\\\}", lambda m: f"(?P<{m[1]}>{'.*' if m[2] else '[^/]+'})", re.escape(self.path)
        )
        found = re.fullmatch(pattern, path)
        return None if found is None else found.groupdict()


@dataclass
class Router:
    """The addresses, in their order; the first that fits answers."""

    routes: list[Added] = field(default_factory=list)


class App:
    """Answers as ASGI asks for, with no server behind it but this page's."""

    def __init__(self) -> None:
        self.router = Router()

    def add_route(self, path: str, endpoint: Endpoint, methods: Iterable[str]) -> None:
        """Puts an address behind the others."""
        self.router.routes.append(Added(path, endpoint, frozenset(methods)))

    def answer(self, method: str, path: str, query: str, body: bytes) -> tuple[int, bytes, str] | None:
        """Status, content and its kind; None where nobody added that address."""
        for route in self.router.routes:
            parts = route.parts(path)
            if parts is not None and method in route.methods:
                return asyncio.run(_asked(route.endpoint, method, path, query, body, parts))
        return None


async def _asked(
    endpoint: Endpoint, method: str, path: str, query: str, body: bytes, parts: dict[str, str]
) -> tuple[int, bytes, str]:
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(), "path_params": parts,
        "headers": [],
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await endpoint(scope, receive, send)
    headers = dict(sent[0]["headers"])
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], content, headers[b"content-type"].decode()
