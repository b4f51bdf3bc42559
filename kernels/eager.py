"""The recurrence in eager PyTorch: it runs on every device and in every dtype, float64 too.

    forward    a_t += w_h * h_{t-1};  i, f, o = sigmoid(a);  g = tanh(a);  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
    backward   dh = dhs_t + w_h^T * da_{t+1};  dc = dcs_t + f_{t+1} dc_{t+1} + dh o (1 - tanh^2 c_t)
               da_i, da_f, da_o = dc g, dc c_{t-1}, dh tanh c_t through sigmoid';  da_g = dc i through tanh'
The maths runs in `state_dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlv2v.kernels.convolution import conv, transposed
from rlv2v.kernels.driver import BackwardOperands, Operands, Outputs, Problem
from rlv2v.kernels.layout import empty_frames, gates_dtype, state_dtype


class EagerRecurrence:
    """Run the recurrence as a dozen PyTorch operators a step; see `rlv2v.kernels.driver.Recurrence`."""

    def unsupported_reason(self, problem: Problem) -> str | None:
        return None

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        w_h, h0, c0 = operands.w_h, operands.h0, operands.c0
        a = operands.convolve_x()
        hs = empty_frames(a, *operands.hs_shape)
        cs = empty_frames(a, *operands.hs_shape, dtype=state_dtype(a.dtype))
        kept_gates = a
        if keep_gates and a.dtype != gates_dtype(a.dtype):
            kept_gates = empty_frames(a, *a.shape, dtype=gates_dtype(a.dtype))
        for n in range(a.shape[0]):
            h = None if h0 is None else h0[n]
            for t in range(a.shape[1]):
                gates = a[n, t].to(cs.dtype)  # a view if the dtypes agree, so that the gates overwrite a
                if h is not None:
                    gates += conv(h, w_h[n])
                i, f, o, g = activate_(gates)
                c = torch.mul(i, g, out=cs[n, t])
                if t or c0 is not None:
                    c.addcmul_(f, c0[n] if t == 0 and c0 is not None else cs[n, t - 1])
                h = hs[n, t].copy_(o * c.tanh())
                if keep_gates and gates.dtype != a.dtype:
                    kept_gates[n, t] = gates
        return Outputs(hs, cs, kept_gates if keep_gates else None)

    def backward(self, operands: BackwardOperands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dhs, dcs, gates, activated, cs, c0, w_h, need_state = operands
        groups, steps, *state = dhs.shape
        da = empty_frames(dhs, *gates.shape)
        dh0 = empty_frames(dhs, groups, *state) if need_state else None
        dc0 = empty_frames(cs, groups, *state) if need_state else None
        for n in range(groups):
            w_back = transposed(w_h[n])
            dh, dc = torch.zeros_like(cs[n, 0]), torch.zeros_like(cs[n, 0])
            for t in reversed(range(steps)):
                gates_t = gates[n, t].to(cs.dtype)
                i, f, o, g = gates_t.chunk(4, 1) if activated else activate_(gates_t.clone())
                tanh_c = cs[n, t].tanh()
                dh += dhs[n, t]
                dc += dh * o * (1 - tanh_c.square())
                if dcs is not None:
                    dc += dcs[n, t]
                c_prev = cs[n, t - 1] if t else None if c0 is None else c0[n]
                da_i, da_f, da_o, da_g = da[n, t].chunk(4, 1)
                da_i.copy_(dc * g * i * (1 - i))
                da_f.copy_(torch.zeros_like(dc) if c_prev is None else dc * c_prev * f * (1 - f))
                da_o.copy_(dh * tanh_c * o * (1 - o))
                da_g.copy_(dc * i * (1 - g.square()))
                dc *= f
                if t or need_state:
                    dh = conv(da[n, t], w_back).to(dc.dtype)
            if dh0 is not None and dc0 is not None:
                dh0[n], dc0[n] = dh, dc
        return da, dh0, dc0


def activate_(a: Tensor) -> tuple[Tensor, ...]:
    """Return i, f, o = sigmoid and g = tanh of pre-activations (N,4C,H,W), computed in place."""
    channels = a.shape[1] // 4
    a[:, : 3 * channels].sigmoid_()
    a[:, 3 * channels :].tanh_()
    return a.chunk(4, 1)
