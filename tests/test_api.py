"""Our addresses in the host's web application: what they answer, what they refuse, and that they are given back."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load_file, save_file

from extensions_builtin_shim.launch import OURS, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.hosts.web import encoded
from lib_locon.library import Library
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


# ---- the built-in's addresses


def test_the_builtins_list_has_its_schema(client: Client, folder: Path) -> None:
    listed = client.get("/sdapi/v1/loras").json
    assert [set(item) for item in listed] == [{"name", "alias", "path", "metadata"}] * 4
    items = {item["name"]: item for item in listed}
    assert items["conv"]["alias"] == "my locon"
    assert items["conv"]["path"] == "sub/conv.safetensors"
    assert items["conv"]["metadata"]["ss_tag_frequency"] == {"a": {"zorp": 3}}
    assert items["conv"]["metadata"]["strange"] == [None]  # the file says NaN, which JSON cannot
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
    assert len(ours) == len(set(ours)) == 6


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
    assert {key: answer.json[key] for key in ("total", "page", "per_page")} == {"total": 4, "page": 1, "per_page": 100}
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


def test_pages(client: Client) -> None:
    found: list[str] = []
    for page in (1, 2, 3):
        answer = client.get("/locon/v1/adapters", f"page={page}&per_page=3")
        assert answer.json["total"] == 4
        found += names(answer)
    assert found == ["broken", "conv", "tiny_loha", "tiny_lora"]


@pytest.mark.parametrize(
    "query", ["page=0", "page=-1", "page=x", "page=1e3", "per_page=0", "per_page=1001", "page=" + "9" * 5000, "page=٣"]
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
    "tiny_lora.safetensors", "tiny_lora::$DATA", "tiny_lora.", "tiny_lora ", "TINY_LORA", "sub\\conv", "~/x", "~root",
    "..%2foutside", "%2e%2e/x", "tiny_lora\0", "file:///etc/passwd", "*", "tiny_lor?",
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
    assert client.get("/locon/v1/loaded").json["active"] is False


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


def test_numbers_that_json_has_not_become_null() -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": torch.tensor(math.inf).item(), "c": "NaN"}
    assert json.loads(encoded(value)) == {"a": [None, [1.5, None]], "b": None, "c": "NaN"}
