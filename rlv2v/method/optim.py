"""Optimisers: one step down the losses of one phase, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

from rlv2v.config import Config
from rlv2v.runtime import distributed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Mark = Callable[[str], None]


def unmarked(part: str) -> None:
    """A `Mark` that books nothing."""


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """In which networks run in the config's precision; what leaves them is float32.

    Without a cache of cast weights: a recording would keep those of its first step, and the gradients of a weight that
    is used several times are then summed in float32.
    """
    dtype, on = DTYPES[config.runtime.precision], config.runtime.precision != "fp32"
    return torch.autocast(device.type, dtype, enabled=on, cache_enabled=False)


class OptimizerStep:
    """An optimiser's steps down the losses of one phase: backward, mean over ranks, clipping, step.

    Args:
        optimiser: of the weights that it moves, one group of them.
        limit: largest norm of the gradient; 0: none.
        config: its precision says whether losses are scaled.
    """

    def __init__(self, optimiser: Adam, limit: float, config: Config) -> None:
        self.optimiser, self.limit = optimiser, limit
        self.weights: list[Tensor] = optimiser.param_groups[0]["params"]
        self.lr = float(optimiser.param_groups[0]["lr"])
        self.scaler = torch.amp.GradScaler(self.weights[0].device.type, enabled=config.runtime.precision == "fp16")
        self.reducer = distributed.Reducer(self.weights)

    def set_rate(self, factor: float) -> None:
        """The learning rate of the next steps, as a share of that at the start."""
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr * factor)
            else:
                group["lr"] = self.lr * factor

    def __call__(self, loss: Tensor, phase: str = "", mark: Mark = unmarked) -> Tensor:
        """One step down a loss; returns the norm of its gradient before clipping."""
        self.optimiser.zero_grad(set_to_none=True)
        with self.reducer:
            self.scaler.scale(loss).backward()
        mark(phase)
        self.reducer.finish()
        mark("all_reduce")
        self.scaler.unscale_(self.optimiser)
        norm = clip_grad_norm_([w for w in self.weights if w.grad is not None], self.limit or float("inf"))
        self.scaler.step(self.optimiser)
        self.scaler.update()
        mark("optimiser")
        return norm

    @property
    def scale(self) -> Tensor | None:
        """The loss scale of fp16."""
        return self.scaler._scale if self.scaler.is_enabled() else None
