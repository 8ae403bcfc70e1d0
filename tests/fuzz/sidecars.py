"""A folder in which one adapter is sound, and whatever lies beside another one is not.

The promises: the sound one is listed with all that its header says; the lists are valid JSON; the user's notes are read
or not, and saved or refused in a sentence, never lost; nothing outside of the folder is written.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

from lib_locon.cards import Cards
from lib_locon.errors import FileError
from lib_locon.facts import FactsIndex, FileMetadata
from lib_locon.hosts.builtin_list import builtin_list
from lib_locon.hosts.web import encoded
from lib_locon.index import facts_table
from lib_locon.library import Library
from lib_locon.user_metadata import read_user_metadata, save_user_metadata
from tests.fuzz.limits import limited
from tests.fuzz.values import NAMES, json_text, json_value, number

FACTORS = {"lora_unet_a.lora_up.weight": [4, 2], "lora_unet_a.lora_down.weight": [2, 4], "lora_unet_a.alpha": [1]}
SECRET = '{"samples_save": true}'


def adapter(metadata: dict[str, Any]) -> bytes:
    """A small sound file."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for key, shape in FACTORS.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode("utf8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + bytes(at)


class Sidecars:
    """Folders of two adapters."""

    def run(self, rng: random.Random, folder: Path) -> str:
        """One folder."""
        library_folder = folder / "Lora"
        library_folder.mkdir()
        outside = folder / "config.json"
        outside.write_text(SECRET)
        (library_folder / "good.safetensors").write_bytes(adapter({"ss_output_name": "good"}))
        name = rng.choice(["x", *(each for each in NAMES if each not in (".", ".."))])
        odd = library_folder / f"{name}.safetensors"
        odd.write_bytes(adapter({}) if rng.random() < 0.5 else adapter(metadata(rng)))
        beside = [odd.with_suffix(end) for end in (".json", ".png", ".preview.png")]
        for path in (beside[0], rng.choice([*beside, library_folder / "adapter_config.json"])):
            if not os.path.lexists(path) and rng.random() < 0.8:
                put(rng, path, outside)
        size = sum(path.stat().st_size for path in library_folder.iterdir() if path.is_file())
        with limited(size):
            self._check_lists(rng, library_folder)
            said = self._check_notes(rng, odd)
        if outside.read_text() != SECRET or {path.name for path in folder.iterdir()} - {"Lora", "config.json", "index"}:
            raise AssertionError("something outside of the adapter folder was written")
        return said

    def _check_lists(self, rng: random.Random, folder: Path) -> None:
        library = Library([folder])
        index = folder.parent / "index"
        table = facts_table(index, allow_pickle=False)
        cards = Cards(library, FactsIndex(table, allow_pickle=False), patience=30).all()
        table.close()
        with sqlite3.connect(index) as database:  # what a damaged disk may hold
            database.execute("UPDATE facts SET value = ?", (json_text(rng, json_value(rng)).decode("utf8", "replace"),))
        table = facts_table(index, allow_pickle=False)
        for listed in (cards, Cards(library, FactsIndex(table, allow_pickle=False), patience=30).all()):
            good = next((card for card in listed if card.name == "good"), None)
            if good is None or good.facts is None or good.facts.problem or good.facts.families != ("LoRA",):
                raise AssertionError(f"the sound adapter is listed as {good}")
            if len(listed) != 2:
                raise AssertionError(f"{len(listed)} of 2 adapters are listed")
        table.close()
        strict(encoded(builtin_list(library)))
        for card in cards:
            strict(encoded(dict(FileMetadata(card.identity))))

    def _check_notes(self, rng: random.Random, path: Path) -> str:
        file = path.with_suffix(".json")
        before = file.read_bytes() if file.is_file() and file.stat().st_size < 1 << 22 else None
        known = read_user_metadata(path)
        notes = rng.choice(["a", "x" * 1_100_000, "\u202e", "é"])
        try:
            save_user_metadata(path, {"notes": notes})
        except FileError as error:
            if before is not None and file.read_bytes() != before:
                raise AssertionError(f"refused ({error}), and yet another file than before") from error
            return "notes refused"
        again = read_user_metadata(path)
        if again.notes != notes or {**known.raw, "notes": 0} != {**again.raw, "notes": 0}:
            raise AssertionError(f"saved, and read back as {str(again)[:500]} (before: {str(known)[:500]})")
        return "notes saved"


def metadata(rng: random.Random) -> dict[str, Any]:
    """Of a header: texts, with anything in them that a text can hold."""
    keys = ("ss_output_name", "ss_tag_frequency", "ss_network_args", "sshs_model_hash", "lora_adapter_metadata", "a")
    text = json_text(rng, json_value(rng)).decode("utf8", "replace")
    return {rng.choice(keys): rng.choice([text, rng.choice(NAMES), str(number(rng))]) for _ in range(3)}


def put(rng: random.Random, path: Path, outside: Path) -> None:
    """Something at `path`: mostly a text, at times no file at all."""
    kind = rng.randrange(10)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", str(outside), "nowhere", path.name]))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.write_bytes(b'{"notes": "' + b"x" * rng.choice([10, 2_000_000]) + b'"}')
    else:
        keys = ("notes", "description", "activation text", "preferred weight", "sd version", "r", "lora_alpha", "a")
        path.write_bytes(json_text(rng, {rng.choice(keys): json_value(rng) for _ in range(rng.randrange(5))}))


def strict(text: bytes) -> None:
    """Raises ValueError for what only Python takes for JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    json.loads(text, parse_constant=refuse)
