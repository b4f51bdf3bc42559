"""The recurrence on the CPU: oneDNN convolves, `csrc/convlstm` does everything pointwise of a step in one pass.

    forward    w_x * x_t + bias, w_h * h_{t-1}  ->  gates, c_t, h_t
    backward   dhs_t, w_h^T * da_{t+1}, dc      ->  da_t, dc
The pointwise part moves, in elements of (B,C,H,W) a step: forward 9 read, 6 written; backward 9 read, 5 written.
It takes float32, bfloat16 and float16, picks AVX-512, AVX2 or portable code at run time, and as many threads as torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.convolution import convolver, transposed
from rlv2v.kernels.driver import BackwardOperands, Operands, Outputs, Problem
from rlv2v.kernels.layout import CODES, address, dense, empty_frames, empty_video, gates_dtype, video_strides

CHUNK_BYTES = 4 << 20  # of pre-activations made at once: they are still in the caches when their step comes
POOLED_BYTES = 1 << 20  # malloc itself reuses smaller buffers


class CpuRecurrence:
    """Run a step as a convolution and one pointwise pass; see `rlv2v.kernels.driver.Recurrence`."""

    def unsupported_reason(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it runs on the CPU, x is on {problem.device}"
        return None if problem.dtype in CODES else f"it computes in float32 at most, x is {problem.dtype}"

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        x, _, w_h, _, h0, c0 = operands
        groups, steps, batch, channels, height, width = operands.hs_shape
        hs = pooled_frames(x, *operands.hs_shape)
        cs = pooled_frames(x, *operands.hs_shape, dtype=torch.float32)
        gates = pooled_frames(x, *operands.gates_shape, dtype=gates_dtype(x.dtype)) if keep_gates else None
        code, rows, threads = CODES[x.dtype], batch * height * width, torch.get_num_threads()
        chunk = max(1, CHUNK_BYTES // max(1, rows * 4 * channels * x.element_size()))
        at_h, at_c, at_gates = StepAddresses(hs), StepAddresses(cs), StepAddresses(gates)
        for g in range(groups):
            convolve_h = convolver(w_h[g], hs.shape[2:], steps)
            h = None if h0 is None else h0[g]
            c_prev = address(None if c0 is None else c0[g])
            hs_of_steps = hs[g].unbind(0)
            for t in range(steps):
                if t % chunk == 0:
                    a = operands.convolve_steps(g, t, min(t + chunk, steps))
                    at_a = StepAddresses(a.unsqueeze(0))
                a_h = None if h is None else dense_result(convolve_h, h)
                now = at_a(0, t % chunk), address(a_h), c_prev, at_h(g, t), at_c(g, t), at_gates(g, t)
                _native.gates_forward(code, rows, channels, *now, threads)
                h, c_prev = hs_of_steps[t], at_c(g, t)
        return Outputs(hs, cs, gates)

    def backward(self, operands: BackwardOperands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dhs, dcs, gates, activated, cs, c0, w_h, need_state = operands
        groups, steps, *state = dhs.shape
        batch, channels, height, width = state
        da = pooled_frames(dhs, *gates.shape)
        dh0 = empty_frames(dhs, groups, *state) if need_state else None
        carry = empty_frames(cs, groups, *state)
        code, rows, threads = CODES[dhs.dtype], batch * height * width, torch.get_num_threads()
        at_dhs, at_dcs, at_gates, at_c, at_da = (StepAddresses(tensor) for tensor in (dhs, dcs, gates, cs, da))
        for g in range(groups):
            convolve_da = convolver(transposed(w_h[g]), da.shape[2:], steps)
            at_carry, da_of_steps = carry[g].data_ptr(), da[g].unbind(0)
            c_first = address(None if c0 is None else c0[g])
            dh = None
            for t in reversed(range(steps)):
                gradients = at_dhs(g, t), address(dh), at_dcs(g, t), 0 if t == steps - 1 else at_carry
                saved = at_gates(g, t), at_c(g, t), at_c(g, t - 1) if t else c_first
                _native.gates_backward(
                    code, activated, rows, channels, *gradients, *saved, at_da(g, t), at_carry, threads
                )
                if t or need_state:
                    dh = dense_result(convolve_da, da_of_steps[t])
            if dh0 is not None and dh is not None:
                dh0[g] = dh
        return da, dh0, carry if need_state else None


class StepAddresses:
    """Compute the address of a step of a group in a dense (G,T,...) tensor, 0 for None; a slice would cost 3 us."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.first, self.group, self.step = address(tensor), 0, 0
        if tensor is not None:
            self.group, self.step = (tensor.stride(axis) * tensor.element_size() for axis in (0, 1))

    def __call__(self, group: int, step: int) -> int:
        return self.first + group * self.group + step * self.step


def dense_result(convolve: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Return the convolution of frames (B,C,H,W) with channels last in memory."""
    result = convolve(frames)
    return result if result.is_contiguous(memory_format=torch.channels_last) else dense(result)


def pooled_frames(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return `empty_frames`, if large in reused memory: new pages would cost up to a tenth of a layer's time."""
    *outer, channels, height, width = shape
    dtype = dtype or like.dtype
    if prod(shape) * dtype.itemsize < POOLED_BYTES:
        return empty_frames(like, *shape, dtype=dtype)
    return from_pool(prod(shape), dtype).view(*outer, height, width, channels).movedim(-1, -3)


def pooled_video(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `empty_video`, if large in reused memory."""
    if prod(shape) * like.element_size() < POOLED_BYTES:
        return empty_video(like, shape)
    return from_pool(prod(shape), like.dtype).as_strided(shape, video_strides(shape))


def from_pool(count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` uninitialised elements of the pool."""
    return torch.frombuffer(_native.Block(count * dtype.itemsize), dtype=dtype, count=count)
