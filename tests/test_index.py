"""The index on disk: what it keeps, what it forgets, and that a bad file of it is no error."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import cards as benchmark
from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon import facts, index
from lib_locon.cards import Cards
from lib_locon.facts import Facts, FactsIndex
from lib_locon.files.reader import FileIdentity
from lib_locon.index import DiskTable, facts_table, hash_table
from lib_locon.library import Library

put_modules_on_path()

FULL = Facts("alias", ("LoRA", "LoCon"), (1, 16), "SD1", 3, ("a", "b"), "ab" * 32, True, True)


def identity(name: str = "a", size: int = 1) -> FileIdentity:
    return FileIdentity(f"/x/{name}", size, 2**61, 5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "index.sqlite3"


def opened(path: Path) -> DiskTable[Facts]:
    return facts_table(path, allow_pickle=False)


def stored(path: Path, *pairs: tuple[FileIdentity, Facts]) -> None:
    table = opened(path)
    table.update(pairs)
    table.close()


def test_what_was_kept_is_there_at_the_next_start(path: Path) -> None:
    stored(path, (identity(), FULL), (identity("b"), Facts()))
    table = opened(path)
    assert dict(table) == {identity(): FULL, identity("b"): Facts()}
    assert len(table) == 2
    assert identity() in table and "x" not in table


def test_a_file_that_changed_is_not_known(path: Path) -> None:
    stored(path, (identity(), FULL))
    table = opened(path)
    changed = [identity(size=2), identity()._replace(mtime_ns=1), identity()._replace(config_ns=0)]
    assert not any(each in table for each in changed)
    table[changed[0]] = Facts()
    table.close()
    assert dict(opened(path)) == {changed[0]: Facts()}, "one per path"


def test_a_problem_is_not_kept(path: Path) -> None:
    stored(path, (identity(), Facts(problem="the disk is not there")))
    assert len(opened(path)) == 0


def test_both_ways_of_reading_are_kept_apart(path: Path) -> None:
    stored(path, (identity(), FULL))
    assert len(facts_table(path, allow_pickle=True)) == 0
    assert len(opened(path)) == 1


def test_another_version_of_us_reads_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(path, (identity(), FULL))
    monkeypatch.setattr(index, "code_version", lambda: "another")
    assert len(opened(path)) == 0


def test_the_version_follows_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "lib_locon"
    shutil.copytree(Path(index.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(index, "__file__", str(package / "index.py"))
    version = index.code_version.__wrapped__
    before = version()
    for file, same in {"hosts/web.py": True, "families/lora.py": False}.items():
        with (package / file).open("a") as source:
            source.write("# changed\n")
        assert (version() == before) == same


def test_hashes_are_kept_and_checked(path: Path) -> None:
    table = hash_table(path)
    table.update({identity(): "a" * 64, identity("b"): ""})
    table.close()
    assert dict(hash_table(path)) == {identity(): "a" * 64}
    with sqlite3.connect(path) as database:
        database.execute("UPDATE hashes SET value = 'short'")
    database.close()
    assert identity() not in hash_table(path)


@pytest.mark.parametrize("content", [b"", b"no database" * 500, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_begun_anew(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    stored(path, (identity(), FULL))
    assert dict(opened(path)) == {identity(): FULL}


def test_a_damaged_row_is_not_there(path: Path) -> None:
    values = [
        "{", '{"no_such": 1}', None, b"\xff", "[]", "7", '{"ranks": 7}', '{"ranks": [1]}', '{"ranks": [1, "2"]}',
        '{"unread": "3"}', '{"families": "LoRA"}', '{"families": [1]}', '{"alias": null}', '{"has_cover": 1}',
    ]  # fmt: skip
    names = ["a", *(f"b{number}" for number in range(1, len(values)))]
    stored(path, *((identity(name), FULL) for name in names))
    with sqlite3.connect(path) as database:
        for name, value in zip(names, values, strict=True):
            database.execute("UPDATE facts SET value = ? WHERE path = ?", (value, f"/x/{name}"))
    database.close()
    table = opened(path)
    assert [table.get(identity(name)) for name in names] == [None] * len(values)
    table[identity()] = Facts()
    assert table[identity()] == Facts()


def one_line(caplog: pytest.LogCaptureFixture, path: Path) -> bool:
    (record,) = caplog.records
    return f"{path} is not used" in record.getMessage()


def test_a_locked_file_is_not_used_and_said_once(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "TIMEOUT", 0.01)
    stored(path, (identity(), FULL))
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    table = opened(path)
    table[identity("b")] = FULL
    assert table[identity("b")] == FULL
    table.close()
    assert one_line(caplog, path)
    other.rollback()
    other.close()
    assert dict(opened(path)) == {identity(): FULL}


def test_what_a_lock_keeps_out_is_written_after_it(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "TIMEOUT", 0.01)
    table = opened(path)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with caplog.at_level("INFO", "lib_locon"):
        for number in range(3):
            table[identity(str(number))] = FULL
            table.flush()
    assert len(table) == 3
    (record,) = caplog.records
    assert "waits: database is locked" in record.getMessage()
    other.close()
    table[identity("3")] = FULL
    table.close()
    assert dict(opened(path)) == {identity(str(number)): FULL for number in range(4)}


def test_a_lock_does_not_slow_every_file_that_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "TIMEOUT", 0.0)
    tried: list[int] = []
    table = opened(path)
    real = table.flush
    monkeypatch.setattr(table, "flush", lambda: (tried.append(len(table)), real())[1])
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    for number in range(3 * index.BATCH):
        table[identity(str(number))] = FULL
    assert tried == [index.BATCH, 2 * index.BATCH, 3 * index.BATCH]
    other.close()


def test_a_hash_is_on_disk_at_once(path: Path) -> None:
    table = hash_table(path)
    table[identity()] = "a" * 64
    assert dict(hash_table(path)) == {identity(): "a" * 64}  # as after the process was killed


def test_damage_that_shows_when_writing_is_begun_anew_at_the_next_start(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored(path, *((identity(str(number)), FULL) for number in range(500)))
    table = opened(path)
    content = bytearray(path.read_bytes())
    with sqlite3.connect(path) as database:
        (root,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name LIKE 'sqlite_autoindex_facts%'"
        ).fetchone()
        size = database.execute("PRAGMA page_size").fetchone()[0]
    database.close()
    content[(root - 1) * size : root * size] = b"\xff" * size  # the rows can all be read, but none be found by its path
    path.write_bytes(content)
    table[identity("new")] = FULL
    table.close()
    assert one_line(caplog, path)
    stored(path, (identity("later"), FULL))
    assert dict(opened(path)) == {identity("later"): FULL}


def test_a_journal_that_was_left_behind_goes_with_the_damaged_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 500)
    journal = path.with_name(f"{path.name}-journal")
    journal.write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\xff" * 600)
    stored(path, (identity(), FULL))
    assert not journal.exists()
    assert dict(opened(path)) == {identity(): FULL}


def test_a_table_of_another_form_is_begun_anew(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE facts (path TEXT PRIMARY KEY, value TEXT)")
        database.execute("CREATE TABLE hashes (path TEXT PRIMARY KEY, value TEXT)")
    database.close()
    stored(path, (identity(), FULL))
    assert dict(opened(path)) == {identity(): FULL}


def test_rows_of_another_version_that_come_later_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(path, (identity(), FULL))
    real = sqlite3.connect
    trace: list[str] = []

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        database = real(*args, **options)

        def look(statement: str) -> None:
            trace.append(statement)
            if statement.startswith("SELECT path"):  # between our cleaning and our reading
                other = real(path)
                other.execute("INSERT INTO facts VALUES ('/x/other', 1, 1, 1, 'another', '{}')")
                other.commit()
                other.close()

        database.set_trace_callback(look)
        return database

    monkeypatch.setattr(index.sqlite3, "connect", connect)
    assert set(opened(path)) == {identity()}
    assert any(statement.startswith("SELECT path") for statement in trace)


def test_a_time_that_no_database_holds_is_no_error(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = opened(path)
    table[identity()._replace(mtime_ns=2**80)] = FULL
    table.flush()
    assert table[identity()._replace(mtime_ns=2**80)] == FULL
    assert one_line(caplog, path)


def test_a_file_that_can_be_read_only_is_no_error(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(path, (identity(), FULL))
    real = sqlite3.connect
    read_only = f"file:{path}?mode=ro"  # as on a disk that is; the tests may run as a user who may write everywhere
    monkeypatch.setattr(index.sqlite3, "connect", lambda _, **options: real(read_only, uri=True, **options))
    table = opened(path)
    table[identity("b")] = FULL
    table.close()
    assert table[identity("b")] == FULL
    assert one_line(caplog, path)
    assert path.exists()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "index.sqlite3"
    table = opened(path)
    table[identity()] = FULL
    table.close()
    assert table[identity()] == FULL
    assert one_line(caplog, path)


def test_a_name_that_is_no_text_is_kept_in_memory_only(path: Path) -> None:
    strange = identity(os.fsdecode(b"\xff"))
    stored(path, (strange, FULL), (identity(), FULL))
    assert dict(opened(path)) == {identity(): FULL}


def test_it_is_a_mapping(path: Path) -> None:
    table = opened(path)
    table[identity()] = FULL
    del table[identity()]
    with pytest.raises(KeyError):
        del table[identity()]
    with pytest.raises(KeyError):
        table[identity()]
    assert len(table) == 0 and list(table) == []


def _write(path: Path, start: int) -> None:
    table = opened(path)
    for number in range(start, start + 300):
        table[identity(str(number))] = FULL
    table.close()


def test_two_processes_share_one_file(path: Path) -> None:
    opened(path).close()
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_write, args=(path, start)) for start in (0, 1000)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(opened(path)) == 600


# ---- under the cards


@pytest.fixture
def shelf(tmp_path: Path) -> Callable[[str, int], Path]:
    def write(name: str, rank: int) -> Path:
        file = tmp_path / "Lora" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
        save_file(
            {f"{key}.lora_up.weight": torch.zeros(320, rank), f"{key}.lora_down.weight": torch.zeros(rank, 768)}, file
        )
        return file

    return write


def listed(folder: Path, path: Path) -> list[str]:
    table = opened(path)
    found = Cards(Library([folder]), FactsIndex(table, rested=table.flush), patience=30).all()
    table.close()
    return [card.rank for card in found]


def test_a_warm_listing_reads_no_file(
    shelf: Callable[[str, int], Path], tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(1, 6):
        shelf(f"a{rank}", rank)
    assert listed(tmp_path / "Lora", path) == ["1", "2", "3", "4", "5"]
    read: list[str] = []
    real = facts.read_facts
    monkeypatch.setattr(facts, "read_facts", lambda file, **options: (read.append(file.stem), real(file, **options))[1])
    assert listed(tmp_path / "Lora", path) == ["1", "2", "3", "4", "5"]
    assert read == []
    shelf("a2", 32)
    assert listed(tmp_path / "Lora", path) == ["1", "32", "3", "4", "5"]
    assert read == ["a2"]


def test_the_webui_keeps_it_in_its_own_folder(
    shelf: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf("a", 4)

    def page(**options: Any) -> list[str]:
        with launch(lora_dir=tmp_path / "Lora", make_model=TinySD.random, **options) as webui, webui.pages() as (page,):
            return [item["locon"]["rank"] for item in page.list_items()]

    data = tmp_path / "data"
    assert page(data_dir=data) == ["4"]
    (file,) = (data / "cache").iterdir()
    assert file.suffix == ".sqlite3"
    monkeypatch.setattr(facts, "read_facts", lambda *_, **__: Facts(problem="read anew"))
    assert page(data_dir=data) == ["4"]
    monkeypatch.setenv("SD_WEBUI_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert page(data_dir=data) == [""]
    assert [each.name for each in (tmp_path / "elsewhere").iterdir()] == [file.name]


def test_the_benchmark_measures_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--files", "101", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert [rows[row]["cards"] for row in benchmark.ROWS] == [101] * 3
    assert [rows[row]["from_index"] for row in benchmark.ROWS] == [0, 101, 101]
    assert rows["warm"]["all"] < rows["cold"]["all"]
    assert 0 < rows["warm"]["found"] < 101
    assert "warm" in benchmark.table(found)
    assert len(benchmark.modules()) == 264
