"""The ConvLSTM recurrence on Triton: allocates, packs the weight, and launches a kernel of `steps` for each step.

Every tensor is dense in the order G,T,B,H,W,channels and is seen as (G,T,B,channels,H,W); a state has no T. T launches
a pass and one that packs the weight, which T = 1 without h0 does without; dh0 takes one more. Nothing is allocated and
nothing waits for the device inside the loops over T. Triton is imported on first use: it is not on every platform.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rlv2v.kernels.convolution import Inputs
from rlv2v.kernels.layout import empty_frames
from rlv2v.kernels.triton.tiles import Tile, backward_tile, forward_tile

Grid = tuple[int, int, int]
Launch = Callable[[Any, Grid, dict[str, Any]], None]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACK_BLOCK = 1024
OLDEST = (8, 0)  # bfloat16 tensor cores and cp.async


def launch(kernel: Any, grid: Grid, arguments: dict[str, Any]) -> None:
    """Run a Triton kernel; what `TritonRecurrence` takes in its place may count, or record, instead."""
    kernel[grid](**arguments)


def interpreted() -> bool:
    """Whether the kernels were made under TRITON_INTERPRET=1, which is read once, when they are."""
    from triton.runtime.interpreter import InterpretedFunction

    from rlv2v.kernels.triton import kernels

    return isinstance(kernels.forward_step, InterpretedFunction)


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on a device; None when it can."""
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


class TritonRecurrence:
    """A backend of the shared driver: the recurrence forward and backward.

    Args:
        launch: runs a kernel, given its grid and its arguments by name.
        capability: the compute capability to take the tiles of; by default the device's, or 8.6 where it has none.
        tile: a tile in place of those, forward and backward, to try it.
    """

    def __init__(
        self, launch: Launch = launch, capability: tuple[int, int] | None = None, tile: Tile | None = None
    ) -> None:
        self.launch = launch
        self.capability = capability
        self.tile = tile

    def forward(
        self, inputs: Inputs, w_h: Tensor, h0: Tensor | None, c0: Tensor | None, keep_gates: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `rlv2v.kernels.driver.Recurrence`."""
        return self.recur(inputs.whole(with_bias=False), w_h, h0, c0, keep_gates, inputs.bias.contiguous())

    def recur(
        self,
        a: Tensor,
        w_h: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        keep_gates: bool,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All hidden states, cells and, when kept, gates of a sequence.

            a_t += w_h * h_{t-1};  i, f, o = sigmoid;  g = tanh;  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)

        Args:
            a: (G,T,B,4C,H,W), pre-activations from x, gate order i, f, o, g; overwritten by the gates
                when these are kept, so that a training step holds one such buffer.
            w_h: (G,4C,C,k,k), contiguous or channels-last, a's dtype.
            h0: (G,B,C,H,W), a's dtype, or None for zero.
            c0: (G,B,C,H,W) float32, or None for zero.
            keep_gates: whether the activated gates are returned.
            bias: (G,4C), a's dtype, or None where a includes it.

        Returns:
            hs (G,T,B,C,H,W) in a's dtype; cs the same in float32; gates (G,T,B,4C,H,W), float32 for such an a, else
            float16, or None.
        """
        from rlv2v.kernels.triton import kernels

        require_dense(a, h0, c0)
        groups, num_steps, batch, _, height, width = a.shape
        channels = w_h.shape[2]
        pixels = groups * batch * height * width
        tile = self.tile or forward_tile(channels, pixels, a.dtype, self.capability_of(a))
        sizes = common_arguments(a, w_h, tile)
        grid = grid_of(a, w_h, tile)
        hs = empty_frames(a, groups, num_steps, batch, channels, height, width)
        cs = empty_frames(a, *hs.shape, dtype=torch.float32)
        gates = None
        if keep_gates:
            gates = a if a.dtype == torch.float32 else a.view(torch.float16)
        with device_guard(a):
            packed = None if h0 is None and num_steps == 1 else self.pack(w_h, tile, transposed=False)
            for t in range(num_steps):
                arguments = {"a": a, "bias": bias, "weight": packed, "hs": hs, "cs": cs, "gates": gates, "t": t} | sizes
                arguments |= before(t, num_steps, h=(hs, h0), c=(cs, c0))
                self.launch(kernels.forward_step, grid, arguments)
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
        """Gradients of the pre-activations and, when needed, of the state before the first step.

            dh = dhs_t + w_h^T * da_{t+1};  dc = dcs_t + carry + dh o (1 - tanh(c_t)^2);  carry = dc f

        Args:
            dhs: (G,T,B,C,H,W), w_h's dtype.
            dcs: (G,T,B,C,H,W) float32, or None for zero.
            gates: (G,T,B,4C,H,W) as `forward` returned them; or, not `activated`, pre-activations in dhs' dtype.
            activated: which of the two.
            cs, c0: the cells that `forward` returned and took.
            w_h: (G,4C,C,k,k), contiguous or channels-last.
            need_state: whether dh0 and dc0 are returned.

        Returns:
            da (G,T,B,4C,H,W) in dhs' dtype; dh0 (G,B,C,H,W) in dhs' dtype and dc0 float32, or None twice.
        """
        from rlv2v.kernels.triton import kernels

        require_dense(dhs, dcs, gates, cs, c0)
        groups, num_steps, batch, channels, height, width = dhs.shape
        pixels = groups * batch * height * width
        tile = self.tile or backward_tile(channels, pixels, dhs.dtype, self.capability_of(dhs))
        sizes = common_arguments(dhs, w_h, tile)
        grid = grid_of(dhs, w_h, tile)
        da = empty_frames(dhs, *gates.shape)
        carry = empty_frames(dhs, groups, batch, channels, height, width, dtype=torch.float32)
        dh0 = empty_frames(dhs, *carry.shape) if need_state else None
        with device_guard(dhs):
            packed = None if num_steps == 1 and not need_state else self.pack(w_h, tile, transposed=True)
            for t in reversed(range(num_steps)):
                last = t == num_steps - 1
                arguments = {"dhs": dhs, "dcs": dcs, "gates": gates, "cs": cs, "carry": carry, "da": da, "t": t} | sizes
                arguments |= {"weight": packed, "ACTIVATED": activated} | before(t, num_steps, c=(cs, c0))
                arguments |= {"da_next": None if last else da, "carry_before": None if last else carry}
                self.launch(kernels.backward_step, grid, arguments)
            if need_state:
                self.launch(kernels.backward_state, grid, {"da": da, "weight": packed, "dh0": dh0} | sizes)
        return da, dh0, carry if need_state else None

    def pack(self, w_h: Tensor, tile: Tile, *, transposed: bool) -> Tensor:
        """The weight in the order in which the programs of one pass read it; see `kernels.pack_weight`."""
        from rlv2v.kernels.triton import kernels

        groups, _, channels, k, _ = w_h.shape
        rows = round_up(4 * channels if transposed else channels, tile.bk)
        columns = round_up(channels, tile.bc) * (1 if transposed else 4)
        packed = torch.empty(groups, k * k * rows * columns, dtype=w_h.dtype, device=w_h.device)
        strides = {"row_stride": w_h.stride(2), "tap_stride": w_h.stride(4)}
        arguments = {"weight": w_h, "packed": packed, "C": channels, "K": k} | strides
        arguments |= {"BC": tile.bc, "BK": tile.bk, "TRANSPOSED": transposed, "BLOCK": PACK_BLOCK}
        grid = (round_up(packed.shape[1], PACK_BLOCK) // PACK_BLOCK, groups, 1)
        self.launch(kernels.pack_weight, grid, arguments | {"num_warps": 4, "enable_fp_fusion": True})
        return packed

    def capability_of(self, tensor: Tensor) -> tuple[int, int]:
        if self.capability is not None:
            return self.capability
        return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 6)


def common_arguments(frames: Tensor, w_h: Tensor, tile: Tile) -> dict[str, Any]:
    """What every launch of a pass has in common: sizes, tile and how to compile."""
    _, num_steps, batch, _, height, width = frames.shape
    channels, k = w_h.shape[2], w_h.shape[3]
    pixels = batch * height * width
    return {
        "height": height,
        "width": width,
        "pixels": pixels,
        "steps": num_steps,
        "C": channels,
        "K": k,
        "BM": tile.bm,
        "BC": tile.bc,
        "BK": tile.bk,
        "UPCAST": frames.dtype == torch.bfloat16 and interpreted(),
        "WIDE": round_up(pixels, tile.bm) * 4 * channels >= 2**31,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.maxnreg,
        "enable_fp_fusion": True,
    }


def before(t: int, num_steps: int, **states: tuple[Tensor, Tensor | None]) -> dict[str, Any]:
    """The state before step t: the step before in a sequence's own tensor, or at t = 0 the one that was given."""
    place = {"before_steps": num_steps, "before_t": t - 1} if t else {"before_steps": 1, "before_t": 0}
    return place | {f"{name}_before": own if t else given for name, (own, given) in states.items()}


def grid_of(frames: Tensor, w_h: Tensor, tile: Tile) -> Grid:
    groups, _, batch, _, height, width = frames.shape
    return -(-batch * height * width // tile.bm), -(-w_h.shape[2] // tile.bc), groups


def require_dense(*tensors: Tensor | None) -> None:
    """The kernels take addresses, not strides: the driver's invariant, whose breach would read other numbers."""
    for tensor in tensors:
        assert tensor is None or tensor.movedim(-3, -1).is_contiguous(), tensor.stride()


def device_guard(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
