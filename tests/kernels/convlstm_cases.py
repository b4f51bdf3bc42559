"""The ConvLSTM's textbook form in fp64, and what the tests of `rlv2v.kernels` feed to it and to the backends.

Tensors come in the order of `NAMES`; a missing state is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels.layout import state_dtype
from rlv2v.kernels.reference import LIMITS

NAMES = ("x", "w_x", "w_h", "bias", "h0", "c0")
LOSSES = ("hs and cs", "hs", "c_T")
STATES = {"state": ("h0", "c0"), "zero": (), "h0 alone": ("h0",), "c0 alone": ("c0",)}
Tensors = list[Tensor | None]


class Shape(NamedTuple):
    """Of a sequence: G, B, T, C_in, C, H, W, k; G 0: no axis of groups."""

    batch: int
    steps: int
    inputs: int
    channels: int
    height: int
    width: int
    kernel: int
    groups: int = 0

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of an argument."""
        state = (self.batch, self.channels, self.height, self.width)
        one = {
            "x": (self.batch, self.steps, self.inputs, self.height, self.width),
            "w_x": (4 * self.channels, self.inputs, self.kernel, self.kernel),
            "w_h": (4 * self.channels, self.channels, self.kernel, self.kernel),
            "bias": (4 * self.channels,),
            "h0": state,
            "c0": state,
        }[name]
        return (self.groups, *one) if self.groups else one

    def scale(self, name: str) -> float:
        """By which to multiply numbers of unit size to have pre-activations of unit size."""
        fan_in = {"w_x": self.inputs, "w_h": self.channels}.get(name)
        return 1.0 if fan_in is None else (fan_in * self.kernel**2) ** -0.5


def literal(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shi et al. 2015, eq. 3: one convolution of [x_t, h] a step; with an axis of groups, one group after the other."""
    if x.dim() == 6:
        states = ([None] * len(x) if state is None else list(state) for state in (h, c))
        of_group = [literal(*given) for given in zip(x, w_x, w_h, bias, *states, strict=True)]
        hs, cs = (torch.stack(part) for part in zip(*of_group, strict=True))
        return hs, cs
    zeros = x.new_zeros(x.shape[0], w_h.shape[1], *x.shape[-2:])
    h, c = zeros if h is None else h, zeros if c is None else c
    weight, padding = torch.cat((w_x, w_h), 1), w_h.shape[-1] // 2
    hs, cs = [], []
    for t in range(x.shape[1]):
        i, f, o, g = conv2d(torch.cat((x[:, t], h), 1), weight, bias, padding=padding).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1)


def arguments(shape: Shape, dtype: torch.dtype, state: str = "state", seed: int = 0) -> Tensors:
    """Leaves of a dtype that want gradients, c0 too."""
    rng = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(shape.of(name), generator=rng, dtype=torch.float64) * shape.scale(name) for name in NAMES
    }
    for name in {"h0", "c0"} - set(STATES[state]):
        del values[name]
    return [values[name].to(dtype).requires_grad_() if name in values else None for name in NAMES]


def exact_copies(tensors: Sequence[Tensor | None]) -> Tensors:
    """The same numbers in fp64, as new leaves that want gradients."""
    return [None if a is None else a.detach().double().clone().requires_grad_() for a in tensors]


def given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [a for a in tensors if a is not None]


def loss_weights(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dhs and dcs of a loss that weighs every state, in the dtypes of hs and cs for inputs of `dtype`."""
    rng = torch.Generator().manual_seed(1)
    dhs, dcs = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    return dhs.to(dtype), dcs.to(state_dtype(dtype))


def gradients(
    loss: str, hs: Tensor, cs: Tensor, inputs: Sequence[Tensor | None], dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """By name, of a loss over results of inputs that were rounded to `dtype`; None for inputs that do not want one."""
    dhs, dcs = (weight.to(a.dtype) for weight, a in zip(loss_weights(hs.shape, dtype), (hs, cs), strict=True))
    axis = cs.dim() - 4
    outputs = {"hs and cs": [hs, cs], "hs": [hs], "c_T": [cs.select(axis, -1)]}[loss]
    weights = {"hs and cs": [dhs, dcs], "hs": [dhs], "c_T": [dcs.select(axis, -1)]}[loss]
    wanted = {name: a for name, a in zip(NAMES, inputs, strict=True) if a is not None and a.requires_grad}
    # hs and cs are used more than once: a backward that overwrites what was saved would show.
    found = torch.autograd.grad(outputs, list(wanted.values()), weights, retain_graph=True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


class Answer(NamedTuple):
    """What is right for `arguments(...)`, in fp64; `weighed`: for each loss of `LOSSES`, the gradients by name."""

    hs: Tensor
    cs: Tensor
    weighed: dict[str, dict[str, Tensor | None]]


@cache
def answer(shape: Shape, dtype: torch.dtype, state: str = "state", seed: int = 0) -> Answer:
    inputs = exact_copies(arguments(shape, dtype, state, seed))
    hs, cs = literal(*inputs)
    return Answer(hs.detach(), cs.detach(), {loss: gradients(loss, hs, cs, inputs, dtype) for loss in LOSSES})


def assert_values(hs: Tensor, cs: Tensor, right: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Within the limit of `dtype`: h absolutely, c too but in proportion where it is above 1."""
    assert hs.dtype == dtype
    assert cs.dtype == state_dtype(dtype)
    for name, ours, exact in zip(("hs", "cs"), (hs, cs), right, strict=True):
        assert ours.shape == exact.shape, name
        off = ((ours.double() - exact).abs() / exact.abs().clamp(min=1)).flatten().detach()
        assert off.numel() == 0 or off.max() <= LIMITS[dtype].value, f"{name} is off by {off.max():.1e}"


def assert_gradients(
    ours: dict[str, Tensor | None],
    exact: dict[str, Tensor | None],
    dtype: torch.dtype,
    scales: dict[str, Tensor] | None = None,
) -> None:
    """Each within the limit of `dtype` as a ratio of norms, to that of the exact one or of its entry in `scales`."""
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        got = ours[name]
        if want is None:
            want = torch.zeros(())
        if got is None:
            got = torch.zeros(want.shape)
        assert got.shape == want.shape or not want.dim(), name
        off, size = (got.double() - want).norm(), (want if scales is None else scales[name]).norm()
        assert off <= LIMITS[dtype].gradient * size, f"d{name} is off by {off / size:.1e}, exact norm {want.norm():.1e}"


def magnitudes(inputs: Tensors, dhs: Tensor, dcs: Tensor) -> dict[str, Tensor]:
    """Of each gradient, the sum of the absolute values where it is a sum of terms, all the way back through the frames.

    Rounding errors are in proportion to these, and to the gradients only where the terms do not cancel, as they may in
    a few pixels. Of one group, fp64; dhs, dcs (B,T,C,H,W).
    """
    x, w_x, w_h, bias, h0, c0 = (None if a is None else a.detach() for a in inputs)
    assert x is not None and w_x is not None and w_h is not None and bias is not None
    zeros, padding = torch.zeros_like(dhs[:, 0]), w_h.shape[-1] // 2
    hs, cs = literal(x, w_x, w_h, bias, h0, c0)
    h_before = torch.cat(((zeros if h0 is None else h0).unsqueeze(1), hs[:, :-1]), 1)
    a = conv2d(torch.cat((x, h_before), 2).flatten(0, 1), torch.cat((w_x, w_h), 1), bias, padding=padding)
    i, f, o, g = (gate.unflatten(0, hs.shape[:2]) for gate in a.chunk(4, 1))
    i, f, o, g = i.sigmoid(), f.sigmoid(), o.sigmoid(), g.tanh()
    c_sizes = [zeros if c0 is None else c0.abs()]
    for t in range(hs.shape[1]):
        c_sizes.append(f[:, t] * c_sizes[-1] + i[:, t] * g[:, t].abs())

    def back(da: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.conv_transpose2d(da, w.abs(), padding=padding)

    da = torch.zeros_like(a).unflatten(0, hs.shape[:2])
    dh, dc = zeros, zeros
    for t in reversed(range(hs.shape[1])):
        dh = dh + dhs[:, t].abs()
        dc = dc + dcs[:, t].abs() + dh * o[:, t] * (1 - cs[:, t].tanh().square())
        to_i, to_f = dc * (g * i * (1 - i))[:, t].abs(), dc * c_sizes[t] * (f * (1 - f))[:, t]
        to_o, to_g = dh * c_sizes[t + 1] * (o * (1 - o))[:, t], dc * (i * (1 - g.square()))[:, t]
        da[:, t] = torch.cat((to_i, to_f, to_o, to_g), 1)
        dh, dc = back(da[:, t], w_h), dc * f[:, t]
    flat = da.flatten(0, 1)

    def of_weight(into: Tensor, w: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(into.flatten(0, 1).abs(), w.shape, flat, padding=padding)

    dx = back(flat, w_x).unflatten(0, hs.shape[:2])
    found = (dx, of_weight(x, w_x), of_weight(h_before, w_h), da.sum((0, 1, 3, 4)), dh, dc)
    return dict(zip(NAMES, found, strict=True))
