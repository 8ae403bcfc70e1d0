"""Our addresses in the host's web application: what they answer, what they refuse, and that they are given back."""

from __future__ import annotations

import hashlib
import json
import math
import ntpath
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load_file, save_file

from extensions_builtin_shim.launch import OURS, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon import dryrun
from lib_locon.errors import UnknownName
from lib_locon.hosts import search
from lib_locon.hosts.web import encoded
from lib_locon.library import Library
from lib_locon.session import Session
from tests import random_adapters
from tests.asgi import Client

put_modules_on_path()

BUILTIN_SCRIPT = """
from modules import script_callbacks

def routes(_, app):
    @app.get("/sdapi/v1/loras")
    async def loras():
        return ["theirs"]

    @app.post("/sdapi/v1/refresh-loras")
    async def refresh():
        return "theirs"

script_callbacks.on_app_started(routes)
"""


def host_app() -> FastAPI:
    """With a route of the host's own, which is there before those of extensions."""
    app = FastAPI()

    @app.get("/sdapi/v1/options")
    def options() -> dict[str, str]:
        return {"from": "host"}

    return app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters for the small model, one of them in a folder, and a file that is none."""
    folder = tmp_path / "secret user" / "Lora"
    (folder / "sub").mkdir(parents=True)
    for name in ("tiny_lora", "tiny_loha"):
        shutil.copy(random_adapters.folder() / f"{name}.safetensors", folder)
    tensors = load_file(random_adapters.folder() / "tiny_locon.safetensors")
    metadata = {"ss_output_name": "my locon", "ss_tag_frequency": json.dumps({"a": {"zorp": 3}}), "strange": "[NaN]"}
    metadata |= {"odd": '{"a": [NaN, 1]}', "ss_resolution": "512", "bad": "{", "spaced": ' {"a": 1}'}
    save_file(tensors, folder / "sub" / "conv.safetensors", metadata)
    (folder / "broken.safetensors").write_bytes(b"<!DOCTYPE html>")
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    running: list[Any] = []

    def run(**options: Any) -> Any:
        running.append(launch(lora_dir=folder, make_model=TinySD.random, make_app=host_app, **options))
        return running[-1]

    yield run
    for webui in running:
        webui.close()


@pytest.fixture
def client(start: Callable[..., Any], tmp_path: Path) -> Iterator[Client]:
    """Whatever is asked of it, no answer says where the adapters lie."""
    client = Client(start().app)
    yield client
    assert client.seen
    for answer in client.seen:
        assert "secret user" not in answer.text
        assert str(tmp_path) not in answer.text
        ours = answer.status not in (404, 405) or "error" in answer.text  # else the host answers, in words of its own
        assert not ours or answer.headers["x-content-type-options"] == "nosniff"


# ---- the built-in's addresses


def test_the_builtins_list_has_its_schema(client: Client, folder: Path) -> None:
    listed = client.get("/sdapi/v1/loras").json
    assert [set(item) for item in listed] == [{"name", "alias", "path", "metadata"}] * 4
    items = {item["name"]: item for item in listed}
    assert items["conv"]["alias"] == "my locon"
    assert items["conv"]["path"] == "sub/conv.safetensors"
    assert items["conv"]["metadata"]["ss_tag_frequency"] == {"a": {"zorp": 3}}
    assert items["conv"]["metadata"]["strange"] == "[NaN]"  # the built-in reads tables only, and programs know that
    assert items["conv"]["metadata"]["odd"] == {"a": [None, 1]}  # the file says NaN, which JSON cannot
    assert list(items["conv"]["metadata"])[:2] == ["ss_resolution", "ss_tag_frequency"]  # its order
    assert items["broken"] == {"name": "broken", "alias": "broken", "path": "broken.safetensors", "metadata": {}}


def test_the_list_is_refreshed(client: Client, folder: Path) -> None:
    folder_time = folder.stat().st_mtime_ns
    client.get("/sdapi/v1/loras")
    shutil.copy(folder / "tiny_lora.safetensors", folder / "new.safetensors")
    os.utime(folder, ns=(folder_time, folder_time))  # as on a network disk that tells of no change
    assert "new" not in {item["name"] for item in client.get("/sdapi/v1/loras").json}
    answer = client.post("/sdapi/v1/refresh-loras")
    assert (answer.status, answer.json) == (200, None)
    assert "new" in {item["name"] for item in client.get("/sdapi/v1/loras").json}


def test_two_files_of_one_name_are_listed_under_their_paths(client: Client, folder: Path) -> None:
    shutil.copy(folder / "tiny_lora.safetensors", folder / "sub" / "tiny_lora.safetensors")
    client.post("/sdapi/v1/refresh-loras")
    names = [item["name"] for item in client.get("/sdapi/v1/loras").json]
    assert names == ["broken", "conv", "sub/tiny_lora", "tiny_loha", "tiny_lora"]


def test_the_builtins_routes_are_answered_by_us_and_given_back(start: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "builtin" / "Lora" / "scripts" / "lora_script.py"
    script.parent.mkdir(parents=True)
    script.write_text(BUILTIN_SCRIPT)
    alone = Client(start(extensions={}, builtin={"Lora": script.parents[1]}).app)
    assert alone.get("/sdapi/v1/loras").json == ["theirs"]
    webui = start(extensions=OURS, builtin={"Lora": script.parents[1]})
    app, client = webui.app, Client(webui.app)
    assert len(client.get("/sdapi/v1/loras").json) == 4
    assert client.post("/sdapi/v1/refresh-loras").json is None
    order = [getattr(route, "path", "") for route in app.router.routes]
    assert order.count("/sdapi/v1/loras") == 1
    webui.reload_ui()
    assert webui.app is not app
    assert len(Client(webui.app).get("/sdapi/v1/loras").json) == 4
    assert client.get("/sdapi/v1/loras").json == ["theirs"]
    assert client.post("/sdapi/v1/refresh-loras").json == "theirs"
    assert client.get("/locon/v1/loaded").status == 404
    assert client.get("/sdapi/v1/options").json == {"from": "host"}


def test_many_reloads_leave_one_of_each(start: Callable[..., Any]) -> None:
    webui = start()
    for _ in range(3):
        webui.reload_ui()
    paths = [getattr(route, "path", "") for route in webui.app.router.routes]
    ours = [path for path in paths if "loras" in path or path.startswith("/locon")]
    assert len(ours) == len(set(ours)) == 9


def test_without_a_web_application_nothing_is_missing(folder: Path) -> None:
    with launch(lora_dir=folder, make_model=TinySD.random) as webui:
        assert webui.app is None
        assert "tiny_lora (LoRA) at 1" in str(webui.generate("<lora:tiny_lora:1>", steps=1).comments)


# ---- the list


def names(answer: Any) -> list[str]:
    return [item["name"] for item in answer.json["adapters"]]


def test_what_the_list_says_of_an_adapter(client: Client, folder: Path) -> None:
    answer = client.get("/locon/v1/adapters")
    assert answer.headers["content-type"] == "application/json"
    counts = {key: answer.json[key] for key in ("total", "waiting", "page", "per_page")}
    assert counts == {"total": 4, "waiting": 0, "page": 1, "per_page": 100}
    items = {item["name"]: item for item in answer.json["adapters"]}
    conv = items["conv"]
    path = folder / "sub" / "conv.safetensors"
    assert conv == {
        "name": "conv", "tag": "my locon", "alias": "my locon", "file": "sub/conv.safetensors",
        "size": path.stat().st_size, "modified": int(path.stat().st_mtime), "family": "LoCon", "rank": conv["rank"],
        "base": conv["base"], "triggers": ["zorp"], "unread_keys": 0, "problem": "", "read": True,
    }  # fmt: skip
    assert items["tiny_loha"]["family"] == "LoHa"
    assert items["broken"]["problem"].startswith("broken.safetensors is a web page")


def test_filters(client: Client) -> None:
    assert names(client.get("/locon/v1/adapters", "family=loha")) == ["tiny_loha"]
    assert names(client.get("/locon/v1/adapters", "text=ZORP")) == ["conv"]
    assert names(client.get("/locon/v1/adapters", "text=my%20locon")) == ["conv"]
    assert names(client.get("/locon/v1/adapters", "text=tiny&family=lora")) == ["tiny_lora"]
    base = next(item["base"] for item in client.get("/locon/v1/adapters").json["adapters"] if item["base"])
    assert names(client.get("/locon/v1/adapters", f"base={base.upper().replace(' ', '%20')}")) == [
        "conv", "tiny_loha", "tiny_lora"
    ]  # fmt: skip
    assert client.get("/locon/v1/adapters", "text=nothing").json["total"] == 0
    assert names(client.get("/locon/v1/adapters", "family=lo")) == []
    assert names(client.get("/locon/v1/adapters", "family=LoCon")) == ["conv"]


def test_a_filter_of_letters_beyond_ascii(client: Client, folder: Path) -> None:
    shutil.copy(folder / "tiny_lora.safetensors", folder / "größe_日.safetensors")
    client.post("/sdapi/v1/refresh-loras")
    for query in ("text=Größe", "text=gr%C3%B6%C3%9Fe", "text=日"):
        assert names(client.get("/locon/v1/adapters", query)) == ["größe_日"]


def test_pages(client: Client) -> None:
    found: list[str] = []
    for page in (1, 2, 3):
        answer = client.get("/locon/v1/adapters", f"page={page}&per_page=3")
        assert answer.json["total"] == 4
        found += names(answer)
    assert found == ["broken", "conv", "tiny_loha", "tiny_lora"]


@pytest.mark.parametrize(
    "query",
    [
        "page=0",
        "page=-1",
        "page=x",
        "page=1e3",
        "per_page=0",
        "per_page=1001",
        "page=" + "9" * 5000,
        "page=٣",
        "per_page=1000000000",
        "page=1&page=0",
        "page=%00",
        "page=",
    ],
)
def test_a_bad_page_is_an_error_in_json(client: Client, query: str) -> None:
    answer = client.get("/locon/v1/adapters", query)
    assert answer.status == 400
    assert "must be a whole number" in answer.json["error"]


# ---- one adapter


def test_one_adapter_is_inspected(client: Client) -> None:
    for name in ("conv", "sub/conv", "my locon"):
        answer = client.get(f"/locon/v1/adapters/{name}")
        assert answer.status == 200
        found = answer.json
        assert (found["name"], found["file"]) == ("sub/conv", "sub/conv.safetensors")
        assert found["families"].keys() >= {"LoCon"}
        assert found["modules"] > 0
        assert "path" not in found
        assert found["metadata"]["ss_output_name"] == "my locon"


def test_a_broken_file_is_said_to_be_so(client: Client) -> None:
    answer = client.get("/locon/v1/adapters/broken")
    assert answer.status == 422
    assert answer.json["error"].startswith("broken.safetensors is a web page")


OUTSIDE = [
    "../outside", "..\\outside", "sub/../../outside", "./tiny_lora", "sub/./conv", "sub//conv", "/etc/passwd", "sub/..",
    "C:\\Windows\\win.ini", "C:tiny_lora", "c:/Windows/win.ini", "\\\\server\\share\\x", "//server/share/x", "..",
    "\\\\?\\C:\\x", "\\\\.\\pipe\\x", "\\\\?\\UNC\\server\\share\\x", "CON", "nul", "sub/aux", "COM1", "lpt1.txt", ".",
    "tiny_lora.safetensors", "tiny_lora::$DATA", "tiny_lora.", "TINY_LORA", "sub\\conv", "~/x", "~root",
    "..%2foutside", "%2e%2e/x", "tiny_lora\0", "file:///etc/passwd", "*", "tiny_lor?", "..%5coutside",
    "%252e%252e/outside",
    "..\uff0foutside", "\uff0e\uff0e/outside", "\u2025/outside", "..\u2215outside", "tiny\u200b_lora", "tiny_lor\u0430",
    "sub/../tiny_lora", "/tiny_lora", "tiny_lora/", "tiny_lora%00", "tiny_lora\0.safetensors", "tiny_lora . ",
    "tiny_lora...",
    "CON.safetensors", "COM\u00b9", "CONIN$", "PRN:", "tiny_lora:stream", "tiny_lora.safetensors::$DATA", "TINY_L~1",
    "\\\\localhost\\c$\\x", "\\??\\C:\\x", "//?/C:/x", "smb://x/y", "%LOCALAPPDATA%\\x", "$HOME/x", "${HOME}/x", "`id`",
    "<script>alert(1)</script>", "\n", "\r\nx: y", "a" * 30_000,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_the_folders_can_be_named(client: Client, folder: Path, name: str) -> None:
    shutil.copy(folder / "tiny_lora.safetensors", folder.parent / "outside.safetensors")
    answer = client.get(f"/locon/v1/adapters/{name}")
    assert answer.status == 404
    assert "error" in answer.json or answer.json == {"detail": "Not Found"}  # that one is the host's
    if name == name.strip() and ":" not in name:  # no tag can hold the others
        done = client.post("/locon/v1/dry-run", {"prompt": f"<lora:{name}:1>"}).json
        assert (done["adapters"], done["written"]) == ([], 0)
        assert len(done["problems"]) == 1


def test_the_full_path_of_a_file_that_is_there_names_nothing(start: Callable[..., Any], folder: Path) -> None:
    client = Client(start().app)
    for path in (folder / "tiny_lora.safetensors", folder / "tiny_lora"):
        assert client.get(f"/locon/v1/adapters/{path}").status == 404
        assert client.get(f"/locon/v1/adapters//{path}").status == 404


def test_every_name_of_the_list_is_a_plain_path_on_both_systems(folder: Path) -> None:
    for entry in Library([folder]).entries:
        for rules in (PurePosixPath, PureWindowsPath):
            pure = rules(entry.name)
            assert not pure.is_absolute() and not pure.drive and not pure.root
            assert ".." not in pure.parts
            assert not PureWindowsPath(entry.name).is_reserved()


def test_a_name_of_the_users_may_be_a_device_elsewhere(client: Client, folder: Path) -> None:
    """Names are looked up, not opened: a file that is there is found, whatever another system makes of its name."""
    shutil.copy(folder / "tiny_lora.safetensors", folder / "con.safetensors")
    client.post("/sdapi/v1/refresh-loras")
    assert client.get("/locon/v1/adapters/con").json["name"] == "con"


def test_the_host_decodes_an_address_once(client: Client, folder: Path) -> None:
    """What is left of `%` after that is a part of the name."""
    shutil.copy(folder / "tiny_lora.safetensors", folder / "50%25.safetensors")
    client.post("/sdapi/v1/refresh-loras")
    assert client.get("/locon/v1/adapters/50%25").json["name"] == "50%25"
    assert client.get("/locon/v1/adapters/50%").status == 404


def watching_files(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What it answers, and every path that the system was asked about meanwhile."""
    touched: list[str] = []
    with monkeypatch.context() as patched:
        for function in ("stat", "lstat", "open", "listdir", "scandir"):
            real = getattr(os, function)

            def seen(path: Any = ".", *args: Any, real: Any = real, **options: Any) -> Any:
                touched.append(os.fspath(path) if not isinstance(path, int) else "")
                return real(path, *args, **options)

            patched.setattr(os, function, seen)
        return answer(), touched


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name.strip() and len(name) < 1000])
def test_no_name_of_a_request_ever_reaches_the_file_system(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it does not matter what this or another system would make of it."""
    library = Library([folder])
    known = {ntpath.normcase(str(entry.path)) for entry in library.entries}

    def ask() -> None:
        with pytest.raises(UnknownName):
            library.find(name)

    _, touched = watching_files(monkeypatch, ask)
    inside = {ntpath.normcase(str(path)) for path in (folder, *folder.parents, *folder.rglob("*"))}
    config = {ntpath.normcase(str(path.parent / "adapter_config.json")) for path in folder.rglob("*")}
    assert {ntpath.normcase(path) for path in touched} <= inside | known | config


def test_a_link_is_a_name_like_any_other_and_tells_nothing_of_where_it_leads(client: Client, folder: Path) -> None:
    """Users put links there to keep files on another disk; a request can make none."""
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    shutil.copy(folder / "tiny_lora.safetensors", outside / "far.safetensors")
    (outside / "bad.safetensors").write_bytes(b"<!DOCTYPE html>")
    (folder / "link.safetensors").symlink_to(outside / "far.safetensors")
    (folder / "more").symlink_to(outside, target_is_directory=True)
    (folder / "dangling.safetensors").symlink_to(outside / "gone.safetensors")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    client.post("/sdapi/v1/refresh-loras")
    listed = names(client.get("/locon/v1/adapters"))
    assert {"link", "bad"} <= set(listed) and "dangling" not in listed
    assert client.get("/locon/v1/adapters/link").json["file"] == "link.safetensors"
    answer = client.get("/locon/v1/adapters/more/bad")
    assert answer.status == 422
    assert "elsewhere" not in answer.text
    for name in ("more/../far", "elsewhere/far", "loop/loop/tiny_lora", "dangling"):
        assert client.get(f"/locon/v1/adapters/{name}").status == 404
    client.get("/sdapi/v1/loras")


def test_a_file_that_goes_away_between_listing_and_reading(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/locon/v1/adapters").json["total"] == 4
    entries = Library([folder]).entries
    monkeypatch.setattr(Library, "entries", property(lambda _: entries))
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    assert client.get("/locon/v1/adapters").json["total"] == 0
    assert [item["metadata"] for item in client.get("/sdapi/v1/loras").json] == [{}] * 4
    answer = client.get("/locon/v1/adapters/tiny_lora")
    assert (answer.status, "cannot be read" in answer.json["error"]) == (422, True)
    said = client.post("/locon/v1/dry-run", {"prompt": "<lora:tiny_lora:1>"}).json
    assert "cannot be read" in str(said["problems"])
    assert client.get("/locon/v1/adapters/%230123456789ab").status == 404


def test_names_that_are_no_text_and_names_with_html(client: Client, folder: Path) -> None:
    strange = [
        os.fsdecode(b"half \xff letter"),
        '<img src=x onerror="alert(1)">',
        "quote'\"",
        "line\nbreak",
        "tab\t",
        "\u202egnp",
    ]
    for name in strange:
        shutil.copy(folder / "tiny_lora.safetensors", folder / f"{name}.safetensors")
    client.post("/sdapi/v1/refresh-loras")
    items = client.get("/locon/v1/adapters", "per_page=1000")
    assert items.headers["content-type"] == "application/json"
    shown = {name.encode("utf8", "replace").decode() for name in strange}
    assert shown <= set(names(items))
    assert shown <= {item["name"] for item in client.get("/sdapi/v1/loras").json}
    for name in strange[1:]:
        answer = client.get(f"/locon/v1/adapters/{name}")
        assert answer.status == 404 if "\n" in name else answer.json["name"] == name  # the host takes no such address
    said = client.post("/locon/v1/dry-run", {"prompt": "<lora:half \udcff letter:1>"})
    assert said.status == 200


# ---- by hash


def test_one_adapter_by_either_hash(client: Client, folder: Path) -> None:
    content = (folder / "tiny_lora.safetensors").read_bytes()
    whole = hashlib.sha256(content).hexdigest()
    body = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    for digits in (whole, whole[:10], body[:12], body[:8].upper()):
        assert client.get("/locon/v1/adapters/#" + digits).json["name"] == "tiny_lora"
    assert client.get("/locon/v1/adapters/#" + "0" * 12).status == 404
    assert "too short" in client.get("/locon/v1/adapters/#" + body[:7]).json["error"]
    said = client.post("/locon/v1/dry-run", {"prompt": f"<lora:#{body[:12]}:1>"}).json
    assert [adapter["name"] for adapter in said["adapters"]] == [f"#{body[:12]}"]


def test_several_files_of_one_hash_are_named(client: Client, folder: Path) -> None:
    shutil.copy(folder / "tiny_lora.safetensors", folder / "copy.safetensors")
    client.post("/sdapi/v1/refresh-loras")
    whole = hashlib.sha256((folder / "copy.safetensors").read_bytes()).hexdigest()
    answer = client.get(f"/locon/v1/adapters/#{whole[:9]}")
    assert (answer.status, "copy, tiny_lora" in answer.json["error"]) == (404, True)


def test_a_hash_does_not_make_us_read_a_whole_collection(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, begun = threading.Event(), []
    monkeypatch.setattr(search, "hashes_of", lambda file: (begun.append(file), may_end.wait(60), 1 / 0))
    monkeypatch.setattr(search, "SECONDS", 0.05)
    began = time.monotonic()
    answer = client.get("/locon/v1/adapters/#0123456789ab")
    assert answer.status == 503
    assert "ask again" in answer.json["error"]
    said = client.post("/locon/v1/dry-run", {"prompt": "<lora:#0123456789ab:1>"}).json
    assert "ask again" in said["problems"][0]
    assert time.monotonic() - began < 30
    assert len(begun) == 1
    may_end.set()


# ---- what is loaded


def test_loaded_says_what_the_model_holds(start: Callable[..., Any]) -> None:
    webui = start()
    client = Client(webui.app)
    assert client.get("/locon/v1/loaded").json == {"active": False, "adapters": [], "problems": [], "warnings": []}
    webui.generate("a cat <lora:tiny_lora:0.5><lora:gone:1>", steps=1)
    loaded = client.get("/locon/v1/loaded").json
    assert loaded["active"] is True
    (adapter,) = loaded["adapters"]
    assert (adapter["name"], adapter["strengths"]) == ("tiny_lora", {"te": 0.5, "unet": 0.5})
    assert adapter["used"] == adapter["total"] > 0
    (problem,) = loaded["problems"]
    assert problem.startswith("there is no adapter 'gone' in Lora")
    webui.generate("a cat", steps=1)
    assert client.get("/locon/v1/loaded").json == {"active": False, "adapters": [], "problems": [], "warnings": []}
    webui.generate("<lora:gone:1><lora:gone:x>", steps=1)
    loaded = client.get("/locon/v1/loaded").json
    assert (loaded["active"], loaded["adapters"], len(loaded["problems"])) == (False, [], 2)


@pytest.mark.parametrize(
    "error", [OSError(2, "no such file", "/home/secret user/x/f.bin"), RuntimeError("at C:\\secret user\\f")]
)
def test_no_error_tells_of_folders(
    start: Callable[..., Any], client: Client, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever fails while weights are written: under the image, in its text, and for programs."""
    webui = start()

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Session, "apply", fails)
    run = webui.generate("<lora:tiny_lora:1>", steps=1)
    (comment,) = run.comments
    assert comment.startswith("no adapter is in this image: ")
    assert "secret" not in comment + run.infotext
    loaded = Client(webui.app).get("/locon/v1/loaded")
    assert len(loaded.json["problems"]) == 1 and "secret" not in loaded.text
    client.get("/locon/v1/loaded")


# ---- the dry run


def weights(model: Any) -> dict[str, bytes]:
    return {name: weight.detach().numpy().tobytes() for name, weight in model.named_parameters()}


def test_a_dry_run_says_what_the_run_does_and_does_nothing(start: Callable[..., Any], folder: Path) -> None:
    from modules import shared

    webui = start()
    client, prompt = Client(webui.app), "a cat <lora:tiny_lora:0.8><lora:my locon:te=0:unet=0.5><lora:tiny_loha:0>"
    before = weights(shared.sd_model)
    versions = {name: weight._version for name, weight in shared.sd_model.named_parameters()}
    said = client.post("/locon/v1/dry-run", {"prompt": prompt}).json
    assert weights(shared.sd_model) == before
    assert {name: weight._version for name, weight in shared.sd_model.named_parameters()} == versions
    assert client.get("/locon/v1/loaded").json["active"] is False
    run = webui.generate(prompt, steps=1)
    assert said["adapters"] == [json.loads(json.dumps(adapter.as_json())) for adapter in run.adapters]
    after = weights(shared.sd_model)
    changed = {name for name in before if before[name] != after[name]}
    assert said["written"] == len(changed) > 0
    assert said["memory"]["weights"] == sum(len(before[name]) for name in changed)
    files = ("tiny_lora", "sub/conv", "tiny_loha")
    assert said["memory"]["adapters"] == sum((folder / f"{name}.safetensors").stat().st_size for name in files)
    assert (said["beside"], said["problems"], said["warnings"]) == (0, [], [])


def test_a_dry_run_beside_an_adapter_that_is_in_use_leaves_it(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    webui.generate("a cat <lora:tiny_lora:1>", steps=1)
    held = weights(shared.sd_model)
    Client(webui.app).post("/locon/v1/dry-run", {"prompt": "<lora:tiny_loha:1>"})
    assert weights(shared.sd_model) == held
    assert webui.generate("a cat <lora:tiny_lora:1>", steps=1).adapters[0].name == "tiny_lora"


class Watched:
    """What of a model and its session must stay as it is."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> tuple[object, ...]:
        from lib_locon.hosts import a1111

        session = a1111._webui.session_of(self.model)
        hooks = {name: list(module._forward_hooks) for name, module in self.model.named_modules()}
        ids = {name: (id(weight), weight._version) for name, weight in self.model.named_parameters()}
        engine = session.engine if session is not None else None
        state = (engine.generation, engine.base_bytes, dict(engine._held)) if engine is not None else None
        matches = list(session._state.matches) if session is not None else None
        seen = (a1111._webui.used, a1111._webui.last_report, list(a1111._webui.cache._adapters), session)
        return weights(self.model), hooks, ids, state, matches, seen


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("before", ["", "<lora:tiny_lora:1>", "<lora:my locon:0.5:stop=1>"])
def test_a_dry_run_touches_neither_weights_nor_session(start: Callable[..., Any], before: str, side: bool) -> None:
    from modules import shared

    webui = start()
    shared.opts.set("locon_side_path", side)
    if before:
        webui.generate(before, steps=2)
    else:
        assert shared.sd_model is not None
    watched = Watched(shared.sd_model)
    was = watched()
    prompts = [
        "",
        "cat",
        "<lora:tiny_loha:1><lora:my locon:0:1>",
        "<lora:gone:1>",
        "<lora:tiny_lora:1e38><lora:tiny_lora:1e38>",
    ]
    for prompt in prompts:
        assert Client(webui.app).post("/locon/v1/dry-run", {"prompt": prompt}).status == 200
        assert watched() == was


def test_dry_runs_beside_an_image_that_is_made_change_no_bit_of_it(start: Callable[..., Any]) -> None:
    """At each step, with weights that change at each step, and other prompts asked for all the while."""
    from modules import script_callbacks

    webui = start()
    prompt = "a cat <lora:tiny_lora:1:0@0,1@1><lora:my locon:1:start=2>"
    alone = webui.generate(prompt, seed=3, steps=6)
    stop, errors, asked = threading.Event(), list[object](), list[int]()

    def ask() -> None:
        client, number = Client(webui.app), 0
        while not stop.wait(0.1):  # so that the image has a turn, too
            number += 1
            answer = client.post("/locon/v1/dry-run", {"prompt": f"<lora:tiny_loha:{number % 3}><lora:tiny_lora:-1>"})
            loaded = client.get("/locon/v1/loaded")
            asked.append(number)
            if (answer.status, loaded.status) != (200, 200) or answer.json["problems"]:
                errors.append((answer.text, loaded.text))

    script_callbacks.on_cfg_denoiser(lambda _: time.sleep(0.02))
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        runs = [webui.generate(prompt, seed=3, steps=6) for _ in range(3)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == [] and len(asked) > 3
    assert [run.image.tobytes() for run in runs] == [alone.image.tobytes()] * 3


def test_the_first_image_and_the_first_questions_at_once(start: Callable[..., Any]) -> None:
    """All of them look at a model that nobody has looked at: it must get one state, and come back to its base."""
    from modules import shared

    from lib_locon.hosts import a1111

    webui = start()
    base = weights(shared.sd_model)
    barrier = threading.Barrier(5)

    def ask() -> None:
        barrier.wait()
        Client(webui.app).post("/locon/v1/dry-run", {"prompt": "<lora:tiny_loha:1>"})
        a1111._webui.session(shared.sd_model)  # as the page's cards do

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    barrier.wait()
    webui.generate("<lora:tiny_lora:1>", steps=1)
    for thread in threads:
        thread.join()
    assert weights(shared.sd_model) != base
    webui.generate("cat", steps=1)
    assert weights(shared.sd_model) == base


def test_one_model_has_one_state_however_many_ask_at_once() -> None:
    model, sessions = TinySD.random(), list[Session]()
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        sessions.append(Session(model))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(session.engine) for session in sessions}) == 1


def test_a_file_is_read_once_however_often_it_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    real = dryrun.read_adapter
    monkeypatch.setattr(dryrun, "read_adapter", lambda path, **options: (read.append(path), real(path, **options))[1])
    prompt = "<lora:tiny_lora:0.01>" * 60 + "<lora:gone:1>" * 20 + "<lora:broken:1>" * 19
    said = client.post("/locon/v1/dry-run", {"prompt": prompt}).json
    assert len(said["adapters"]) == 60
    assert len(said["problems"]) == 39
    assert sorted(path.stem for path in read) == ["broken", "tiny_lora"]
    assert said["memory"]["adapters"] == read[0].stat().st_size or said["memory"]["adapters"] == read[1].stat().st_size


def test_a_prompt_of_ten_thousand_tags_is_refused_at_once(client: Client) -> None:
    for tag in ("<lora:a:1>", "<lora:::>", "<lora: >", "<lyco:tiny_lora:x>"):
        began = time.monotonic()
        answer = client.post("/locon/v1/dry-run", {"prompt": (tag * 10_000)[: 99_990 // len(tag) * len(tag)]})
        assert (answer.status, time.monotonic() - began < 60) == (413, True), tag
        assert "100 tags" in answer.json["error"]


def test_a_weight_of_two_names_is_written_once(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    model = shared.sd_model
    whole = Client(webui.app).post("/locon/v1/dry-run", {"prompt": "<lora:tiny_lora:1>"}).json
    before = weights(model)
    webui.generate("<lora:tiny_lora:1>", steps=1)
    changed = [path for path, content in weights(model).items() if content != before[path]]
    first = next(path for path in changed if path.endswith("to_q.weight"))
    other = next(path for path in changed if path != first and len(before[path]) == len(before[first]))
    webui.generate("", steps=1)
    model.get_submodule(other.removesuffix(".weight")).weight = model.get_parameter(first)
    said = Client(webui.app).post("/locon/v1/dry-run", {"prompt": "<lora:tiny_lora:1>"}).json
    assert said["written"] == whole["written"] - 1
    assert said["memory"]["weights"] == whole["memory"]["weights"] - len(before[first])


def test_the_adapter_for_every_prompt_is_in_a_dry_run(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    shared.opts.set("sd_lora", "tiny_lora")
    client = Client(webui.app)
    assert [each["name"] for each in client.post("/locon/v1/dry-run", {"prompt": "a cat"}).json["adapters"]] == [
        "tiny_lora"
    ]
    said = client.post("/locon/v1/dry-run", {"prompt": "a cat <lora:tiny_lora:0.5>"}).json
    assert [each["strengths"]["unet"] for each in said["adapters"]] == [0.5]


def test_a_dry_run_with_the_side_path_on(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    webui.generate("a cat", steps=1)
    shared.opts.set("locon_side_path", True)
    said = Client(webui.app).post("/locon/v1/dry-run", {"prompt": "<lora:tiny_lora:1>"}).json
    assert said["written"] == 0
    assert said["beside"] > 0


def test_a_dry_run_tells_of_problems(client: Client) -> None:
    prompt = "<lora:gone:1><lora:broken:1><lora:tiny_lora:much><lora:tiny_lora:1:colour=red>"
    said = client.post("/locon/v1/dry-run", {"prompt": prompt}).json
    problems = "\n".join(said["problems"])
    assert "there is no adapter 'gone' in Lora" in problems
    assert "broken.safetensors is a web page" in problems
    assert "^" in problems  # under `much`
    assert "colour" in str(said["warnings"])
    assert [adapter["name"] for adapter in said["adapters"]] == ["tiny_lora"]


def test_random_block_weights_in_a_dry_run(client: Client) -> None:
    said = client.post("/locon/v1/dry-run", {"prompt": "<lora:tiny_lora:1:lbw=R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R>"})
    assert said.status == 200
    assert said.json["problems"] == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (None, 400), ([], 400), ({}, 400), ({"prompt": 1}, 400), ({"prompt": None}, 400), (b"{", 400), (b"\xff", 400),
        (b"[" * 100_000, 400), ({"prompt": "x" * 200_000}, 413), ({"prompt": "x" * 2_000_000}, 413),
    ],
)  # fmt: skip
def test_a_bad_request_is_an_error_in_json(client: Client, body: Any, status: int) -> None:
    answer = client.post("/locon/v1/dry-run", body)
    assert answer.status == status
    assert set(answer.json) == {"error"}
    assert len(answer.json["error"]) > 10


def test_without_a_model_a_dry_run_says_so_and_loads_none(start: Callable[..., Any]) -> None:
    from modules import sd_models

    client = Client(start().app)
    sd_models.model_data.clear()
    answer = client.post("/locon/v1/dry-run", {"prompt": "<lora:tiny_lora:1>"})
    assert (answer.status, "no model is loaded" in answer.json["error"]) == (409, True)
    assert sd_models.model_data.sd_model is None


# ---- who may ask, and what goes wrong


PROTECTED = [
    ("GET", "/locon/v1/adapters"), ("GET", "/locon/v1/adapters/conv"), ("GET", "/locon/v1/adapters/no"),
    ("GET", "/locon/v1/loaded"), ("POST", "/locon/v1/dry-run"), ("HEAD", "/locon/v1/loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_each_of_our_own_addresses_asks_for_it(start: Callable[..., Any], method: str, path: str) -> None:
    from modules import shared

    client = Client(start().app)
    shared.cmd_opts.api_auth = "ann:one"
    assert client.ask(method, path, content=b"{").status == 401
    assert client.ask(method, path, content=b"{", login="ann:one").status in (200, 400, 404)


@pytest.mark.parametrize("option", ["ann", "ann,bob", ",", " "])
def test_a_password_that_is_none_lets_nobody_in(start: Callable[..., Any], option: str) -> None:
    """The host does not start its API with it; ours is there without, and must not be open because of a slip."""
    from modules import shared

    client = Client(start().app)
    shared.cmd_opts.api_auth = option
    for login in ("", ":", "ann:", "ann:ann", option, f"{option}:"):
        assert client.get("/locon/v1/loaded", login=login).status == 401


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic !", "Basic YQ==", "Bearer YW5uOm9uZQ==", "YW5uOm9uZQ==", "Basic \xff"]
)
def test_a_strange_login_is_refused(start: Callable[..., Any], header: str) -> None:
    from modules import shared

    client = Client(start().app)
    shared.cmd_opts.api_auth = "ann:one"
    answer = client.get("/locon/v1/loaded", headers={"authorization": header})
    assert answer.status == 401
    assert "error" in answer.json


def test_the_login_of_the_page_is_asked_for_where_it_has_one(start: Callable[..., Any]) -> None:
    """As gradio keeps it: names and passwords in `auth`, the cookies of those who are logged in in `tokens`."""
    from modules import shared

    webui = start()
    webui.app.auth, webui.app.tokens = {"eve": "three"}, {"t0ken": "eve"}
    client = Client(webui.app)
    for method, path in PROTECTED:
        assert client.ask(method, path, content=b"{").status == 401
        assert client.ask(method, path, content=b"{", login="eve:three").status in (200, 400, 404)
    for cookie, status in {
        "access-token=t0ken": 200, "a=b; access-token-unsecure=t0ken": 200, "access-token-x9=t0ken": 200,
        "access-token=other": 401, "token=t0ken": 401, "access-token=": 401, "": 401, "\x00=;=": 401,
    }.items():  # fmt: skip
        assert client.get("/locon/v1/loaded", headers={"cookie": cookie}).status == status, cookie
    assert client.get("/sdapi/v1/loras").status == 200  # the host's API asks for nothing either
    shared.cmd_opts.api_auth = "ann:one"
    for login, status in {"ann:one": 200, "eve:three": 200, "ann:three": 401, "eve:one": 401}.items():
        assert client.get("/locon/v1/loaded", login=login).status == status


def test_what_the_page_asks_needs_no_more_than_the_page(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    client = Client(webui.app)
    shared.cmd_opts.api_auth = "ann:one"
    assert client.get("/locon/v1/complete", "tag=<lora:t").status == 200
    webui.app.auth, webui.app.tokens = {"eve": "three"}, {"t0ken": "eve"}
    assert client.get("/locon/v1/complete", "tag=<lora:t").status == 401
    assert client.get("/locon/v1/complete", "tag=<lora:t", headers={"cookie": "access-token=t0ken"}).status == 200


LOCAL = [
    ("127.0.0.1", "127.0.0.1:7860"),
    ("127.9.9.9", "localhost"),
    ("::1", "[::1]:7860"),
    ("::ffff:127.0.0.1", "LOCALHOST:1"),
]
NOT_LOCAL = [
    ("10.0.0.1", "127.0.0.1", {}), ("8.8.8.8", "localhost", {}), ("", "localhost", {}),
    ("localhost.evil.com", "localhost", {}),
    ("127.0.0.1", "webui.example.com", {}), ("127.0.0.1", "localhost.evil.com", {}),
    ("127.0.0.1", "127.0.0.1.evil.com", {}),
    ("127.0.0.1", "localhost", {"x-forwarded-for": "127.0.0.1"}),
    ("127.0.0.1", "localhost", {"forwarded": "for=1.2.3.4"}),
    ("127.0.0.1", "localhost", {"x-real-ip": "127.0.0.1"}), ("127.0.0.1", "localhost", {"via": "1.1 x"}),
    ("127.0.0.1", "localhost", {"cf-connecting-ip": "1.1.1.1"}),
    ("127.0.0.1", "localhost", {"x-forwarded-proto": "https"}),
]  # fmt: skip


def test_full_paths_are_for_who_set_it_and_for_this_computer_only(
    start: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(start().app)

    def told(**options: Any) -> set[bool]:
        listed = client.get("/sdapi/v1/loras", **options).json
        items = client.get("/locon/v1/adapters", **options).json["adapters"]
        one = client.get("/locon/v1/adapters/conv", **options).json
        conv = folder / "sub" / "conv.safetensors"
        paths = [next(item for item in each if item["name"] == "conv").get("path") for each in (listed, items)]
        return {path == str(conv) for path in (*paths, one.get("path"))}

    for client_, host in LOCAL:
        assert told(client=client_, headers={"host": host}) == {False}
    monkeypatch.setenv("SD_WEBUI_LOCON_FULL_PATHS", "1")
    for client_, host in LOCAL:
        assert told(client=client_, headers={"host": host}) == {True}
    for client_, host, headers in NOT_LOCAL:
        assert told(client=client_, headers={"host": host, **headers}) == {False}, (client_, host, headers)


def test_the_password_of_the_hosts_api_is_asked_for(start: Callable[..., Any]) -> None:
    from modules import shared

    client = Client(start().app)
    shared.cmd_opts.api_auth = "ann:one,bob:two:more"
    refused = client.get("/locon/v1/loaded")
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == "Basic"
    assert "error" in refused.json
    for login, status in {"ann:one": 200, "bob:two:more": 200, "ann:two:more": 401, "ann:": 401, ":": 401}.items():
        assert client.get("/locon/v1/loaded", login=login).status == status
    assert client.get("/sdapi/v1/loras").status == 200  # as the built-in's own


def test_other_methods_are_refused(client: Client) -> None:
    assert client.post("/locon/v1/loaded").status == 405
    assert client.get("/locon/v1/dry-run").status == 405


def test_an_error_of_ours_is_json_and_tells_no_more_than_its_kind(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("/home/somebody")

    monkeypatch.setattr(Library, "refresh", fails)
    answer = client.post("/sdapi/v1/refresh-loras")
    assert (answer.status, answer.json) == (500, {"error": "an error in sd-webui-locon itself: ZeroDivisionError"})
    assert "somebody" in caplog.text


def test_a_body_in_many_parts_costs_no_more_than_in_one(client: Client) -> None:
    began = time.monotonic()
    answer = client.post("/locon/v1/dry-run", json.dumps({"prompt": "x" * 90_000}).encode(), parts=90_000)
    assert answer.status == 200
    assert time.monotonic() - began < 30
    assert client.post("/locon/v1/dry-run", b" " * 1_000_001, parts=1000).status == 413


def test_a_request_that_is_broken_off_is_no_request(client: Client) -> None:
    answer = client.post("/locon/v1/dry-run", b'{"prompt": "<lora:tiny_lora:1>"}', broken_off=True)
    assert answer.status == 400


def test_numbers_that_json_has_not_become_null() -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": torch.tensor(math.inf).item(), "c": "NaN"}
    assert json.loads(encoded(value)) == {"a": [None, [1.5, None]], "b": None, "c": "NaN"}
