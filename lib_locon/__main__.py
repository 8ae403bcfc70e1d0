"""The command line: `python -m lib_locon inspect …` and `python -m lib_locon bake …`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lib_locon.bake import bake, no_steps
from lib_locon.errors import LoconError
from lib_locon.files.reader import SafetensorsFile
from lib_locon.inspection import Inspection, inspect
from lib_locon.library import Library
from lib_locon.progress import ProgressBar
from lib_locon.prompt.grammar import Parsed, parse_prompt
from lib_locon.prompt.request import Problem
from lib_locon.report import summary
from lib_locon.resolve import AdapterCache, resolve
from lib_locon.session import Use
from lib_locon.terminal import escape_unencodable, printable

BAD_INPUT = 2
ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""The signals that ask a program to end."""


class Parser(argparse.ArgumentParser):
    """Its refusals repeat what was given, which may be the names of files (`inspect *`)."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        super().error(printable(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 2 with a sentence on stderr on bad input."""
    escape_unencodable()
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except LoconError as error:
        return _fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away (`| head`): nothing is wrong
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m lib_locon", description="Adapters without any webui.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="say what adapter files are, from their headers")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--base", type=Path, metavar="CHECKPOINT", help="also say what each would change in this one")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    _add_allow_pickle(command)
    command.set_defaults(run=_inspect)

    command = commands.add_parser("bake", help="write a checkpoint with adapters baked in")
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument("--prompt", required=True, help='tags as in the webui: "<lora:a:0.8><lora:b:te=0.5:unet=1>"')
    command.add_argument("--lora-dir", required=True, type=Path, action="append", metavar="DIR", help="adapter folder")
    command.add_argument("-o", "--output", required=True, type=Path, metavar="OUT.safetensors")
    command.add_argument("--skip-bad", action="store_true", help="go on without tags that cannot be used")
    what = "also bake what rounding to the checkpoint's 8 bits takes more than a fifth of"
    command.add_argument("--allow-loss", action="store_true", help=what)
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    _add_allow_pickle(command)
    command.set_defaults(run=_bake)
    return parser


def _add_allow_pickle(command: argparse.ArgumentParser) -> None:
    what = "also read pickled adapters (.pt, .ckpt, .bin); only from authors you trust"
    command.add_argument("--allow-pickle", action="store_true", help=what)


def _inspect(options: argparse.Namespace) -> int:
    checkpoint = SafetensorsFile(options.base) if options.base else None
    found: list[Inspection] = []
    errors: list[dict[str, str]] = []
    for path in options.files:
        try:
            found.append(inspect(path, checkpoint, allow_pickle=options.allow_pickle))
        except LoconError as error:
            errors.append({"path": str(path), "error": str(error)})
    if options.json:
        print(json.dumps({"adapters": [item.as_json() for item in found], "errors": errors}))
    elif found:
        print("\n\n".join(map(_inspection_text, found)))
    for failed in errors:
        _fail(failed["error"])
    return BAD_INPUT if errors else 0


def _inspection_text(found: Inspection) -> str:
    rows = {
        "file": f"{found.path} ({found.size / 1e6:.1f} MB)",
        "family": _counts(found.families),
        "rank": _counts(found.ranks),
        "alpha": _counts(found.alphas),
        "base model": found.base,
        "names": _counts(found.dialects),
        "parts": _counts(found.components),
        "modules": str(found.modules),
    }
    if found.unread:
        rows["not read"] = summary(found.unread)
    if found.notes:
        rows["note"] = "; ".join(found.notes)
    if found.match:
        patched = f"{found.match.weights} weights, {found.match.bytes / 1e6:.1f} MB"
        rows["would change"] = f"{found.match.used}/{found.match.total} modules: {patched} of {found.match.checkpoint}"
        if found.match.notes:
            rows["rounding"] = "; ".join(found.match.notes)
        if found.match.unmatched:
            rows["not used"] = summary(found.match.unmatched)
    lines = [f"  {label:<13} {printable(value)}" for label, value in rows.items()]
    lines += [f"    {item}" for item in (found.match.unmatched if found.match else found.unread)]
    return "\n".join([printable(found.name), *lines])


def _counts(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _bake(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    checkpoint = SafetensorsFile(options.checkpoint)
    _check_output(options)
    parsed = parse_prompt(options.prompt)
    uses, problems = _uses(options.lora_dir, parsed, options.allow_pickle)
    for problem in (*parsed.warnings, *problems):
        print(problem, file=sys.stderr)
    if problems and not options.skip_bad:
        return _fail("nothing was written: a tag above cannot be used (--skip-bad goes on without it)")
    with _signals_interrupt(), ProgressBar(sys.stderr, printable(f"baking {options.output.name}")) as bar:
        baked = bake(
            checkpoint,
            uses,
            options.output,
            options.prompt,
            bar.update,
            skip_bad=options.skip_bad,
            allow_loss=options.allow_loss,
        )
    if options.json:
        result = {
            "output": str(baked.output),
            "changed": baked.changed,
            "total": baked.total,
            "adapters": [report.as_json() for report in baked.adapters],
            "problems": [str(problem) for problem in (*parsed.warnings, *problems)],
            "seconds": round(time.perf_counter() - started, 3),
        }
        print(json.dumps(result))
    else:
        output = printable(str(baked.output))
        print(*baked.adapters, f"{output}: {baked.changed} of {baked.total} tensors changed", sep="\n")
    return 0


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A request to end, or a terminal that is closed, interrupts as Ctrl-C does: no partial file is left behind.

    Only the first counts: a second one must not interrupt the removal of that file.
    """
    before: dict[int, Any] = {}

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    # not every system has all of them
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    if threading.current_thread() is threading.main_thread():  # in others it cannot be asked for
        for number in numbers:
            # who started us with nohup wants us to go on; and a handler that is not Python's could not be put back
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _uses(folders: Sequence[Path], parsed: Parsed, allow_pickle: bool) -> tuple[list[Use], list[Problem]]:
    for folder in folders:
        if not folder.is_dir():
            raise LoconError(f"--lora-dir {folder} is no folder")
    uses, missing = resolve(
        parsed.requests, Library(folders, allow_pickle=allow_pickle), AdapterCache(allow_pickle=allow_pickle)
    )
    if not uses and not parsed.bad and not missing:
        raise LoconError('--prompt has no <lora:…> tag in it, so there is nothing to bake: try "<lora:name:1>"')
    timed = [use for use in uses if use.strengths.schedule]
    problems = [*parsed.bad, *missing, *(Problem(no_steps(use.name, use.strengths)) for use in timed)]
    return [use for use in uses if use not in timed], problems


def _check_output(options: argparse.Namespace) -> None:
    out: Path = options.output
    if out.suffix != ".safetensors":
        raise LoconError(f"-o {out}: the name must end in .safetensors")
    if not out.absolute().parent.is_dir():
        raise LoconError(f"-o {out}: there is no folder {out.absolute().parent}")
    if out.exists() and out.samefile(options.checkpoint):
        raise LoconError(f"-o {out} is the checkpoint itself: choose another name")
    if out.exists() and not options.force:
        raise LoconError(f"-o {out} exists already: choose another name, or say --force to replace it")


def _fail(sentence: str) -> int:
    print(printable(sentence), file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
