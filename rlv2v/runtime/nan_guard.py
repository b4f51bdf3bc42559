"""A guard that stops a run at a NaN or an infinity, by its name and step, before it reaches a checkpoint."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rlv2v.errors import UserError
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.device import HostCopy

LAG = 4  # steps after which a GPU's values are read: by then they have arrived, and nobody waits
SMALLEST_SCALE = 1.0  # of a loss in fp16; at a smaller one no gradient fits into fp16's range


class NanGuard:
    """Read the logged values of each step, as means over the ranks, and stop the run at a NaN or infinity.

    All ranks read the same values at the same step, so that all stop together. Where losses are scaled (fp16), an
    infinite gradient is part of the search for the scale; a scale below 1 is not.

    Args:
        device: where the values are computed.
        lag: steps after which they are read; by default `LAG` on a GPU, else 0.
    """

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        self._lag = (LAG if device.type == "cuda" else 0) if lag is None else lag
        self._pending: deque[tuple[int, tuple[str, ...], HostCopy]] = deque()
        self._seen: dict[str, list[float]] = {}
        self._num_seen = 0

    def record(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take the values () of a step; a method may have none."""
        if not values:
            return
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._pending.append((step, tuple(values), HostCopy(dist.mean(stacked))))

    def read(self, *, everything: bool = False) -> dict[str, float]:
        """Check all values that are `lag` steps old, or `everything`; return the newest of them, {} for none.

        Raises:
            UserError: a loss, gradient norm or scale is NaN or infinite.
        """
        newest: dict[str, float] = {}
        while len(self._pending) > (0 if everything else self._lag):
            step, names, copy = self._pending.popleft()
            newest = dict(zip(names, copy.read()[0].tolist(), strict=True))
            check_values(newest, step)
            self._num_seen += 1
            for name, value in newest.items():
                self._seen.setdefault(name, []).append(value)
        return newest

    def summary(self) -> dict[str, float]:
        """Return what was read since the last summary: the newest of a value, or the mean of one that steps miss."""
        seen, self._seen = self._seen, {}
        num, self._num_seen = self._num_seen, 0
        return {name: values[-1] if len(values) == num else sum(values) / len(values) for name, values in seen.items()}


def check_values(values: Mapping[str, float], step: int) -> None:
    """Raise UserError for the first of a step's values that is NaN or infinite, or a scale that is too small."""
    is_scaled = any(name.startswith("scale") for name in values)
    for name, value in values.items():
        if not math.isfinite(value) and not (is_scaled and name.startswith("grad")):
            kind = "gradient norm" if name.startswith("grad") else "loss"
            stop(f"{kind} {name!r} is {value}", step)
        if name.startswith("scale") and value < SMALLEST_SCALE:
            stop(f"the loss scale of fp16, {name!r}, fell to {value:g}", step)


def check_weights(nets: Iterable[tuple[str, nn.Module]], step: int) -> None:
    """Raise UserError for the first weight or buffer with a NaN or infinity in it; waits for a GPU."""
    named = [
        (f"{net}.{name}", tensor)
        for net, module in nets
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    norms = torch.stack(torch._foreach_norm([tensor.detach().float() for _, tensor in named], math.inf))
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        stop(f"weight {named[bad[0]][0]!r} is {norms[bad[0]].item()}", step)


def stop(reason: str, step: int) -> None:
    """Raise the UserError that ends the run."""
    raise UserError(
        f"{reason} at step {step}: the run stops; its last checkpoint is whole. "
        f"Try a smaller --lr or --disc-lr, or --precision fp32"
    )
