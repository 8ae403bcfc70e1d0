"""How long a list of adapter cards takes, the first time and with the index on disk.

    python -m benchmarks.cards                   1000 files, a table
    python -m benchmarks.cards --files 10000 --json
    python -m benchmarks.cards --files 10000 --folder DIR     in a folder that stays: the second time nothing is written

The files are LoRAs on the 264 modules that kohya trains in SD1.5: headers of true size over bodies that are holes (no
numbers are read but the alphas). Each listing runs in a process of its own, as after a start of the webui. Seconds are
those of the processor: neither other programs nor a slow disk count.

    cold       no index: every header is read, one after the other, and kept
    warm       with the index that the first one left: no adapter file is opened
    changed    the same after one file in a hundred was written anew

    first      until there is a list to show, in which the cards that wait for their header say so; this alone is in
               seconds of the clock
    all        until every card says what its header says; `ratio` is that in multiples of reading and parsing the
               headers alone, one after the other
    page       to make the HTML of all cards for the host's page, of `page_mib`
    search     to filter them by a word that a part of them has, as the API does; median of five
    rss_mib    what listing, page and searches added to the memory of that process, at their end; null where the
               system does not tell
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lib_locon.cards import Card

T = TypeVar("T")
RANK = 16
SEARCHED = "word7"
"""A word of the captions that some of the files show among their most frequent ones."""
ROWS = ("cold", "warm", "changed")
SAMPLE = 10
"""One file in so many is read for the floor."""


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000, metavar="N", help="1000 if left out")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--folder", type=Path, help="where the files are, or are put; a temporary one if left out")
    parser.add_argument("--list", nargs=2, metavar=("FOLDER", "INDEX"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print(json.dumps(listing(*map(Path, options.list))))
        return 0
    if options.files < 1:
        parser.error("--files must be 1 or more")
    with _folder(options.folder) as folder:
        result = measure(options.files, folder)
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="locon-benchmark-") as name:
        yield Path(name)


def measure(files: int, place: Path) -> dict[str, Any]:
    """The JSON object."""
    folder = place / f"Lora {files}"
    if not folder.exists():
        write(folder, files)
    with tempfile.TemporaryDirectory(prefix="locon-index-") as name:
        index, rows = Path(name, "index.sqlite3"), {}
        for row in ROWS:
            if row == "changed":
                write(folder, files, step=100, trained="again")
            command = [sys.executable, "-m", "benchmarks.cards", "--list", str(folder), str(index)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[row] = json.loads(done.stdout)
            print(f"{row}: {done.stdout.strip()}", file=sys.stderr)
        floor = plain(folder)
        for found in rows.values():
            found["ratio"] = round(found["all"] / floor, 3)
        return {
            "files": files,
            "index_mib": round(index.stat().st_size / 2**20, 2),
            "floor_seconds": round(floor, 3),
            "rows": rows,
        }


def plain(folder: Path) -> float:
    """Seconds to read and parse the headers and nothing more, reckoned from a sample."""
    paths = sorted(folder.rglob("*.safetensors"))
    sample = paths[::SAMPLE]
    started = time.process_time()
    for path in sample:
        with path.open("rb") as file:
            json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return (time.process_time() - started) * len(paths) / len(sample)


def listing(folder: Path, index: Path) -> dict[str, Any]:
    """One listing, in this process, with the host's page of cards made of it."""
    from extensions_builtin_shim.launch import put_modules_on_path

    put_modules_on_path()
    from modules import shared, shared_options

    from lib_locon.cards import Cards
    from lib_locon.facts import FactsIndex
    from lib_locon.hosts.cards_page import CardsPage
    from lib_locon.index import facts_table
    from lib_locon.library import Library

    shared.opts.data_labels.update(shared_options.known())
    before, started, at = rss(), time.process_time(), time.perf_counter()
    known = facts_table(index, allow_pickle=False)
    at_start = len(known)
    cards = Cards(Library([folder]), FactsIndex(known, rested=known.flush))
    cards.all()
    first = time.perf_counter() - at
    while cards.index.waiting:
        time.sleep(0.05)
    found = cards.all()
    everything = time.process_time() - started
    assert all(card.rank == str(RANK) for card in found)
    html, making = timed(lambda: CardsPage(lambda: cards.library, lambda: cards).create_html("txt2img"))
    assert html.count("data-locon-names") == len(found)
    searches = [timed(lambda: searched(cards.all(), f"{SEARCHED} ")) for _ in range(5)]
    after = rss()
    known.close()
    return {
        "cards": len(found),
        "from_index": at_start,
        "first": round(first, 3),
        "all": round(everything, 3),
        "page": round(making, 3),
        "page_mib": round(len(html.encode()) / 2**20, 1),
        "found": len(searches[0][0]),
        "search": round(statistics.median(seconds for _, seconds in searches), 3),
        "rss_mib": None if before is None or after is None else round((after - before) / 2**20, 1),
    }


def searched(cards: Iterable[Card], word: str) -> list[Card]:
    """Those that have the word, as the API finds them."""
    return [card for card in cards if any(word in f"{term} ".lower() for term in card.search_terms)]


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds that it took."""
    started = time.process_time()
    return action(), time.process_time() - started


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
    columns = ("first", "all", "ratio", "page", "search", "rss_mib")
    head = f"{result['files']} files, index of {result['index_mib']} MiB, headers alone {result['floor_seconds']} s\n"
    head += f"{'':10}" + "".join(f"{column:>9}" for column in columns) + "  from the index"
    rows = (
        f"{name:10}" + "".join(f"{'?' if row[column] is None else row[column]:>9}" for column in columns)
        + f"  {row['from_index']}"
        for name, row in result["rows"].items()
    )  # fmt: skip
    return "\n".join([head, *rows])


if __name__ == "__main__":
    sys.exit(main())
