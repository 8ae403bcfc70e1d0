"""Asks a web application without a server: one request in, one answer out."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote


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
        self, method: str, path: str, query: str = "", content: bytes = b"", login: str = "", raw: str = ""
    ) -> Answer:
        """`raw` is the path as it goes over the wire, where it is not the usual spelling."""
        headers = [(b"host", b"test"), (b"content-length", str(len(content)).encode())]
        if login:
            headers.append((b"authorization", b"Basic " + base64.b64encode(login.encode())))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": (raw or quote(path)).encode(), "query_string": query.encode(), "root_path": "",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("test", 80), "state": {},
        }  # fmt: skip
        answer = asyncio.run(self._ask(scope, content))
        self.seen.append(answer)
        return answer

    async def _ask(self, scope: dict[str, Any], content: bytes) -> Answer:
        sent: list[MutableMapping[str, Any]] = []
        # in two parts, as a server may hand it on
        parts = [content[: len(content) // 2], content[len(content) // 2 :]]

        async def receive() -> MutableMapping[str, Any]:
            part = parts.pop(0) if parts else b""
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        body = b"".join(message.get("body", b"") for message in sent[1:])
        assert headers.get("content-length") in (None, str(len(body)))
        return Answer(sent[0]["status"], headers, body.decode())
