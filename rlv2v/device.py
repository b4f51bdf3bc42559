"""Which device and how many threads torch shall use."""

from __future__ import annotations

import torch

from rlv2v.errors import UserError


def pick_device(name: str) -> torch.device:
    """The named torch device ("cpu", "cuda", "cuda:1"), tried out; "auto" is cuda where there is one.

    Raises:
        UserError: torch cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected one that torch can use here, got {name!r} ({reason}); try cpu") from None
