"""Constant tensors that a step needs again and again: made once for each device and dtype, not anew in each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MAX_KNOWN = 512
"""Constants that are remembered; a recording may point at them, so none is ever dropped."""
_known: dict[tuple[Any, ...], Tensor] = {}
_remembering = True


def constant(make: Callable[..., Tensor], *args: Any, like: Tensor) -> Tensor:
    """Return `make(*args, like)`, which depends on `args` and on the dtype and device of `like` alone.

    A value that was made before is returned as it is, so nobody may write to it. Nothing is remembered while a graph is
    traced or recorded: what it makes belongs to it.
    """
    if not _remembering or type(like) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return make(*args, like)
    key = (make, args, like.dtype, like.device)
    found = _known.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # what inference makes could not be saved for a gradient
            found = make(*args, like)
        recording = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not recording and len(_known) < MAX_KNOWN:
            _known[key] = found
    return found


@contextmanager
def made_anew() -> Iterator[None]:
    """Make every constant anew in the block, as for a count of what a step allocates."""
    global _remembering
    before, _remembering = _remembering, False
    try:
        yield
    finally:
        _remembering = before
