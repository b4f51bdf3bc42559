"""The recurrence in plain PyTorch: runs on every device and dtype, fp64 too. See `rlv2v.kernels.driver.Recurrence`.

    forward    a_t += w_h * h_{t-1};  i, f, o = sigmoid;  g = tanh;  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
    backward   dh = dhs_t + w_h^T * da_{t+1};  dc = dcs_t + f_{t+1} dc_{t+1} + dh o (1 - tanh^2 c_t)
               da_i, da_f, da_o = dc g, dc c_{t-1}, dh tanh c_t through sigmoid';  da_g = dc i through tanh'
Maths in `state_dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlv2v.kernels.convolution import Inputs, conv, transposed
from rlv2v.kernels.layout import empty_frames, gates_dtype, state_dtype


class EagerRecurrence:
    """See the module."""

    def forward(
        self, inputs: Inputs, w_h: Tensor, h0: Tensor | None, c0: Tensor | None, keep_gates: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a = inputs.whole()
        groups, steps, batch, _, height, width = a.shape
        shape = (groups, steps, batch, w_h.shape[2], height, width)
        hs, cs = empty_frames(a, *shape), empty_frames(a, *shape, dtype=state_dtype(a.dtype))
        kept = a
        if keep_gates and a.dtype != gates_dtype(a.dtype):
            kept = empty_frames(a, *a.shape, dtype=gates_dtype(a.dtype))
        for n in range(groups):
            h = None if h0 is None else h0[n]
            for t in range(steps):
                gates = a[n, t].to(cs.dtype)
                if h is not None:
                    gates += conv(h, w_h[n])
                i, f, o, g = activate_(gates)
                c = torch.mul(i, g, out=cs[n, t])
                if t or c0 is not None:
                    c.addcmul_(f, c0[n] if t == 0 and c0 is not None else cs[n, t - 1])
                h = hs[n, t].copy_(o * c.tanh())
                if keep_gates and gates.dtype != a.dtype:
                    kept[n, t] = gates
        return hs, cs, kept if keep_gates else None

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
        groups, steps, batch, channels, height, width = dhs.shape
        da = empty_frames(dhs, *gates.shape)
        shape = (groups, batch, channels, height, width)
        dh0 = empty_frames(dhs, *shape) if need_state else None
        dc0 = empty_frames(cs, *shape) if need_state else None
        for n in range(groups):
            w_back = transposed(w_h[n])
            dh, dc = torch.zeros_like(cs[n, 0]), torch.zeros_like(cs[n, 0])
            for t in reversed(range(steps)):
                at = gates[n, t].to(cs.dtype)
                i, f, o, g = at.chunk(4, 1) if activated else activate_(at.clone())
                tanh_c = cs[n, t].tanh()
                dh += dhs[n, t]
                dc += dh * o * (1 - tanh_c.square())
                if dcs is not None:
                    dc += dcs[n, t]
                before = cs[n, t - 1] if t else None if c0 is None else c0[n]
                da_i, da_f, da_o, da_g = da[n, t].chunk(4, 1)
                da_i.copy_(dc * g * i * (1 - i))
                da_f.copy_(torch.zeros_like(dc) if before is None else dc * before * f * (1 - f))
                da_o.copy_(dh * tanh_c * o * (1 - o))
                da_g.copy_(dc * i * (1 - g.square()))
                dc *= f
                if t or need_state:
                    dh = conv(da[n, t], w_back).to(dc.dtype)
            if dh0 is not None and dc0 is not None:
                dh0[n], dc0[n] = dh, dc
        return da, dh0, dc0


def activate_(a: Tensor) -> tuple[Tensor, ...]:
    """i, f, o = sigmoid, g = tanh of pre-activations (N,4C,H,W), in place."""
    channels = a.shape[1] // 4
    a[:, : 3 * channels].sigmoid_()
    a[:, 3 * channels :].tanh_()
    return a.chunk(4, 1)
