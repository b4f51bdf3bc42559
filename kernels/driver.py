"""A whole ConvLSTM layer around a backend's recurrence: what runs once over all T, as cuDNN does for its LSTM.

    forward    a = w_x * x + bias for every frame, then the recurrence
    backward   the recurrence backwards gives da;  dx = w_x^T * da;  dw_x and dbias from da and x;
               dw_h from da_t and h_{t-1}, all t at once
    recompute  the gates were not kept: a = w_x * x + w_h * h + bias for every frame at once, since all h are known
Frames are in the layout of `rlv2v.kernels.layout`. A missing h0 or c0 is zero and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlv2v.kernels.convolution import conv, conv_gradients
from rlv2v.kernels.layout import dense, stack_groups


class Problem(NamedTuple):
    """What the choice of a backend may depend on: device, x's dtype, and the numbers G,T,B,C,H,W,k."""

    device: torch.device
    dtype: torch.dtype
    groups: int
    steps: int
    batch: int
    channels: int
    height: int
    width: int
    kernel: int

    @classmethod
    def of(cls, x: Tensor, w_h: Tensor) -> Problem:
        """Read the problem off x (G,T,B,C_in,H,W) and w_h (G,4C,C,k,k)."""
        groups, steps, batch, _, height, width = x.shape
        return cls(x.device, x.dtype, groups, steps, batch, w_h.shape[2], height, width, w_h.shape[-1])


class Operands(NamedTuple):
    """The arguments of a layer of G groups; all in x's dtype but c0, which is in `state_dtype`.

    Shapes: x (G,T,B,C_in,H,W), w_x (G,4C,C_in,k,k), w_h (G,4C,C,k,k), bias (G,4C), h0 and c0 (G,B,C,H,W) or None.
    """

    x: Tensor
    w_x: Tensor
    w_h: Tensor
    bias: Tensor
    h0: Tensor | None
    c0: Tensor | None

    @property
    def hs_shape(self) -> torch.Size:
        """The shape (G,T,B,C,H,W) of hs and cs."""
        return self.x.shape[:3] + self.w_h.shape[2:3] + self.x.shape[4:]

    @property
    def gates_shape(self) -> torch.Size:
        """The shape (G,T,B,4C,H,W) of the gates and the pre-activations."""
        return self.x.shape[:3] + self.w_h.shape[1:2] + self.x.shape[4:]

    def convolve_x(self, with_bias: bool = True) -> Tensor:
        """Return w_x * x + bias of all frames, (G,T,B,4C,H,W), dense; the caller may overwrite it."""
        groups, steps = self.x.shape[:2]
        a = stack_groups([self.convolve_steps(g, 0, steps, with_bias) for g in range(groups)])
        assert a is not None
        return a

    def convolve_steps(self, group: int, first: int, last: int, with_bias: bool = True) -> Tensor:
        """Return w_x * x + bias of the steps [first, last) of a group, (last-first,B,4C,H,W), as `convolve_x` does."""
        x = self.x[group, first:last]
        bias = self.bias[group] if with_bias else None
        return dense(conv(x.flatten(0, 1), self.w_x[group], bias)).unflatten(0, x.shape[:2])


class Outputs(NamedTuple):
    """The results of a forward pass.

    hs (G,T,B,C,H,W) is in x's dtype, cs the same shape in `state_dtype`, the activated gates (G,T,B,4C,H,W) in
    `gates_dtype`, or None if they were not kept. All are dense.
    """

    hs: Tensor
    cs: Tensor
    gates: Tensor | None


class BackwardOperands(NamedTuple):
    """What the backward pass of a recurrence takes; frames are dense.

    dhs (G,T,B,C,H,W) is in x's dtype, dcs the same shape in `state_dtype`, or None for zero. `gates` are those of the
    forward if `activated`, else pre-activations in x's dtype. `need_state` asks for dh0 and dc0.
    """

    dhs: Tensor
    dcs: Tensor | None
    gates: Tensor
    activated: bool
    cs: Tensor
    c0: Tensor | None
    w_h: Tensor
    need_state: bool


class Recurrence(Protocol):
    """A backend: the part of the layer that goes from frame to frame."""

    def unsupported_reason(self, problem: Problem) -> str | None:
        """Return why the backend cannot run a problem, or None if it can."""
        ...

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        """Run the recurrence over all steps."""
        ...

    def backward(self, operands: BackwardOperands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return da (G,T,B,4C,H,W) and dh0 in x's dtype, dc0 in `state_dtype`; the last two None unless needed."""
        ...


def backward(
    recurrence: Recurrence,
    operands: Operands,
    outputs: Outputs,
    dhs: Tensor,
    dcs: Tensor | None,
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the operands in their order, None where `need` is False.

    The gates are recomputed if `outputs` has none.
    """
    x, w_x, w_h, _, h0, c0 = operands
    hs, cs, gates = outputs
    activated = gates is not None
    if gates is None:
        gates = operands.convolve_x()
        add_hidden(gates, w_h, hs, h0)
    need_x, need_w_x, need_w_h, need_bias, need_h0, need_c0 = need
    da, dh0, dc0 = recurrence.backward(
        BackwardOperands(dhs, dcs, gates, activated, cs, c0, w_h, need_state=need_h0 or need_c0)
    )
    del gates
    of_x = [
        conv_gradients(da[g].flatten(0, 1), x[g].flatten(0, 1), w_x[g], (need_x, need_w_x, need_bias))
        for g in range(x.shape[0])
    ]
    dx, dw_x, dbias = (stack_groups(gradients) for gradients in zip(*of_x, strict=True))
    dw_h = None
    if need_w_h:
        h_first = [None] * len(x) if h0 is None else list(h0)
        dw_h = stack_groups([hidden_gradient(*group) for group in zip(da, hs, w_h, h_first, strict=True)])
    dx = None if dx is None else dense(dx.unflatten(1, x.shape[1:3]))
    return [dx, dw_x, dw_h, dbias, dh0 if need_h0 else None, dc0 if need_c0 else None]


def add_hidden(a: Tensor, w_h: Tensor, hs: Tensor, h0: Tensor | None) -> None:
    """Add w_h * h_{t-1} to a_t, all t in one convolution."""
    for g in range(a.shape[0]):
        if a.shape[1] > 1:
            a[g, 1:].flatten(0, 1).add_(conv(hs[g, :-1].flatten(0, 1), w_h[g]))
        if h0 is not None:
            a[g, 0] += conv(h0[g], w_h[g])


def hidden_gradient(da: Tensor, hs: Tensor, w_h: Tensor, h0: Tensor | None) -> Tensor:
    """Return the gradient of one group's w_h (4C,C,k,k), summed over all frames that follow another or h0."""
    dw_h = None
    if da.shape[0] > 1:
        dw_h = conv_gradients(da[1:].flatten(0, 1), hs[:-1].flatten(0, 1), w_h, (False, True, False))[1]
    if h0 is not None:
        first = conv_gradients(da[0], h0, w_h, (False, True, False))[1]
        dw_h = first if dw_h is None or first is None else dw_h.add_(first)
    return torch.zeros_like(w_h) if dw_h is None else dw_h
