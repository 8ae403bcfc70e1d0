"""`python -m extensions_builtin_shim`: the headless webui, for one command or as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from extensions_builtin_shim.app import App
from extensions_builtin_shim.launch import ADAPTERS, launch
from extensions_builtin_shim.limits import BadRequest, checked_prompt, checked_seed, checked_steps
from lib_locon.terminal import escape_unencodable, printable

EPILOG = """
Several --prompt are run one after the other in one process; --out a.png then writes a-1.png, a-2.png, …
Each PNG carries the webui's infotext. What went wrong with an adapter is told on stderr and in the JSON's "comments";
the image is made without it, as in the webui.

Without --prompt a page is served on 127.0.0.1; Ctrl-C ends it.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def parser() -> Parser:
    """All options."""
    parser = Parser(
        "python -m extensions_builtin_shim",
        description="A small headless webui with a small model; it loads scripts/locon.py as the webui does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to paint, with <lora:name:strength>")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    parser.add_argument("--seed", type=int, default=1, help="1 if left out; -1 is a random one")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps, 8 if left out")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="where the image goes")
    parser.add_argument("--lora-dir", type=Path, default=ADAPTERS, metavar="DIR", help="the folder with the adapters")
    parser.add_argument("--json", action="store_true", help="tell about all runs as one JSON object on stdout")
    parser.add_argument("--port", type=int, metavar="N", help="the page's port, 7870 if left out; 0 is any free one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad arguments, 1 for a file that cannot be written or a port that is taken."""
    escape_unencodable()
    options = parser()
    args = options.parse_args(argv)
    problem = _problem(args)
    if problem:
        options.error(problem)
    try:
        return _run(args)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130  # what shells expect of a program that Ctrl-C ended


def _run(args: argparse.Namespace) -> int:
    with launch(lora_dir=args.lora_dir, make_app=App) as webui:
        if args.prompt is None:
            from extensions_builtin_shim.page import serve

            return serve(webui, 7870 if args.port is None else args.port)
        from extensions_builtin_shim.runs import Request, run_all

        return run_all(webui, Request(args.prompt, args.negative_prompt, args.seed, args.steps, args.out, args.json))


def _problem(args: argparse.Namespace) -> str | None:
    """The first thing that is wrong with the arguments."""
    try:
        for text in (args.negative_prompt, *(args.prompt or ())):
            checked_prompt(text)
        checked_seed(args.seed)
        checked_steps(args.steps)
    except BadRequest as error:
        return str(error)
    if not args.lora_dir.is_dir():
        return f"--lora-dir: there is no folder {args.lora_dir}"
    return _problem_of_page(args) if args.prompt is None else _problem_of_runs(args)


def _problem_of_page(args: argparse.Namespace) -> str | None:
    if args.json or args.out is not None:
        return "--out and --json go with --prompt; without --prompt a page is served"
    if args.port is not None and not 0 <= args.port <= 65535:
        return f"--port must be 0 to 65535, not {args.port}"
    return None


def _problem_of_runs(args: argparse.Namespace) -> str | None:
    if args.port is not None:
        return "--port is the page's, and with --prompt no page is served"
    if args.out is None:
        return None if args.json else "where should the image go? Add --out FILE.png, or --json"
    if args.out.suffix.lower() != ".png":
        return f"--out must end in .png, not {args.out.suffix or 'in nothing'}"
    if not args.out.parent.is_dir():
        return f"--out: there is no folder {args.out.parent}"
    return None


if __name__ == "__main__":
    sys.exit(main())
