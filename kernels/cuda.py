"""The recurrence in CUDA, one launch a pass: the weight of the hidden state stays on chip through all T steps.

    forward, t = 0..T-1:    a_t += w_h * h_{t-1};   i, f, o = sigmoid(a);   g = tanh(a)
                            c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
    backward, t = T-1..0:   dh = dhs_t + w_h^T * da_{t+1};   dc = dcs_t + carry + dh o (1 - tanh^2 c_t)
                            da_i, da_f, da_o = dc g, dc c_{t-1}, dh tanh c_t through sigmoid'; da_g = dc i through tanh'
                            carry = dc f;   after t = 0:  dh0 = w_h^T * da_0,  dc0 = carry
Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes; weights that stay on chip: Diamos et al. 2016,
"Persistent RNNs". The kernels are in csrc/convlstm.

Shapes and layout are those of `rlv2v.kernels.driver`; w_h is contiguous here. G networks of one shape run side by side.
Dtypes: float16 or bfloat16 for a, w_h, h and their gradients, float32 for c, float16 for gates; maths in float32.
The launches zero the counters of the barriers between steps.
Limit: these barriers and the reads of h or da from L2; w_h is read from memory once a pass.
Fits: a slice of 8 hidden channels needs k*k*64*C bytes of shared memory, C padded to 16, and a stage of the state
beside it; all slices of all groups are resident at once. For one group that is C <= 736, 160, 48 for k = 1, 3, 5 on 46
SMs of 99 KB (sm_86) and C <= 1776, 384, 128 on 132 SMs of 227 KB (sm_90).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.driver import BackwardOperands, Operands, Outputs, Problem
from rlv2v.kernels.layout import address, empty_frames, is_dense

TensorOrNone = TypeVar("TensorOrNone", Tensor, Tensor | None)
CAPABILITIES = ((8, 6), (8, 9), (9, 0))
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
RESERVED_BYTES = 1024  # of a multiprocessor's shared memory, which a block cannot ask for


def unavailable_reason(device: torch.device) -> str | None:
    """Return why the kernels cannot run on the device, or None if they can."""
    if not _native.has_cuda:
        return "rlv2v was built without CUDA (no nvcc was found)"
    if device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"is built for compute capability {CAPABILITIES}, {device} has {capability}"
    return None


def unfit_reason(channels: int, kernel: int, dtype: torch.dtype, properties: Any, groups: int = 1) -> str | None:
    """Return why a state of so many channels does not fit a device, or None if it does at any B, H, W.

    properties: of the device, as `torch.cuda.get_device_properties` returns them; `multi_processor_count` and
        `shared_memory_per_multiprocessor` are read.
    """
    if dtype not in DTYPES:
        return f"dtype must be float16 or bfloat16, got {dtype}"
    # The smallest tile with its halo is 8 x 8 pixels, and every frame can be cut into those.
    shape = _native.ConvLstmShape(groups, 1, 1, channels, 8, 8, kernel)
    shared_bytes = properties.shared_memory_per_multiprocessor - RESERVED_BYTES
    for backward in (False, True):
        plan = _native.persistent_plan(shape, backward, properties.multi_processor_count, shared_bytes)
        if isinstance(plan, str):
            return plan
    return None


class CudaRecurrence:
    """Run the recurrence in one launch a pass; see the module and `rlv2v.kernels.driver.Recurrence`."""

    def unsupported_reason(self, problem: Problem) -> str | None:
        reason = unavailable_reason(problem.device)
        if reason is not None:
            return reason
        properties = torch.cuda.get_device_properties(problem.device)
        return unfit_reason(problem.channels, problem.kernel, problem.dtype, properties, problem.groups)

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        return self.recur(operands.convolve_x(), operands.w_h, operands.h0, operands.c0, keep_gates)

    def recur(self, a: Tensor, w_h: Tensor, h0: Tensor | None, c0: Tensor | None, keep_gates: bool) -> Outputs:
        """Run the recurrence on the pre-activations a (G,T,B,4C,H,W) that come from x.

        Raises:
            ValueError: an argument that does not fit the others or the device.
            RuntimeError: an error of CUDA.
        """
        w_h, h0, c0 = aligned(w_h.contiguous()), aligned(h0), aligned(c0)
        groups, steps, batch, height, width, channels, _ = sizes(a, w_h)
        state, sequence = (groups, batch, channels, height, width), (groups, steps, batch, channels, height, width)
        check("a", a, (groups, steps, batch, 4 * channels, height, width), w_h.dtype, w_h.device)
        check("h0", h0, state, a.dtype, a.device)
        check("c0", c0, state, torch.float32, a.device)
        hs, cs = empty_frames(a, *sequence), empty_frames(a, *sequence, dtype=torch.float32)
        gates = empty_frames(a, *a.shape, dtype=torch.float16) if keep_gates else None
        counters = torch.empty(groups, _native.persistent_counters, dtype=torch.int32, device=a.device)
        tensors = {"a": a, "w_h": w_h, "h0": h0, "c0": c0, "hs": hs, "cs": cs, "gates": gates, "counters": counters}
        with torch.cuda.device(a.device):
            _native.persistent_forward(*launch(a, w_h), **addresses(tensors))
        return Outputs(hs, cs, gates)

    def backward(self, operands: BackwardOperands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the recurrence backwards; raises as `recur` does."""
        dhs, dcs, gates, activated, cs, c0, w_h, need_state = operands
        dhs, dcs, c0, w_h = aligned(dhs), aligned(dcs), aligned(c0), aligned(w_h.contiguous())
        groups, steps, batch, height, width, channels, _ = sizes(gates, w_h)
        state, sequence = (groups, batch, channels, height, width), (groups, steps, batch, channels, height, width)
        check("gates", gates, tuple(gates.shape), torch.float16 if activated else dhs.dtype, dhs.device)
        check("dhs", dhs, sequence, w_h.dtype, w_h.device)
        check("dcs", dcs, sequence, torch.float32, dhs.device)
        check("cs", cs, sequence, torch.float32, dhs.device)
        check("c0", c0, state, torch.float32, dhs.device)
        da = empty_frames(dhs, *gates.shape)
        dh0 = empty_frames(dhs, *state) if need_state else None
        dc0 = empty_frames(dhs, *state, dtype=torch.float32)  # the carry, needed or not
        counters = torch.empty(groups, _native.persistent_counters, dtype=torch.int32, device=dhs.device)
        tensors = {"dhs": dhs, "dcs": dcs, "gates": gates, "cs": cs, "c0": c0, "w_h": w_h}
        tensors |= {"da": da, "dh0": dh0, "dc0": dc0, "counters": counters}
        with torch.cuda.device(dhs.device):
            _native.persistent_backward(*launch(gates, w_h), activated=activated, **addresses(tensors))
        return da, dh0, dc0 if need_state else None


def sizes(gates: Tensor, w_h: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """Return G,T,B,H,W,C,k of a tensor (G,T,B,4C,H,W) and the weight; ValueError if the two do not agree."""
    if w_h.dim() != 5 or w_h.shape[1] != 4 * w_h.shape[2] or w_h.shape[3] != w_h.shape[4] or not w_h.is_contiguous():
        raise ValueError(f"cuda: w_h must be (G,4C,C,k,k) and contiguous, got {tuple(w_h.shape)}")
    if w_h.dtype not in DTYPES:
        raise ValueError(f"cuda: w_h must be float16 or bfloat16, got {w_h.dtype}")
    if gates.dim() != 6 or gates.shape[0] != w_h.shape[0] or gates.shape[3] != w_h.shape[1]:
        expected = (w_h.shape[0], "T", "B", w_h.shape[1], "H", "W")
        raise ValueError(f"cuda: the gates' tensor must be {expected}, got {tuple(gates.shape)}")
    groups, steps, batch, _, height, width = gates.shape
    return groups, steps, batch, height, width, w_h.shape[2], w_h.shape[3]


def check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless the tensor is None or of this shape, dtype and device, and dense with channels last."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"cuda: {name} must be {dtype} {shape} on {device}, got {got}")
    if not is_dense(tensor):
        raise ValueError(f"cuda: {name} must be dense with C after H, W, got strides {tensor.stride()}")


def launch(gates: Tensor, w_h: Tensor) -> tuple[_native.ConvLstmShape, str, int, int]:
    """Return the first arguments of both passes: shape, dtype, device index, stream."""
    groups, steps, batch, height, width, channels, kernel = sizes(gates, w_h)
    index = torch.cuda.current_device() if w_h.device.index is None else w_h.device.index
    shape = _native.ConvLstmShape(groups, steps, batch, channels, height, width, kernel)
    return shape, DTYPES[w_h.dtype], index, torch.cuda.current_stream(w_h.device).cuda_stream


def addresses(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """Return the addresses of tensors by name, 0 for None."""
    return {name: address(tensor) for name, tensor in tensors.items()}


def aligned(tensor: TensorOrNone) -> TensorOrNone:
    """Return the tensor, or a copy if it does not begin at a multiple of 16 bytes, as a slice may not."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()
