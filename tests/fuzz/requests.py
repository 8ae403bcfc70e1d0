"""Raw HTTP to the demo's page, and through it to the addresses that the extension adds.

The promises: no request is answered with 500, or not at all; an answer that says it is JSON is JSON; a body is not read
beyond the limit, whatever its headers say; the server answers the next request.
"""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from extensions_builtin_shim.app import App
from extensions_builtin_shim.launch import ADAPTERS, launch
from tests.fuzz.limits import limited
from tests.fuzz.prompts import PIECES
from tests.fuzz.sidecars import strict
from tests.fuzz.values import NAMES, json_text, json_value

PATHS = (
    "/", "/main.mjs", "/api/options", "/api/cards", "/api/progress", "/api/generate", "/api/interrupt",
    "/api/read-parameters", "/sd_extra_networks/thumb", "/sd_extra_networks/cover-images", "/sdapi/v1/loras",
    "/sdapi/v1/refresh-loras", "/locon/v1/adapters", "/locon/v1/adapters/glow", "/locon/v1/loaded", "/locon/v1/dry-run",
    "/locon/v1/complete", "/locon/v1/parse", "/locon/v1/fit", "/file=extensions/sd-webui-locon/style.css",
)  # fmt: skip
FIELDS = ("prompt", "negative_prompt", "text", "names", "seed", "steps", "guidance", "count", "negative", "a")
QUERY = ("filename", "page", "item", "tag", "text", "family", "base", "per_page", "refresh")
PLACES = ("/etc/passwd", "//server/share/x.png", "\\\\server\\share\\x.png", "../../secret.png", "C:x.png", "\x00", "")
BODY = 48 * 1024
"""Bytes: below what the page reads; `Content-Length` lies beyond it at times."""


class Requests:
    """A server in this process, asked over a socket."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-requests-"))
        for path in ADAPTERS.glob("*.safetensors"):
            shutil.copy(path, self._folder)
        self._webui = launch(lora_dir=self._folder, make_app=App)
        from extensions_builtin_shim.page import Server  # imports the stand-in's `modules`

        self._webui.__enter__()
        self._server = Server(self._webui, 0)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._webui.__exit__(kind, error, at)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, rng: random.Random, folder: Path) -> str:
        """One request, then a plain one."""
        del folder
        request = made(rng, self.port)
        with limited(len(request)):
            status, body, kind = self._ask(request)
            if status == 500:
                raise AssertionError(f"{request[:600]!r} is answered with {body[:600]!r}")
            if kind.startswith("application/json"):
                strict(body)
            plain = f"GET /api/progress HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n"
            if self._ask(plain.encode())[0] != 200:
                raise AssertionError(f"after {request[:600]!r} the server does not answer")
        return str(status)

    def _ask(self, request: bytes) -> tuple[int, bytes, str]:
        """(status, body, content type); (0, …) where the server closed without a word, which HTTP allows for noise."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            try:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it refused before the end, which is right for a body that is too long
            until = time.monotonic() + 30
            try:
                while time.monotonic() < until and (part := connection.recv(1 << 16)):
                    answer += part
            except ConnectionError:
                pass
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1]) if lines[0].startswith("HTTP/") else 0
        kind = next((line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("content-type:")), "")
        return status, body, kind


def made(rng: random.Random, port: int) -> bytes:
    """A request as bytes."""
    method = rng.choice(["GET", "GET", "POST", "POST", "POST", "HEAD", "PUT", "DELETE", "BREW", ""])
    path = rng.choice(PATHS)
    if rng.random() < 0.2:
        path = rng.choice(["/locon/v1/adapters/", "/", "/file=", "/api/"]) + quote(
            rng.choice([*NAMES, *PLACES]), safe=""
        )
    if rng.random() < 0.6:
        texts = [*PLACES, *NAMES, *PIECES, "1", "-1", "9" * 5000]
        pairs = (f"{rng.choice(QUERY)}={quote(rng.choice(texts))}" for _ in range(rng.randrange(1, 4)))
        path += "?" + "&".join(pairs)
    body = b""
    if method not in ("GET", "HEAD"):
        fields = {rng.choice(FIELDS): json_value(rng) for _ in range(rng.randrange(5))}
        if rng.random() < 0.6:
            fields |= {"prompt": "".join(rng.choice(PIECES) for _ in range(rng.randrange(10))), "steps": 1}
        body = json_text(rng, fields if rng.random() < 0.9 else json_value(rng))[:BODY]
    length = rng.choice([str(len(body))] * 8 + ["", "-1", "+5", "0x10", "0" * 12 + str(1 << 28), "9" * 30, "1e3", "٣"])
    headers = {
        "Host": rng.choice([f"127.0.0.1:{port}"] * 12 + [f"localhost:{port}", "evil.example", "", f"[::1]:{port}"]),
        "Content-Type": rng.choice(["application/json"] * 8 + ["text/plain", "application/json; charset=utf-16", ""]),
        "Content-Length": length,
        "Connection": "close",
    }
    if rng.random() < 0.1:
        headers["Origin"] = rng.choice(["http://evil.example", f"http://127.0.0.1:{port}", "null"])
    if rng.random() < 0.05:
        headers["Transfer-Encoding"] = "chunked"
    if rng.random() < 0.05:
        headers[rng.choice(["X", "Expect", "Range"])] = rng.choice(["100-continue", "bytes=0-", "x" * 70_000])
    head = f"{method} {path} HTTP/1.{rng.choice('1111109')}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    whole = head.encode("utf8", "surrogatepass") + b"\r\n" + body
    return whole if rng.random() < 0.95 else whole[: rng.randrange(len(whole))]
