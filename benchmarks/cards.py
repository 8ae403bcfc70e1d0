"""How long a list of adapter cards takes, the first time and with the index on disk.

    python -m benchmarks.cards                   1000 files, a table
    python -m benchmarks.cards --files 10000 --json

The files are LoRAs on the 264 modules that kohya trains in SD1.5: headers of true size over bodies that are holes (no
numbers are read but the alphas). They are written just before, so they come from the system's file cache: from a disk
at rest the first listing takes longer, the second does not. Each listing runs in a process of its own, as after a start
of the webui. `rss_mib` is what the listing added to the memory of that process, at its end; null where the system does
not tell.

    cold       no index: every header is read, one after the other, and kept
    warm       with the index that the first one left: no adapter file is opened
    changed    the same after one file in a hundred was written anew
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK = 16
ROWS = ("cold", "warm", "changed")
PATIENCE = 100_000.0


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000, metavar="N", help="1000 if left out")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--list", nargs=2, metavar=("FOLDER", "INDEX"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print(json.dumps(listing(*map(Path, options.list))))
        return 0
    if options.files < 1:
        parser.error("--files must be 1 or more")
    result = measure(options.files)
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0


def measure(files: int) -> dict[str, Any]:
    """The JSON object."""
    with tempfile.TemporaryDirectory(prefix="locon-benchmark-") as name:
        folder, index = Path(name, "Lora"), Path(name, "index.sqlite3")
        write(folder, files)
        rows = {}
        for row in ROWS:
            if row == "changed":
                write(folder, files, step=100, trained="again")
            command = [sys.executable, "-m", "benchmarks.cards", "--list", str(folder), str(index)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[row] = json.loads(done.stdout)
        return {"files": files, "index_mib": round(index.stat().st_size / 2**20, 2), "rows": rows}


def listing(folder: Path, index: Path) -> dict[str, Any]:
    """One listing, in this process."""
    from lib_locon.cards import Cards
    from lib_locon.facts import FactsIndex
    from lib_locon.index import facts_table
    from lib_locon.library import Library

    before, started = rss(), time.perf_counter()
    known = facts_table(index, allow_pickle=False)
    at_start = len(known)
    cards = Cards(Library([folder]), FactsIndex(known, rested=known.flush), patience=PATIENCE)
    found = cards.all()
    seconds, after = time.perf_counter() - started, rss()
    assert all(card.rank == str(RANK) for card in found)
    known.close()
    return {
        "cards": len(found),
        "from_index": at_start,
        "seconds": round(seconds, 3),
        "rss_mib": None if before is None or after is None else round((after - before) / 2**20, 1),
    }


def rss() -> int | None:
    """Bytes of memory that this process has now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def write(folder: Path, files: int, step: int = 1, trained: str = "once") -> None:
    """Every `step`th of so many adapters, a hundred in a folder."""
    for number in range(0, files, step):
        path = folder / f"{number // 100:03}" / f"adapter {number}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"ss_output_name": f"adapter {number}", "ss_comment": f"trained {trained}"}
        tags = {f"word{word}": 300 - word for word in range(number % 50, number % 50 + 200)}
        metadata["ss_tag_frequency"] = json.dumps({"10_folder": tags})
        write_one(path, metadata)


def write_one(path: Path, metadata: dict[str, str]) -> None:
    """A whole adapter, of which only the header and the alphas take room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata}
    names, end = modules(), 0
    for name in names:
        header[f"{name}.alpha"] = {"dtype": "F16", "shape": [], "data_offsets": [end, end := end + 2]}
    for name, (rows, columns) in names.items():
        for suffix, shape in {"lora_up": [rows, RANK], "lora_down": [RANK, columns]}.items():
            size = 2 * shape[0] * shape[1]
            header[f"{name}.{suffix}.weight"] = {
                "dtype": "F16",
                "shape": shape,
                "data_offsets": [end, end := end + size],
            }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<e", RANK) * len(names))
        file.truncate(8 + len(text) + end)


def modules() -> dict[str, tuple[int, int]]:
    """Name → rows and columns, of SD1.5's attentions and CLIP's layers."""
    found: dict[str, tuple[int, int]] = {}
    places = [("down_blocks_0", 2, 320), ("down_blocks_1", 2, 640), ("down_blocks_2", 2, 1280), ("mid_block", 1, 1280)]
    places += [("up_blocks_1", 3, 1280), ("up_blocks_2", 3, 640), ("up_blocks_3", 3, 320)]
    for block, count, width in places:
        for number in range(count):
            prefix = f"lora_unet_{block}_attentions_{number}"
            found |= {f"{prefix}_proj_in": (width, width), f"{prefix}_proj_out": (width, width)}
            inner = f"{prefix}_transformer_blocks_0"
            for attention, context in {"attn1": width, "attn2": 768}.items():
                found |= {f"{inner}_{attention}_to_{part}": (width, context) for part in "kv"}
                found |= {f"{inner}_{attention}_to_{part}": (width, width) for part in ("q", "out_0")}
            found |= {f"{inner}_ff_net_0_proj": (8 * width, width), f"{inner}_ff_net_2": (width, 4 * width)}
    for layer in range(12):
        prefix = f"lora_te_text_model_encoder_layers_{layer}"
        found |= {f"{prefix}_self_attn_{part}_proj": (768, 768) for part in ("q", "k", "v", "out")}
        found |= {f"{prefix}_mlp_fc1": (3072, 768), f"{prefix}_mlp_fc2": (768, 3072)}
    return found


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = (
        f"{result['files']} files, index of {result['index_mib']} MiB\n{'':10}{'seconds':>9}{'MiB':>8}  from the index"
    )
    rows = (
        f"{name:10}{row['seconds']:>9.3f}{'?' if row['rss_mib'] is None else row['rss_mib']:>8}  {row['from_index']}"
        for name, row in result["rows"].items()
    )
    return "\n".join([head, *rows])


if __name__ == "__main__":
    sys.exit(main())
