"""What every command shares: flags from a type, exit codes that scripts can read, and the overview of `rlv2v`."""

from __future__ import annotations

import errno
import io
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any, TypeVar

import tyro

from rlv2v.errors import UserError, nearest

Args = TypeVar("Args")

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
COMMANDS = {
    "synth": "write the synthetic dataset as video files",
    "prepare": "read any videos once, for training that loads fast",
    "train": "learn a translator from unpaired videos",
    "translate": "translate a video of any length",
    "evaluate": "measure a trained run on held-out clips",
    "report": "make one HTML page of a run: videos, curves, metrics",
}


def run_command(main: Callable[[Args], None], args_type: type[Args] | Any, *, description: str | None = None) -> None:
    """Parse the command line as `args_type`, run `main`, and leave with 0 (done) or 2 (the user can mend it).

    A bad flag, a `UserError`, a full disk or a refused path leave with 2 and one line on stderr. Any other exception is
    a bug and keeps its traceback (exit code 1).
    """
    module = sys.modules["__main__"].__spec__
    name = module.name if module else sys.argv[0]
    try:
        main(parse(args_type, f"python -m {name}" if module else f"python {name}", name, description))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"{name}: {error.filename or 'disk'}: {error.strerror}; free space or choose another folder",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def parse(args_type: type[Args] | Any, prog: str, name: str, description: str | None) -> Any:
    """Return what tyro parses, but print its boxed error as one line on stderr."""
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            return tyro.cli(args_type, prog=prog, description=description)
    except SystemExit as stop:
        if stop.code:
            text = " ".join(re.sub("[\u2500-\u257f]", " ", output.getvalue()).split())
            print(f"{name}: {explained(text)}", file=sys.stderr)
        raise


def explained(text: str) -> str:
    """Return tyro's error, whose lines have been joined, as one sentence with the nearest name."""
    if unknown := re.search(r"Unrecognized options: (\S+?),? .*?(?:Perhaps you meant: (--[\w.-]+)|For full)", text):
        suggestion = f"; did you mean {unknown[2]}?" if unknown[2] else ""
        return f"unknown option {unknown[1]}{suggestion}"
    if choice := re.search(r"invalid choice '(.*?)' for argument '(\S+?)'. Expected one of \((.*?)\)", text):
        names = re.findall(r"'(.*?)'", choice[3])
        return f"{choice[2]}: expected {', '.join(names)}, got {choice[1]!r}{nearest(choice[1], names)}"
    return text


def main() -> None:
    """Run the console script `rlv2v`: `rlv2v train ...` is `python -m rlv2v.train ...`; alone it prints an overview."""
    command, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in COMMANDS:
        sys.argv = [f"rlv2v {command}", *rest]
        runpy.run_module(f"rlv2v.{command}", run_name="__main__", alter_sys=True)
    elif command in ("-h", "--help"):
        print("Unsupervised few-shot video-to-video translation.\n\nusage: rlv2v COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("\nrlv2v COMMAND --help describes its options; the first run: rlv2v train --out runs/first --budget 300")
    else:
        print(f"rlv2v: expected {', '.join(COMMANDS)}, got {command!r}{nearest(command, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
