"""The public functions: check the arguments, bring them into the operators' form, and run a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from rlv2v.kernels import ops as _ops  # noqa: F401  (registers the operators)
from rlv2v.kernels.casts import autocast, autocast_weight
from rlv2v.kernels.dispatch import Selection, check_backend, select
from rlv2v.kernels.driver import Operands, Problem
from rlv2v.kernels.layout import dense, state_dtype
from rlv2v.kernels.reference import LIMITS, convlstm_ref


def convlstm(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a ConvLSTM over a sequence, or G of one shape at once.

        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g);  c' = f c + i g;  h' = o tanh(c')
        with a = w_x * x + w_h * h + bias                (* is a convolution, stride 1, same padding)
    Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes.

    Takes float64, float32, bfloat16 or float16; the pointwise maths and the cells are float32 if x has 16 bits. Under
    autocast x, h0 and the weights are cast to its dtype. It is fastest with x dense in the order T,B,H,W,C, which is
    how hs comes back, seen in the shape below.

    Args:
        x: input sequence (B,T,C_in,H,W); T, C_in, H, W >= 1. If x has a leading axis G, every argument and result has
            one: G calls in one.
        w_x: (4C,C_in,k,k), gate order i, f, o, g; k is 1, 3 or 5.
        w_h: (4C,C,k,k).
        bias: (4C,).
        h0: hidden state before the first frame (B,C,H,W); zero if None.
        c0: cell before the first frame (B,C,H,W), in x's dtype or float32; zero if None.
        backend: "auto" (by the table of `rlv2v.kernels.dispatch`; `explain` says which) or a name from `BACKENDS`.
        recompute: keep 6 instead of 14 bytes an element and step for the backward (16-bit dtypes), which then
            convolves x and all h once more.

    Returns:
        `hs, (h_T, c_T)`: hs (B,T,C,H,W), the last hidden state and the last cell (B,C,H,W); c_T is float32 if x has 16
        bits.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a backend that is unknown or cannot run this, or, in
            PyTorch's anomaly mode, an argument with a NaN or infinity; names it, what was expected and what came.
    """
    hs, cs = convlstm_cells(x, w_x, w_h, bias, h0, c0, backend=backend, recompute=recompute)
    time_axis = x.dim() - 4
    return hs, (hs.select(time_axis, -1), cs.select(time_axis, -1))


def convlstm_cells(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `convlstm` and return the state after every frame, to fork from: `hs, cs`, each (B,T,C,H,W)."""
    check_backend(backend)
    operands = prepare(x, w_x, w_h, bias, h0, c0)
    grouped = x.dim() == 6
    if not grouped:
        operands = Operands._make(None if tensor is None else tensor.unsqueeze(0) for tensor in operands)
    if backend == "reference":
        groups = zip(*([None] * len(operands.x) if tensor is None else tensor for tensor in operands), strict=True)
        hs, cs = (torch.stack(states) for states in zip(*(convlstm_ref(*group) for group in groups), strict=True))
    else:
        wants_gradient = any(tensor is not None and tensor.requires_grad for tensor in operands)
        keep_gates = not recompute and torch.is_grad_enabled() and wants_gradient
        operands = operands._replace(x=dense(operands.x.transpose(1, 2)))
        hs, cs, _ = torch.ops.rlv2v.convlstm(*operands, backend, keep_gates)
        hs, cs = hs.transpose(1, 2), cs.transpose(1, 2)
    return (hs, cs) if grouped else (hs.squeeze(0), cs.squeeze(0))


def explain(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None = None, c0: Tensor | None = None
) -> Selection:
    """Return which backend `backend="auto"` runs for these arguments, why, and why none of the others; print it.

    Raises:
        ValueError: as `convlstm`.
    """
    x, _, w_h, *_ = prepare(x, w_x, w_h, bias, h0, c0)
    if x.dim() == 5:
        x, w_h = x.unsqueeze(0), w_h.unsqueeze(0)
    return select(Problem.of(x.transpose(1, 2), w_h))


def prepare(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None) -> Operands:
    """Return the arguments, checked and cast as autocast wants them; c0 is cast to `state_dtype`."""
    x, h0 = autocast(x), None if h0 is None else autocast(h0)
    w_x, w_h, bias = map(autocast_weight, (w_x, w_h, bias))
    check_arguments(x, w_x, w_h, bias, h0, c0)
    return Operands(x, w_x, w_h, bias, h0, None if c0 is None else c0.to(state_dtype(x.dtype)))


def check_arguments(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None) -> None:
    """Raise ValueError for the first argument whose type, rank, shape, dtype or device does not fit the others."""
    arguments = {"x": x, "w_x": w_x, "w_h": w_h, "bias": bias, "h0": h0, "c0": c0}
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("h0", "c0")):
            raise ValueError(f"convlstm: {name} must be a tensor, got {type(tensor).__name__}")
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise ValueError(f"convlstm: {name} must be strided, got {tensor.layout}")
    if x.dtype not in LIMITS:
        raise ValueError(f"convlstm: x must be one of {[str(dtype) for dtype in LIMITS]}, got {x.dtype}")
    group = "G," if x.dim() == 6 else ""
    outer = tuple(x.shape[:1]) if group else ()
    if x.dim() not in (5, 6) or min(x.shape[-4:]) < 1 or 0 in outer:
        raise ValueError(f"convlstm: x must be ({group}B,T,C_in,H,W) with T, C_in, H, W >= 1, got {tuple(x.shape)}")
    kernels = w_h.shape[-2:]
    well_formed = w_h.dim() == len(outer) + 4 and w_h.shape[-4] == 4 * w_h.shape[-3] and w_h.shape[-3] >= 1
    if not well_formed or kernels not in ((1, 1), (3, 3), (5, 5)):
        raise ValueError(f"convlstm: w_h must be ({group}4C,C,k,k) with k 1, 3 or 5, got {tuple(w_h.shape)}")
    batch, _, c_in, height, width = x.shape[-5:]
    channels = w_h.shape[-3]
    expected = {"w_x": (4 * channels, c_in, *kernels), "w_h": w_h.shape[-4:], "bias": (4 * channels,)}
    expected |= dict.fromkeys(("h0", "c0"), (batch, channels, height, width))
    for name, shape in expected.items():
        tensor = arguments[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != (*outer, *shape):
            raise ValueError(f"convlstm: {name} must be {(*outer, *shape)}, got {tuple(tensor.shape)}")
        dtypes = {x.dtype, state_dtype(x.dtype)} if name == "c0" else {x.dtype}
        if tensor.dtype not in dtypes or tensor.device != x.device:
            raise ValueError(
                f"convlstm: {name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
            )
    # Dynamo can trace neither this call nor a branch on values.
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        for name, tensor in arguments.items():
            if tensor is not None and not tensor.isfinite().all():
                count = tensor.numel() - int(tensor.isfinite().sum())
                raise ValueError(f"convlstm: {name} must be finite in anomaly mode, got {count} values that are not")
