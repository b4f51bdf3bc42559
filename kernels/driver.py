"""A whole ConvLSTM layer around a backend's recurrence: what runs once over all T, as cuDNN does for its LSTM.

    forward    a = w_x * x + bias for every frame; the recurrence
    backward   the recurrence backwards, giving da;  dx = w_x^T * da;  dw_x, dbias from da and x;
               dw_h from da_t and h_{t-1}, all t at once
    recompute  the gates are not kept: a = w_x * x + w_h * h + bias for every frame at once, as all h are known by then
Layout of x, hs, cs, gates and their gradients: `rlv2v.kernels.layout`. A missing h0 or c0 is zero, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlv2v.kernels.convolution import Inputs, conv, conv_gradients, joined
from rlv2v.kernels.layout import dense

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Recurrence(Protocol):
    """The part of the layer that goes from frame to frame; one an implementation.

    Shapes: gates, da (G,T,B,4C,H,W); hs, cs, dhs, dcs (G,T,B,C,H,W); h0, c0, dh0, dc0 (G,B,C,H,W); w_h (G,4C,C,k,k).
    da, h and its gradients have x's dtype, c and its gradients `state_dtype`, the gates `gates_dtype`; all dense.
    """

    def forward(
        self, inputs: Inputs, w_h: Tensor, h0: Tensor | None, c0: Tensor | None, keep_gates: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`hs, cs, gates`; gates None unless `keep_gates`."""
        ...

    def backward(
        self,
        dhs: Tensor,
        dcs: Tensor | None,
        gates: Tensor,
        activated: bool,
        cs: Tensor,
        c0: Tensor | None,
        w_h: Tensor,
        need_state: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`da, dh0, dc0`, the last two None unless `need_state`; not `activated`: pre-activations of x's dtype."""
        ...


def forward(
    recurrence: Recurrence,
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`hs, cs, gates` of x (G,T,B,C_in,H,W), w_x (G,4C,C_in,k,k), w_h (G,4C,C,k,k), bias (G,4C)."""
    return recurrence.forward(Inputs(x, w_x, bias), w_h, h0, c0, keep_gates)


def backward(
    recurrence: Recurrence,
    dhs: Tensor,
    dcs: Tensor | None,
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    hs: Tensor,
    cs: Tensor,
    gates: Tensor | None,
    need: Sequence[bool],
) -> Gradients:
    """Gradients of x, w_x, w_h, bias, h0, c0, those that `need` asks for; gates None: they are recomputed."""
    activated = gates is not None
    if gates is None:
        gates = Inputs(x, w_x, bias).whole()
        add_hidden(gates, w_h, hs, h0)
    need_x, need_w_x, need_w_h, need_bias, need_h0, need_c0 = need
    da, dh0, dc0 = recurrence.backward(dhs, dcs, gates, activated, cs, c0, w_h, need_h0 or need_c0)
    del gates
    of_x = [
        conv_gradients(da[g].flatten(0, 1), x[g].flatten(0, 1), w_x[g], (need_x, need_w_x, need_bias))
        for g in range(x.shape[0])
    ]
    dx, dw_x, dbias = (joined(gradients) for gradients in zip(*of_x, strict=True))
    dw_h = None
    if need_w_h:
        dw_h = joined([hidden_gradient(da[g], hs[g], w_h[g], None if h0 is None else h0[g]) for g in range(x.shape[0])])
    dx = None if dx is None else dense(dx.unflatten(1, x.shape[1:3]))
    return dx, dw_x, dw_h, dbias, dh0 if need_h0 else None, dc0 if need_c0 else None


def add_hidden(a: Tensor, w_h: Tensor, hs: Tensor, h0: Tensor | None) -> None:
    """a_t += w_h * h_{t-1}, all t in one convolution."""
    for g in range(a.shape[0]):
        if a.shape[1] > 1:
            a[g, 1:].flatten(0, 1).add_(conv(hs[g, :-1].flatten(0, 1), w_h[g]))
        if h0 is not None:
            a[g, 0] += conv(h0[g], w_h[g])


def hidden_gradient(da: Tensor, hs: Tensor, w_h: Tensor, h0: Tensor | None) -> Tensor:
    """Gradient of w_h (4C,C,k,k) over all frames that follow another or h0."""
    dw_h = None
    if da.shape[0] > 1:
        dw_h = conv_gradients(da[1:].flatten(0, 1), hs[:-1].flatten(0, 1), w_h, (False, True, False))[1]
    if h0 is not None:
        first = conv_gradients(da[0], h0, w_h, (False, True, False))[1]
        dw_h = first if dw_h is None or first is None else dw_h.add_(first)
    return torch.zeros_like(w_h) if dw_h is None else dw_h
