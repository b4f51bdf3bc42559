"""The definition of the ConvLSTM in PyTorch; every faster backend is held to it within `LIMITS`.

    a_t = w_x * x_t + w_h * h_{t-1} + bias            (* is a convolution, stride 1, same padding)
    i, f, o = sigmoid(a_i, a_f, a_o);   g = tanh(a_g)
    c_t = f c_{t-1} + i g;              h_t = o tanh(c_t)
Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes. Gate order along the 4C axis: i, f, o, g.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d


class Limit(NamedTuple):
    """The largest difference from this definition in float64: of h absolute, of a gradient as a ratio of norms."""

    value: float
    gradient: float


LIMITS = {
    torch.float64: Limit(1e-12, 1e-12),
    torch.float32: Limit(2e-6, 5e-6),
    torch.float16: Limit(2e-3, 2e-3),
    torch.bfloat16: Limit(1.5e-2, 2.5e-2),
}
"""Limits of the self check on a GPU: the same rounded inputs of unit size, T = 3, sums of a few hundred terms."""


def convlstm_ref(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return all hidden states and all cells of a sequence: `hs, cs`, each (B,T,C,H,W); arguments as in `convlstm`.

    The convolution of x runs once over all B*T frames; only that of h is inside the loop, and is left out for a missing
    h0, which is zero. With 16-bit inputs the cells are float32, as everywhere.
    """
    batch, steps = x.shape[:2]
    channels, padding = w_h.shape[1], w_h.shape[-1] // 2
    cell_dtype = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    from_x = conv2d(x.flatten(0, 1), w_x, bias, padding=padding).unflatten(0, (batch, steps))
    h, c = h0, c0
    hs, cs = [], []
    for a in from_x.unbind(1):
        if h is not None:
            a = a + conv2d(h, w_h, padding=padding)
        sigmoids, g = a.to(cell_dtype).split((3 * channels, channels), dim=1)
        i, f, o = sigmoids.sigmoid().chunk(3, dim=1)
        new = i * g.tanh()
        c = new if c is None else torch.addcmul(new, f, c.to(cell_dtype))
        h = (o * c.tanh()).to(x.dtype)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1)
