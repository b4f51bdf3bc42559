"""The recurrence in Triton: allocates, packs the weight, and launches one kernel of `triton.kernels` a step.

A pass takes T launches and one that packs the weight, which T = 1 without h0 does not need; dh0 takes one more. Nothing
is allocated and nothing waits for the device inside the loops over T. Triton is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rlv2v.kernels.driver import BackwardOperands, Operands, Outputs, Problem
from rlv2v.kernels.layout import empty_frames, is_dense
from rlv2v.kernels.triton.tiles import Tile, backward_tile, forward_tile

Grid = tuple[int, int, int]
Launch = Callable[[Any, Grid, dict[str, Any]], None]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACK_BLOCK = 1024
OLDEST = (8, 0)  # bfloat16 tensor cores and cp.async


def launch(kernel: Any, grid: Grid, arguments: dict[str, Any]) -> None:
    """Run a Triton kernel. `TritonRecurrence` takes other functions in its place, which may count or record."""
    kernel[grid](**arguments)


def interpreted() -> bool:
    """Return whether the kernels were made under TRITON_INTERPRET=1, which is read once, when they are."""
    from rlv2v.kernels.triton import kernels

    return bool(kernels.INTERPRETED.value)


def unavailable_reason(device: torch.device) -> str | None:
    """Return why this backend cannot run on a device, or None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"a {device.type} tensor needs TRITON_INTERPRET=1, set before triton is imported"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability {'.'.join(map(str, capability))} is below {'.'.join(map(str, OLDEST))}"
    return None


@dataclass(frozen=True)
class TritonRecurrence:
    """Run the recurrence as one fused kernel a step; see `rlv2v.kernels.driver.Recurrence`.

    Args:
        launch: runs a kernel, given its grid and its arguments by name.
        capability: the compute capability whose tiles are taken; by default the device's, or 8.6 if it has none.
        tile: a tile to try in place of those, forward and backward.
    """

    launch: Launch = launch
    capability: tuple[int, int] | None = None
    tile: Tile | None = None

    def unsupported_reason(self, problem: Problem) -> str | None:
        if problem.dtype not in DTYPES:
            return f"it computes in float32 at most, x is {problem.dtype}"
        return unavailable_reason(problem.device)

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        a, bias = operands.convolve_x(with_bias=False), operands.bias.contiguous()
        return self.recur(a, operands.w_h, operands.h0, operands.c0, keep_gates, bias)

    def recur(
        self, a: Tensor, w_h: Tensor, h0: Tensor | None, c0: Tensor | None, keep_gates: bool, bias: Tensor
    ) -> Outputs:
        """Run the recurrence on the pre-activations that come from x.

        Args:
            a: (G,T,B,4C,H,W); overwritten by the gates if these are kept, so that a step holds one such buffer.
            w_h: (G,4C,C,k,k), contiguous or channels-last, in a's dtype.
            h0: (G,B,C,H,W) in a's dtype, or None for zero.
            c0: (G,B,C,H,W) float32, or None for zero.
            keep_gates: whether the activated gates are returned.
            bias: (G,4C) in a's dtype, which a does not include.
        """
        from rlv2v.kernels.triton import kernels

        require_dense(a, h0, c0)
        groups, steps, batch, _, height, width = a.shape
        tile, grid, sizes = self.plan(a, w_h, forward_tile)
        hs = empty_frames(a, groups, steps, batch, w_h.shape[2], height, width)
        cs = empty_frames(a, *hs.shape, dtype=torch.float32)
        gates = None
        if keep_gates:
            gates = a if a.dtype == torch.float32 else a.view(torch.float16)
        tensors = {"a": a, "bias": bias, "hs": hs, "cs": cs, "gates": gates}
        with device_guard(a):
            tensors["weight"] = None if h0 is None and steps == 1 else self.pack(w_h, tile, transposed=False)
            for t in range(steps):
                tensors |= {"h_prev": hs, "c_prev": cs} if t else {"h_prev": h0, "c_prev": c0}
                self.launch(kernels.forward_step, grid, {**tensors, "t": t, **sizes})
        return Outputs(hs, cs, gates)

    def backward(self, operands: BackwardOperands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from rlv2v.kernels.triton import kernels

        dhs, dcs, gates, activated, cs, c0, w_h, need_state = operands
        require_dense(dhs, dcs, gates, cs, c0)
        groups, steps, *state = dhs.shape
        tile, grid, sizes = self.plan(dhs, w_h, backward_tile)
        da = empty_frames(dhs, *gates.shape)
        carry = empty_frames(dhs, groups, *state, dtype=torch.float32)
        dh0 = empty_frames(dhs, groups, *state) if need_state else None
        tensors = {"dhs": dhs, "dcs": dcs, "gates": gates, "cs": cs, "carry": carry, "da": da}
        with device_guard(dhs):
            weight = None if steps == 1 and not need_state else self.pack(w_h, tile, transposed=True)
            tensors |= {"weight": weight, "da_next": None, "carry_next": None}
            for t in reversed(range(steps)):
                tensors["c_prev"] = cs if t else c0
                self.launch(kernels.backward_step, grid, {**tensors, "t": t, "ACTIVATED": activated, **sizes})
                tensors |= {"da_next": da, "carry_next": carry}
            if need_state:
                self.launch(kernels.backward_state, grid, {"da": da, "weight": weight, "dh0": dh0, **sizes})
        return da, dh0, carry if need_state else None

    def pack(self, w_h: Tensor, tile: Tile, *, transposed: bool) -> Tensor:
        """Return the weight in the order in which the programs of one pass read it; see `kernels.pack_weight`."""
        from rlv2v.kernels.triton import kernels

        groups, _, channels, k, _ = w_h.shape
        rows = round_up(4 * channels if transposed else channels, tile.bk)
        columns = round_up(channels, tile.bc) * (1 if transposed else 4)
        packed = torch.empty(groups, k * k * rows * columns, dtype=w_h.dtype, device=w_h.device)
        arguments = {"weight": w_h, "packed": packed, "row_stride": w_h.stride(2), "tap_stride": w_h.stride(4)}
        arguments |= {"C": channels, "K": k, "BC": tile.bc, "BK": tile.bk, "TRANSPOSED": transposed}
        arguments |= {"BLOCK": PACK_BLOCK, "num_warps": 4, "enable_fp_fusion": True}
        grid = (round_up(packed.shape[1], PACK_BLOCK) // PACK_BLOCK, groups, 1)
        self.launch(kernels.pack_weight, grid, arguments)
        return packed

    def plan(self, frames: Tensor, w_h: Tensor, tile_of: Callable[..., Tile]) -> tuple[Tile, Grid, dict[str, Any]]:
        """Return a pass's tile, its grid, and the arguments that its launches share: sizes and how to compile."""
        groups, steps, batch, _, height, width = frames.shape
        channels, k, pixels = w_h.shape[2], w_h.shape[3], batch * height * width
        capability = self.capability
        if capability is None:
            capability = torch.cuda.get_device_capability(frames.device) if frames.is_cuda else (8, 6)
        tile = self.tile or tile_of(channels, groups * pixels, frames.dtype, capability)
        grid = (-(-pixels // tile.bm), -(-channels // tile.bc), groups)
        sizes = {"height": height, "width": width, "pixels": pixels, "steps": steps, "C": channels, "K": k}
        sizes |= {"BM": tile.bm, "BC": tile.bc, "BK": tile.bk}
        sizes["WIDE"] = round_up(pixels, tile.bm) * 4 * channels >= 2**31
        sizes["TF32"] = frames.dtype == torch.float32 and torch.backends.cudnn.allow_tf32  # as the convolution of x
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.maxnreg}
        return tile, grid, {**sizes, **options, "enable_fp_fusion": True}


def require_dense(*tensors: Tensor | None) -> None:
    """Assert the driver's invariant: the kernels take addresses, not strides, and would read other numbers."""
    for tensor in tensors:
        assert tensor is None or is_dense(tensor), tensor.stride()


def device_guard(tensor: Tensor) -> Any:
    """Return a context in which the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
