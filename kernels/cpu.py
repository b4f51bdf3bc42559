"""The recurrence on the CPU: oneDNN convolves, `csrc/convlstm` does all that is pointwise in a step in one pass.

    forward    w_x * x_t + bias, w_h * h_{t-1}  ->  gates, c_t, h_t
    backward   dhs_t, w_h^T * da_{t+1}, dc      ->  da_t, dc
Elements of (B,C,H,W) that the pointwise part moves in a step: forward 9 read, 6 written, backward 9 read, 5 written.
float32, bfloat16, float16; AVX-512, AVX2 or portable, picked at run time; as many threads as torch has. See
`rlv2v.kernels.driver.Recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.convolution import Inputs, convolver, transposed
from rlv2v.kernels.layout import dense, empty_frames, gates_dtype

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK_BYTES = 4 << 20  # of pre-activations made at once: they are still in the caches when their step comes
POOLED_BYTES = 1 << 20  # smaller buffers are used again by malloc itself


class CpuRecurrence:
    """See the module."""

    def forward(
        self, inputs: Inputs, w_h: Tensor, h0: Tensor | None, c0: Tensor | None, keep_gates: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        groups, steps, batch, _, height, width = inputs.shape
        x, channels = inputs.x, w_h.shape[2]
        state = (batch, channels, height, width)
        hs = memory(x, groups, steps, *state)
        cs = memory(x, groups, steps, *state, dtype=torch.float32)
        gates = memory(x, *inputs.shape, dtype=gates_dtype(x.dtype)) if keep_gates else None
        code, rows, threads = CODES[x.dtype], batch * height * width, torch.get_num_threads()
        chunk = max(1, CHUNK_BYTES // max(1, rows * 4 * channels * x.element_size()))
        at_h, at_c, at_gates = Steps(hs), Steps(cs), Steps(gates)
        for g in range(groups):
            hidden = convolver(w_h[g], hs.shape[2:], steps)
            h = None if h0 is None else h0[g]
            c = 0 if c0 is None else c0[g].data_ptr()
            of_steps = hs[g].unbind(0)
            for t in range(steps):
                if t % chunk == 0:
                    a = inputs.chunk(g, t, min(t + chunk, steps))
                    at_a = Steps(a.unsqueeze(0))
                a_h = None if h is None else convolved(hidden, h)
                _native.gates_forward(
                    code,
                    rows,
                    channels,
                    at_a(0, t % chunk),
                    address(a_h),
                    c,
                    at_h(g, t),
                    at_c(g, t),
                    at_gates(g, t),
                    threads,
                )
                h, c = of_steps[t], at_c(g, t)
        return hs, cs, gates

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
        groups, steps, *state = dhs.shape
        batch, channels, height, width = state
        da = memory(dhs, *gates.shape)
        dh0 = empty_frames(dhs, groups, *state) if need_state else None
        carry = empty_frames(cs, groups, *state)
        code, rows, threads = CODES[dhs.dtype], batch * height * width, torch.get_num_threads()
        at_dhs, at_dcs, at_gates, at_c, at_da = (Steps(tensor) for tensor in (dhs, dcs, gates, cs, da))
        for g in range(groups):
            hidden = convolver(transposed(w_h[g]), da.shape[2:], steps)
            at_carry, of_steps = carry[g].data_ptr(), da[g].unbind(0)
            c_first = 0 if c0 is None else c0[g].data_ptr()
            dh = None
            for t in reversed(range(steps)):
                _native.gates_backward(
                    code,
                    activated,
                    rows,
                    channels,
                    at_dhs(g, t),
                    address(dh),
                    at_dcs(g, t),
                    0 if t == steps - 1 else at_carry,
                    at_gates(g, t),
                    at_c(g, t),
                    at_c(g, t - 1) if t else c_first,
                    at_da(g, t),
                    at_carry,
                    threads,
                )
                if t or need_state:
                    dh = convolved(hidden, of_steps[t])
            if dh0 is not None and dh is not None:
                dh0[g] = dh
        return da, dh0, carry if need_state else None


class Steps:
    """Addresses of the frames of a step of a group in a dense (G,T,...) tensor, 0 for None; slices cost 3 us each."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.first, self.group, self.step = 0, 0, 0
        if tensor is not None:
            size = tensor.element_size()
            self.first, self.group, self.step = tensor.data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size

    def __call__(self, group: int, step: int) -> int:
        return self.first + group * self.group + step * self.step


def convolved(convolve: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """The convolution of frames (B,C,H,W), channels last in memory."""
    result = convolve(frames)
    return result if result.is_contiguous(memory_format=torch.channels_last) else dense(result)


def memory(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`empty_frames` in memory that is used again, where it is large: new pages would cost up to a tenth of a layer."""
    *outer, channels, height, width = shape
    dtype = dtype or like.dtype
    count = prod(shape)
    if count * dtype.itemsize < POOLED_BYTES:
        return empty_frames(like, *shape, dtype=dtype)
    flat = torch.frombuffer(_native.Block(count * dtype.itemsize), dtype=dtype, count=count)
    return flat.view(*outer, height, width, channels).movedim(-1, -3)


def address(tensor: Tensor | None) -> int:
    """Of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
