"""The page on 127.0.0.1: what it serves, and what it refuses."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import ones

from extensions_builtin_shim.app import App
from extensions_builtin_shim.launch import ADAPTERS, CHECKOUT, launch

FILES = CHECKOUT / "extensions_builtin_shim" / "page" / "files"
ONE, OTHER = sorted(path.stem for path in ADAPTERS.glob("*.safetensors"))[:2]
HTML = "<img src=x onerror=alert(1)>"


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
    """A server with the shipped adapters, one whose name would be HTML, and one with a preview and words beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    for path in ADAPTERS.glob("*.safetensors"):
        (folder / path.name).symlink_to(path)
    save_file({"x.alpha": ones(1)}, folder / f"{HTML}.safetensors")
    Image.new("RGB", (4, 4), "red").save(folder / f"{ONE}.preview.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path_factory.getbasetemp() / "secret.png")
    (folder / "secret.txt").write_text("secret")
    words = {"description": HTML, "activation text": 'glow "x" \\ </script>', "preferred weight": 0.7}
    (folder / f"{ONE}.json").write_text(json.dumps({**words, "negative text": "ugly"}))
    with launch(lora_dir=folder, make_app=App) as webui:
        from extensions_builtin_shim.page import Server

        server = Server(webui, 0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Client(server.server_address[1])
        server.shutdown()
        thread.join()
        server.server_close()


def request(**changes: Any) -> dict[str, Any]:
    return {"prompt": "cat", "seed": 1, "steps": 1, **changes}


def test_page_and_its_parts(served: Client) -> None:
    parts = ["/page.css", *(f"/{path.name}" for path in FILES.glob("*.mjs")), *added(served)]
    for path in ["/", "/?x", *parts]:
        status, headers, content = served.raw("GET", path)
        kind = {".mjs": "text/javascript", ".css": "text/css"}.get(Path(path.partition("?")[0]).suffix, "text/html")
        assert (status, headers.get_content_type()) == (200, kind)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"://" not in content  # no resource from elsewhere
        assert all(way not in content for way in (b"innerHTML", b"insertAdjacentHTML", b"outerHTML", b"eval("))


def added(served: Client) -> list[str]:
    """What the extensions put into the page."""
    page = served.raw("GET", "/")[2].decode()
    return [f"/{address}" for address in re.findall(r'(?:src|href)="(file=[^"]*)"', page)]


def test_scripts_and_styles_of_the_extension(served: Client) -> None:
    """Fact: "`.mjs` are served as modules, each also as its own `<script>` tag." """
    root = "/file=extensions/sd-webui-locon"
    scripts = ("locon", "locon_completion", "locon_tags", "locon_texts")
    files = {f"{root}/javascript/{name}.mjs": f"javascript/{name}.mjs" for name in scripts}
    files[f"{root}/style.css"] = "style.css"
    assert added(served) == [f"{address}?{(CHECKOUT / path).stat().st_mtime}" for address, path in files.items()]
    for other in ("/install.py", "/javascript/../install.py", "/../../etc/passwd", ""):
        assert served.raw("GET", root + other)[0] == 404


def test_every_id_that_the_scripts_ask_for_is_there() -> None:
    page = (FILES / "page.html").read_text()
    asked = {name for path in FILES.glob("*.mjs") for name in re.findall(r'\bat\("([^"]+)"\)', path.read_text())}
    assert len(asked) > 15
    assert [name for name in asked if f'id="{name}"' not in page] == []
    assert 'lang="en"' in page


def test_generate(served: Client) -> None:
    status, plain = served.ask("POST", "/api/generate", request())
    assert status == 200
    (image,) = plain["images"]
    png = base64.b64decode(image["image"].removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG")
    assert Image.open(io.BytesIO(png)).text == {"parameters": image["infotext"]}  # type: ignore[attr-defined]
    status, run = served.ask("POST", "/api/generate", request(prompt=f"cat <lora:{ONE}:1><lora:none:1>"))
    assert status == 200
    assert run["images"][0]["image"] != image["image"]
    assert [adapter["name"] for adapter in run["adapters"]] == [ONE]
    assert any("no adapter 'none'" in comment for comment in run["comments"])
    assert served.ask("POST", "/api/generate", request())[1]["images"] == [image]
    assert served.ask("POST", "/api/generate", {"prompt": "", "steps": 1, "negative_prompt": "x"})[0] == 200


def test_several_images(served: Client) -> None:
    both = served.ask("POST", "/api/generate", request(count=2))[1]["images"]
    assert [image["seed"] for image in both] == [1, 2]
    assert served.ask("POST", "/api/generate", request(seed=2))[1]["images"] == both[1:]


def test_guidance_counts(served: Client) -> None:
    images = [served.ask("POST", "/api/generate", request(guidance=value))[1]["images"] for value in (1, 7.5)]
    assert images[0][0]["sha256"] != images[1][0]["sha256"]
    assert "CFG scale: 7.5" in images[1][0]["infotext"]


def test_random_seed(served: Client) -> None:
    seeds = {served.ask("POST", "/api/generate", request(seed=-1))[1]["images"][0]["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert -1 not in seeds


def test_progress_and_interrupt(served: Client) -> None:
    answers: list[Any] = []
    body = request(steps=200, count=16)
    thread = threading.Thread(target=lambda: answers.append(served.ask("POST", "/api/generate", body)))
    thread.start()
    seen = [0.0]
    while len(seen) < 4:
        seen.append(served.ask("GET", "/api/progress")[1]["progress"])
        if seen[-1] == seen[-2]:
            seen.pop()
        time.sleep(0.01)
    assert seen == sorted(seen)
    assert seen[-1] < 1
    assert served.ask("POST", "/api/interrupt", {}) == (200, {})
    thread.join(60)
    status, made = answers[0]
    assert status == 200
    assert made["interrupted"]
    assert 1 <= len(made["images"]) < 16
    assert served.ask("GET", "/api/progress")[1]["progress"] == 0
    assert not served.ask("POST", "/api/generate", request())[1]["interrupted"]


def test_infotext_is_read_back(served: Client) -> None:
    made = served.ask("POST", "/api/generate", request(prompt=f"cat, <lora:{ONE}:0.5>\nred", negative_prompt="x"))[1]
    fields = served.ask("POST", "/api/read-parameters", {"text": made["images"][0]["infotext"]})[1]
    known = {key: fields[key] for key in ("Prompt", "Negative prompt", "Steps", "Seed", "CFG scale")}
    assert known == {
        "Prompt": f"cat, <lora:{ONE}:0.5>\nred", "Negative prompt": "x", "Steps": "1", "Seed": "1",
        "CFG scale": "2.5",
    }  # fmt: skip
    assert "Steps" not in served.ask("POST", "/api/read-parameters", {"text": "only words, no: text"})[1]


def test_one_generation_at_a_time(served: Client) -> None:
    prompts = ["cat", f"cat <lora:{ONE}:1>"] * 3
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        made = served.ask("POST", "/api/generate", request(prompt=prompts[index], steps=2))[1]
        answers[index] = made["images"][0]["sha256"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answers[index] for index in (0, 2, 4)}) == len({answers[index] for index in (1, 3, 5)}) == 1
    assert answers[0] != answers[1]


def test_cards(served: Client) -> None:
    status, data = served.ask("GET", "/api/cards")
    assert status == 200
    (page,) = data["pages"]
    cards = {card["name"]: card for card in page["cards"]}
    assert list(cards) == [HTML, *sorted(path.stem for path in ADAPTERS.glob("*.safetensors"))]
    card = cards[ONE]
    assert card["prompt"] == f'<lora:{ONE}:0.7> glow "x" \\ </script>'
    assert card["negative_prompt"] == "(ugly:1)"
    assert card["description"] == HTML
    assert card["locon"]["family"]
    assert int(card["locon"]["rank"]) > 0
    assert card["locon"]["base"] == "this model"
    assert cards[OTHER]["prompt"] == f"<lora:{OTHER}:1>"
    assert "no adapter" in cards[HTML]["locon"]["problem"]
    status, headers, content = served.raw("GET", card["preview"].removeprefix("."))
    assert (status, headers.get_content_type(), content[:4]) == (200, "image/png", b"\x89PNG")


def test_previews_come_from_the_adapter_folders_only(served: Client) -> None:
    preview = next(
        card["preview"] for card in served.ask("GET", "/api/cards")[1]["pages"][0]["cards"] if card["preview"]
    )
    folder = unquote(preview.partition("filename=")[2].partition("&")[0]).rpartition("/")[0]
    names = (f"{folder}/../../secret.png", f"{folder}/secret.txt", f"{folder}/{ONE}.safetensors", "/etc/passwd", "")
    for name in names:
        assert served.ask("GET", f"/sd_extra_networks/thumb?filename={quote(name)}")[0] == 404
    assert served.ask("GET", f"/sd_extra_networks/cover-images?page=lora&item={ONE}")[0] == 404


@pytest.mark.parametrize("content", ["deep JSON", "no JSON", "a broken PNG", "no picture", "a huge PNG"])
def test_a_picture_in_a_file_that_is_none(served: Client, content: str) -> None:
    from extensions_builtin_shim.page.cards import cover_image

    file = io.BytesIO()
    Image.new("1", (4100, 4100) if content == "a huge PNG" else (4, 4)).save(file, "PNG")
    png = file.getvalue()
    begun = png[: png.index(b"IDAT") - 4] + b"\0\0\0\1IDATx"  # Pillow looks for more of the picture behind it
    data = {"a broken PNG": begun + b"\0" * 11, "no picture": b"PK", "a huge PNG": png}.get(content)
    content = "[" * 100_000 if content == "deep JSON" else content
    images = content if data is None else json.dumps([base64.b64encode(data).decode()])
    page: Any = SimpleNamespace(name="lora", metadata={"x": {"ssmd_cover_images": images}})
    assert cover_image([page], "lora", "x") is None


def test_refresh_finds_new_files(served: Client, tmp_path: Path) -> None:
    def names() -> list[str]:
        return [card["name"] for card in served.ask("GET", "/api/cards?refresh=1")[1]["pages"][0]["cards"]]

    assert "tiny_new" not in names()
    folder = Path(served.ask("GET", "/api/cards")[1]["pages"][0]["folders"][0])
    new = folder / "tiny_new.safetensors"
    new.symlink_to(make_copy(tmp_path))
    assert "tiny_new" in names()
    new.unlink()
    assert "tiny_new" not in names()


def make_copy(folder: Path) -> Path:
    """One file is one adapter, under whichever names: so a new one needs a file of its own."""
    return Path(shutil.copy(ADAPTERS / f"{ONE}.safetensors", folder / "copy.safetensors"))


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "headers", "message"),
    [
        (404, "GET", "/none", None, {}, "there is nothing at /none"),
        (404, "GET", "/../page.py", None, {}, "there is nothing at"),
        (404, "GET", "/page.html", None, {}, "there is nothing at"),
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
        (400, "POST", "/api/generate", {"prompt": "x", "guidance": "5"}, {}, "the guidance must be a number"),
        (400, "POST", "/api/generate", {"prompt": "x", "guidance": 1e9}, {}, "the guidance must be a number"),
        (400, "POST", "/api/generate", {"prompt": "x", "count": 0}, {}, "the number of images must be"),
        (400, "POST", "/api/read-parameters", {}, {}, "a prompt must be a text"),
        (405, "GET", "/api/interrupt", None, {}, "/api/interrupt is for POST requests"),
        (404, "GET", "/sd_extra_networks/cover-images?page=x", None, {}, "there is no such picture"),
        (413, "POST", "/api/generate", b" " * 70_000, {}, "may have 65536 bytes"),
        (411, "POST", "/api/generate", {}, {"Content_Length": "-1"}, "must say how long it is"),
        (415, "POST", "/api/generate", {}, {"Content_Type": "text/plain"}, "must be application/json"),
        (400, "GET", "ftp://[", None, {}, "the address is none"),
        (403, "GET", "/", None, {"Host": "evil.example"}, "answers only as 127.0.0.1"),
        (403, "GET", "/api/cards", None, {"Host": "127.0.0.1.evil.example:7870"}, "answers only as 127.0.0.1"),
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
    assert served.ask("GET", "/api/cards")[0] == 200


def test_own_origin_and_localhost(served: Client) -> None:
    host = f"localhost:{served.port}"
    assert served.ask("GET", "/api/cards", Host=host, Origin=f"http://{host}")[0] == 200


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


def test_taken_port(served: Client, capsys: pytest.CaptureFixture[str]) -> None:
    from extensions_builtin_shim.page import serve

    assert serve(None, served.port) == 1  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert f"port {served.port} of 127.0.0.1 cannot be had" in told
    assert "another --port" in told


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")
def test_ctrl_c_ends_quietly() -> None:
    command = [sys.executable, "-m", "extensions_builtin_shim", "--port", "0"]
    page = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell makes what it runs in the background, these tests perhaps, deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert page.stdout is not None
    assert page.stdout.readline().startswith("http://127.0.0.1:")
    page.send_signal(signal.SIGINT)
    _, err = page.communicate(timeout=60)
    assert page.returncode == 0
    assert err == ""


@pytest.mark.parametrize(
    ("lengths", "status"),
    [
        (["0" * 12 + str(1 << 28)], 413),
        (["9" * 5000], 413),
        (["+5"], 411),
        (["-1"], 411),
        (["0x10"], 411),
        (["2", "2"], 411),
        ([], 411),
    ],
)
def test_no_body_is_read_beyond_the_limit_whatever_is_said_of_its_length(
    served: Client, lengths: list[str], status: int
) -> None:
    head = f"POST /api/interrupt HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
    head += "".join(f"Content-Length: {length}\r\n" for length in lengths)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(f"{head}\r\n".encode())  # and no byte of a body: who waits for it never answers
        assert connection.recv(100).split()[1] == str(status).encode()


def test_a_body_in_chunks_is_refused(served: Client) -> None:
    status, answer = served.ask("POST", "/api/interrupt", {}, Transfer_Encoding="chunked")
    assert (status, answer["error"]) == (411, "the request must say how long it is (one Content-Length)")


def test_the_disk_is_asked_about_no_name_outside_of_the_pages_folders(
    served: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modules import ui_extra_networks  # the stand-in's

    asked: list[str] = []
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: (asked.append(str(path)), real(path))[1])
    for name in ("//server/share/x.png", "\\\\server\\share\\x.png", "/etc/x.png", "../x.png"):
        with pytest.raises(ValueError, match="is in no folder of a page"):
            ui_extra_networks.fetch_file(name)
    assert not asked


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "ICO", "a bomb"])
def test_no_other_picture_inside_a_file_is_decoded(kind: str) -> None:
    from extensions_builtin_shim.page.cards import cover_image

    file = io.BytesIO()
    if kind == "a bomb":
        Image.new("1", (6000, 6000)).save(file, "PNG")
    else:
        Image.new("RGB", (16, 16), "red").save(file, kind)

    class Page:
        name = "lora"
        metadata = {"x": {"ssmd_cover_images": json.dumps([base64.b64encode(file.getvalue()).decode()])}}  # noqa: RUF012

    assert cover_image([Page()], "lora", "x") is None  # type: ignore[list-item]
