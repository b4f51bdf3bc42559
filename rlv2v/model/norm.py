"""Sequence-wise normalisation, made causal (RL-V2V-GAN section 3.4), and what comes before it in a block."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from rlv2v.kernels.sequence_norm import Moments, activate_and_pool, sequence_norm
from rlv2v.model.frames import RunMode, State, attributes_set, batch_major, frame_major
from rlv2v.runtime.distributed import mean as mean_over_ranks

__all__ = ["Moments", "Scope", "SequenceNorm", "stats_over"]
Scope = Literal["ranks", "rank", "clip"]


class SequenceNorm(nn.Module):
    """Sequence-wise normalisation, made causal: (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and variance of a channel run over all pixels of all frames *so far*. `kind="clip"` takes them over one clip.
    `kind="batch"` takes them over all clips of the mini-batch, on all ranks, as the paper does (section 3.4), but for
    `stats_over`; in eval mode over each clip, so that a translation is what the clip's own frames make of it.
    `kind="none"` returns x as it is. `rlv2v.kernels.sequence_norm` says what is computed in which dtype.
    """

    scope: Scope

    def __init__(self, channels: int, kind: str = "clip", eps: float = 1e-3, *, backend: str = "auto") -> None:
        super().__init__()
        if kind not in ("clip", "batch", "none"):
            raise ValueError(f"SequenceNorm: kind must be 'clip', 'batch' or 'none', got {kind!r}")
        self.kind, self.eps, self.backend, self.scope = kind, eps, backend, "ranks"
        if kind == "none":
            return
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, state: Moments | None = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        """Normalise x (B,T,C,H,W) from a state; `mode` as in `rlv2v.model.blocks`."""
        if self.kind == "none":
            return x, None
        y, _, state = self.activate_and_normalise(x, None, state, **mode)
        return y, state

    def activate_and_normalise(
        self,
        x: Tensor,
        residual: Tensor | None,
        state: Moments | None = None,
        *,
        slope: float = 1.0,
        pool: tuple[int, int] = (1, 1),
        **mode: Unpack[RunMode],
    ) -> tuple[Tensor, Tensor, State]:
        """Return avg_pool(a) normalised, a = LeakyReLU(x + residual), and the state; in one pass over the frames."""
        before: dict[str, Any] = {"residual": residual, "slope": slope, "pool": pool}
        if self.kind == "none":
            a, p, _ = activate_and_pool(x, **before, backend=self.backend)
            return p, a, None
        if self.kind == "clip" or not self.training or self.scope == "clip":
            return self.normalise(x, state, **before, **mode)
        a, p, moments = activate_and_pool(x, **before, moments=True, backend=self.backend)
        assert moments is not None
        y, _, state = self.normalise(p, state, moments=self.mean_over_clips(moments), **mode)
        return y, a, state

    def mean_over_clips(self, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return moments (B,T,C) averaged over the clips of this rank, or of all ranks, as `scope` says."""
        means = torch.stack([moment.mean(0) for moment in moments])
        means = mean_over_ranks(means) if self.scope == "ranks" else means
        mean, square = (m.expand_as(moments[0]) for m in means)
        return mean, square

    def normalise(
        self, x: Tensor, state: Moments | None, *, moments: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, State]:
        """Return what `sequence_norm` does, with a state as `mode` asks for it."""
        all_states, one_step = (kwargs.pop(name, None) for name in ("all_states", "one_step_from_each"))
        kwargs |= {"eps": self.eps, "backend": self.backend}
        if not one_step:
            y, a, states = sequence_norm(x, self.weight, self.bias, state, moments=moments, **kwargs)
            return y, a, states if all_states else Moments(*(s[:, -1] for s in states))
        assert state is not None
        if kwargs.get("residual") is not None:
            kwargs["residual"] = singles(kwargs["residual"])
        if moments is not None:
            moments = singles(moments[0]), singles(moments[1])
        before = Moments(*(frame_major(s) for s in state))
        y, a, _ = sequence_norm(singles(x), self.weight, self.bias, before, moments=moments, **kwargs)
        return batch_major(y.squeeze(1), x), batch_major(a.squeeze(1), x), None


def singles(x: Tensor) -> Tensor:
    """Return the frames of x (B,T,...) as clips of one frame, (T*B,1,...)."""
    return frame_major(x).unsqueeze(1)


def stats_over(scope: Scope, *nets: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which `kind="batch"` normalises over this rank's clips, or over each clip.

    "rank" is for runs that not every rank makes, or not over as many clips; "clip" for clips that have nothing to do
    with each other, such as states of the policy gradient, which end in padding.
    """
    norms = (m for net in nets for m in net.modules() if isinstance(m, SequenceNorm))
    return attributes_set((norm, "scope", scope) for norm in norms)
