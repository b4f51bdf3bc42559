"""What the commands share: their list, arguments by type, errors on one line with exit codes, the console script."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from rlv2v import __version__, end_at_once
from rlv2v.crop_size import CropSize
from rlv2v.errors import UserError, nearest
from rlv2v.runtime.interrupt import Stop

Args = TypeVar("Args")
RunFolder = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Run folder that `python -m rlv2v.train` wrote.")
]
SizeFlag = Annotated[
    CropSize,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIDE|HEIGHTxWIDTH",
        instance_from_str=lambda typed: CropSize.of(typed[0]),
        is_instance=lambda value: isinstance(value, CropSize),
        str_from_instance=lambda size: [str(size)],
    ),
]
Device = Annotated[str, tyro.conf.arg(help="Torch device: cpu, cuda, cuda:1 ...; auto: cuda where there is one.")]

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class Command(NamedTuple):
    """A command: its line in the overview, and the arguments of the example in its help."""

    summary: str
    example: str


COMMANDS = {
    "synth": Command("write the synthetic dataset as video files", "data/synth"),
    "prepare": Command("read any videos once, for training that loads fast", "mine prepared --size 64"),
    "train": Command("learn a translator from unpaired videos", "--data mine --out runs/mine --size 64 --budget 1800"),
    "translate": Command("translate a video of any length", "runs/mine holiday.mp4 holiday-translated.mp4"),
    "export": Command("write a trained model as ONNX and torch.export", "runs/mine exported"),
    "evaluate": Command("measure a trained run on held-out clips", "runs/mine --data mine --json evaluation.json"),
    "report": Command("show runs side by side on one HTML page", "runs/mine runs/cyclegan"),
}


def run_command(main: Callable[[Args], None], args_type: type[Args] | Any, *, description: str | None = None) -> None:
    """Parse the command line as `args_type`, run `main`, and exit with 0 (done) or 2 (the user can mend it).

    A bad flag, a `UserError`, a full disk or a refused path exits with 2 and one line on stderr, Ctrl-C or a `Stop`
    with 128 + the signal's number and one line. Any other exception is a bug and keeps its traceback (exit code 1).
    description: for `--help`; by default the docstring of `args_type`.
    """
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may hold what its encoding has no character for
        sys.stdout.reconfigure(errors="backslashreplace")
    module = sys.modules["__main__"].__spec__
    name = module.name if module else sys.argv[0]
    prog = f"python -m {name}" if module else f"python {name}"
    description = description or inspect.getdoc(args_type)
    if command := COMMANDS.get(name.removeprefix("rlv2v.")):
        description = f"{description}\n\nexample: {prog} {command.example}"
    try:
        main(parse(args_type, prog=prog, description=description))
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"{error.filename or 'disk'}: {error.strerror}; free space or choose another folder"
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, Stop) else Stop(signal.SIGINT)
        print("; ".join(filter(None, (f"{name}: stopped by {stop}", stop.remedy))), file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    else:
        return
    print(f"{name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(args_type: type[Args] | Any, *, prog: str, description: str | None) -> Any:
    """Return what tyro parses of sys.argv.

    Raises:
        UserError: a bad flag or value, in one sentence instead of tyro's box.
        SystemExit: with 0, after `--help`.
    """
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            return tyro.cli(args_type, prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    with redirect_stdout(io.StringIO()) as usage, suppress(SystemExit):
        tyro.cli(args_type, prog=prog, args=["--help"])
    raise UserError(explain(unboxed(output.getvalue()), unboxed(usage.getvalue()), sys.argv[1:]))


def unboxed(text: str) -> str:
    """Return tyro's output without its frames and colours."""
    return re.sub("\x1b\\[[0-9;]*m|[\u2500-\u257f]", " ", text)


def explain(error: str, usage: str, argv: Sequence[str]) -> str:
    """Return tyro's error as one sentence that names the thing, what was expected and what came.

    Args:
        error: what tyro printed; a text that no rule fits, as of another version, is joined to one line.
        usage: the command's `--help`.
        argv: the command's arguments.
    """
    words = [word for argument in argv for word in (argument.split("=", 1) if argument[:2] == "--" else [argument])]
    words = [word.replace("_", "-") if word[:2] == "--" else word for word in words]

    def expected(option: str) -> str:
        placeholder = re.search(rf"(?<!\S){re.escape(option)} (?:{{None}}\|)?(\S.*?)(?:  |\n)", usage)
        return placeholder[1].translate(str.maketrans("", "", "[]")) if placeholder else "a value"

    def got(option: str) -> str:
        index = words.index(option) if option in words else len(words)
        values = takewhile(lambda word: word[:2] != "--", words[index + 1 :])
        return repr(" ".join(values)).replace("''", "nothing")

    options = set(re.findall(r"(?<!\S)--[\w.-]+", usage))
    for word in words:
        if word[:2] == "--" and word not in options:
            return f"unknown option {word}{nearest(word, options)}"
    line = " ".join(error.split())
    if choice := re.search(r"invalid choice '(.*?)' for argument '(\S+?)'. Expected one of \((.*?)\)", line):
        names = re.findall(r"'(.*?)'", choice[3])
        return f"{choice[2]}: expected {', '.join(names)}, got {choice[1]!r}{nearest(choice[1], names)}"
    if "Missing from" in line:
        names = re.findall(r"^ {6}(\S+(?: \S+)*?) *$", error.partition("For full")[0], re.MULTILINE)
        return f"missing {', '.join(names)}; --help describes {'it' if len(names) == 1 else 'them'}"
    if wrong := re.search(r"(?:Missing value for argument '|Error parsing )(--[\w.-]+)", line):
        return f"{wrong[1]}: expected {expected(wrong[1])}, got {got(wrong[1])}"
    if surplus := re.search(r"Unrecognized options: (\S+)", line):
        return f"unexpected argument {surplus[1]!r}"
    return line


def main() -> None:
    """Run the console script `rlv2v`: `rlv2v train ...` is `python -m rlv2v.train ...`; alone it prints an overview."""
    command, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in COMMANDS:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_at_once)
        sys.argv = [f"rlv2v {command}", *rest]
        runpy.run_module(f"rlv2v.{command}", run_name="__main__", alter_sys=True)
    elif command in ("-h", "--help"):
        print("Unsupervised few-shot video-to-video translation.\n\nusage: rlv2v COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name:10} {entry.summary}" for name, entry in COMMANDS.items()))
        print("\nrlv2v COMMAND --help describes its options; the first run: rlv2v train --out runs/first --budget 300")
    elif command == "--version":
        print(f"rlv2v {__version__}")
    else:
        print(f"rlv2v: expected {', '.join(COMMANDS)}, got {command!r}{nearest(command, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
