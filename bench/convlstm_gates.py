"""The gates alone: the pointwise part of one step, forward and backward, of what a convolution just made.

    forward   a (B,4C,H,W), c_prev -> h, c        backward   dh, dc -> da, dc_prev
    eager            chunk, sigmoid, tanh, products through torch's autograd: what a user's layer runs
    eager by hand    no autograd: as few of torch's operators as it takes, the backward written out
    compile          torch.compile of the first; `compile by hand`: of the second, two graphs
    cpu              rlv2v._native, one pass forward and one backward
Everybody allocates its results anew, keeps what its backward needs, and has its inputs dense in the layout that it gets
in a layer: torch's own for the peers, channels-last for ours. In 16 bits the peers' cells have 16 bits too, as under
autocast, ours 32. GB/s are of the bytes that the fused form moves, for everybody; the limit is a copy that moves as
many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from convlstm_layer import Shape
from convlstm_peers import BF16, F32, compiled, pointwise
from convlstm_rows import Case, Contender, Row, case_rows, copy, differences, name_of, rounded
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.cpu import CODES
from rlv2v.kernels.frames import gates_dtype

Step = Callable[[], tuple[Tensor, ...]]
Function = Callable[..., tuple[Tensor, ...]]


def moved_bytes(elements: int, dtype: torch.dtype) -> int:
    """Forward: a, c_prev read, h, c, gates written. Backward: dh, dc, gates, c, c_prev read, da, dc_prev written."""
    size, of_gates, cell = dtype.itemsize, gates_dtype(dtype).itemsize, 4
    forward = 4 * size + cell + size + cell + 4 * of_gates
    backward = size + cell + 4 * of_gates + cell + cell + 4 * size + cell
    return elements * (forward + backward)


def by_autograd(cell: Function, given: tuple[Tensor, ...]) -> Step:
    """`h, c, da, dc_prev` through torch's autograd."""
    a, c_prev, dh, dc = given
    a, c_prev = a.clone().requires_grad_(), c_prev.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        h, c = cell(a, c_prev)
        return h, c, *torch.autograd.grad((h, c), (a, c_prev), (dh, dc))

    return step


def forward_by_hand(a: Tensor, c_prev: Tensor) -> tuple[Tensor, ...]:
    """`h, c`, the activated gates and tanh c."""
    channels = c_prev.shape[1]
    sigmoids, g = a[:, : 3 * channels].sigmoid(), a[:, 3 * channels :].tanh()
    i, f, o = sigmoids.chunk(3, 1)
    c = torch.addcmul(i * g, f, c_prev)
    tanh_c = c.tanh()
    return o * tanh_c, c, sigmoids, g, tanh_c


def backward_by_hand(
    dh: Tensor, dc: Tensor, c_prev: Tensor, sigmoids: Tensor, g: Tensor, tanh_c: Tensor
) -> tuple[Tensor, Tensor]:
    """`da, dc_prev`."""
    i, f, o = sigmoids.chunk(3, 1)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    d_sigmoids = torch.cat((dc * g, dc * c_prev, dh * tanh_c), 1)
    return torch.cat((d_sigmoids * sigmoids * (1 - sigmoids), dc * i * (1 - g * g)), 1), dc * f


def by_hand(forward: Function, backward: Function, given: tuple[Tensor, ...]) -> Step:
    """`h, c, da, dc_prev` without autograd."""
    a, c_prev, dh, dc = given

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            h, c, *kept = forward(a, c_prev)
            return h, c, *backward(dh, dc, c_prev, *kept)

    return step


def fused(given: tuple[Tensor, ...]) -> Step:
    """Ours: a, dh of the dtype, c_prev and dc float32, channels-last."""
    a, c_prev, dh, dc = (tensor.contiguous(memory_format=torch.channels_last) for tensor in given)
    batch, channels, height, width = c_prev.shape
    code, rows, kept = CODES[a.dtype], batch * height * width, gates_dtype(a.dtype)

    def step() -> tuple[Tensor, ...]:
        h, c, gates = torch.empty_like(dh), torch.empty_like(c_prev), torch.empty_like(a, dtype=kept)
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


def name_of_step(shape: Shape) -> str:
    return f"gates B{shape.batch} C{shape.channels} {shape.height}x{shape.width}"


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """`a, c_prev, dh, dc` in float64, unit-sized."""
    rng = torch.Generator().manual_seed(0)
    state = (shape.batch, shape.channels, shape.height, shape.width)
    sizes = ((shape.batch, 4 * shape.channels, *state[2:]), state, state, state)
    return tuple(rounded(torch.randn(*size, generator=rng)) for size in sizes)


def gates_case(shape: Shape, *, with_compiled: bool) -> Case:
    """All contenders of a shape, both dtypes, checked against float64: h as a value, the others by ratio of norms."""
    exact_given = inputs(shape)
    exact = by_autograd(pointwise, exact_given)()
    case = Case(name_of_step(shape), "forward+backward", [])
    for dtype in (F32, BF16):
        given = tuple(tensor.to(dtype) for tensor in exact_given)
        a, c_prev, dh, dc = given
        steps = {
            "eager": by_autograd(pointwise, given),
            "eager by hand": by_hand(forward_by_hand, backward_by_hand, given),
        }
        if with_compiled:
            torch._dynamo.reset()
            steps["compile"] = by_autograd(compiled(pointwise), given)
            steps["compile by hand"] = by_hand(compiled(forward_by_hand), compiled(backward_by_hand), given)
        steps["cpu"] = fused((a, c_prev.float(), dh, dc.float()))
        work = {"gb_s": float(moved_bytes(shape.elements // shape.steps, dtype))}
        for name, step in steps.items():
            ours = name == "cpu"
            label = name if dtype == F32 and not ours else f"{name} {name_of(dtype)}"
            case.found[label] = differences(step(), exact, num_values=1)
            backend, group = "cpu" if ours else "", f"compiled {name_of(dtype)}" if name.startswith("compile") else ""
            case.contenders.append(Contender(label, dtype, step, work, ours=ours, backend=backend, group=group))
        case.contenders.append(copy(work["gb_s"], dtype))
    return case


def gates_rows(shape: Shape, rounds: int) -> list[Row]:
    """Check, time, print."""
    return case_rows(gates_case(shape, with_compiled=True), rounds)
