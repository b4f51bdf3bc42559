"""The gates alone: the pointwise part of one ConvLSTM step, forward and backward.

    forward   a (B,4C,H,W), c_prev -> h, c        backward   dh, dc -> da, dc_prev
    eager            chunk, sigmoid, tanh, products through torch's autograd: what a user's layer runs
    eager by hand    no autograd: as few of torch's operators as it takes, the backward written out
    compile          torch.compile of the first; `compile by hand`: of the second, two graphs
    cpu              rlv2v._native, one pass forward and one backward
All allocate their results anew, keep what the backward needs, and get dense inputs in the layout of a layer: torch's
own for the peers, channels-last for ours. In 16 bits the peers' cells have 16 bits too, as under autocast, ours 32.
GB/s are of the bytes that the fused form moves, for all; the limit is a copy that moves as many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from convlstm_layer import Shape, checked, differences, name_of, rounded
from convlstm_peers import BF16, F32, compiled, pointwise
from harness import Contender, copy_limit
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.cpu import CODES
from rlv2v.kernels.layout import gates_dtype

Step = Callable[[], tuple[Tensor, ...]]
Function = Callable[..., tuple[Tensor, ...]]


def moved_bytes(elements: int, dtype: torch.dtype) -> int:
    """Return the bytes that the fused form moves.

    Forward: a, c_prev read, h, c, gates written. Backward: dh, dc, gates, c, c_prev read, da, dc_prev written.
    """
    size, of_gates, cell = dtype.itemsize, gates_dtype(dtype).itemsize, 4
    forward = 4 * size + cell + size + cell + 4 * of_gates
    backward = size + cell + 4 * of_gates + cell + cell + 4 * size + cell
    return elements * (forward + backward)


def by_autograd(cell: Function, inputs: tuple[Tensor, ...]) -> Step:
    """Return the step that computes `h, c, da, dc_prev` through torch's autograd."""
    a, c_prev, dh, dc = inputs
    a, c_prev = a.clone().requires_grad_(), c_prev.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        h, c = cell(a, c_prev)
        return h, c, *torch.autograd.grad((h, c), (a, c_prev), (dh, dc))

    return step


def forward_by_hand(a: Tensor, c_prev: Tensor) -> tuple[Tensor, ...]:
    """Return `h, c`, the activated gates and tanh c."""
    channels = c_prev.shape[1]
    sigmoids, g = a[:, : 3 * channels].sigmoid(), a[:, 3 * channels :].tanh()
    i, f, o = sigmoids.chunk(3, 1)
    c = torch.addcmul(i * g, f, c_prev)
    tanh_c = c.tanh()
    return o * tanh_c, c, sigmoids, g, tanh_c


def backward_by_hand(
    dh: Tensor, dc: Tensor, c_prev: Tensor, sigmoids: Tensor, g: Tensor, tanh_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `da, dc_prev`."""
    i, f, o = sigmoids.chunk(3, 1)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    d_sigmoids = torch.cat((dc * g, dc * c_prev, dh * tanh_c), 1)
    return torch.cat((d_sigmoids * sigmoids * (1 - sigmoids), dc * i * (1 - g * g)), 1), dc * f


def by_hand(forward: Function, backward: Function, inputs: tuple[Tensor, ...]) -> Step:
    """Return the step that computes `h, c, da, dc_prev` without autograd."""
    a, c_prev, dh, dc = inputs

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            h, c, *saved = forward(a, c_prev)
            return h, c, *backward(dh, dc, c_prev, *saved)

    return step


def fused(inputs: tuple[Tensor, ...]) -> Step:
    """Return our step: a, dh of the dtype, c_prev and dc float32, channels-last."""
    a, c_prev, dh, dc = (tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs)
    batch, channels, height, width = c_prev.shape
    code, rows = CODES[a.dtype], batch * height * width

    def step() -> tuple[Tensor, ...]:
        h, c, gates = torch.empty_like(dh), torch.empty_like(c_prev), torch.empty_like(a, dtype=gates_dtype(a.dtype))
        threads = torch.get_num_threads()
        _native.gates_forward(
            code, rows, channels, a.data_ptr(), 0, c_prev.data_ptr(),
            h.data_ptr(), c.data_ptr(), gates.data_ptr(), threads,
        )  # fmt: skip
        da, dc_prev = torch.empty_like(a), torch.empty_like(c_prev)
        _native.gates_backward(
            code, True, rows, channels, dh.data_ptr(), 0, 0, dc.data_ptr(), gates.data_ptr(), c.data_ptr(),
            c_prev.data_ptr(), da.data_ptr(), dc_prev.data_ptr(), threads,
        )  # fmt: skip
        return h, c, da, dc_prev

    return step


def gates_contenders(shape: Shape, *, with_compiled: bool) -> list[Contender]:
    """Return all contenders of a shape in both dtypes, checked against float64: h by value, the others by norms."""
    rng = torch.Generator().manual_seed(0)
    state = (shape.batch, shape.channels, shape.height, shape.width)
    sizes = ((shape.batch, 4 * shape.channels, *state[2:]), state, state, state)
    exact_inputs = tuple(rounded(torch.randn(*size, generator=rng)) for size in sizes)
    exact, contenders = by_autograd(pointwise, exact_inputs)(), list[Contender]()
    for dtype in (F32, BF16):
        inputs = tuple(tensor.to(dtype) for tensor in exact_inputs)
        a, c_prev, dh, dc = inputs
        steps = {
            "eager": by_autograd(pointwise, inputs),
            "eager by hand": by_hand(forward_by_hand, backward_by_hand, inputs),
        }
        if with_compiled:
            torch._dynamo.reset()
            steps["compile"] = by_autograd(compiled(pointwise), inputs)
            steps["compile by hand"] = by_hand(compiled(forward_by_hand), compiled(backward_by_hand), inputs)
        steps["cpu"] = fused((a, c_prev.float(), dh, dc.float()))
        work = {"gb_s": float(moved_bytes(shape.elements // shape.steps, dtype))}
        for name, step in steps.items():
            group = "compiled" if name.startswith("compile") else ""
            contender = Contender(name, step, name_of(dtype), work, ours=name == "cpu", group=group)
            contenders.append(checked(contender, differences(step(), exact, num_values=1), dtype))
        contenders.append(copy_limit(work["gb_s"], name_of(dtype)))
    return contenders
