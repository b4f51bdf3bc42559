"""The one exception that means "the user can mend this", and how a text is kept on one line."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Report a mistake in what the user gave: the thing, what was expected, what came, and the remedy.

    The message is kept on one line (`one_line`), so that no file name can break it. Commands print it without a
    traceback and leave with exit code 2; a library caller catches it as a `ValueError`.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


def one_line(text: object) -> str:
    """Return `text` with every newline and control character escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def several(names: Sequence[str], between: str = ", ", most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it; its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`, with newlines and control characters in its messages escaped."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape)
    return logger


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), None
    return True


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean <name>?" for the one of `names` that `name` resembles most, "" if none does."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""
