"""One optimiser step down the loss of one phase, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

from rlv2v.kernels.casts import weights_cast_once
from rlv2v.runtime import distributed

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BookTime = Callable[[str], object]
"""Books the time since its last call to a section of the step: `rlv2v.runtime.timer.StepTimer.mark`."""


def no_timing(section: str) -> None:
    """A `BookTime` that does nothing."""


@contextmanager
def autocast(config: Config, device: torch.device) -> Iterator[None]:
    """Run networks in the config's precision, whose weights do not change inside; their outputs are float32.

    torch keeps no cast weights: it would sum their gradients in 16 bits.
    """
    dtype, enabled = DTYPES[config.runtime.precision], config.runtime.precision != "fp32"
    with torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False), weights_cast_once():
        yield


class OptimizerStep:
    """One step of an optimiser down a loss: backward pass, mean over ranks, clipping, update.

    Args:
        optimiser: holds the weights that it moves, in one group.
        limit: largest norm of the gradient; 0: none.
        config: its precision decides whether losses are scaled.
        suffix: of the names in the log.
    """

    def __init__(self, optimiser: Adam, limit: float, config: Config, suffix: str = "") -> None:
        self.optimiser, self.limit, self.suffix = optimiser, limit, suffix
        self.weights: list[Tensor] = optimiser.param_groups[0]["params"]
        self.lr = float(optimiser.param_groups[0]["lr"])
        self.scaler = torch.amp.GradScaler(self.weights[0].device.type, enabled=config.runtime.precision == "fp16")
        self.reducer = distributed.Reducer(self.weights)

    def set_rate(self, factor: float) -> None:
        """Set the learning rate of the next steps, as a share of that at the start."""
        for group in self.optimiser.param_groups:
            old, new = group["lr"], self.lr * factor
            group["lr"] = old.fill_(new) if isinstance(old, Tensor) else new

    def __call__(self, loss: Tensor, section: str = "", book_time: BookTime = no_timing) -> dict[str, Tensor]:
        """Go one step down a loss; return the logs: it, its gradient's norm before clipping, and fp16's loss scale."""
        self.optimiser.zero_grad(set_to_none=True)
        with self.reducer:
            self.scaler.scale(loss).backward()
        book_time(section)
        self.reducer.finish()
        book_time("all_reduce")
        self.scaler.unscale_(self.optimiser)
        norm = clip_grad_norm_([w for w in self.weights if w.grad is not None], self.limit or float("inf"))
        self.scaler.step(self.optimiser)
        self.scaler.update()
        book_time("optimiser")
        logs = {"loss": loss, "grad": norm}
        if self.scaler.is_enabled():
            assert self.scaler._scale is not None  # `get_scale` would wait for the device
            logs["scale"] = self.scaler._scale.clone()
        return {f"{name}{self.suffix}": value for name, value in logs.items()}
