"""Asks a web application without a server: one request in, one answer out."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Answer:
    """`text` is the body; `json` what it says."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Client:
    """The last answers are kept in `seen`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.seen: list[Answer] = []

    def get(self, path: str, query: str = "", **options: Any) -> Answer:
        return self.ask("GET", path, query, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return self.ask("POST", path, content=content, **options)

    def ask(
        self,
        method: str,
        path: str,
        query: str = "",
        content: bytes = b"",
        login: str = "",
        raw: str = "",
        headers: Mapping[str, str] = _NONE,
        client: str = "127.0.0.1",
        parts: int = 2,
        broken_off: bool = False,
    ) -> Answer:
        """`raw` is the path as it goes over the wire, where it is not the usual spelling; the body comes in `parts`."""
        sent = {"host": "test", "content-length": str(len(content)), **headers}
        pairs = [(key.encode(), value.encode("latin-1")) for key, value in sent.items()]
        if login:
            pairs.append((b"authorization", b"Basic " + base64.b64encode(login.encode())))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": (raw or quote(path)).encode(), "query_string": query.encode(), "root_path": "",
            "headers": pairs, "client": (client, 1), "server": ("test", 80), "state": {},
        }  # fmt: skip
        answer = asyncio.run(self._ask(scope, content, parts, broken_off))
        self.seen.append(answer)
        return answer

    async def _ask(self, scope: dict[str, Any], content: bytes, count: int, broken_off: bool) -> Answer:
        sent: list[MutableMapping[str, Any]] = []
        # in parts, as a server may hand it on
        size = max(1, -(-len(content) // count))
        parts = [content[start : start + size] for start in range(0, len(content), size)][: 1 if broken_off else None]

        async def receive() -> MutableMapping[str, Any]:
            if broken_off and not parts:
                return {"type": "http.disconnect"}
            part = parts.pop(0) if parts else b""
            return {"type": "http.request", "body": part, "more_body": bool(parts) or broken_off}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        body = b"".join(message.get("body", b"") for message in sent[1:])
        assert headers.get("content-length") in (None, str(len(body)))
        return Answer(sent[0]["status"], headers, body.decode())
