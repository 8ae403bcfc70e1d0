"""The page on 127.0.0.1: what it serves, and what it refuses."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from extensions_builtin_shim.launch import ADAPTERS, CHECKOUT, launch


class Client:
    """Speaks to the server as a browser on this machine would."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON or text)."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, content = self.raw(method, path, content, headers)
        return status, json.loads(content)

    def raw(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[Any, ...]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        named = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        connection.request(method, path, body, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with the shipped adapters and one whose name would be HTML."""
    folder = tmp_path_factory.mktemp("adapters")
    for path in ADAPTERS.iterdir():
        (folder / path.name).symlink_to(path)
    save_file({"x.alpha": ones(1)}, folder / "<img src=x onerror=alert(1)>.safetensors")
    with launch(lora_dir=folder) as webui:
        from extensions_builtin_shim.page import Server

        server = Server(webui, folder, 0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Client(server.server_address[1])
        server.shutdown()
        thread.join()
        server.server_close()


def request(**changes: Any) -> dict[str, Any]:
    return {"prompt": "cat", "seed": 1, "steps": 1, **changes}


def test_page_and_its_parts(served: Client) -> None:
    kinds = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css", "/?x": "text/html"}
    for path, kind in kinds.items():
        status, headers, content = served.raw("GET", path)
        assert (status, headers.get_content_type()) == (200, kind)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"://" not in content  # no resource from elsewhere
    script = served.raw("GET", "/page.js")[2].decode()
    assert "innerHTML" not in script
    assert "insertAdjacentHTML" not in script


def test_page_has_what_it_should() -> None:
    page = (CHECKOUT / "extensions_builtin_shim" / "page.html").read_text()
    script = (CHECKOUT / "extensions_builtin_shim" / "page.js").read_text()
    for name in ("prompt", "seed", "steps", "generate", "image", "adapters", "comments", "status"):
        assert f'id="{name}"' in page
        assert f'at("{name}")' in script
    assert 'lang="en"' in page
    assert "<label" in page


def test_generate(served: Client) -> None:
    status, plain = served.ask("POST", "/api/generate", request())
    assert status == 200
    assert base64.b64decode(plain["image"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    status, run = served.ask("POST", "/api/generate", request(prompt="cat <lora:tiny_lora:1><lora:none:1>"))
    assert status == 200
    assert run["image"] != plain["image"]
    assert [adapter["name"] for adapter in run["adapters"]] == ["tiny_lora"]
    assert any("no adapter 'none'" in comment for comment in run["comments"])
    assert served.ask("POST", "/api/generate", request())[1]["image"] == plain["image"]
    assert served.ask("POST", "/api/generate", {"prompt": "", "steps": 1, "negative_prompt": "x"})[0] == 200


def test_one_generation_at_a_time(served: Client) -> None:
    prompts = ["cat", "cat <lora:tiny_lora:1>"] * 3
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        answers[index] = served.ask("POST", "/api/generate", request(prompt=prompts[index], steps=2))[1]["sha256"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answers[index] for index in (0, 2, 4)}) == len({answers[index] for index in (1, 3, 5)}) == 1
    assert answers[0] != answers[1]


def test_adapters(served: Client) -> None:
    status, data = served.ask("GET", "/api/adapters")
    assert status == 200
    names = [adapter["name"] for adapter in data["adapters"]]
    assert names == ["<img src=x onerror=alert(1)>", *sorted(path.stem for path in ADAPTERS.iterdir())]


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "headers", "message"),
    [
        (404, "GET", "/none", None, {}, "there is nothing at /none"),
        (404, "GET", "/../page.py", None, {}, "there is nothing at"),
        (404, "GET", "/page.py", None, {}, "there is nothing at"),
        (405, "POST", "/", None, {}, "/ is for GET requests"),
        (405, "GET", "/api/generate", None, {}, "/api/generate is for POST requests"),
        (501, "PUT", "/", None, {}, "Unsupported method"),
        (400, "POST", "/api/generate", b"{", {}, "the request is no JSON"),
        (400, "POST", "/api/generate", b"[" * 60_000, {}, "the request is no JSON"),
        (400, "POST", "/api/generate", [], {}, "must be a JSON object"),
        (400, "POST", "/api/generate", {"seed": 1}, {}, "has no prompt"),
        (400, "POST", "/api/generate", {"prompt": 1}, {}, "a prompt must be a text"),
        (400, "POST", "/api/generate", {"prompt": "x" * 10_001}, {}, "may have 10000 characters"),
        (400, "POST", "/api/generate", {"prompt": "\ud800"}, {}, "no text in UTF-8"),
        (400, "POST", "/api/generate", {"prompt": "x", "seed": 1.5}, {}, "the seed must be a whole number"),
        (400, "POST", "/api/generate", {"prompt": "x", "seed": True}, {}, "the seed must be a whole number"),
        (400, "POST", "/api/generate", {"prompt": "x", "steps": 10**9}, {}, "the steps must be a whole number"),
        (400, "POST", "/api/generate", {"prompt": "x", "stepps": 1}, {}, "unknown: stepps"),
        (413, "POST", "/api/generate", b" " * 70_000, {}, "may have 65536 bytes"),
        (411, "POST", "/api/generate", {}, {"Content_Length": "-1"}, "must say how long it is"),
        (415, "POST", "/api/generate", {}, {"Content_Type": "text/plain"}, "must be application/json"),
        (403, "GET", "/", None, {"Host": "evil.example"}, "answers only as 127.0.0.1"),
        (403, "GET", "/api/adapters", None, {"Host": "127.0.0.1.evil.example:7870"}, "answers only as 127.0.0.1"),
        (403, "POST", "/api/generate", {"prompt": "x"}, {"Origin": "http://evil.example"}, "other sites"),
        (403, "POST", "/api/generate", {"prompt": "x"}, {"Origin": "null"}, "other sites"),
    ],
)
def test_refusals(
    served: Client, status: int, method: str, path: str, body: Any, headers: dict[str, str], message: str
) -> None:
    got, data = served.ask(method, path, body, **headers)
    assert got == status
    assert data.keys() == {"error"}
    assert message in data["error"]
    assert served.ask("GET", "/api/adapters")[0] == 200


def test_own_origin_and_localhost(served: Client) -> None:
    host = f"localhost:{served.port}"
    assert served.ask("GET", "/api/adapters", Host=host, Origin=f"http://{host}")[0] == 200


def test_failure_is_told(served: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import processing

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of paint")

    with monkeypatch.context() as patch:
        patch.setattr(processing, "sample", fail)
        assert served.ask("POST", "/api/generate", request()) == (500, {"error": "out of paint"})
    assert served.ask("POST", "/api/generate", request())[0] == 200


def test_listens_on_this_machine_only(served: Client) -> None:
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with socket.socket() as outside:
            outside.settimeout(5)
            assert outside.connect_ex((str(address), served.port)) != 0


def test_taken_port(served: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from extensions_builtin_shim.page import serve

    assert serve(None, tmp_path, served.port) == 1  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert f"port {served.port} of 127.0.0.1 cannot be had" in told
    assert "another --port" in told


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")
def test_ctrl_c_ends_quietly() -> None:
    command = [sys.executable, "-m", "extensions_builtin_shim", "--port", "0"]
    page = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert page.stdout is not None
    assert page.stdout.readline().startswith("http://127.0.0.1:")
    page.send_signal(signal.SIGINT)
    _, err = page.communicate(timeout=60)
    assert page.returncode == 0
    assert err == ""
