"""The ConvLSTM as one autograd node a sequence: the forward of `reference`, and a backward written out by hand.

    dc_t = dh_t o (1 - tanh^2 c_t) + f_{t+1} dc_{t+1};   dh_t = dhs_t + w_h^T * da_{t+1}
    da_i, da_f, da_o = dc g, dc c_{t-1}, dh tanh c through sigmoid';   da_g = dc i through tanh'
Only the gradients of h and c are inside the loop over T. Those of both weights, the bias and x are one convolution
backward each over all T, as cuDNN does for its LSTM; autograd alone would take them step by step. Runs wherever torch
does. Shapes as in `convlstm`; saves the activated gates, x, h and c for the backward, and recomputes tanh c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, conv_transpose2d


class Sequence(torch.autograd.Function):
    """`hs, cs` of a sequence; see the module."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, steps = x.shape[:2]
        channels, padding = w_h.shape[1], w_h.shape[-1] // 2
        gates = conv2d(x.flatten(0, 1), w_x, bias, padding=padding).unflatten(0, (batch, steps))
        hs = gates.new_empty(batch, steps, channels, *gates.shape[-2:])
        cs = torch.empty_like(hs)
        h, c = h0, c0
        for t in range(steps):
            a = gates[:, t]
            if h is not None:
                a += conv2d(h, w_h, padding=padding)
            i, f, o = a[:, : 3 * channels].sigmoid_().chunk(3, 1)
            g = a[:, 3 * channels :].tanh_()
            c = i * g if c is None else torch.addcmul(i * g, f, c)
            h = o * c.tanh()
            hs[:, t], cs[:, t] = h, c
        ctx.save_for_backward(x, w_x, w_h, h0, c0, gates, hs, cs)
        return hs, cs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhs: Tensor, dcs: Tensor) -> tuple[Tensor | None, ...]:
        x, w_x, w_h, h0, c0, gates, hs, cs = ctx.saved_tensors
        steps, channels, padding = x.shape[1], w_h.shape[1], w_h.shape[-1] // 2
        da = torch.empty_like(gates)
        dh, dc = dhs[:, -1], dcs[:, -1]
        for t in reversed(range(steps)):
            sigmoids, g = gates[:, t].split((3 * channels, channels), 1)
            i, f, o = sigmoids.chunk(3, 1)
            c_before = cs[:, t - 1] if t else c0
            tanh_c = cs[:, t].tanh()
            dc = torch.addcmul(dc, dh * o, 1 - tanh_c.square())
            into = da[:, t]
            torch.mul(dc, g, out=into[:, :channels])
            if c_before is None:
                into[:, channels : 2 * channels] = 0
            else:
                torch.mul(dc, c_before, out=into[:, channels : 2 * channels])
            torch.mul(dh, tanh_c, out=into[:, 2 * channels : 3 * channels])
            into[:, : 3 * channels] *= sigmoids * (1 - sigmoids)
            torch.mul(dc * i, 1 - g.square(), out=into[:, 3 * channels :])
            if t or h0 is not None:
                dh = conv_transpose2d(into, w_h, padding=padding)
            dc = dc * f
            if t:
                dh, dc = dh + dhs[:, t - 1], dc + dcs[:, t - 1]
        need_x, need_w_x, need_w_h, need_bias, need_h0, need_c0 = ctx.needs_input_grad
        frames = da.flatten(0, 1)
        dx, dw_x, dbias = convolution_backward(frames, x.flatten(0, 1), w_x, padding, (need_x, need_w_x, need_bias))
        dw_h = None
        if need_w_h and h0 is not None:
            before = torch.cat((h0[:, None], hs[:, :-1]), 1).flatten(0, 1)
            dw_h = convolution_backward(frames, before, w_h, padding, (False, True, False))[1]
        elif need_w_h and steps > 1:
            later = da[:, 1:].flatten(0, 1)
            dw_h = convolution_backward(later, hs[:, :-1].flatten(0, 1), w_h, padding, (False, True, False))[1]
        elif need_w_h:
            dw_h = torch.zeros_like(w_h)
        dx = None if dx is None else dx.unflatten(0, x.shape[:2])
        return dx, dw_x, dw_h, dbias, dh if need_h0 else None, dc if need_c0 else None


def convolution_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, padding: int, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a same-padded convolution's input, weight and bias, those that `mask` asks for."""
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, inputs, weight, [weight.shape[0]], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )
    return gradients


def convlstm_sequence(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `convlstm_ref`, the same numbers to rounding; no second derivatives."""
    hs, cs = Sequence.apply(x, w_x, w_h, bias, h0, c0)
    return hs, cs
