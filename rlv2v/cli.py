"""What every `python -m rlv2v.<command>` shares: flags from a dataclass, and exit codes that scripts can read."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any, TypeVar

import tyro

from rlv2v.errors import UserError

Args = TypeVar("Args")

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def run_command(
    main: Callable[[Args], None], args_type: type[Args], start: Callable[[list[str]], Args] | None = None
) -> None:
    """Parse `args_type` from the command line, run `main`, and leave with 0 (done) or 2 (the user can mend it).

    `start` gives the flags' defaults from the arguments, where they are not the dataclass's own. A bad flag, a
    `UserError`, a full disk or a refused path leave with 2 and one line on stderr. Any other exception is a bug and
    keeps its traceback (exit code 1).
    """
    module = sys.modules["__main__"].__spec__
    name = module.name if module else sys.argv[0]
    try:
        default = tyro.MISSING_NONPROP if start is None else start(sys.argv[1:])
        main(parse(args_type, f"python -m {name}" if module else f"python {name}", name, default))
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


def parse(args_type: type[Args], prog: str, name: str, default: Any) -> Args:
    """tyro's parser, but with its boxed error as one line on stderr."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(args_type, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code:
            lines = (re.sub("[\u2500-\u257f]", "", line).strip() for line in said.getvalue().splitlines())
            print(f"{name}: {' '.join(line for line in lines if line)}", file=sys.stderr)
        raise
