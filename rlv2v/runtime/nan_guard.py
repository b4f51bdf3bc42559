"""Watches the numbers of a run: one that is none stops it, by its name and step, before it reaches a checkpoint."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rlv2v.errors import UserError
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.device import HostCopy

LAG = 4  # steps that a GPU's numbers are read later: by then they are there, and nobody waits
SMALLEST_SCALE = 1.0  # of a loss in fp16: below, the gradients do not fit however small they are made


class NanGuard:
    """Reads what each step said, as means over the ranks, and stops the run at a number that is none.

    All ranks read the same numbers at the same step, so that all stop together. Where losses are scaled (fp16), a
    gradient beyond the range is part of the search for the scale; a scale below 1 is not.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = LAG if device.type == "cuda" else 0
        self._said: deque[tuple[int, tuple[str, ...], HostCopy]] = deque()

    def record(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take the numbers () of a step."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._said.append((step, tuple(values), HostCopy(dist.mean(stacked))))

    def read(self, *, everything: bool = False) -> dict[str, float]:
        """Check what is there, or all; returns the newest numbers that were read, {} for none.

        Raises:
            UserError: a loss, a norm of gradients or a scale is no number.
        """
        newest: dict[str, float] = {}
        while len(self._said) > (0 if everything else self._lag):
            step, names, copy = self._said.popleft()
            newest = dict(zip(names, copy.read()[0].tolist(), strict=True))
            check_numbers(newest, step)
        return newest


def check_numbers(values: Mapping[str, float], step: int) -> None:
    """Raise UserError for the first of a step's numbers that is none."""
    scaled = any(name.startswith("scale") for name in values)
    for name, value in values.items():
        if not math.isfinite(value) and not (scaled and name.startswith("grad")):
            kind = "gradient norm" if name.startswith("grad") else "loss"
            stop(f"{kind} {name!r} is {value}", step)
        if name.startswith("scale") and value < SMALLEST_SCALE:
            stop(f"the loss scale of fp16, {name!r}, fell to {value:g}", step)


def check_weights(nets: Iterable[tuple[str, nn.Module]], step: int) -> None:
    """Raise UserError for the first weight or buffer that holds a number that is none; waits for a GPU."""
    named = [
        (f"{net}.{name}", tensor)
        for net, module in nets
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    norms = torch.stack(torch._foreach_norm([tensor.detach().float() for _, tensor in named], math.inf))
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        stop(f"weight {named[bad[0]][0]!r} is {norms[bad[0]].item()}", step)


def stop(what: str, step: int) -> None:
    raise UserError(
        f"{what} at step {step}: the run stops; its last checkpoint is whole. "
        f"Try a smaller --lr or --disc-lr, or --precision fp32"
    )
