"""Runs of the command line: one image per prompt, files, and what is told about them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extensions_builtin_shim.webui import Run, Webui
from lib_locon.terminal import printable


@dataclass(frozen=True)
class Request:
    """The command line's wishes."""

    prompts: Sequence[str]
    negative_prompt: str
    seed: int
    steps: int
    out: Path | None
    json: bool

    def path(self, index: int) -> Path | None:
        """Where the image of prompt `index` goes: the file itself, or numbered from 1 where there are several."""
        if self.out is None or len(self.prompts) == 1:
            return self.out
        return self.out.with_name(f"{self.out.stem}-{index + 1}{self.out.suffix}")


def run_all(webui: Webui, request: Request) -> int:
    """Runs every prompt in order and returns the exit code."""
    runs: list[dict[str, object]] = []
    for index, prompt in enumerate(request.prompts):
        with _Log() as log:
            run = webui.generate(prompt, request.negative_prompt, seed=request.seed, steps=request.steps)
        # what is said under the image is logged as well; on stderr once is enough
        for line in dict.fromkeys(printable(line, lines=True) for line in (*run.comments, *log.lines)):
            sys.stderr.write(f"{line}\n")
        path = request.path(index)
        try:
            if path is not None:
                path.write_bytes(run.png)
        except OSError as error:
            sys.stderr.write(f"{printable(str(path))} cannot be written: {error.strerror or error}\n")
            return 1
        runs.append(run.as_json(None if path is None else str(path)))
        if not request.json:
            sys.stdout.write(_line(run, path))
    if request.json:
        json.dump({"runs": runs}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    return 0


class _Log(logging.Handler):
    """Holds back the warnings that come while a run is under way."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the message."""
        self.lines.append(self.format(record))

    def __enter__(self) -> _Log:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def _line(run: Run, path: Path | None) -> str:
    seconds = run.seconds
    times = f"load {seconds.load:.2f} s, apply {seconds.apply:.2f} s, sample {seconds.sample:.2f} s"
    return f"{printable(str(path))}  seed {run.seed}  sha256 {run.sha256[:12]}  {times}\n"
