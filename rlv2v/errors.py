"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: names the thing, what was expected, what came, and the remedy, on one line.

    Commands print it without a traceback and leave with exit code 2; a library caller catches it as a `ValueError`.
    """
